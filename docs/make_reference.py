"""Write docs/reference/ from copier.yml and catalog/; with --check only say whether it is current."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
TYPES = {"str": "text", "int": "whole number", "float": "number", "bool": "yes or no"}
MADE = "<!-- Made by `make docs` from {}; do not edit. -->\n"
CHOSEN_BY = {
    "model": "an id of [the models](models.md)",
    "azure_gpu": "an id of [the Azure GPUs](models.md#azure-gpus)",
    "azure_location": "a region of [the chosen GPU](models.md#azure-gpus)",
}


def main() -> int:
    """Write the pages, or compare them with what they should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is stale")
    check = parser.parse_args().check
    stale = []
    for path, text in {REFERENCE / "questions.md": questions_page(), REFERENCE / "models.md": models_page()}.items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path.relative_to(ROOT).as_posix())
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".new")
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(path)
    if check and stale:
        print(f"{' and '.join(stale)}: not what copier.yml and catalog/ say; run `make docs`.", file=sys.stderr)
        return 1
    print(f"{'Written: ' + ', '.join(stale) if stale else 'The reference is current.'}")
    return 0


# ------------------------------------------------------------------------------------------------- The questions


def questions_page() -> str:
    """Return the page of questions, in the sections and the order of copier.yml."""
    source = (ROOT / "copier.yml").read_text(encoding="utf-8")
    questions = {name: details for name, details in yaml.safe_load(source).items() if is_question(name, details)}
    pages = [
        MADE.format("copier.yml"),
        "# The questions\n",
        "Answer at the prompt, or on the command line with `-d name=value`. A question that is not asked takes its",
        "default. Defaults and conditions stand here as `copier.yml` has them: `model` in one of them is the answer to",
        "the question `model`. A default that depends on other answers follows them when these change, until you give",
        "an answer of your own.\n",
    ]
    for section, names in sections(source):
        asked = [name for name in names if name in questions]
        if asked:
            pages.append(f"## {section}\n")
            pages += [question(name, questions[name]) for name in asked]
    return "\n".join(pages)


def is_question(name: str, details: Any) -> bool:
    """Tell a question from a setting of Copier and from a value computed for the templates."""
    return not name.startswith("_") and details.get("when") is not False and not details.get("secret")


def sections(source: str) -> list[tuple[str, list[str]]]:
    """Return the titles of the ruled comment lines of copier.yml, each with the names that stand below it."""
    found: list[tuple[str, list[str]]] = [("Settings", [])]
    for line in source.splitlines():
        if title := re.match(r"# -{8,} (.+)", line):
            found.append((title[1], []))
        elif name := re.match(r"([a-z]\w*):", line):
            found[-1][1].append(name[1])
    return found


def question(name: str, details: dict[str, Any]) -> str:
    """Return one question: its meaning, and what may be answered."""
    facts = {"Type": TYPES[details["type"]], "Choices": choices(name, details), "Range": range_of(details)}
    facts |= {"Default": default(details["default"]), "Asked": asked(details)}
    lines = [f"### `{name}`\n", plain(details["help"]), ""]
    lines += [f"- {title}:{'' if fact[0] == chr(10) else ' '}{fact}" for title, fact in facts.items() if fact]
    return "\n".join(lines) + "\n"


def choices(name: str, details: dict[str, Any]) -> str:
    """Return the values that may be chosen, what each means, and when it is refused."""
    if name in CHOSEN_BY:
        return CHOSEN_BY[name]
    written = details.get("choices", {})
    if isinstance(written, list):
        return ", ".join(f"`{value}`" for value in written)
    lines = []
    for label, choice in written.items():
        value, refused = (choice["value"], choice["validator"]) if isinstance(choice, dict) else (choice, "")
        line = f"  - `{value}`: {label.removeprefix(f'{value}: ')}"
        if reason := re.fullmatch(r"\{% if (.+?) %\}(.+)\{% endif %\}", refused):
            line += f" (refused when {code(reason[1])}: {reason[2]})"
        lines.append(line)
    return "\n" + "\n".join(lines) if lines else ""


def range_of(details: dict[str, Any]) -> str:
    """Return what the validator names as the range, as in `1 to 100: type 3`."""
    limits = re.search(r"(\d[\d.]* to .+?): type", details.get("validator", ""))
    return limits[1].replace("{{ context }}", "the model's context") if limits else ""


def default(value: Any) -> str:
    """Return a default as it is written."""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    written = " ".join(str(value).split())
    if "UNSET" in written:
        return "none; an answer is needed"
    if name := re.fullmatch(r"\{\{ defaults\.(\w+) \}\}", written):  # they stand together in copier.yml
        together = yaml.safe_load((ROOT / "copier.yml").read_text(encoding="utf-8"))["defaults"]["default"]
        [expression] = re.findall(rf"'{name[1]}': (.+?)(?:,(?= ')| \}})", " ".join(together.split()))
        written = f"{{{{ {expression} }}}}".replace("demo", "model == 'demo'").replace("t4", "azure_gpu is a T4")
    return code(written) if written else "empty"


