"""What is installed in an environment, by whom. Read from its files; nothing is imported from it."""

# Only the standard library, and nothing newer than Python 3.8, as in create_env.py.
from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def python_in(prefix: Path) -> Path:
    """Return the environment's own Python."""
    if sys.platform != "win32":
        return prefix / "bin" / "python"
    return prefix / "Scripts" / "python.exe" if prefix.parent == ROOT else prefix / "python.exe"


def site_packages(prefix: Path) -> Path | None:
    """Return the folder of packages of the environment's own Python, None if it does not run."""
    # Asked, not searched for: after a change of Python, the folder of the old one is still there.
    command = [str(python_in(prefix)), "-I", "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return Path(done.stdout.strip())


def torch_versions(prefix: Path) -> list[str]:
    """Return the torch versions in the environment: none, one, or several after an interruption."""
    site = site_packages(prefix)
    return [project(folder.name)[1] for folder in site.glob("torch-*.dist-info")] if site else []


def project(folder: str) -> tuple[str, str]:
    """Return name and version of a package from the name of its folder: torch-2.13.0.dist-info."""
    name, _, rest = folder.partition("-")
    return canonical(name), re.sub(r"(-py[\d.]+)?\.(dist|egg)-info$", "", rest)


def canonical(name: str) -> str:
    """Return a package's name as all spellings of it are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def conda_records(prefix: Path) -> list[dict[str, Any]]:
    """Return what conda knows about each package that it installed; nothing for a venv."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(prefix.glob("conda-meta/*.json"))]


def conda_distributions(prefix: Path) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yield each Python package that conda installed: its record, pip's name for it, and its *-info folder."""
    for record in conda_records(prefix):
        found = (re.search(r"site-packages/([^/]+\.(?:dist|egg)-info)(?:/|$)", file) for file in record["files"])
        for folder in sorted({match.group(1) for match in found if match}):
            yield record, project(folder)[0], folder
