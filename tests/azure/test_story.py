"""All commands through the real az, in the order in which a user runs them, with every failure that can occur.

Each fixture is a chapter, and needs the one before it. A failed command is run again, and completes the work. The job
and the app run their real commands, in the folder that stands in for the share.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import Azure, Done
from emulator import SUBSCRIPTION, Emulator, Request

SECRET = "hf_neverToBeSeenAnywhere0123456789"  # not one: only to look for
QUESTION = "She grinned at the market."
EXECVE = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "signal=none", "-e", "trace=execve", "-s", "9999"]


@dataclass
class Chapter:
    """What the commands said, by a name for each; how many files each sent; what else was found."""

    said: dict[str, Done] = field(default_factory=dict)
    sent: dict[str, list[str]] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)


def config_of(workspace: Path, purpose: str = "finetuning") -> dict[str, Any]:
    """Return what provisioning has written."""
    return dict(json.loads((workspace / "infra" / f"{purpose}.config.json").read_text(encoding="utf-8")))


def set_commands(workspace: Path, *commands: str) -> None:
    """Write COMMANDS into the configuration, as a user does."""
    file = workspace / "infra" / "finetuning.config.json"
    file.write_text(json.dumps(config_of(workspace) | {"COMMANDS": commands}), encoding="utf-8")


def share_of(emulator: Emulator, workspace: Path) -> Path:
    """Return the folder that stands in for the workspace's share."""
    config = config_of(workspace)
    return emulator.share(config["STORAGE_ACCOUNT_NAME"], config["FILE_SHARE_NAME"])


def uploads(requests: list[Request]) -> list[str]:
    """Return the files that requests make on a share, other than the manifest."""
    made = [one.path for one in requests if one.method == "PUT" and one.headers.get("x-ms-type") == "file"]
    return [path for path in made if not path.endswith("/.azure-sync.json") and "/.azure-code/" not in path]


def assert_one_sentence(done: Done, sentence: str) -> None:
    """Check the exit status, and that the error is one line which names a command or a page."""
    assert done.status == 1
    assert done.err.startswith("error: ")
    assert sentence in done.err
    assert done.err.count("\n") == 1
    assert "`" in done.err or "https://" in done.err


# ------------------------------------------------------------------------------------------------------- Provisioning


@pytest.fixture(scope="module")
def provisioned(emulator: Emulator, azure: Azure, workspace: Path) -> Chapter:
    """Provision what the job needs."""
    story = Chapter()
    story.said["run"] = azure("run")
    story.said["dry run"] = azure("provision", "finetuning", "--dry-run")
    story.found["after a dry run"] = dict(emulator.resources)
    story.said["provision"] = azure("provision", "finetuning", "--yes")
    assert story.said["provision"].status == 0, story.said["provision"].err
    story.found["config"] = config_of(workspace)
    lend_environment(share_of(emulator, workspace), workspace, emulator)
    return story


def environment_key(emulator: Emulator, kind: str = "jobs") -> str:
    """Return the secret that seals the Python environments."""
    secrets = emulator.find(f"Microsoft.App/{kind}")["properties"]["configuration"]["secrets"]
    return str({one["name"]: one["value"] for one in secrets}["environment-key"])


def lend_environment(share: Path, workspace: Path, emulator: Emulator) -> None:
    """Put an environment where infra/environment.sh would make one, as a second start of the job finds it.

    It has the packages of this one by a path in a file, so that only few files are checked at each start.
    """
    python = subprocess.run(["python3", "--version"], capture_output=True, check=True).stdout
    lock = (workspace / "setup" / "requirements-cpu.txt").read_bytes()
    made = share / ".cache" / "environments" / f"cpu-{hashlib.sha256(python + lock).hexdigest()[:16]}"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made], check=True)
    (packages,) = made.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    env = {**os.environ, "ENVIRONMENT_KEY": environment_key(emulator)}
    subprocess.run([sys.executable, workspace / "infra" / "seal.py", made, made.name], env=env, check=True)


def test_nothing_runs_before_it_is_provisioned(provisioned: Chapter) -> None:
    assert_one_sentence(
        provisioned.said["run"], "Nothing is provisioned for finetuning yet: run `python infra/azure.py "
    )


def test_a_dry_run_changes_nothing_not_even_the_group(provisioned: Chapter) -> None:
    assert "It would create the group rg-my-ft" in provisioned.said["dry run"].out
    assert not [identity for identity in provisioned.found["after a dry run"] if "rg-my-ft" in identity]


