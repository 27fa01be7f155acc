"""README, git settings, VS Code tasks, dev container and CI of a workspace match its answers and scripts."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CATALOGUE = {entry["id"]: entry for entry in yaml.safe_load((ROOT / "catalog" / "models.yml").read_text())["models"]}
FILE = {"dataset_source": "file", "dataset_path": "dataset/rows.jsonl"}
HUB = {"dataset_source": "huggingface", "dataset_name": "owner/rows"}
# Answers that between them go through every branch of the files tested here.
WORKSPACES: dict[str, dict[str, Any]] = {
    "demo": {},
    "gated": {"model": "llama-3.2-1b-instruct", "device": "gpu", "platform": "windows", "environment": "conda"},
    "azure": {"model": "phi-3-mini-4k-instruct", "target": "azure", "environment": "none", **HUB},
    "hub": {"model": "custom", "custom_model_id": "owner/model", "environment": "venv", "platform": "macos", **FILE},
    "folder": {"model": "custom", "custom_model_id": "../model", "device": "cpu", "platform": "windows"},
}


@pytest.fixture(scope="module")
def workspaces(render: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One workspace for each of the answers above."""
    folder = tmp_path_factory.mktemp("workspaces")
    return {name: render(folder / name, **answers) for name, answers in WORKSPACES.items()}


