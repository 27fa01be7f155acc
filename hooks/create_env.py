"""Run after rendering, in the new workspace: create its environment and, if requested, download its model.

It always exits with status 0: if a task fails, Copier deletes the new workspace.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PYTHON = "python" if sys.platform == "win32" else "python3"


def main() -> int:
    """Prepare the workspace in the current folder; return 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--download-model", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--after-update", action="store_true", help="only when the update changed what is installed")
    # A later template may pass new options to an older copy of this file: ignore them.
    args, _ = parser.parse_known_args()
    try:
        unchanged = args.after_update and not changed(Path.cwd())
        failed = None if unchanged else prepare(Path.cwd(), args.download_model)
    except KeyboardInterrupt:
        failed = "The setup was interrupted. Resume it", f"{PYTHON} setup/create_env.py"
    except Exception as error:  # keep the workspace after any error
        failed = f"The environment was not created ({error}). Try again", f"{PYTHON} setup/create_env.py"
    mark(Path.cwd() / "setup" / "create_env.incomplete", failed is not None)
    if failed:
        print(f"The workspace is complete, but its setup is not. {failed[0]}, in {Path.cwd()}:", file=sys.stderr)
        print(f"  {failed[1]}", file=sys.stderr, flush=True)
    return 0


def prepare(workspace: Path, download_model: bool) -> tuple[str, str] | None:
    """Create the environment, then download the model; return None, or what failed and the command to try again."""
    create_env = load(workspace / "setup" / "create_env.py")
    manager = create_env.read_settings()["manager"]
    if manager == "none":
        return None
    command, env = [sys.executable, "-B", "setup/create_env.py"], {**os.environ, "COPIER_SAYS_NEXT": "yes"}
    if subprocess.run(command, cwd=workspace, env=env, check=False).returncode != 0:
        return "The environment was not created. Try again", f"{PYTHON} setup/create_env.py"
    if not download_model:
        return None
    conda, _ = create_env.find_conda(manager)
    prefix = create_env.find_prefix(conda, create_env.conda_name())[0] if conda else workspace / ".venv"
    python = str(create_env.python_in(prefix))
    if subprocess.run([python, "setup/get_model.py"], cwd=workspace, check=False).returncode != 0:
        return "The model was not downloaded. Activate the environment and try again", "python setup/get_model.py"
    return None


def mark(file: Path, incomplete: bool) -> None:
    """Write or delete the file that tells Copier's last message, in copier.yml, that something failed."""
    with contextlib.suppress(OSError):
        if incomplete:
            file.touch()
        else:
            file.unlink(missing_ok=True)


def changed(workspace: Path) -> bool:
    """Return whether git sees changes of the environment since the last commit; False while they have conflicts."""
    names = "setup/environment.toml", "setup/conda-environment.yml", "setup/requirements-*.txt"
    status = ["git", "status", "--porcelain", "--", *names]
    lines = subprocess.run(status, cwd=workspace, capture_output=True, text=True, check=False).stdout.splitlines()
    if any(line.startswith(("UU", "AA", "DU", "UD")) for line in lines):
        print(f"Resolve the conflicts in setup/, then run: {PYTHON} setup/create_env.py", file=sys.stderr)
        return False
    return bool(lines)


def load(file: Path) -> Any:
    """Import a script of the workspace as a module, without writing to the workspace."""
    sys.dont_write_bytecode = True
    sys.path.append(str(file.parent))  # for the scripts next to it
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
