"""Other users of this machine: what they leave in the folder for temporary files is neither read nor waited for."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NOBODY = 65534
ANSWERS = "_commit: v0\n_src_path: /nowhere\n"

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="links are for administrators there, and pipes no files"
)

OLD_RENDER = """if True:
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from migrate import Update
    print(Update(Path.cwd(), ".copier-answers.yml", Path(sys.argv[1]).parent).old_render())
"""


def old_render(tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Let an update in a workspace look for the folder into which Copier has rendered the old release."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    (folder / ".copier-answers.yml").write_text(ANSWERS)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    return subprocess.run(
        [sys.executable, "-c", OLD_RENDER, str(REPOSITORY / "hooks")],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_the_old_render_of_this_user_is_found(tmp_path: Path) -> None:
    render = tmp_path / "copier._main.x.old_copy.y"
    render.mkdir()
    (render / ".copier-answers.yml").write_text(ANSWERS)
    assert old_render(tmp_path).stdout == f"{render}\n"


@pytest.mark.parametrize("kind", ["pipe", "pipe of another", "folder of another", "link"])
def test_what_others_leave_is_no_old_render_and_holds_no_update(tmp_path: Path, kind: str) -> None:
    if "another" in kind and os.geteuid() != 0:
        pytest.skip("only root can act as another user")
    render = tmp_path / "copier._main.x.old_copy.y"
    real = tmp_path / "real" if kind == "link" else render
    real.mkdir()
    if "pipe" in kind:
        os.mkfifo(real / ".copier-answers.yml")
    else:
        (real / ".copier-answers.yml").write_text(ANSWERS)
    if kind == "link":
        render.symlink_to(real)
    if "another" in kind:
        os.chown(render, NOBODY, NOBODY)
    done = old_render(tmp_path)  # the old release is rendered again, which is impossible here
    assert done.stdout == "" and "the old release cannot be rendered" in done.stderr


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that others can look into; pytest's own are closed to them."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("taken", [False, True])
def test_another_user_cannot_hold_the_lock_of_an_environment(
    open_to_all: Path, small_workspace: Any, taken: bool
) -> None:
    import fcntl

    if os.geteuid() != 0:
        pytest.skip("only root can act as another user")
    workspace = small_workspace(open_to_all / "workspace", open_to_all / "machine", shutil.which("uv") is not None)
    if taken:  # the name of the folder is no secret
        folder = open_to_all / "machine" / "create_env-0"
        folder.mkdir(mode=0o777)
        os.chown(folder, NOBODY, NOBODY)
    assert workspace.run().returncode == 0
    locks = [*open_to_all.rglob("create_env-*.lock")]
    assert len(locks) == 1
    with contextlib.ExitStack() as held:
        os.seteuid(NOBODY)
        try:
            with contextlib.suppress(PermissionError):
                fcntl.flock(held.enter_context(locks[0].open()), fcntl.LOCK_EX)
        finally:
            os.seteuid(0)
        command = [sys.executable, str(workspace.root / "setup" / "create_env.py")]
        done = subprocess.run(command, env=workspace.env, capture_output=True, text=True, timeout=60, check=False)
    assert "is up to date" in done.stdout and "Another run" not in done.stdout
