"""Cases of infra/azure.py outside the story: an existing group, rare failures of az, wrong command lines, telemetry."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import arm
import pytest
from conftest import RENDERED, Azure
from emulator import SUBSCRIPTION, Emulator

GROUP = f"/subscriptions/{SUBSCRIPTION}/resourceGroups/rg-shared"


def test_destroying_in_a_shared_group_deletes_only_what_is_tagged(
    azure: Azure, workspace: Path, emulator: Emulator
) -> None:
    settings = workspace / "infra" / "azure.yaml"
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace("rg-my-ft", "rg-shared"), encoding="utf-8")
    group = {"id": GROUP, "name": "rg-shared", "type": "Microsoft.Resources/resourceGroups", "location": "westus3"}
    emulator.resources[GROUP.lower()] = group | {"properties": {"provisioningState": "Succeeded"}}
    for name, tags in (("ours", {"workspace": "my-ft"}), ("theirs", {"workspace": "another"}), ("untagged", None)):
        kind = "Microsoft.OperationalInsights/workspaces"
        arm.store(emulator, {"id": f"{GROUP}/providers/{kind}/{name}", "name": name, "type": kind, "tags": tags})
    try:
        done = azure("destroy", stdin="rg-shared\n")
    finally:
        settings.write_text(text, encoding="utf-8")
    assert (done.status, done.err) == (0, "")
    assert "2 other resources of the group stay." in done.out
    left = {one["name"] for one in emulator.resources.values() if one["id"].startswith(GROUP)}
    assert left == {"rg-shared", "theirs", "untagged"}


def test_the_estimate_has_the_time_and_what_is_not_included(azure: Azure) -> None:
    done = azure("estimate")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("A run of 250 steps:\n  about ")
    assert "Waiting for a GPU costs nothing." in done.out


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            "(DeploymentActive) The deployment is still active.",
            "A deployment to rg-x is still running: `az deployment ",
        ),
        (
            "(RequestDisallowedByPolicy) Resource 'st' was disallowed by policy 'no-public-access'.",
            "A policy of the subscription forbids it (RequestDisallowedByPolicy) Resource 'st' was disallowed",
        ),
        (
            "(MissingSubscriptionRegistration) The subscription is not registered to use namespace 'Microsoft.App'.",
            "The provider Microsoft.App is not registered: run `az provider register --namespace Microsoft.App --wait`",
        ),
        ("The content for this response was already consumed", "`az deployment group validate --resource-group rg-x "),
    ],
)
def test_rarer_failures_of_az_are_one_sentence_too(azure: Azure, said: str, sentence: str) -> None:
    from az import explain

    found = explain(f"ERROR: {said}\nCode: X", {"group": "rg-x", "purpose": "inference"})
    assert sentence in found
    assert "\n" not in found


def test_az_runs_with_its_telemetry_off(azure: Azure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from az import az

    program = tmp_path / "az"  # says only what it is given: az itself shows no setting that comes from a variable
    program.write_text('#!/bin/sh\necho "\\"$AZURE_CORE_COLLECT_TELEMETRY\\""\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("AZURE_CORE_COLLECT_TELEMETRY", "yes")
    assert az("version") == "no"


def test_a_damaged_configuration_is_one_sentence(azure: Azure, workspace: Path) -> None:
    file = workspace / "infra" / "inference.config.json"
    file.write_text('{"ACA_APP_NAME": ', encoding="utf-8")
    done = azure("endpoint")
    file.unlink()
    assert done.status == 1
    assert "infra/inference.config.json is damaged" in done.err
    assert "delete it, and run `python infra/azure.py provision inference`." in done.err


@pytest.mark.parametrize("words", [[], ["provision"], ["secret", "set"], ["launch"]])
def test_a_wrong_command_line_shows_the_usage(workspace: Path, words: list[str]) -> None:
    command = [sys.executable, workspace / "infra" / "azure.py", *words]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: azure.py")


def test_help_is_fast_and_names_every_command(workspace: Path) -> None:
    started = time.monotonic()
    command = [sys.executable, workspace / "infra" / "azure.py", "--help"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert time.monotonic() - started < 1
    for name in ("provision", "secret", "run", "logs", "status", "pull", "deploy", "endpoint", "estimate", "destroy"):
        assert f"\n{name} " in done.stdout


def test_a_local_workspace_has_no_azure_files() -> None:
    assert not (RENDERED / "infra").exists()


@pytest.mark.parametrize("key", ["a", "fifteen letters"])
def test_a_short_key_of_the_app_is_refused(workspace: Path, key: str) -> None:
    program = "import sys; sys.path.insert(0, sys.argv[1]); import secret; secret.ask('CHAT_API_KEY')"
    command = [sys.executable, "-c", program, workspace / "infra"]
    env = os.environ | {"CHAT_API_KEY": key}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=env, check=False)
    assert done.returncode == 1
    assert "CHAT_API_KEY is too short: take one of at least 16 characters" in done.stderr