def test_provisioning_lists_the_resources_and_writes_the_configuration(provisioned: Chapter) -> None:
    done = provisioned.said["provision"]
    assert (done.status, done.err) == (0, "")
    assert re.search(r"(?m)^  Microsoft.App/jobs ", done.out)
    assert done.out.endswith("Written: infra/finetuning.config.json\nNext: python infra/azure.py run\n")
    config = provisioned.found["config"]
    keys = ["SUBSCRIPTION_ID", "RESOURCE_GROUP_NAME", "STORAGE_ACCOUNT_NAME", "FILE_SHARE_NAME", "ACA_JOB_NAME"]
    assert list(config) == [*keys, "COMMANDS"]
    assert (config["SUBSCRIPTION_ID"], config["RESOURCE_GROUP_NAME"]) == (SUBSCRIPTION, "rg-my-ft")


# ------------------------------------------------------------------------------------------------------------- Secrets


@pytest.fixture(scope="module")
def secret(
    provisioned: Chapter, azure: Azure, workspace: Path, environment: dict[str, str], emulator: Emulator
) -> Chapter:
    """Set a secret from a pipe, with every command line written down, and one from a variable; provision once more."""
    story = Chapter()
    log = emulator.folder / "execve"
    strace = [*EXECVE, "-o", str(log)] if shutil.which("strace") else []
    command = [*strace, sys.executable, workspace / "infra" / "azure.py", "secret", "set", "HF_TOKEN"]
    run = subprocess.run(
        command, env=environment, input=f"{SECRET}\n", capture_output=True, encoding="utf-8", check=False
    )
    story.said["secret"] = Done(run.returncode, run.stdout, run.stderr)
    story.found["command lines"] = log.read_text(encoding="utf-8") if log.exists() else None
    story.found["environment key"] = environment_key(emulator)
    story.said["second secret"] = azure("secret", "set", "WANDB_API_KEY", WANDB_API_KEY=SECRET)
    (workspace / "infra" / "finetuning.config.json").unlink()
    story.said["no"] = azure("provision", "finetuning", "--dry-run")
    story.found["config anew"] = config_of(workspace)
    set_commands(workspace, "echo mine")
    story.said["yes"] = azure("provision", "finetuning", stdin="y\n")
    story.found["config"] = config_of(workspace)
    return story


def test_the_job_gets_its_secret(secret: Chapter, emulator: Emulator, workspace: Path) -> None:
    done = secret.said["secret"]
    assert (done.status, done.err) == (0, "")
    assert done.out == "The job has the secret hf-token, and sees it as HF_TOKEN from its next start on.\n"
    properties = emulator.find("Microsoft.App/jobs", config_of(workspace)["ACA_JOB_NAME"])["properties"]
    secrets = {one["name"]: one["value"] for one in properties["configuration"]["secrets"]}
    assert secrets["hf-token"] == SECRET
    variables = properties["template"]["containers"][0]["env"]
    assert [one["secretRef"] for one in variables if one["name"] == "HF_TOKEN"] == ["hf-token"]


def test_provisioning_again_asks_and_keeps_secrets_and_commands_even_without_the_configuration(
    secret: Chapter, emulator: Emulator, workspace: Path
) -> None:
    assert secret.said["no"].out.endswith(
        "Nothing was deployed. To deploy: python infra/azure.py provision finetuning --yes\n"
    )
    assert secret.found["config anew"]["ACA_JOB_NAME"]
    assert (secret.said["yes"].status, secret.said["yes"].err) == (0, "")
    assert secret.found["config"]["COMMANDS"] == ["echo mine"]
    properties = emulator.find("Microsoft.App/jobs")["properties"]
    kept = {one["name"]: one["value"] for one in properties["configuration"]["secrets"]}
    assert kept | {"environment-key": ""} == {"hf-token": SECRET, "wandb-api-key": SECRET, "environment-key": ""}
    assert kept["environment-key"] == secret.found["environment key"]
    variables = {one["name"]: one.get("secretRef") for one in properties["template"]["containers"][0]["env"]}
    assert (variables["HF_TOKEN"], variables["WANDB_API_KEY"]) == ("hf-token", "wandb-api-key")


def test_the_secret_is_on_no_command_line(secret: Chapter) -> None:
    lines = secret.found["command lines"]
    if lines is None:
        pytest.skip("strace is not installed")
    assert "hf-token=@-" in lines
    assert SECRET not in lines


def test_an_empty_secret_is_refused(azure: Azure, provisioned: Chapter) -> None:
    assert_one_sentence(azure("secret", "set", "HF_TOKEN", stdin="\n"), "HF_TOKEN is empty: type it when asked")