def readme(workspace: Path) -> str:
    return (workspace / "README.md").read_text(encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read one of VS Code's files, which may hold comments."""
    return json.loads(re.sub(r"^\s*//.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE))


def steps(workspace: Path, name: str = "test") -> list[dict[str, Any]]:
    workflow = yaml.safe_load((workspace / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))
    return list(workflow["jobs"][name]["steps"])


def commands(workspace: Path) -> list[list[str]]:
    """Return what README, tasks, launch configurations, dev container and CI run, behind the name of the Python."""
    spans = re.findall(r"`([^`\n]+)`", readme(workspace))
    blocks = re.findall(r"^```shell\n(.*?)^```", readme(workspace), flags=re.MULTILINE | re.DOTALL)
    texts = [*spans, *"".join(blocks).splitlines(), *(step["run"] for step in steps(workspace) if "run" in step)]
    texts.append(read_json(workspace / ".devcontainer" / "devcontainer.json")["postCreateCommand"])
    lines = "\n".join(texts).splitlines()
    found = [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"(\.venv/bin/)?python3? ", line)]
    found += [task["args"] for task in read_json(workspace / ".vscode" / "tasks.json")["tasks"]]
    for configuration in read_json(workspace / ".vscode" / "launch.json")["configurations"]:
        found.append([configuration["program"].removeprefix("${workspaceFolder}/"), *configuration["args"]])
    return found


@cache
def options(script: Path, *command: str) -> set[str]:
    """Return the options of a script, or of a command that it has, as --help says."""
    asked = [sys.executable, "-B", script, *command, "--help"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    return set(re.findall(r"--[a-z-]+", done.stdout))


@pytest.mark.parametrize("name", WORKSPACES)
def test_every_command_that_a_workspace_names_exists(workspaces: dict[str, Path], name: str) -> None:
    named = commands(workspaces[name])
    for first, *arguments in named:
        if first == "-m":
            assert arguments in (["pytest"], ["pip", "install", "--quiet", "-r", "setup/requirements-copier.txt"])
            continue
        used = {argument for argument in arguments if argument.startswith("--")}
        command = arguments[:1] if first == "infra/azure.py" else []
        known = options(ROOT / "template" / first, *command)  # its file is the same everywhere
        assert used <= known, (first, arguments)
    scripts = {"setup/create_env.py", "setup/get_model.py", "inference/console_chat.py", "inference/gradio_chat.py"}
    scripts |= {
        "finetuning/export.py",
        "setup/drift.py",
        "setup/undo_update.py",
        *(["infra/azure.py"] if name == "azure" else []),
    }
    assert {command[0] for command in named} == {*scripts, "finetuning/invoke_olive.py", "-m"}


@pytest.mark.parametrize("name", WORKSPACES)
def test_every_file_that_the_readme_names_exists_or_will_be_created(workspaces: dict[str, Path], name: str) -> None:
    rooms = r"dataset|finetuning|inference|infra|setup|tests|\.[a-z]+"
    paths = re.findall(rf"`((?:{rooms})/[^`\s]*)`", readme(workspaces[name]))
    made = {"setup/create_env.log", "dataset/rows.jsonl", "infra/finetuning.config.json"}
    assert [path for path in paths if path not in made and not list(workspaces[name].glob(path))] == []
    folders = {f"{path.name}/" for path in workspaces[name].iterdir() if path.is_dir()}
    assert folders <= set(paths)


@pytest.mark.parametrize("name", WORKSPACES)
def test_the_readme_is_short(workspaces: dict[str, Path], name: str) -> None:
    text = readme(workspaces[name])
    assert text.startswith(f"# {name}\n")
    assert len(text.splitlines()) <= 100
    assert "\n\n\n" not in text
    assert max(map(len, text.splitlines())) <= 240


def test_the_start_commands_match_platform_and_environment(workspaces: dict[str, Path]) -> None:
    start = {name: readme(workspace).split("```")[1] for name, workspace in workspaces.items()}
    assert "python3 setup/create_env.py" in start["demo"] and "source .venv/bin/activate" in start["demo"]
    assert "python setup/create_env.py" in start["gated"] and "conda activate gated\n" in start["gated"]
    assert ".venv" not in start["gated"] and ".venv\\Scripts\\activate" in start["folder"]
    assert "create_env.py" not in start["azure"] and "setup/requirements-gpu.txt" in start["azure"]
    assert {name for name, text in start.items() if "get_model.py" in text} == {"gated", "azure", "hub"}


def test_the_git_commands_for_updates_are_shown_after_the_copy_and_in_the_readme(workspaces: dict[str, Path]) -> None:
    command = 'git init && git add -A && git commit -m "As rendered"'
    assert command in yaml.safe_load((ROOT / "copier.yml").read_text(encoding="utf-8"))["_message_after_copy"]
    for workspace in workspaces.values():
        assert f"- **Updates** need git. If this folder is not in git yet: `{command}`." in readme(workspace)


def test_azure_is_mentioned_only_if_it_was_chosen(workspaces: dict[str, Path]) -> None:
    assert {name for name, workspace in workspaces.items() if "Azure" in readme(workspace)} == {"azure"}
    assert {name for name, workspace in workspaces.items() if (workspace / "infra").exists()} == {"azure"}


def test_the_azure_steps_are_tasks_with_the_names_that_ai_toolkit_users_know(workspaces: dict[str, Path]) -> None:
    remote = {
        "Provision Azure Container Apps job for fine-tuning": ["provision", "finetuning"],
        "Add Azure Container Apps Job secret for fine-tuning": ["secret", "set", "${input:secret}"],
        "Run fine-tuning": ["run"],
        "Show the running fine-tuning job streaming logs": ["logs", "--follow"],
        "Provision Azure Container Apps for inference": ["provision", "inference"],
        "Deploy for inference": ["deploy"],
        "Open the inference endpoint": ["endpoint"],
    }
    for name, workspace in workspaces.items():
        tasks = read_json(workspace / ".vscode" / "tasks.json")
        found = {task["label"]: task["args"][1:] for task in tasks["tasks"] if task["args"][0] == "infra/azure.py"}
        assert found == (remote if name == "azure" else {})
        assert [one["id"] for one in tasks.get("inputs", [])] == (["secret"] if name == "azure" else [])


def test_the_readme_has_the_azure_steps_in_order(workspaces: dict[str, Path]) -> None:
    named = [command[1] for command in commands(workspaces["azure"]) if command[0] == "infra/azure.py"]
    steps = ["estimate", "provision", "run", "pull", "provision", "deploy", "endpoint", "destroy"]
    assert [step for step in named if step in steps][:8] == steps


@pytest.mark.parametrize("model", [model for model in CATALOGUE if model not in {"demo", "custom"}])
def test_the_readme_says_what_the_model_is(render: Callable[..., Path], tmp_path: Path, model: str) -> None:
    entry = CATALOGUE[model]
    text = readme(render(tmp_path / "workspace", model=model))
    assert f"[{entry['hub_id']}](https://huggingface.co/{entry['hub_id']})" in text
    page = f"https://huggingface.co/{entry['hub_id']}/blob/{entry['revision']}"
    licence = entry["licence_text"]
    assert f"[{entry['licence']}]({licence if licence.startswith('https:') else f'{page}/{licence}'})" in text
    assert f"{entry['parameters'] * 2 / 1e9:.1f} GB" in text
    assert ("The model is gated." in text, "HF_TOKEN" in text) == (entry["gated"],) * 2


def test_git_ignores_results_and_keeps_the_rows(workspaces: dict[str, Path]) -> None:
    made = ["models/adapter/x", "models/run.json", ".venv/x", "setup/create_env.log", ".env", "tests/__pycache__/x.pyc"]
    made += ["dataset/rows.rejected.jsonl"]
    kept = [
        "dataset/rows.jsonl",
        "finetuning/models.py",
        "setup/model.yaml",
        ".vscode/tasks.json",
        ".copier-answers.yml",
    ]
    git = ["git", "-c", f"core.excludesFile={os.devnull}", "-C", str(workspaces["demo"])]
    subprocess.run([*git, "init", "--quiet"], check=True)
    done = subprocess.run([*git, "check-ignore", "--no-index", *made, *kept], capture_output=True, text=True)
    assert done.stdout.split() == made


def test_a_checkout_on_windows_has_the_same_line_ends(workspaces: dict[str, Path], tmp_path: Path) -> None:
    names = ("infra/environment.sh", "infra/provision/inference.bicep", ".gitattributes")
    (tmp_path / "infra" / "provision").mkdir(parents=True)
    for name in names:
        shutil.copy(workspaces["azure"] / name, tmp_path / name)
    git = ["git", "-c", "core.autocrlf=true", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", *names], check=True, capture_output=True)
    for name in names[:2]:
        (tmp_path / name).unlink()
    subprocess.run([*git, "checkout", "--", *names[:2]], check=True)
    assert [b"\r\n" in (tmp_path / name).read_bytes() for name in names[:2]] == [False, False]


@pytest.mark.parametrize("name", WORKSPACES)
def test_ci_runs_pinned_actions_with_read_only_rights(workspaces: dict[str, Path], name: str) -> None:
    for file in (workspaces[name] / ".github" / "workflows").iterdir():
        if file.name == "update.yml":  # it may write, and is read by tests/update/test_workflow.py
            continue
        text = file.read_text(encoding="utf-8")
        workflow = yaml.safe_load(text)
        assert workflow["permissions"] == {"contents": "read"}
        assert set(workflow[True]) == {"push", "pull_request"}  # YAML reads the key `on` as true
        actions = re.findall(r"uses: (.*)", text)
        assert len(actions) == {"test.yml": 2, "bicep.yml": 1}[file.name]
        assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action) for action in actions)
        assert "${{" not in text  # nothing of the event or of the secrets gets into a command


def test_ci_compiles_and_lints_every_bicep_file_with_the_real_compiler(workspaces: dict[str, Path]) -> None:
    files = [f"infra/provision/{path.name}" for path in (workspaces["azure"] / "infra/provision").glob("*.bicep")]
    runs = [step["run"] for step in steps(workspaces["azure"], "bicep") if "run" in step]
    for command in ("build", "lint"):
        found = [run.split()[4] for run in runs if run.startswith(f"az bicep {command} --file ")]
        assert sorted(found) == sorted(files)


def test_the_container_has_the_extensions_of_the_editor_and_a_gpu_where_one_was_chosen(
    workspaces: dict[str, Path],
) -> None:
    for name, workspace in workspaces.items():
        container = read_json(workspace / ".devcontainer" / "devcontainer.json")
        recommended = read_json(workspace / ".vscode" / "extensions.json")["recommendations"]
        assert container["customizations"]["vscode"]["extensions"] == recommended
        assert re.fullmatch(r"mcr\.microsoft\.com/devcontainers/python:\d+\.\d+\.\d+-3\.11-[a-z]+", container["image"])
        assert ("hostRequirements" in container) == (name in {"gated", "azure"})


def test_ruff_finds_nothing_to_change_in_a_workspace(workspaces: dict[str, Path]) -> None:
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
        done = subprocess.run(ruff, cwd=workspaces["demo"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
