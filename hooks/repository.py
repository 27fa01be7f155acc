"""The git repository of a workspace: its index, and what is not part of the template."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from typing import Any

TAB = "\t"  # before the name in git's listing of the index: mode, hash, stage

# characters that move the cursor, end a line or turn the direction of writing
CONTROLS = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object) -> str:
    """Return a text with control characters as escapes like \\u001b: a repository may hold files of any name."""
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", str(text))


class Repository:
    """The repository that a workspace is in; `folder` is the workspace, `prefix` its path in the repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prefix = self.path("--show-prefix")

    @property
    def top(self) -> Path:
        """The repository's top folder."""
        return Path(self.path("--show-toplevel"))

    def path(self, *options: str) -> str:
        """Return a path from `git rev-parse`."""
        return self.git("rev-parse", *options).decode().rstrip("\n")

    def git(self, *arguments: str, given: bytes = b"") -> bytes:
        """Run git in the workspace, and return its output; empty if it fails."""
        command = ["git", "-c", "core.quotePath=false", *arguments]
        return subprocess.run(command, cwd=self.folder, input=given, capture_output=True, check=False).stdout

    def listed(self, *arguments: str) -> list[str]:
        """Run git in the workspace, and return its NUL-separated output."""
        return split(self.git(*arguments))

    def restore_index(self, lines: list[str]) -> None:
        """Restore the index from before the update: Copier may have recorded its own conflicts."""
        now = self.listed("ls-files", "--stage", "-z")
        changed = [f"0 {'0' * 40}\t{self.prefix}{line.partition(TAB)[2]}" for line in now if line not in lines]
        for line in lines:
            facts, _, name = line.partition(TAB)
            if line not in now:
                changed.append(f"{facts}\t{self.prefix}{name}")
        self.update_index(changed)

    def mark_conflict(self, name: str, sides: tuple[bytes | None, bytes, bytes]) -> None:
        """Record a conflict in the index, so git shows it."""
        lines = [f"0 {'0' * 40}\t{self.prefix}{name}"]
        for stage, data in enumerate(sides, start=1):
            if data is not None:
                digest = self.git("hash-object", "-w", "--stdin", given=data).decode().strip()
                lines.append(f"100644 {digest} {stage}\t{self.prefix}{name}")
        self.update_index(lines)

    def update_index(self, lines: list[str]) -> None:
        """Change entries of the index; an editor may hold its lock for a moment."""
        given = "".join(f"{line}\0" for line in lines).encode(errors="surrogateescape")
        for _ in range(40):
            command = ["git", "update-index", "-z", "--index-info"]
            done = subprocess.run(command, cwd=self.folder, input=given, capture_output=True, check=False)
            if done.returncode == 0:
                return
            time.sleep(0.25)
        raise OSError(done.stderr.decode(errors="replace").strip())

    def put_back_others(self, state: dict[str, Any]) -> None:
        """Restore files that are not part of the template, in case Copier wrote or restored them."""
        names = set(state["names"])
        ours = [name for line in state["index"] if (name := line.partition(TAB)[2]) not in names]
        for name in self.listed("ls-files", "--modified", "--deleted", "-z"):
            if name in ours:
                self.git("checkout-index", "--force", "--", name)
        top = self.top
        for name in state["gone"]:
            if not name.startswith(self.prefix) or name[len(self.prefix) :] not in names:
                (top / name).unlink(missing_ok=True)


def split(output: bytes) -> list[str]:
    """Split git's NUL-separated output."""
    return [part for part in output.decode(errors="surrogateescape").split("\0") if part]