# ---------------------------------------------------------------------------------------------------------------- Runs


@pytest.fixture(scope="module")
def stumbled(secret: Chapter, emulator: Emulator, azure: Azure, workspace: Path) -> Chapter:
    """Run the job, which fails in every way; each time the same command is typed again."""
    story = Chapter()
    share = share_of(emulator, workspace)
    set_commands(workspace, "echo begun", 'read line < "$WORKSPACE_MOUNT/gate"', 'echo "$line"')

    def run(name: str, *options: str, **faults: int) -> None:
        first = len(emulator.requests)
        emulator.faults.update({fault.replace("_", " "): times for fault, times in faults.items()})
        story.said[name] = azure("run", *options)
        story.sent[name] = uploads(emulator.requests[first:])
        emulator.faults.clear()

    emulator.room = 60_000  # the sample's rows are more
    run("share full")
    story.found["manifest"] = json.loads((share / ".azure-sync.json").read_text())
    emulator.room = None
    run("share busy", busy_share=1000)
    run("network gone", network=1000)
    run("throttled", throttle=1000)
    run("job failed", dropped_upload=3, job_failed=1)
    story.said["pull"] = azure("pull")
    run("job timed out", job_timed_out=1)
    os.mkfifo(share / "gate")

    def sign_out(request: Request) -> None:
        if request.path.endswith("/getAuthToken"):
            emulator.faults["expired token"] = 1000

    emulator.watch = sign_out
    run("signed out", queued=1)
    connections: list[str] = []

    def open_the_gate(request: Request) -> None:
        if request.path.endswith("/getAuthToken"):
            connections.append(request.path)
            if len(connections) == 2:
                (share / "gate").write_text("ended\n")

    emulator.watch = open_the_gate
    run("signed in again", log_cut=1)
    emulator.watch = lambda request: None
    (share / "gate").unlink()
    return story


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        ("share full", "The file share is full: `az storage share-rm update --storage-account "),
        ("share busy", "The file share is busy (ServerBusy): wait a minute, `az storage account show --name "),
        ("network gone", "Azure cannot be reached: check whether `curl -I https://management.azure.com` responds"),
        ("throttled", "Azure throttles the requests: wait a minute, until `az group list --output table` works"),
        ("job failed", "ended as Failed (a command failed, memory ran out, or it took longer than `timeout`"),
        ("job timed out", "ended as Failed (a command failed, memory ran out, or it took longer than `timeout`"),
        ("signed out", "az is not logged in, or its login has expired: run `az login`"),
        ("pull", "The job has no result yet: `python infra/azure.py status`"),
    ],
)
def test_a_run_that_fails_says_why_in_one_sentence(stumbled: Chapter, failure: str, sentence: str) -> None:
    assert_one_sentence(stumbled.said[failure], sentence)


def test_a_run_after_an_interrupted_one_sends_the_rest(stumbled: Chapter) -> None:
    arrived, sent = stumbled.found["manifest"], stumbled.sent["job failed"]
    assert arrived
    assert sent
    assert not {path for path in arrived if any(one.endswith(f"/{path}") for one in sent)}
    assert stumbled.sent["job timed out"] == []


def test_following_a_run_again_prints_every_line_once_although_the_log_is_cut(stumbled: Chapter) -> None:
    assert " waits for a GPU. Ctrl-C leaves it waiting" in stumbled.said["signed out"].out
    done = stumbled.said["signed in again"]
    assert (done.status, done.err) == (0, "")
    first, *lines = done.out.splitlines()
    assert "is still running, so nothing is sent or started; `az containerapp job stop " in first
    assert lines == ["begun", "ended", f"{first.split()[0]} has succeeded.", "Next: python infra/azure.py pull"]


# ------------------------------------------------------------------------------------- Training, and a second opinion


