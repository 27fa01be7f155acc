"""The report of a run: models/report/index.html, which needs no network, and its plot loss.png."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from preparing.problems import visible
from reporting.run_record import RunRecord, interval_in_words, published

TEMPLATE = Path(__file__).with_name("report.html")
# background, text, training, held out: colour-blind readers can tell the curves apart
LIGHT = ("#ffffff", "#333333", "#0072b2", "#d55e00")
DARK = ("#1b1e24", "#d8dbe0", "#56b4e9", "#e69f00")
NAMES = {  # readable names for the keys of run.json
    "source": "rows from",
    "held_out_source": "held-out rows from",
    "train_rows": "rows to train on",
    "held_out_rows": "rows held out",
    "tokens": "tokens trained on, each epoch",
    "answer_share": "share of answer tokens",
    "cut_rows": "rows cut at max_seq_len",
    "left_out_rows": "rows left out: their answer was cut off",
    "set_aside_rows": "rows rejected, listed next to the data",
    "repeated_rows": "rows that each epoch takes twice: the processes train on equally many",
    "duplicate_rows": "rows that repeat another",
    "held_out_rows_trained_on": "held-out rows trained on too",
    "asked_rows": "held-out rows asked",
    "sha256": "SHA-256 of the rows",
    "start_to_first_step": "start to first step",
    "before": "evaluation before",
    "after": "evaluation after",
}
PATHS = ("base_model", "model_path", "train_file", "held_out_file", "source", "held_out_source")
SHOWN_ELSEWHERE = ("config", "data", "metrics", "timings")


def write_report(run: RunRecord, history: list[dict[str, float]], folder: Path) -> Path:
    """Write index.html and loss.png to a folder, replacing earlier ones, and return the page's path.

    `run` is the content of run.json; `history` is the Trainer's log: dicts with `step` and `loss` or `eval_loss`.
    """
    from jinja2 import Environment, StrictUndefined

    training, held_out = curve(history, "loss"), curve(history, "eval_loss")
    of = evaluated(run)
    plots = [loss_plot(training, held_out, f"held-out{of}", colours) for colours in (LIGHT, DARK)]
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=plain
    )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        run=run,
        base_model=published(run["base_model"]),
        metrics=metrics(run),
        facts=facts(run),
        settings=settings(run),
        light_plot=base64.b64encode(plots[0]).decode(),
        dark_plot=base64.b64encode(plots[1]).decode(),
        plot_in_words=f"{in_words('Training loss', training)} {in_words(f'Held-out loss{of}', held_out)}",
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("loss.png", plots[0]), ("index.html", page.encode())):
        unfinished = folder / f".{name}.new"
        unfinished.write_bytes(content)
        unfinished.replace(folder / name)
    return folder / "index.html"


def plain(value: Any) -> Any:
    """Return a value of the page or the card without control characters; what is escaped already as it is."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def metrics(run: RunRecord) -> list[dict[str, str]]:
    """Return the rows of the before/after table."""
    before, after = run["metrics"]["before"], run["metrics"]["after"]
    rows: list[tuple[str, Callable[[dict[str, Any]], str], str]] = [
        ("Loss", lambda one: f"{one['eval_loss']:.4f}", "lower is better"),
        ("Perplexity", lambda one: f"{one['perplexity']:.2f}", "lower is better"),
    ]
    if run["examples"]:  # without questions there is no accuracy
        rows.insert(0, ("Exact answers", lambda one: f"{one['accuracy']:.1%}", "higher is better"))
        rows.insert(1, ("95 % confidence interval", interval_in_words, "narrower with more held-out rows"))
    return [{"name": name, "before": form(before), "after": form(after), "hint": hint} for name, form, hint in rows]


