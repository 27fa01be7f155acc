"""Fine-tune the model through Microsoft Olive: check → evaluate → train → evaluate → report.

python finetuning/invoke_olive.py            the run that finetuning/olive-config.yaml describes
python finetuning/invoke_olive.py --check    only say whether it can work
python finetuning/invoke_olive.py --smoke    the same run on a tiny replica of the model, offline, in seconds

accelerate launch finetuning/invoke_olive.py trains on all GPUs of the machine; with --config_file finetuning/fsdp.yaml
it spreads one model over them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import logging
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "models"
EXAMPLES = 10
# set by accelerate launch and torchrun: which of the run's processes this is; the first one does all but training
RANK = int(os.environ.get("RANK", "0"))
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


def main() -> int:
    """Run the steps, and turn a user's mistake into one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check settings, data and machine; train nothing")
    parser.add_argument("--json", action="store_true", help="with --check: one JSON object on stdout, for programs")
    parser.add_argument("--smoke", action="store_true", help="run on a tiny replica of the model, offline")
    parser.add_argument("--fresh", action="store_true", help="start over instead of resuming")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    if (arguments.smoke or arguments.check) and PROCESSES > 1:  # the others would wait for a training for ever
        parser.error("--check and --smoke are for one process: python finetuning/invoke_olive.py --check")
    if arguments.json and not arguments.check:
        parser.error("--json goes with --check")
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]  # a pipe on Windows has another encoding
    os.chdir(ROOT)  # the paths in olive-config.yaml are relative to the workspace
    quiet()
    leave_out("torchmetrics")
    gc.disable()  # the imports make a million objects that stay: not worth looking through again and again
    try:
        return help_train() if RANK else run(arguments)
    except KeyboardInterrupt as stopped:
        if not RANK:
            print("\nStopped. The same command goes on from the newest checkpoint.", file=sys.stderr)
        return 128 + (stopped.args or (signal.SIGINT,))[0]
    except Exception as error:
        if arguments.debug:
            raise
        if arguments.json:
            print(json.dumps({"problem": explain(error)}))
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1


def explain(error: Exception) -> str:
    """Return what is wrong and what to do, in one sentence."""
    kinds = {kind.__name__ for kind in type(error).__mro__}  # by name, as importing their files takes long
    if kinds & {"ConfigError", "DataError", "ModelError"}:
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed in {sys.prefix}: run `python setup/create_env.py`, then use its Python."
    if "Timeout" in kinds:
        return "Another run is under way in this workspace: wait for its end, or stop it, then run this again."
    reason = (str(error).splitlines() or ["no reason given"])[0].rstrip(".: ")
    return f"Unforeseen: {reason}. Nothing that was there is lost; --debug shows where it happened."