@pytest.fixture(scope="module")
def trained(
    stumbled: Chapter, emulator: Emulator, azure: Azure, workspace: Path, environment: dict[str, str]
) -> Chapter:
    """Train the demo in the job; meanwhile provision the app, which fails in every way first; then follow the run."""
    story, command = Chapter(), ("provision", "inference", "--yes")
    share = share_of(emulator, workspace)
    (share / "finetuning/invoke_olive.py").write_text("print('theirs', __import__('os').environ['HF_TOKEN'])\n")
    set_commands(workspace, "source infra/environment.sh", "python finetuning/invoke_olive.py")
    (archive,) = (share / ".azure-code").iterdir()
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-1] + b"x")
    story.said["tampered"] = azure("run")
    story.said["why"] = azure("logs")
    first = len(emulator.requests)
    emulator.faults["queued"] = 1
    story.said["run"] = azure("run", "--no-wait")
    story.sent["run"] = uploads(emulator.requests[first:])

    empty, old = emulator.folder / "empty", emulator.folder / "old"
    for folder in (empty, old):
        folder.mkdir()
    (old / "az").write_text('#!/bin/sh\necho \'{"azure-cli": "2.50.0"}\'\n')  # an old one cannot be installed here
    (old / "az").chmod(0o755)
    story.said["no az"] = azure(*command, PATH=str(empty))
    story.said["old az"] = azure(*command, PATH=os.pathsep.join([str(old), environment["PATH"]]))
    story.said["not logged in"] = azure(*command, AZURE_CONFIG_DIR=str(empty))
    file = workspace / "infra" / "finetuning.config.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(SUBSCRIPTION, "another"), encoding="utf-8")
    story.said["wrong subscription"] = azure(*command)
    file.write_text(text, encoding="utf-8")
    settings = workspace / "infra" / "azure.yaml"
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace('"Consumption"', '"Consumption-GPU-NC8as-T4"'), encoding="utf-8")
    for fault in ("unregistered Microsoft.App", "no gpu in region", "refused", "name taken", "no quota"):
        emulator.faults[fault] = 1
        story.said[fault] = azure(*command)
        emulator.faults[fault] = 0
        story.found.setdefault("written after", []).extend(
            [fault] * (workspace / "infra/inference.config.json").exists()
        )
    settings.write_text(text, encoding="utf-8")
    story.said["provision"] = azure(*command)

    story.said["follow"] = azure("logs", "--follow")
    story.said["logs"] = azure("logs")
    story.said["status"] = azure("status")
    story.found["share"] = {
        path.relative_to(share_of(emulator, workspace)).parts[0] for path in share_of(emulator, workspace).iterdir()
    }
    story.said["pull"] = azure("pull")
    return story


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        ("no az", "The Azure CLI is not installed: see https://aka.ms/installazurecli, then run `az login`."),
        ("old az", "az is version 2.50.0, and 2.80.0 or later is needed: run `az upgrade`"),
        ("not logged in", "az is not logged in, or its login has expired: run `az login`"),
        ("wrong subscription", "az's login has no subscription another: `az account list --output table`"),
        ("unregistered Microsoft.App", "run `az provider register --namespace Microsoft.App --wait`"),
        ("no gpu in region", "The region swedencentral has no Consumption-GPU-NC8as-T4"),
        ("refused", "This login has no permission for Microsoft.Resources/deployments/write: ask an owner"),
        (
            "name taken",
            "is already taken: choose another group with `copier update --trust --data azure_resource_group=…`",
        ),
        ("no quota", "The quota ManagedEnvironmentConsumptionT4Gpus in swedencentral is 0"),
    ],
)
def test_a_failure_in_provisioning_is_one_sentence_with_the_command_that_helps(
    trained: Chapter, failure: str, sentence: str
) -> None:
    assert_one_sentence(trained.said[failure], sentence)


def test_the_configuration_is_written_once_the_deployment_has_succeeded(trained: Chapter, workspace: Path) -> None:
    assert trained.found["written after"] == ["no quota"]
    done = trained.said["provision"]
    assert (done.status, done.err) == (0, "")
    assert config_of(workspace, "inference")["ACA_APP_ENDPOINT"].startswith("https://")


def test_an_unchanged_workspace_is_not_sent_again(trained: Chapter) -> None:
    assert trained.sent["run"] == []
    assert "Sent 0 files, removed 0.\n" in trained.said["run"].out


def test_code_that_was_changed_on_the_share_never_runs(trained: Chapter) -> None:
    assert_one_sentence(trained.said["tampered"], "`python infra/azure.py logs` shows why")
    why = "error: The code on the share was changed there, and nothing of it ran: find out who can write to the share"
    assert why in trained.said["why"].out
    for name in ("why", "follow", "logs"):
        assert "theirs" not in trained.said[name].out


def test_the_job_runs_the_commands_of_the_configuration_and_its_log_is_shown(trained: Chapter) -> None:
    for name in ("follow", "logs"):
        done = trained.said[name]
        assert (done.status, done.err) == (0, "")
        assert "exact answers" in done.out
    assert re.search(r"job\S* +Succeeded", trained.said["status"].out)


def test_files_that_must_stay_local_are_not_on_the_share(trained: Chapter) -> None:
    assert not trained.found["share"] & {".git", ".venv", ".env", "__pycache__"}


