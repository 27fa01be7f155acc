"""Build the documentation's site from README.md, CHANGELOG.md and docs/ into site/; run it with `make site`.

The pages keep the places that they have in the repository, so that one link works here and there. What is added: the
navigation, a list of the decisions, and the configurator with the questions of copier.yml.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from configurator import transpile
from make_reference import is_question, sections

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
STAGE = ROOT / ".cache" / "site-pages"
PAGES = STAGE / "pages"
SITE = ROOT / "site"
# What belongs to the site, outside docs/.
OUTSIDE = {"README.md": "README.md", "CHANGELOG.md": "CHANGELOG.md", "LICENSE": "LICENSE.txt"}
OUTSIDE["SECURITY.md"] = "SECURITY.md"
OUTSIDE["benchmarks/README.md"] = "benchmarks/README.md"
SECTIONS = {"Tutorial": "tutorial", "How-to": "how-to", "Reference": "reference", "Decisions": "decisions"}
KINDS = (".md", ".png", ".svg", ".css")
# Pages that need the width of what stands beside others.
WIDE = {"docs/configurator/index.md": ["navigation", "toc"], "docs/reference/models.md": ["toc"]}
# What the page needs of a question; each may be a template.
TEMPLATES = ("default", "when", "ask", "help", "placeholder", "validator")


def main() -> int:
    """Stage the pages, and let zensical build them."""
    shutil.rmtree(STAGE, ignore_errors=True)
    try:
        stage()
        configurator()
    except transpile.UnknownError as error:
        print(f"make_site: {error}: docs/configurator/transpile.py does not know it; teach it", file=sys.stderr)
        return 1
    config = (DOCS / "zensical.toml").read_text(encoding="utf-8")
    config = config.replace("[project]\n", f"[project]\nnav = {toml(navigation())}\n", 1)
    (STAGE / "zensical.toml").write_text(config, encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(STAGE / "zensical.toml")]
    done = subprocess.run(command, cwd=STAGE, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        warnings = done.stderr.split("Traceback (most recent call last)")[0]
        print(f"make_site: zensical refuses the pages:\n{warnings}", file=sys.stderr)
        return 1
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(STAGE / "site", SITE)
    print(f"Written: {SITE.relative_to(ROOT)}/index.html and {len(list(SITE.rglob('*.html'))) - 1} more pages")
    print(f"The search needs a server: python -m http.server --bind 127.0.0.1 --directory {SITE.relative_to(ROOT)}")
    return 0


# ------------------------------------------------------------------------------------------------------- The pages


def stage() -> None:
    """Copy what the site shows, each at its place."""
    for path in DOCS.rglob("*"):
        is_shown = DOCS / "example" not in path.parents or path == DOCS / "example" / "README.md"
        if path.suffix in KINDS and path.is_file() and is_shown:
            copy(path, PAGES / path.relative_to(ROOT))
    for name, target in OUTSIDE.items():
        copy(ROOT / name, PAGES / target)
    titles = "\n".join(f"- [{title(path)}]({path.name})" for path in pages("decisions"))
    text = f"# Decisions\n\nWhy it is built this way: the context, the decision, and what follows.\n\n{titles}\n"
    (PAGES / "docs/decisions/index.md").write_text(text, encoding="utf-8")


def copy(source: Path, target: Path) -> None:
    """Copy a file. In a page, a link to a folder leads to its list, one to the licence to the text."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix != ".md":
        shutil.copyfile(source, target)
        return
    text = source.read_text(encoding="utf-8")
    text = re.sub(r"\]\(([\w./-]+/)\)", r"](\1index.md)", text)
    if hidden := WIDE.get(source.relative_to(ROOT).as_posix()):
        text = f"---\nhide: {json.dumps(hidden)}\n---\n\n{text}"
    target.write_text(re.sub(r"\]\(((?:\.\./)*LICENSE)\)", r"](\1.txt)", text), encoding="utf-8")


def pages(folder: str) -> list[Path]:
    """Return the pages of a section: the decisions by their numbers, all else by title."""
    found = (DOCS / folder).glob("*.md")
    return sorted(found, key=lambda path: path.name if folder == "decisions" else title(path).lower())


def title(path: Path) -> str:
    """Return a page's title for the navigation: its heading, without what the section says already."""
    heading = re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert heading, path
    short = heading[1].removeprefix("How to ").removeprefix("The ")
    return short[:1].upper() + short[1:]