def facts(run: RunRecord) -> dict[str, dict[str, str]]:
    """Return the other facts of run.json as tables by title: its groups of values, then single values."""
    timings = dict(run["timings"])
    speed = timings.pop("tokens_per_second", None)
    groups = {
        "data": {**run.get("data", {}), "sha256": run["dataset_sha256"]},
        "time": {name: duration(seconds) for name, seconds in {"total": run["seconds"], **timings}.items()}
        | {"tokens a second, in training": speed},
        **{name: group for name, group in run.items() if isinstance(group, dict) and name not in SHOWN_ELSEWHERE},
        "run": {
            name: value
            for name, value in run.items()
            if not isinstance(value, dict | list) and name not in ("dataset_sha256", "seconds")
        },
    }
    return {title: table(group) for title, group in groups.items()}


def settings(run: RunRecord) -> dict[str, dict[str, str]]:
    """Return the settings by group, named as in olive-config.yaml."""
    return {
        title: {name: in_text(bare(name, value)) for name, value in group.items()}
        for title, group in run.get("config", {}).items()
    }


def table(group: dict[str, Any]) -> dict[str, str]:
    """Return the names and values of a group in readable form."""
    return {
        NAMES.get(name, name.replace("_", " ")): f"{value:.1%}"
        if name.endswith("_share")
        else in_text(bare(name, value))
        for name, value in group.items()
    }


def bare(name: str, value: Any) -> Any:
    """Return a value without folders of this machine, if its name is that of a path, or of several."""
    if name not in PATHS or not value:
        return value
    return [published(path) for path in value] if isinstance(value, list) else published(value)


def duration(seconds: float) -> str:
    """Return a time in readable form: 31.4 s, or hours, minutes and seconds."""
    return f"{seconds:.4g} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))


def in_text(value: Any) -> str:
    """Return one value in readable form."""
    if value is None or value in ("", []):
        return "–"
    if isinstance(value, dict):
        return ", ".join(f"{name} {in_text(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(in_text, value))
    if isinstance(value, bool):
        return "true" if value else "false"  # as in olive-config.yaml
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def curve(history: list[dict[str, float]], key: str) -> list[tuple[float, float]]:
    """Return (step, value) for every entry of the Trainer's log that has the key."""
    return [(entry["step"], float(entry[key])) for entry in history if key in entry]


def evaluated(run: RunRecord) -> str:
    """Return in parentheses how many held-out rows the evaluations in the training read, or nothing if all."""
    rows, all_rows = run["config"]["training"]["eval_rows"], run["data"]["held_out_rows"]
    return "" if rows >= all_rows else f" ({rows} of {all_rows} rows)"


def in_words(name: str, points: list[tuple[float, float]]) -> str:
    """Describe a curve in text, for screen readers."""
    if not points:
        return f"{name}: not reported."
    (first, start), (last, end) = points[0], points[-1]
    return f"{name}: {start:.3f} at step {first:.0f}, {end:.3f} at step {last:.0f}."


def loss_plot(
    training: list[tuple[float, float]],
    held_out: list[tuple[float, float]],
    held_out_label: str,
    colours: tuple[str, str, str, str],
) -> bytes:
    """Draw the losses over the steps. Returns a PNG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot, which looks for a display

    background, ink, blue, orange = colours
    with rc_context(
        {"font.size": 11, "text.color": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink}
    ):
        figure = Figure(figsize=(5.6, 3.2), dpi=200, facecolor=background, layout="constrained")
        axes = figure.add_subplot(facecolor=background, xlabel="step", ylabel="loss")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(ink)
        axes.grid(axis="y", alpha=0.25)
        if training:
            axes.plot(*zip(*training, strict=True), color=blue, linewidth=1.5, label="training")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o--", color=orange, markersize=5, label=held_out_label)
            step, lowest = min(held_out, key=lambda point: point[1])
            axes.plot(step, lowest, "o", color=orange, markersize=12, fillstyle="none", label=f"lowest: {lowest:.3f}")
        if training or held_out:
            axes.legend(frameon=False)
        png = io.BytesIO()
        figure.savefig(png, format="png", facecolor=background)
    return png.getvalue()