# ------------------------------------------------------------------------------------------------- Serving, and the end


@pytest.fixture(scope="module")
def served(trained: Chapter, emulator: Emulator, azure: Azure, workspace: Path, environment: dict[str, str]) -> Chapter:
    """Chat here with what was pulled, while the app is deployed; ask the app; delete everything."""
    story = Chapter()
    (workspace / "dataset" / "README.md").write_text("changed\n", encoding="utf-8")
    (workspace / "tests" / "test_smoke.py").unlink()
    scripts = [[workspace / "setup/get_model.py"], [workspace / "inference/console_chat.py", "--prompt", QUESTION]]
    shell = " && ".join(subprocess.list2cmdline([sys.executable, *script]) for script in scripts)
    chat = subprocess.Popen(["bash", "-c", shell], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    first = len(emulator.requests)
    story.said["deploy"] = azure("deploy")
    story.sent["deploy"] = uploads(emulator.requests[first:])
    story.said["endpoint"] = azure("endpoint")
    story.said["status"] = azure("status")
    key = next(iter(find_key(emulator)))
    story.found["answer"] = ask(config_of(workspace, "inference")["ACA_APP_ENDPOINT"], key, emulator)
    story.found["without a key"] = ask(config_of(workspace, "inference")["ACA_APP_ENDPOINT"], "", emulator)
    out, err = chat.communicate(timeout=120)
    story.said["chat"] = Done(chat.returncode, out, err)
    story.said["not destroyed"] = azure("destroy", stdin="rg-another\n")
    story.found["before"] = len(emulator.resources)
    story.said["destroy"] = azure("destroy", stdin="rg-my-ft\n")
    return story


def find_key(emulator: Emulator) -> Iterator[str]:
    """Yield the key of the app."""
    app = emulator.find("Microsoft.App/containerApps")
    yield from (one["value"] for one in app["properties"]["configuration"]["secrets"] if one["name"] == "chat-api-key")


def ask(endpoint: str, key: str, emulator: Emulator) -> tuple[int, Any]:
    """Ask the app through its API, as a program does; return status and answer."""
    import requests

    session = requests.Session()
    session.trust_env = False
    proxy = f"http://127.0.0.1:{emulator.server.server_port}"
    session.proxies, session.verify = {"https": proxy}, str(emulator.folder / "ca.pem")
    body = {"model": "tuned", "messages": [{"role": "user", "content": QUESTION}]}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer = session.post(f"{endpoint}/v1/chat/completions", json=body, headers=headers, timeout=60)
    return answer.status_code, answer.json()


def test_an_edited_file_is_sent_and_a_deleted_one_removed(served: Chapter) -> None:
    assert [path.split("/", 2)[2] for path in served.sent["deploy"]] == ["dataset/README.md"]
    assert "Sent 1 files, removed 1.\n" in served.said["deploy"].out


def test_the_adapter_that_the_job_trained_chats_here(served: Chapter) -> None:
    done = served.said["chat"]
    assert done.status == 0, done.err
    assert done.out.splitlines()[-1] == "joy"


def test_the_app_answers_with_the_tuned_model_only_with_the_key(served: Chapter) -> None:
    assert served.said["deploy"].status == 0, served.said["deploy"].err
    status, answer = served.found["answer"]
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "joy")
    assert served.found["without a key"][0] == 401


def test_destroy_asks_for_the_groups_name_and_deletes_everything(
    served: Chapter, emulator: Emulator, workspace: Path
) -> None:
    assert_one_sentence(served.said["not destroyed"], "Nothing was deleted: the answer was not rg-my-ft")
    assert served.found["before"] > 0
    done = served.said["destroy"]
    assert (done.status, done.err) == (0, "")
    assert "Microsoft.App/containerApps" in done.out
    assert not [identity for identity in emulator.resources if "/rg-my-ft" in identity]
    assert not list((workspace / "infra").glob("*.config.json"))
    assert (workspace / "models" / "run.json").is_file()


def test_no_secret_is_in_any_output_or_file(
    served: Chapter, stumbled: Chapter, trained: Chapter, emulator: Emulator, workspace: Path
) -> None:
    said = "".join(done.out + done.err for story in (stumbled, trained, served) for done in story.said.values())
    assert SECRET not in said
    files = [file for file in emulator.folder.rglob("*") if file.is_file()]
    assert len(files) > 100
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]


def test_az_connected_only_to_azure(served: Chapter, emulator: Emulator) -> None:
    assert emulator.broken == []
    assert set(emulator.unknown) <= {"azcliprod.blob.core.windows.net"}  # where az looks for its own newest version
