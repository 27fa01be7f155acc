"""Reporting to other tools during a run: what is refused, what is written, and where."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from conftest import REPOSITORY, Run

TENSORBOARD = REPOSITORY / ".cache" / "tensorboard"
Invoke = Callable[..., Run]


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Take back what a run sets for the packages, and what this machine sets for them."""
    with patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith(("TENSORBOARD_", "MLFLOW_", "WANDB_", "TRACKIO_"))]:
            del os.environ[name]
        yield


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make TensorBoard importable: it is next to the environment, because the locks do not have it."""
    if not (TENSORBOARD / "tensorboard").is_dir():
        pytest.skip("tensorboard is not in .cache: `make test` puts it there")
    monkeypatch.syspath_prepend(TENSORBOARD)


def settings_with(report_to: object) -> Any:
    from settings.config_file import read_file, the_pass
    from settings.run_settings import Settings

    config = read_file()
    the_pass(config)["training_args"]["report_to"] = report_to
    return Settings.of(config)


@pytest.mark.parametrize("names", ["mlflow", "wandb", "trackio", ["trackio", "wandb"]])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    invoke: Invoke, workspace: Path, names: str | list[str]
) -> None:
    import shlex
    import sys

    name = names if isinstance(names, str) else names[0]
    lines = (workspace / "finetuning" / "olive-config.yaml").read_text(encoding="utf-8").splitlines()
    line = next(number for number, text in enumerate(lines, start=1) if "report_to" in text)
    for arguments in ((), ("--check",)):
        run = invoke(*arguments, settings={"report_to": names})
        assert run.status == 1
        assert run.err == (
            f"error: olive-config.yaml, line {line}: training_args.report_to needs {name}, which is not installed: "
            f"run `{shlex.quote(sys.executable)} -m pip install {name}`, or set report_to: none.\n"
        )


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("all", "is all: name what you want"),
        (["all"], "is all: name what you want"),
        ("comet_ml", "is 'comet_ml': choose none, or one or some of tensorboard, mlflow, wandb, trackio"),
        (["none", "wandb"], "choose none"),
        (None, "is None: choose none"),
        (3, "is 3: choose none"),
        ({"wandb": True}, "choose none"),
    ],
)
def test_unsupported_values_are_refused(workspace: Path, value: object, words: str) -> None:
    from settings.config_file import CONFIG, ConfigError
    from settings.validation import check_report_to

    with pytest.raises(ConfigError) as refused:
        check_report_to(settings_with(value), CONFIG)
    assert words in str(refused.value)
    assert str(refused.value).startswith("olive-config.yaml, line ")


@pytest.mark.parametrize("value", ["none", []])
def test_a_run_that_reports_to_nothing_needs_nothing_and_leaves_nothing(
    workspace: Path, tmp_path: Path, value: object
) -> None:
    from reporting.run_record import keep_logs
    from settings.config_file import CONFIG
    from settings.validation import check_report_to

    check_report_to(settings_with(value), CONFIG)
    before = dict(os.environ)
    keep_logs(settings_with(value), tmp_path / "logs")
    assert dict(os.environ) == before
    assert not (tmp_path / "logs").exists()


def test_logs_are_stored_with_the_results_unless_the_environment_says_otherwise(workspace: Path) -> None:
    from reporting.run_record import keep_logs

    logs = workspace / "models" / "logs"
    os.environ["WANDB_DIR"] = "/somewhere/else"
    before = dict(os.environ)
    keep_logs(settings_with("mlflow"), logs)
    new = {name: value for name, value in os.environ.items() if before.get(name) != value}
    places = {name: value for name, value in new.items() if name.endswith("DIR")}
    assert set(places) == {"TENSORBOARD_LOGGING_DIR", "TRACKIO_DIR", "WANDB_CACHE_DIR"}
    assert all(Path(place).is_relative_to(logs) for place in places.values())
    assert new["MLFLOW_TRACKING_URI"] == "sqlite:///models/logs/mlflow.db"
    assert os.environ["WANDB_DIR"] == "/somewhere/else"
    assert new["WANDB_CONSOLE"] == "off"  # it would send what the run prints: questions and answers


def test_tensorboard_gets_the_losses_of_the_run(invoke: Invoke, workspace: Path, tensorboard: None) -> None:
    run = invoke("--fresh", settings={"max_steps": 10, "report_to": ["tensorboard"], "eval_rows": 1000})
    assert run.status == 0, run.err
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (file,) = (workspace / "models" / "logs" / "tensorboard").rglob("events.out.*")
    values: dict[str, dict[int, float]] = {}
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            values.setdefault(value.tag, {})[event.step] = sum(value.tensor.float_val)
    assert sorted(values["eval/loss"]) == sorted(values["train/loss"]) == list(range(1, 11))
    best = min(values["eval/loss"].values())
    assert run.json["metrics"]["after"]["eval_loss"] == pytest.approx(best, abs=2e-3)
    assert [path.name for path in (workspace / "models" / "logs").iterdir()] == ["tensorboard"]


def test_the_smoke_run_reports_to_nobody_and_says_so(invoke: Invoke, workspace: Path, tensorboard: None) -> None:
    run = invoke("--smoke", settings={"report_to": "tensorboard"})
    assert run.status == 0, run.err
    assert "The smoke run reports only to models/smoke/report" in run.out
    assert not (workspace / "models" / "smoke" / "logs").exists()
