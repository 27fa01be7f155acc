"""Every command of a workspace turns off the telemetry of its libraries, in one module, before it imports any of them.

tests/workspace/test_demo.py watches the processes from outside, and shows that this is enough.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TEMPLATE = Path(__file__).resolve().parents[2] / "template"
# These import the standard library alone, and start git, copier, uv, pip, conda or az. az has its own, in infra/az.py.
WITHOUT_LIBRARIES = {"infra/azure.py", "infra/seal.py", "setup/create_env.py", "setup/drift.py", "setup/undo_update.py"}
# At the end of the process: what it would have passed to a library, and to a process that it starts.
SITECUSTOMIZE = """
import atexit, json, os
atexit.register(lambda: open(os.environ["LEFT"], "w").write(json.dumps(dict(os.environ))))
"""


def scripts() -> list[str]:
    """Return the workspace's files that can be run."""
    files = [path for path in TEMPLATE.rglob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
    return sorted(path.relative_to(TEMPLATE).as_posix() for path in files)


def turned_off(**before: str) -> dict[str, str]:
    """Return the environment after an import of no_telemetry.py in a process that has only these variables."""
    code = "import json, no_telemetry, os; print(json.dumps(dict(os.environ)))"
    setup = str(TEMPLATE / "setup")
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": setup, **before}, capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def switches() -> dict[str, Any]:
    before = dict(os.environ)
    try:
        return runpy.run_path(str(TEMPLATE / "setup" / "no_telemetry.py"))
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.parametrize("script", sorted(set(scripts()) - WITHOUT_LIBRARIES))
def test_a_command_turns_telemetry_off(script: str, switches: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    path = os.pathsep.join([str(tmp_path), str(TEMPLATE / "finetuning")])  # as `python -m training.tiny_model` has it
    environment = {
        "PATH": os.defpath,
        "PYTHONPATH": path,
        "LEFT": str(tmp_path / "left"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    subprocess.run([sys.executable, str(TEMPLATE / script), "--help"], env=environment, stdout=-3, check=True)
    left = json.loads((tmp_path / "left").read_text())
    wanted = switches["OFF"] | switches["OFF_BY_DEFAULT"]
    assert {name: left.get(name) for name in wanted} == wanted


def test_every_command_is_known_here() -> None:
    assert set(scripts()) >= WITHOUT_LIBRARIES
    assert len(set(scripts()) - WITHOUT_LIBRARIES) >= 6, "the commands were not found: this test would see nothing"


@pytest.mark.parametrize("script", sorted(WITHOUT_LIBRARIES))
def test_a_command_without_it_imports_no_library(script: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, json, os, sys\n"
        "atexit.register(lambda: open(os.environ['LEFT'], 'w').write(json.dumps([*sys.modules])))\n"
    )
    environment = {"PATH": os.defpath, "PYTHONPATH": str(tmp_path), "LEFT": str(tmp_path / "left")}
    command = [sys.executable, "-B", str(TEMPLATE / script), "--help"]
    subprocess.run(command, env=environment, stdout=-3, check=True)
    loaded = {name.partition(".")[0] for name in json.loads((tmp_path / "left").read_text())}
    assert not loaded & {"datasets", "gradio", "huggingface_hub", "olive", "onnxruntime", "torch", "transformers"}


def test_a_shell_variable_can_enable_a_trackers_reports_but_no_librarys(switches: dict[str, Any]) -> None:
    on = {"ORT_DISABLE_TELEMETRY": "0", "GRADIO_ANALYTICS_ENABLED": "True", "HF_HUB_DISABLE_TELEMETRY": ""}
    left = turned_off(**on, CI="", WANDB_ERROR_REPORTING="true")
    assert {name: left[name] for name in switches["OFF"]} == switches["OFF"]
    assert left["CI"] == "1"  # an empty value counts as none, for Olive too
    assert left["WANDB_ERROR_REPORTING"] == "true"
    assert turned_off(CI="gitlab")["CI"] == "gitlab"
