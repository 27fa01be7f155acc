"""The plan on the console: a table for each part in a terminal, plain lines in a pipe."""

from __future__ import annotations

from typing import Any

from planning.facts import (
    AzureFacts,
    DataFacts,
    EstimateFacts,
    MachineFacts,
    ModelFacts,
    Plan,
    RowFacts,
    RunFacts,
)
from planning.memory import GIB
from preparing.problems import visible

Lines = list[tuple[str, str]]  # label and text

BARS = "▁▂▃▄▅▆▇█"
WORTH_SAYING = 1.5  # times as fast in bfloat16
OLD_PRICE = 90  # days after which the age of a price is said
PARTS = {
    "weights": "weights",
    "adapter": "adapter",
    "gradients_and_optimizer": "gradients and optimizer",
    "activations": "activations",
    "logits": "logits",
    "evaluation": "evaluations, beyond the training",
    "framework": "Python and libraries",
}


def show(part: str, facts: Any) -> None:
    """Print one part of the plan."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    lines = {
        "run": run_lines,
        "machine": machine_lines,
        "model": model_lines,
        "data": data_lines,
        "rows": row_lines,
        "memory": lambda facts: [("memory", facts["line"])],
        "estimate": estimate_lines,
        "azure": azure_lines,
    }[part](facts)
    lines = [(label, visible(text)) for label, text in lines]
    console = Console(highlight=False)
    if not console.is_terminal:
        for label, text in lines:
            print(f"{label:8} {text}", flush=True)
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=8, style="bold")
    table.add_column()
    for label, text in lines:
        table.add_row(label, escape(text))
    console.print(table)


def verdict(report: Plan) -> None:
    """Print that the run can work, and the next command."""
    model = report["model"]
    fits = "This run fits" if "estimate" in report else "Nothing speaks against this run, but its memory is not known"
    if model["folder"] is None and model["name"] != "models/demo":
        print(f"{fits}. Next: python setup/get_model.py")
    elif report.get("azure", {}).get("target") == "azure" and not report["machine"]["gpu"]:
        print("This run fits the chosen GPU in Azure.")
    else:
        print(f"{fits}. Next: python finetuning/invoke_olive.py")


def size(number: float) -> str:
    """Return bytes in GiB, small ones in MiB."""
    return f"{number / GIB:.2f} GiB" if number >= GIB / 10 else f"{number / 2**20:.1f} MiB"


def run_lines(facts: RunFacts) -> Lines:
    """Return the main settings of the run."""
    return [("model", facts["model"]), ("method", f"{facts['method']}, rank {facts['rank']}, {facts['dtype']}")]


def machine_lines(facts: MachineFacts) -> Lines:
    """Return device, memory and disk."""
    lines = [("device", f"CPU, {facts['cores']} cores")]
    if facts["gpu"]:
        count = f"{facts['gpus']} × " if facts["gpus"] > 1 else ""
        lines = [
            ("device", f"{count}{facts['gpu']}, driver {facts['driver'] or 'not known'}"),
            ("GPU memory", f"{size(facts['vram_free'])} of {size(facts['vram'])} free"),
        ]
    lines.append(("memory", f"{size(facts['ram_free'])} of {size(facts['ram'])} free"))
    return [*lines, ("disk", f"{size(facts['disk_free'])} free")]


def model_lines(facts: ModelFacts) -> Lines:
    """Return where the model is, and how large."""
    here = "on this machine"
    if facts["commit"] and facts["commit"] != facts["revision"]:
        here += f": {facts['revision'] or 'main'} is commit {facts['commit']} here, get_model.py looks for a newer one"
    if facts["folder"] is None:
        here = "is built by the run" if facts["name"] == "models/demo" else "not on this machine yet"
        if facts["download_bytes"]:
            here += f", a download of {size(facts['download_bytes'])}: python setup/get_model.py"
    if facts["parameters"] is None:
        return [("base", here), ("", "size and needs not known: the hub does not answer, or config.json is unusual")]
    text = f", {number(facts['text_parameters'])} of them in the text model" if facts["text_parameters"] else ""
    lines = [("base", f"{number(facts['parameters'])} parameters{text}, {here}")]
    if trained := facts["trained_parameters"]:
        share = f"{trained / (facts['text_parameters'] or facts['parameters']):.2%}"
        lines.append(("adapter", f"{number(trained)} parameters, {share} of the base"))
    if better := facts["replaced_by"]:
        change = f"copier update --trust --data model={better}"
        lines.append(("advice", f"this model is deprecated and stays valid; a better one: {change}"))
    if facts["no_int4"]:
        lines.append(("export", facts["no_int4"]))
    if not facts["own_template"]:
        lines.append(("template", "the model has no chat template: the one in setup/model.yaml is used"))
    return lines


def number(count: float) -> str:
    """Return a number in billions, millions or thousands."""
    for unit, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f}"


def data_lines(facts: DataFacts) -> Lines:
    """Return rows, tokens, what is cut, and the length of the run."""
    tokens, rows = facts["tokens"], facts["rows"]
    guess = ", estimated from characters" if facts["tokens_estimated"] else ""
    sample = f", of {facts['rows_counted']} rows" if facts["rows_counted"] < rows["train"] else ""
    highest = max(facts["histogram"].values())
    bars = "".join(BARS[-(-count * 8 // highest) - 1] if count else " " for count in facts["histogram"].values())
    cut = f"no row is longer than max_seq_len {facts['max_seq_len']}"
    if facts["truncated"]:
        cut = f"{facts['truncated']} rows are longer than max_seq_len {facts['max_seq_len']}"
        cut += f", {facts['without_answer']} of them lose their whole answer" if facts["without_answer"] else ""
    return [
        *row_lines(facts),
        (
            "tokens",
            f"a row has {tokens['min']} to {tokens['max']}, median {tokens['median']}, 95 % up to {tokens['p95']}"
            f"{guess}{sample}",
        ),
        ("", f"{tokens['min']} {bars} {tokens['max']}"),
        ("answers", f"{facts['answer_share']:.0%} of the tokens are trained on"),
        ("cut", cut),
    ]


def row_lines(facts: RowFacts) -> Lines:
    """Return rows and steps, and warnings about the rows."""
    rows, steps, batch, epochs = facts["rows"], facts["steps"], facts["rows_a_step"], facts["epochs"]
    length = f"{steps} steps of {batch} rows: {epochs} epochs"
    if facts["max_steps"] >= steps and facts["decided_by"] == "epochs":
        length += f" end the run before max_steps {facts['max_steps']}"
    if facts["decided_by"] == "max_steps":
        length = f"{steps} steps of {batch} rows: max_steps ends the run before its {epochs} epochs "
        length += f"({facts['steps_of_epochs']} steps)"
    return [
        ("data", f"{rows['train']} rows to train on, {rows['held_out']} held out"),
        ("length", length),
        *(
            [("", f"{learning} of them with a learning rate above 0")]
            if (learning := facts["learning_steps"]) < steps
            else []
        ),
        *(("", warning) for warning in facts["warnings"]),
    ]


def estimate_lines(facts: EstimateFacts) -> Lines:
    """Return memory, disk and time."""
    memory, disk = facts["memory"], facts["disk"]
    parts = " · ".join(f"{name} {size(memory[part])}" for part, name in PARTS.items() if memory[part])
    checkpointing = "on" if facts["gradient_checkpointing"] else "off"
    room = f" of {size(facts['memory_limit'])}" if facts["memory_limit"] else ""
    lines = [
        ("memory", f"about {size(memory['total'])}{room}, gradient checkpointing {checkpointing}"),
        ("", parts),
        (
            "disk",
            f"about {size(disk['run'])}: checkpoints {size(disk['checkpoints'])} · adapter {size(disk['adapter'])}",
        ),
        ("", f"later, if you want: merged {size(disk['merged_export'])}, ONNX from {size(disk['onnx_export'])}"),
    ]
    lines.append(("time", f"{duration(facts['seconds'])}, {facts['seconds_source']}".removeprefix(", ")))
    if (gain := facts["bfloat16_gain"]) and gain >= WORTH_SAYING:
        said = f"this processor multiplies bfloat16 {gain} times as fast as float32: torch_dtype: bfloat16"
        lines.append(("faster", f"{said} in olive-config.yaml"))
    return lines


def duration(seconds: float | None) -> str:
    """Return seconds in readable form."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 6000 else f"about {seconds / 3600:.1f} h"


def azure_lines(facts: AzureFacts) -> Lines:
    """Return the time and cost of the run on Azure GPUs, if relevant."""
    lines = []
    for gpu in facts["gpus"]:
        text = f"{gpu['name']}: "
        if gpu["memory"] > gpu["memory_limit"]:
            text += f"too small, {size(gpu['memory'])} are needed"
        else:
            text += f"{duration(gpu['hours'] * 3600)}, rough"
            if price := gpu["price"]:
                old = f", {gpu['price_days']} days ago" if (gpu["price_days"] or 0) > OLD_PRICE else ""
                text += (
                    f", {gpu['dollars']:.2f} $ ({price['usd_per_hour']:.2f} $ an hour in {price['region']}, "
                    f"{price['date']}{old}, {price['source'].split('/')[2]})"
                )
            else:
                text += ", price not known"
        lines.append(("chosen" if gpu["chosen"] else "Azure", text))
    return lines
