"""One emulator, one login of the real az, one workspace that is rendered for Azure."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
RENDERED = Path(os.environ.get("WORKSPACE", REPOSITORY / ".cache" / "workspace"))
AZURE_CLI = REPOSITORY / ".cache" / "azure-cli" / "bin"
sys.path.insert(0, str(HERE))

from emulator import TENANT, Emulator  # noqa: E402


@dataclass
class Done:
    """What a command gave."""

    status: int
    out: str
    err: str


Azure = Callable[..., Done]


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """The emulator."""
    with Emulator(tmp_path_factory.mktemp("azure"), AZURE_CLI / "python") as started:
        started.containers.path = str(Path(sys.executable).parent)
        yield started


@pytest.fixture(scope="session")
def environment(emulator: Emulator) -> dict[str, str]:
    """The variables with which az, logged in, talks to the emulator."""
    tools = emulator.folder / "bin"
    tools.mkdir()
    (tools / "az").symlink_to(AZURE_CLI / "az")
    bicep = tools / "bicep"
    compiler = f'exec "{REPOSITORY / ".venv" / "bin" / "python"}" "{HERE / "bicep_to_arm.py"}" "$@"'
    bicep.write_text(f"#!/bin/sh\n{compiler}\n")
    bicep.chmod(0o755)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("AZURE_", "HF_"))}
    variables |= emulator.environment(emulator.folder / "login")
    variables |= {"PATH": os.pathsep.join([str(tools), os.environ["PATH"]])}
    variables |= {"PYTHONDONTWRITEBYTECODE": ""}  # az is not compiled before its first call
    login = ["login", "--service-principal", "--username", "me", "--password", "pass", "--tenant", TENANT]
    subprocess.run([tools / "az", *login, "--output", "none"], env=variables, check=True)
    return variables


@pytest.fixture(scope="session")
def workspace(emulator: Emulator) -> Path:
    """A workspace that is rendered for Azure, without an environment of its own."""
    folder = emulator.folder / "my workspace"
    copier = REPOSITORY / ".venv" / "bin" / "copier"
    answers = ["target=azure", "project_name=my-ft", "environment=venv", "max_steps=250"]
    options = [option for answer in answers for option in ("-d", answer)]
    command = [copier if copier.is_file() else "copier", "copy", "--quiet", "--defaults", "--skip-tasks", *options]
    subprocess.run([*command, "--vcs-ref", "HEAD", REPOSITORY, folder], check=True)
    return folder


@pytest.fixture(scope="session")
def azure(workspace: Path, environment: dict[str, str]) -> Iterator[Azure]:
    """Run infra/azure.py in this process: starting Python for each command would take half of the time."""
    sys.path.insert(0, str(workspace / "infra"))
    sys.dont_write_bytecode = True
    import app
    import azure as command_line
    import deployment
    import logs
    import share

    patches = pytest.MonkeyPatch()
    for module in (deployment, logs):
        patches.setattr(module, "POLL", 0.0)
    patches.setattr(app, "POLL", 0.1)
    patches.setattr(share, "BACKOFF", 0.0)

    def run(*arguments: str, stdin: str = "", **variables: str) -> Done:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as here, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            here.setattr(os, "environ", {**environment, **variables})
            here.setattr(sys, "stdin", io.StringIO(stdin))
            status = command_line.main(list(arguments))
        return Done(status, out.getvalue(), err.getvalue())

    yield run
    patches.undo()