def asked(details: dict[str, Any]) -> str:
    """Return when the question is asked. `advanced or name is defined` only keeps a default out of the answers file."""
    condition = re.sub(r"advanced or \w+ is defined", "", str(details.get("when", "")).strip("{} "))
    when = [f"when {code(condition)}"] if condition else []
    ask = str(details.get("ask", ""))
    if ask == "False":
        return " ".join(["never; change it with `-d`", *when])
    return " and ".join([*when, *(["when `advanced`"] if "advanced" in ask else [])]) or "always"


def plain(text: str) -> str:
    """Return a help text without Jinja: a name stays a name, one of two values is both, all else is an ellipsis."""
    text = re.sub(r"(?<=\w)\n\s*(?=[A-Z])", ". ", re.sub(r"\{%.*?%\}", "", text))
    text = " ".join(text.split())
    text = re.sub(r"\{\{ (\w+) if .+? else (\w+) \}\}", r"\1 or \2", text)
    text = re.sub(r"\{\{ (\w+) \}\}", r"‹\1›", text)
    return re.sub(r"\{\{.+?\}\}", "…", text)


def code(text: str) -> str:
    """Return text as inline code."""
    return f"`{text}`"


# --------------------------------------------------------------------------------------------------- The catalogue


def models_page() -> str:
    """Return the page of models and Azure GPUs."""
    models = catalogue("models.yml")["models"]
    gpus = catalogue("azure_gpus.yml")["gpus"]
    return "\n".join(
        [
            MADE.format("catalog/"),
            "# The models\n",
            "What `-d model=…` takes. The download is two bytes for each parameter. «Gated»: the hub wants a log-in",
            "and an accepted licence first. Every model is used at the revision that stands here, and no newer one.\n",
            "| id | model | licence | parameters | download | gated | context, tokens | revision | source |",
            "|---|---|---|--:|--:|---|--:|---|---|",
            *(model_row(model) for model in models if not model["deprecated"]),
            *deprecated(models),
            "",
            "## Azure GPUs\n",
            "What `-d azure_gpu=…` takes. A serverless GPU is billed while a job runs, a dedicated one as long as it",
            "is held; both need a quota. Prices are US dollars for an hour of the whole profile, with the day they",
            "were read. Regions change: [Azure's list]"
            "(https://learn.microsoft.com/azure/container-apps/gpu-serverless-overview) is the newest.\n",
            "| id | GPU | profile | vCPU | memory | GPU memory | bfloat16 | price per hour | regions |",
            "|---|---|---|--:|--:|--:|---|---|---|",
            *map(gpu_row, gpus),
            "",
        ]
    )


def catalogue(name: str) -> Any:
    """Read a file of the catalogue."""
    return yaml.safe_load((ROOT / "catalog" / name).read_text(encoding="utf-8"))


def model_row(model: dict[str, Any]) -> str:
    """Return a model as a row of the table; a fact that does not exist is a dash."""
    parameters, revision, hub = model["parameters"], model["revision"], f"https://huggingface.co/{model['hub_id']}"
    from_hub = bool(revision)
    return row(
        code(model["id"]),
        f"[{model['name']}]({hub})" if from_hub else model["name"],
        f"[{model['licence']}]({model['licence_url']})" if model["licence"] else "–",
        size(parameters) if parameters else "–",
        f"{parameters * 2 / 10**9:.1f} GB" if from_hub else "–",
        {True: "yes", False: "no", None: "–"}[model["gated"]],
        f"{model['context']:,}" if model["context"] else "–",
        f"[`{revision[:12]}`]({hub}/tree/{revision})" if revision else "–",
        f"[config]({model['source']})" if model["source"] else "–",
    )


def size(parameters: int) -> str:
    """Return a number of parameters in billions or millions."""
    return f"{parameters / 10**9:.1f} B" if parameters >= 10**8 else f"{parameters / 10**6:.1f} M"


def deprecated(models: list[dict[str, Any]]) -> list[str]:
    """Return the models that are kept for the workspaces that have them, and what to use instead."""
    old = [model for model in models if model["deprecated"]]
    lines = [f"- `{model['id']}`: better `{model['replaced_by']}`" for model in old]
    return ["", "Deprecated, and kept for the workspaces that use them:\n", *lines] if lines else []


def gpu_row(gpu: dict[str, Any]) -> str:
    """Return a GPU as a row of the table."""
    price = gpu["price"]
    return row(
        code(gpu["id"]),
        gpu["name"],
        code(gpu["profile"]),
        gpu["vcpu"],
        f"{gpu['memory_gib']} GiB",
        f"{gpu['gpus']} × {gpu['gpu_memory_gib']} GB",
        "yes" if gpu["bf16"] else "no",
        f"[{price['usd_per_hour']:.2f}]({price['source']}), {price['date']}" if price else "not verified",
        ", ".join(gpu["regions"] or ["–"]),
    )


def row(*cells: Any) -> str:
    """Return cells as a row of a Markdown table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
