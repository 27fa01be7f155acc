"""Fine-tune the model through Microsoft Olive: check → evaluate → train → evaluate → report.

python finetuning/invoke_olive.py            the run that finetuning/olive-config.yaml describes
python finetuning/invoke_olive.py --check    only check whether the run can work
python finetuning/invoke_olive.py --smoke    the same run on a tiny replica of the model, offline, in seconds

accelerate launch finetuning/invoke_olive.py trains on all GPUs of the machine; with --config_file finetuning/fsdp.yaml
it spreads one model over them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # -P and PYTHONSAFEPATH leave it out
from preparing.problems import visible
from preparing.workspace import MODELS, ROOT
from settings.startup import explain, hide_gpus, leave_out, quiet
from training.processes import PROCESSES, RANK

if TYPE_CHECKING:
    from settings.run_settings import Settings

EXAMPLES = 10  # questions with their answers, kept in run.json


def main() -> int:
    """Run the steps, and report a user error in one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check settings, data and machine; train nothing")
    parser.add_argument("--json", action="store_true", help="with --check: one JSON object on stdout, for programs")
    parser.add_argument("--smoke", action="store_true", help="run on a tiny replica of the model, offline")
    parser.add_argument("--fresh", action="store_true", help="start over instead of resuming")
    parser.add_argument("--keep-worse", action="store_true", help="publish the adapter even if it made the model worse")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    if (arguments.smoke or arguments.check) and PROCESSES > 1:  # the others would wait forever for the training
        parser.error("--check and --smoke are for one process: python finetuning/invoke_olive.py --check")
    if arguments.json and not arguments.check:
        parser.error("--json goes with --check")
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]  # a pipe on Windows has another encoding
    os.chdir(ROOT)  # the paths in olive-config.yaml are relative to the workspace
    quiet()
    leave_out("torchmetrics")
    gc.disable()  # the imports create a million permanent objects, not worth scanning repeatedly
    try:
        return help_train() if RANK else run(arguments)
    except KeyboardInterrupt as stopped:
        if not RANK:
            print("\nStopped. The same command resumes from the newest checkpoint.", file=sys.stderr)
        return 128 + (stopped.args or (signal.SIGINT,))[0]
    except Exception as error:
        if arguments.debug:
            raise
        if arguments.json:
            print(json.dumps({"problem": explain(error)}))
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1


def run(arguments: argparse.Namespace) -> int:
    """Check the settings, the data and the machine; then tune, unless only the check is requested."""
    from filelock import FileLock

    from planning import hardware, show_plan
    from planning.plan import as_the_rows_are, read_rows, run_facts
    from settings.run_settings import read_settings
    from settings.validation import validate

    started = time.monotonic()
    results = MODELS / "smoke" if arguments.smoke else MODELS
    settings = read_settings()
    if not settings.gpu:
        hide_gpus()
    if arguments.check:
        return check_only(settings, arguments.json)
    validate(settings)
    if arguments.smoke:
        from training.smoke import shrink

        settings = shrink(settings, results)
    hardware.refuse(settings)
    rows = read_rows(settings)
    settings = as_the_rows_are(settings, rows["train"])
    show_plan.show("run", run_facts(settings))
    results.mkdir(parents=True, exist_ok=True)
    with FileLock(results / ".lock", timeout=0):  # two runs at once would mix their checkpoints
        tune(settings, rows, results, arguments, started)
    return 0


def help_train() -> int:
    """Take part in the training as one of several processes, silently: the first one does everything else."""
    from settings.run_settings import read_settings

    if not read_settings().gpu:
        hide_gpus()
    from training.processes import share
    from training.train import train

    with contextlib.redirect_stdout(None):
        train(*share())
    return 0


def check_only(settings: Settings, as_json: bool) -> int:
    """Show what the run will do and need. Returns 1 if it cannot work."""
    from planning import show_plan
    from planning.plan import plan

    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        report = plan(settings, (lambda part, facts: None) if as_json else show_plan.show)
    if as_json:
        print(json.dumps(report))
    if report["problem"]:
        print(f"error: {visible(report['problem'])}", file=sys.stderr)
        return 1
    if not as_json:
        show_plan.verdict(report)
    return 0


