"""The conda environment: which program creates it, where it is, what its file lists, and what conda installed into it.

conda and pip both install Python packages, and neither sees when the other overwrites its files. So each keeps to its
own: what conda has installed is not installed from the lock.
"""

# Only the standard library, and nothing newer than Python 3.8, as in create_env.py.
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from install import SetupError
from installed import ROOT, conda_distributions, conda_records, project, site_packages

FILE = ROOT / "setup" / "conda-environment.yml"
CONDAS = ("conda", "mamba", "micromamba")
STAMP = "create_env.stamp"


# ------------------------------------------------------------------------------------------- Which program, and where


def find_conda(manager: str) -> tuple[str, str]:
    """Return the conda-like program for `manager` ("" for a venv), and the choice in words. Raises SetupError."""
    if manager != "venv":
        for program, where in conda_programs():
            stem = Path(program).stem
            if Path(program).is_file() and (manager == "auto" or stem == manager):
                return program, f"{stem} ({where})"
        if manager != "auto":
            raise SetupError(f"{manager} was not found: install Miniforge (conda-forge.org) or use --manager venv.")
    return "", "venv" if manager == "venv" else "venv (no conda was found)"


def conda_programs() -> Iterator[tuple[str, str]]:
    """Yield the possible paths of conda, and each place in words; start-up files are never read or changed."""
    for variable in ("CONDA_EXE", "MAMBA_EXE"):
        yield os.environ.get(variable, ""), f"from {variable}"
    for name in CONDAS:
        yield shutil.which(name) or "", "on PATH"
    for folder in ("miniforge3", "miniconda3", "AppData/Local/miniforge3", "AppData/Local/miniconda3"):
        home = Path(os.path.expanduser("~"), folder)  # noqa: PTH111 - Path's fails for an account without one
        yield str(home / ("Scripts/conda.exe" if sys.platform == "win32" else "bin/conda")), f"in {home}"


def find_prefix(conda: str, name: str) -> tuple[Path, bool]:
    """Return the folder of a conda environment, and whether it exists already. Raises SetupError."""
    root = os.environ.get("MAMBA_ROOT_PREFIX") if Path(conda).stem == "micromamba" else None
    usual = (Path(root) if root else Path(conda).resolve().parents[1]) / "envs"
    prefix, exists = usual / name, is_conda(usual / name) and (usual / name / STAMP).is_file()
    if not exists:  # only conda knows: its settings may name other folders
        listed = [Path(folder) for folder in ask(conda, "env", "list").get("envs", [])]
        # A base environment, which contains the others, is never this one, whatever its folder's name.
        same = [path for path in listed if path.name == name and not (path / "condabin").is_dir()]
        found = sorted(filter(is_conda, same), key=lambda path: not (path / STAMP).is_file())
        prefix, exists = (found[0], True) if found else (folder_of_new(conda, usual) / name, False)
    if " " in str(prefix):
        raise SetupError(f"{prefix} has a space in its path, which breaks conda environments: use --manager venv.")
    return prefix, exists


def folder_of_new(conda: str, usual: Path) -> Path:
    """Return the folder in which conda creates environments: the first of its own that can be written."""
    facts = ask(conda, "info")
    folders = [Path(folder) for folder in facts.get("envs_dirs") or facts.get("envs directories") or []]
    for folder in folders:
        there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
        if there.is_dir() and os.access(there, os.W_OK):
            return folder
    return folders[0] if folders else usual


def ask(conda: str, *command: str) -> dict[str, Any]:
    """Return the answer of a command that changes nothing. Raises SetupError."""
    try:
        done = subprocess.run([conda, *command, "--json"], capture_output=True, text=True, check=True)
        return dict(json.loads(done.stdout))
    except (OSError, subprocess.CalledProcessError, ValueError, TypeError) as error:
        raise SetupError(f"{conda} does not work ({error}): repair it or use --manager venv.") from error


def is_conda(prefix: Path) -> bool:
    """Return whether the folder is a conda environment."""
    return (prefix / "conda-meta").is_dir()


# ------------------------------------------------------------------------------------------------ What the file lists


def conda_name() -> str:
    """Return the environment's name from setup/conda-environment.yml. Raises SetupError."""
    # No option, no path outside of the environments, nor conda's base: the update removes packages it does not list.
    found = re.search(r"^name:\s*([\"']?)(\w[\w.-]*)\1\s*(#.*)?$", FILE.read_text(encoding="utf-8"), re.MULTILINE)
    if not found or found.group(2) in ("base", "root"):
        raise SetupError("setup/conda-environment.yml has no name of its own: write a line `name: my-environment`.")
    return found.group(2)


