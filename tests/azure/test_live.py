"""The story in Azure itself, in its own group, which is deleted at the end. It runs only on request.

It needs az on PATH, logged in, and a subscription in which the login can create resources. The demo trains on a CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
VARIABLE = "COPIER_FINETUNE_LIVE_AZURE"

pytestmark = pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"costs money: set {VARIABLE}=yes to run it")


def test_the_demo_trains_in_azure_and_its_adapter_comes_back(tmp_path: Path) -> None:
    group = f"rg-copier-finetune-{uuid.uuid4().hex[:8]}"
    copier = REPOSITORY / ".venv" / "bin" / "copier"
    answers = ["target=azure", "project_name=live-test", "environment=none", f"azure_resource_group={group}"]
    options = [option for answer in answers for option in ("-d", answer)]
    command = [copier if copier.is_file() else "copier", "copy", "--quiet", "--defaults", "--skip-tasks", *options]
    subprocess.run([*command, "--vcs-ref", "HEAD", REPOSITORY, tmp_path / "live"], check=True)

    def azure(*words: str, stdin: str = "") -> None:
        script = tmp_path / "live" / "infra" / "azure.py"
        subprocess.run([sys.executable, script, *words], input=stdin, encoding="utf-8", check=True)

    try:
        azure("provision", "finetuning", "--yes")
        azure("run")
        azure("pull")
        run = json.loads((tmp_path / "live" / "models" / "run.json").read_text(encoding="utf-8"))
        assert run["metrics"]["after"]["accuracy"] > run["metrics"]["before"]["accuracy"]
        azure("provision", "inference", "--yes")
        azure("deploy")
    finally:
        azure("destroy", stdin=f"{group}\n")