def tune(
    settings: Settings, rows: dict[str, list[Any]], results: Path, arguments: argparse.Namespace, started: float
) -> None:
    """Evaluate, train, evaluate, report. Raises ConfigError if the training made the model worse."""
    from planning import show_plan
    from planning.advice import explained
    from planning.fit import settle
    from planning.model_facts import base_model
    from planning.plan import row_facts
    from preparing.dataset import spread
    from preparing.tokenised import list_refused, tokenise_rows
    from preparing.tokens import load_tokenizer
    from reporting.evaluate import evaluate
    from reporting.model_card import write_model_card
    from reporting.report import write_report
    from reporting.run_record import asked, data_facts, describe, keep_logs, publish, refuse_worse, settings_as_used
    from reporting.show_results import show, show_figures
    from training.processes import share
    from training.sessions import Sessions
    from training.train import train

    gc.freeze()
    gc.enable()
    base = base_model(settings)
    run_json = describe(settings, rows, base.commit, results)
    # never resume from checkpoints of other settings, other data or another number of processes
    name = f"{run_json['config_sha256'][:8]}-{run_json['dataset_sha256'][:8]}-{PROCESSES}".removesuffix("-1")
    run_folder, folder = results / "checkpoints" / name, str(base.folder)
    settings = replace(settings, model_path=folder, revision=None)  # given an id, Olive would ask the hub
    over = arguments.fresh or (run_folder / "finished").exists()
    sessions = Sessions(run_folder, run_json["date"], started, over)
    run_json["date"] = sessions.date
    tokenizer = load_tokenizer(folder, run_json["date"])
    found = {part: tokenise_rows(tokenizer, rows[part], **vars(settings.data[part].tokens)) for part in rows}
    for part in found:
        list_refused(found[part].refused, rows[part])
        if cut := found[part].cut_in_words():
            print(cut)
    rows = {part: found[part].rows for part in found}
    tokens = {part: found[part].examples for part in found}
    settings, estimated, line = settle(settings, found)
    show_plan.show("rows", row_facts(settings, rows, len(tokens["train"])))
    show_plan.show("memory", {"line": line})
    if repeated := settings.repeated_rows(len(tokens["train"])):
        print(
            f"{repeated} rows are trained on twice in each epoch: the {PROCESSES} processes take equally many batches."
        )
    if over:
        shutil.rmtree(run_folder, ignore_errors=True)  # the result of a finished run is in models/adapter
    run_folder.mkdir(parents=True, exist_ok=True)
    sessions.note()
    keep_logs(settings, results / "logs")

    with explained(settings, estimated):
        print(f"Evaluating {run_json['base_model']} on the held-out rows")
        before = evaluate(settings, tokenizer, folder, None, rows["held_out"], tokens["held_out"])
        sessions.note(before=before.seconds)
        print(f"Training an adapter: {run_json['method']}")
        share((settings, tokens, run_folder))
        adapter, used, losses = train(settings, tokens, run_folder, sessions.note)
        print("Evaluating the tuned model on the same rows")
        after = evaluate(settings, tokenizer, folder, adapter, rows["held_out"], tokens["held_out"])

    sessions.note(after=after.seconds)
    run_json["config"] = settings_as_used(settings, run_json, used)
    run_json["data"] = data_facts(settings, rows, found["train"], tokenizer) | {"asked_rows": len(after.questions)}
    run_json["metrics"] = {"before": before.metrics, "after": after.metrics}
    examples = [
        {"question": asked(row), "expected": row[-1]["content"], "before": one, "after": other}
        for row, one, other in zip(after.questions, before.answers, after.answers, strict=True)
    ]
    run_json["examples"] = spread(examples, EXAMPLES)
    run_json["timings"], run_json["sessions"] = sessions.timings, len(sessions.all)
    run_json["seconds"] = round(sessions.total("seconds"), 2)
    show_figures(run_json)
    if not (settings.smoke or arguments.keep_worse):
        refuse_worse(run_json, adapter, results)
    publish(run_json, adapter, folder, results)
    write_model_card(run_json, results / "adapter")
    report = write_report(run_json, losses, results / "report")
    (run_folder / "finished").touch()
    show(run_json, report.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main())