def navigation() -> list[dict[str, Any]]:
    """Return the navigation, by Diátaxis."""
    found: list[dict[str, Any]] = [{"Home": "README.md"}, {"Configurator": "docs/configurator/index.md"}]
    for name, folder in SECTIONS.items():
        entries: list[Any] = [{title(path): path.relative_to(ROOT).as_posix()} for path in pages(folder)]
        if name == "Reference":
            entries.append({"Benchmarks": "benchmarks/README.md"})
        found.append({name: ["docs/decisions/index.md", *entries] if name == "Decisions" else entries})
    return [*found, {"Changelog": "CHANGELOG.md"}, {"Security": "SECURITY.md"}]


def toml(value: Any) -> str:
    """Return lists, tables and texts as TOML, in one line."""
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{json.dumps(name)} = {toml(item)}' for name, item in value.items())} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------ The configurator


def configurator() -> None:
    """Write the script with the questions, and let the page load it: a page in a repository has no scripts."""
    script = (DOCS / "configurator" / "configurator.js").read_text(encoding="utf-8")
    folder = PAGES / "docs" / "configurator"
    (folder / "configurator.js").write_text(f"{script}\n{questionnaire()}", encoding="utf-8")
    with (folder / "index.md").open("a", encoding="utf-8") as page:
        page.write('\n<link rel="stylesheet" href="configurator.css">\n<script src="configurator.js" defer></script>\n')


def questionnaire() -> str:
    """Return the questions of copier.yml and what they take from the catalogue as JavaScript."""
    source = (ROOT / "copier.yml").read_text(encoding="utf-8")
    entries = {name: details for name, details in yaml.safe_load(source).items() if not name.startswith("_")}
    titles = {name: section for section, names in sections(source) for name in names}
    used = transpile.used_names([text for details in entries.values() for text in texts(details)])
    included = {
        path.relative_to(ROOT).as_posix(): pruned(yaml.safe_load(path.read_text(encoding="utf-8")), used)
        for path in sorted((ROOT / "catalog").glob("*.yml"))
        if path.relative_to(ROOT).as_posix() in source
    }
    lines = [f"  {question(name, details, titles[name])}," for name, details in entries.items()]
    catalogue = json.dumps(included, ensure_ascii=False, separators=(",", ":"))
    return "\n".join(["start([", *lines, f"], {catalogue});", ""])


def question(name: str, details: dict[str, Any], section: str) -> str:
    """Return one question as a JavaScript object."""
    try:
        fields = {"name": js(name), "type": js(details["type"]), "section": js(section)}
        fields["shown"] = js(is_question(name, details))
        fields["secret"] = js(bool(details.get("secret")))
        fields["machine"] = js("_copier_conf" in str(details["default"]))
        fields |= {field: js(details[field]) for field in TEMPLATES if field in details}
        if "choices" in details:
            fields["choices"] = choices(details["choices"])
    except transpile.UnknownError as error:
        raise transpile.UnknownError(f"copier.yml, {name}: {error}") from error
    return f"{{ {', '.join(f'{field}: {value}' for field, value in fields.items())} }}"


def choices(written: Any) -> str:
    """Return choices: a template that gives YAML, or a list of label, value and validator."""
    if isinstance(written, str):
        return js(written)
    rows = written.items() if isinstance(written, dict) else [(value, value) for value in written]
    full = [(label, value if isinstance(value, dict) else {"value": value}) for label, value in rows]
    parts = [[label, choice["value"], choice.get("validator", "")] for label, choice in full]
    return f"[{', '.join('[' + ', '.join(map(js, part)) + ']' for part in parts)}]"


def js(value: Any) -> str:
    """Return a value as JavaScript, a text as a template."""
    return transpile.function(value) if isinstance(value, str) else json.dumps(value)


def texts(value: Any) -> list[str]:
    """Return all texts in a value."""
    if isinstance(value, dict):
        return [text for item in value.items() for part in item for text in texts(part)]
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    return [value] if isinstance(value, str) else []


def pruned(value: Any, used: set[str]) -> Any:
    """Return a part of the catalogue with the keys that the questions read."""
    if isinstance(value, dict):
        return {key: pruned(item, used) for key, item in value.items() if key in used}
    return [pruned(item, used) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
