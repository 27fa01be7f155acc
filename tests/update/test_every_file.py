"""A workspace of each release, with an edit in every file, is updated to this one and keeps every edit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import NOW, RELEASES, commit, contents, git, known, run_copier

Copy = Callable[..., Path]
# those that give the most files
ANSWERS = {"platform": "linux", "environment": "venv", "device": "gpu", "target": "azure", "model": "phi-2"}
ANSWERS_FILE = ".copier-answers.yml"
CONFLICTS = {
    ".gitattributes",  # both lines that it has are others since 0.1.2, and the user's stands beside them
    "setup/azure_gpus.yaml",  # since 0.6.0, the lines around the user's have other numbers
    "setup/models.yaml",  # since 0.6.0, new models stand beside the user's line
}
COMMENTS = {"html": "<!-- {} -->", "bicep": "// {}", "md": "{}.\n", "jsonl": '{{"messages": "{}"}}'}
PLACES = {"py": r"(def|class|@)", "md": "#", "bicep": r"(param|var|resource|module|output|@)", "html": r"\s*<(div|h|p)"}
VALUE = re.compile(r"(\s*(?:- )?[\w.-]+(?::| =) )(true|false|\d[\d.e-]*|\"[^\"]+\"|[\w./-]+)(?=\s*(#.*)?\n)")


class Edit:
    """What a user did to a file: a line of their own, and in YAML and TOML another value."""

    def __init__(self, name: str, text: str, mark: str) -> None:
        self.line, self.key, self.value = "", "", ""
        kind = name.rpartition(".")[2]
        lines = text.splitlines(keepends=True)
        at = self.near_the_middle(lines, VALUE)
        if kind in ("yaml", "yml", "toml") and (found := VALUE.match(lines[at])):
            number = found[2][0].isdigit()
            self.key, self.value = found[1], mark[-4:] if number else f'"{mark}"' if found[2][0] == '"' else mark
            lines[at] = f"{self.key}{self.value}{lines[at][found.end() :]}"
        if kind == "json":
            at, self.line = lines.index("{\n") + 1, f'  "{mark}": true,\n'
        elif kind in ("txt", "jsonl", "gitignore", "gitattributes"):
            at, self.line = len(lines), COMMENTS.get(kind, "{}").format(mark) + "\n"
        else:
            at = self.near_the_middle(lines, re.compile(PLACES.get(kind, r"(?=\S)(?!#)")))
            self.line = COMMENTS.get(kind, "# {}").format(mark) + "\n"
        self.text = "".join([*lines[:at], self.line, *lines[at:]])

    @staticmethod
    def near_the_middle(lines: list[str], pattern: re.Pattern[str]) -> int:
        """Return the number of the line at or after the middle that matches, else of the last one before it."""
        matching = [number for number, line in enumerate(lines) if pattern.match(line)]
        return next((number for number in matching if number >= len(lines) // 2), matching[-1] if matching else 0)

    def is_in(self, text: str) -> bool:
        return self.line in text and f"{self.key}{self.value}" in text

    def rest(self, text: str) -> list[str]:
        """Return the lines that are not the user's."""
        lines = text.replace(self.line, "", 1).splitlines()
        return [line for line in lines if not self.key or not line.startswith(self.key)]


@pytest.mark.parametrize("tag", RELEASES)
def test_every_file_keeps_its_edit_and_is_otherwise_as_in_this_release(
    tag: str, copy: Copy, releases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = copy(tmp_path / "tone", known(releases, tag), **ANSWERS)
    edits = {}
    for number, (name, data) in enumerate(sorted(contents(workspace).items()), start=1):
        if name != ANSWERS_FILE:
            edits[name] = Edit(name, data.decode(), f"mine-{7000 + number}")
            (workspace / name).write_bytes(edits[name].text.encode())
    commit(workspace, "My edits")

    done = run_copier(workspace, "update", "--trust", "--defaults", "--skip-tasks", "--vcs-ref", NOW)

    assert done.returncode == 0, done.stderr
    conflicts = git(workspace, "diff", "--name-only", "--diff-filter=U").split()
    after = {name: data.decode() for name, data in contents(workspace).items()}
    fresh = {name: data.decode() for name, data in contents(copy(tmp_path / "fresh/tone", NOW, **ANSWERS)).items()}
    where = {name: [other for other, text in after.items() if edit.is_in(text)] for name, edit in edits.items()}
    lost = [name for name, found in where.items() if not found]
    with capsys.disabled():
        print(f"\n{tag}: {len(edits)} files edited, {len(lost)} edits lost, {len(conflicts)} conflicts {conflicts}")
    assert not lost, done.stderr
    assert set(conflicts) <= CONFLICTS, conflicts
    assert conflicts == [name for name, text in sorted(after.items()) if "<<<<<<< before updating" in text]
    assert f"The update ended with {f'{len(conflicts)} conflict' if conflicts else 'no conflict'}" in done.stderr
    for name, (found, *_) in where.items():
        if found not in conflicts and found in fresh and not found.endswith(".jsonl"):
            assert edits[name].rest(after[found]) == edits[name].rest(fresh[found]), found
    assert sorted(after) == sorted({*fresh, *(name for name, [found, *_] in where.items() if found == name)})
    assert git(workspace, "status", "--porcelain", "--", ANSWERS_FILE).strip() == f"M {ANSWERS_FILE}"
