"""Render the demo workspace into docs/example/, to look at before copying; with --check, only report what is stale."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

from copier import run_copy
from copier.errors import DirtyLocalWarning

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "docs" / "example"
ANSWERS = {"project_name": "example", "platform": "linux", "environment": "venv"}
OF_THE_MOMENT = ".copier-answers.yml"  # names the template's commit and folder


def main() -> int:
    """Write the example, or check that it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        rendered = Path(folder) / "example"
        warnings.filterwarnings("ignore", category=DirtyLocalWarning)
        options = {"defaults": True, "quiet": True, "skip_tasks": True, "vcs_ref": "HEAD"}
        run_copy(str(ROOT), rendered, ANSWERS, **options)
        (rendered / OF_THE_MOMENT).unlink()
        new, old = contents(rendered), contents(EXAMPLE)
        stale = sorted(name for name in {*new, *old} if new.get(name) != old.get(name))
        if stale and check:
            print(f"docs/example: {', '.join(stale)}: out of date; run `make docs`.", file=sys.stderr)
            return 1
        if stale:
            shutil.rmtree(EXAMPLE, ignore_errors=True)
            shutil.copytree(rendered, EXAMPLE)
    print(f"{f'Written: {len(stale)} files of docs/example' if stale else 'The example is up to date.'}")
    return 0


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, with plain line ends."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes().replace(b"\r\n", b"\n")
        for path in folder.rglob("*")
        if path.is_file()
    }


if __name__ == "__main__":
    sys.exit(main())