def quiet() -> None:
    """Keep every library from calling home and from talking over the run. Olive sends nothing where CI is set."""
    os.environ.update(
        OLIVE_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_TELEMETRY="1", ORT_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1"
    )
    os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # `datasets` counts every file that it reads, also a local one
    for name, value in (
        ("CI", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TRANSFORMERS_VERBOSITY", "error"),
    ):
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for library in ("olive", "matplotlib"):
        logging.getLogger(library).setLevel(logging.ERROR)


def leave_out(package: str) -> None:
    """Let a stand-in take the place of a package that is imported and not used: a second less before the first step.

    Olive imports torchmetrics for its evaluators, and scipy and matplotlib with it; evaluate.py evaluates here.
    """
    sys.modules.setdefault(package, MagicMock(__spec__=importlib.util.find_spec(package)))


def run(arguments: argparse.Namespace) -> int:
    """Check the settings, the data and the machine, then tune, unless only the check is asked for."""
    import check
    import machine
    import preview
    import screen
    from estimate import Settings

    started = time.monotonic()
    results = MODELS / "smoke" if arguments.smoke else MODELS
    config = check.read_config()
    if arguments.check:
        return check_only(config, arguments.json)
    check.validate(config)
    if arguments.smoke:
        from smoke import shrink

        shrink(config, results)
    machine.refuse(config)
    rows = check.read_rows(config)
    screen.show("run", preview.run_facts(config))
    screen.show("rows", preview.row_facts(Settings.of(config), rows, len(rows["train"])))
    from filelock import FileLock

    results.mkdir(parents=True, exist_ok=True)
    with FileLock(results / ".lock", timeout=0):  # two runs at once would mix their checkpoints
        tune(config, rows, results, arguments.fresh, started)
    return 0


def help_train() -> int:
    """Train beside the first process of several, silently: that one does everything else."""
    from train import share, train

    with contextlib.redirect_stdout(None):
        train(*share())
    return 0


def check_only(config: dict[str, Any], as_json: bool) -> int:
    """Show what the run will do and need; 1 when it cannot work."""
    import preview
    import screen

    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        report = preview.preview(config, (lambda part, facts: None) if as_json else screen.show)
    if as_json:
        print(json.dumps(report))
    if report["problem"]:
        print(f"error: {report['problem']}", file=sys.stderr)
        return 1
    if not as_json:
        screen.verdict(report)
    return 0


def tune(config: dict[str, Any], rows: dict[str, list[Any]], results: Path, fresh: bool, started: float) -> None:
    """Evaluate, train, evaluate, report."""
    import check
    import screen
    from advice import explained
    from evaluate import evaluate
    from model_card import write_model_card
    from preview import settle
    from record import data_facts, describe, keep_logs, publish, use_folder
    from report import write_report
    from train import share, train

    gc.freeze()
    gc.enable()
    base = check.base_model(config)
    folder = str(base.folder)
    run_json = describe(config, rows, base.commit, results)
    # checkpoints of other settings, other data or another number of processes are never gone on from
    name = f"{run_json['config_sha256'][:8]}-{run_json['dataset_sha256'][:8]}-{PROCESSES}".removesuffix("-1")
    run_folder = results / "checkpoints" / name
    use_folder(config, folder)
    tokens = check.tokenise_rows(config, rows)
    estimated, line = settle(config, tokens)
    screen.show("memory", {"line": line})
    if fresh or (run_folder / "finished").exists():
        shutil.rmtree(run_folder, ignore_errors=True)  # the result of a finished run stands in models/adapter
    keep_logs(config, results / "logs")

    with explained(config, estimated):
        print(f"Evaluating {run_json['base_model']} on the held-out rows")
        before = evaluate(config, folder, None, rows["held_out"], tokens["held_out"])
        print(f"Training an adapter: {run_json['method']}")
        adapter, timings, losses = train(*share((config, tokens, run_folder)))
        print("Evaluating the tuned model on the same rows")
        after = evaluate(config, folder, adapter, rows["held_out"], tokens["held_out"])

    run_json["data"] = data_facts(config, rows, folder) | {"asked_rows": len(after.questions)}
    run_json["metrics"] = {"before": before.metrics, "after": after.metrics}
    run_json["examples"] = [
        {"question": row[-2]["content"], "expected": row[-1]["content"], "before": one, "after": other}
        for row, one, other in zip(after.questions, before.answers, after.answers, strict=True)
    ][:EXAMPLES]
    run_json["timings"] = timings | {"before": before.seconds, "after": after.seconds}
    run_json["seconds"] = round(time.monotonic() - started, 2)
    publish(run_json, adapter, folder, results)
    write_model_card(run_json, results / "adapter")
    report = write_report(run_json, losses, results / "report")
    (run_folder / "finished").touch()
    show(run_json, report.relative_to(ROOT))


def show(run_json: dict[str, Any], report: Path) -> None:
    """Print the metrics, some answers, and the next command."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    before, after = run_json["metrics"]["before"], run_json["metrics"]["after"]
    table = Table("held-out rows", "before", "after")
    table.add_row("exact answers", f"{before['accuracy']:.2%}", f"{after['accuracy']:.2%}")
    for name in ("eval_loss", "perplexity"):
        table.add_row(name.replace("_", " "), f"{before[name]:.4f}", f"{after[name]:.4f}")
    console.print(table)
    answers = Table("question", "expected", "before", "after")
    for example in run_json["examples"][:5]:
        answers.add_row(*(escape(example[key][:300]) for key in ("question", "expected", "before", "after")))
    console.print(answers)
    console.print(f"Done in {run_json['seconds']:.0f} s.")
    for what, where in (
        ("adapter", run_json["adapter"]),
        ("figures", report.parents[1] / "run.json"),
        ("report", report),
    ):
        console.print(f"  {what:8} {Path(where).as_posix()}", highlight=False)
    smoke = "smoke" in report.parts
    console.print(f"Next: python {'finetuning/invoke_olive.py' if smoke else 'inference/console_chat.py'}")


if __name__ == "__main__":
    sys.exit(main())