def conda_lists() -> tuple[list[str], list[str], list[str]]:
    """Return channels, conda's dependencies, and pip's, from setup/conda-environment.yml. Raises SetupError."""
    lists: dict[str, list[str]] = {"channels": [], "dependencies": [], "pip": []}
    key, depth = "", 0  # of `- pip:`, whose items are further to the right
    # Not with PyYAML, which is in the environment alone.
    for number, text in enumerate(FILE.read_text(encoding="utf-8").splitlines(), 1):
        line = re.sub(r"(^|\s)#.*", "", text).rstrip()
        section = re.fullmatch(r"(\w+):\s*(\[.*\])?", line)
        item = re.fullmatch(r"\s*-\s+([\"']?)([\w./:~][^\"']*[^\"':]|\w)\1", line)
        if key == "pip" and line and len(line) - len(line.lstrip()) <= depth:
            key = "dependencies"
        if section and section.group(1) in ("channels", "dependencies"):
            key = section.group(1)
            lists[key] = [part.strip("\"' ") for part in re.findall(r"[^\[\],]+", section.group(2) or "")]
        elif key == "dependencies" and re.fullmatch(r"\s*-\s+pip:", line):
            key, depth = "pip", len(line) - len(line.lstrip())
        elif item and key:
            lists[key].append(item.group(2).strip())
        elif line and not re.match(r"(name|prefix):|---$", line):
            raise SetupError(
                f"setup/conda-environment.yml, line {number}: `{line.strip()}` is neither a channel nor a package: "
                "write `- name=version`, one a line, or below `- pip:` for packages of pip."
            )
    # Until conda 25, `nodefaults` stood for what --override-channels does; later it is a channel that is not there.
    channels = [channel for channel in lists["channels"] if channel != "nodefaults"] or ["conda-forge"]
    if "python" not in map(package_name, lists["dependencies"]):
        raise SetupError("setup/conda-environment.yml lists no Python: write `- python=3.11` under `dependencies:`.")
    return channels, lists["dependencies"], lists["pip"]


def package_name(dependency: str) -> str:
    """Return the package's name in `conda-forge::python >=3.11`."""
    return re.split(r"[\s=<>!~\[]", dependency.rpartition("::")[2].strip())[0].lower()


# ----------------------------------------------------------------------------------------- What is in the environment


def not_needed(prefix: Path, dependencies: list[str]) -> list[str]:
    """Return the conda packages that neither the file lists nor a listed package needs."""
    needs = {record["name"]: list(map(package_name, record.get("depends", []))) for record in conda_records(prefix)}
    wanted = list(map(package_name, dependencies))
    for name in wanted:  # grows on the way
        wanted += [other for other in needs.get(name, []) if other not in wanted]
    return sorted(set(needs) - set(wanted))


def made_from_file(prefix: Path, dependencies: list[str]) -> bool:
    """Return whether the environment has what the file lists and nothing else, as `conda env create` leaves it."""
    names = {record["name"] for record in conda_records(prefix)}
    site = site_packages(prefix)
    folders = {path.name for path in site.glob("*-info")} if site else set()
    by_conda = {folder for _, _, folder in conda_distributions(prefix)}
    listed = set(map(package_name, dependencies))
    return listed <= names and not not_needed(prefix, dependencies) and folders <= by_conda


def mixed(prefix: Path) -> dict[str, list[Path]]:
    """Return the conda packages over which pip or uv put another version, each with the files of both."""
    site = site_packages(prefix)
    found: dict[str, list[Path]] = {}
    if not site:
        return found
    for record, name, folder in conda_distributions(prefix):
        others = [path for path in site.glob("*-info") if project(path.name)[0] == name and path.name != folder]
        if others or not (site / folder).is_dir():
            files = [prefix / file for file in record["files"]]
            for other in others:
                lines = (other / "RECORD").read_text(encoding="utf-8") if (other / "RECORD").is_file() else ""
                files += [site / line.split(",")[0].strip('"') for line in lines.splitlines()]
                files += [path for path in other.rglob("*") if path.is_file()]
            found[record["name"]] = files
    return found


def delete(files: list[Path], prefix: Path) -> None:
    """Delete files of the environment, then the folders that have nothing else but compiled files."""
    inside = [file for file in map(Path, map(os.path.normpath, files)) if prefix in file.parents]
    for file in inside:
        if file.is_file() or file.is_symlink():
            file.unlink()
    for folder in sorted(
        {folder for file in inside for folder in file.parents if prefix in folder.parents}, reverse=True
    ):
        if folder.is_dir() and all(path.name == "__pycache__" for path in folder.iterdir()):
            shutil.rmtree(folder)
