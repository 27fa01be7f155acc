"""What the user of a workspace does, drawn at random; each line that they write has a token of its own."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .draws import ANSWERS, Tree, git, lf, lines


@dataclass
class Edit:
    """What a user wrote in a text, and took out of it."""

    parts: list[bytes] = field(default_factory=list)  # each is a part of a line
    removed: set[bytes] = field(default_factory=set)  # whole lines
    keys: set[bytes] = field(default_factory=set)  # of settings with another value


class User:
    """Someone who changes a workspace; `edits` says what of a text is theirs, `did` what was done."""

    def __init__(self, rng: random.Random, workspace: Path, old: Tree, new: Tree, renames: dict[str, str]) -> None:
        self.rng, self.workspace, self.old, self.new, self.renames = rng, workspace, old, new, renames
        self.edits: dict[str, Edit] = {}
        self.did: list[str] = []
        self.used: set[str] = {ANSWERS}
        self.count = 0

    def act(self) -> None:
        actions: dict[Callable[[], str], int] = {
            self.edit: 14,
            self.edit_and_rename: 1,
            self.take_new_name: 2,
            self.add: 4,
            self.add_what_comes_later: 4,
            self.delete: 5,
            self.delete_folder: 1,
            self.rename: 5,
            self.chmod: 3,
            self.link: 3,
            self.link_folder: 1,
            self.ignore: 3,
            self.untrack: 4,
            self.crlf: 4,
            self.answers_in_crlf: 1,
            self.bom: 2,
            self.utf_16: 2,
            self.binary: 2,
            self.empty: 2,
            self.folder: 1,
            self.file_for_folder: 1,
            self.reject: 1,
        }
        action = self.rng.choices(list(actions), list(actions.values()))[0]
        if said := action():
            self.did.append(said)

    def token(self) -> str:
        self.count += 1
        return f"tok{self.count:03d}x{self.rng.randrange(10**6):06d}"

    def some_file(self) -> str:
        """Choose a file of the template that is still as it was; rather one that the update changes."""
        names = sorted(name for name in self.old if name not in self.used and (self.workspace / name).is_file())
        busy = [name for name in names if name in self.renames or lf(self.old[name].data) != self.coming(name)]
        name = self.rng.choice(busy if busy and self.rng.random() < 0.6 else names)
        self.used.add(name)
        return name

    def coming(self, name: str) -> bytes | None:
        entry = self.new.get(self.renames.get(name, name))
        return lf(entry.data) if entry else None

    def new_name(self) -> str:
        folder = self.rng.choice(["", "finetuning/", "mine/", "Über uns/", "infra/", ".github/", "later/"])
        if (self.workspace / folder.rstrip("/")).is_file():  # the user has put a file in place of a folder
            folder = ""
        word = self.rng.choice(["my notes", "größe", "it's", "-x", "#1", "a[1]", "mine", "a\nb"])
        return f"{folder}{word}-{self.token()}.txt{self.rng.choice(['', '', '', ' '])}"

    # ---- in a text

    def edit(self, name: str = "") -> str:
        name = name or self.some_file()
        path, edit = self.workspace / name, self.edits.setdefault(name, Edit())
        text = path.read_bytes().split(b"\n")
        done = [self.change(name, text, edit) for _ in range(self.rng.choice([1, 1, 2, 3]))]
        data = b"\n".join(text)
        if self.rng.random() < 0.1:
            data = data.rstrip(b"\n")
            done.append("no newline at the end")
        path.write_bytes(data)
        return f"edit {name}: {', '.join(done)}"

    def change(self, name: str, text: list[bytes], edit: Edit) -> str:
        own_line = self.line()
        once = [
            at
            for at, line in enumerate(text)
            if len(line.strip()) > 3 and lines(self.old[name].data).count(line) == 1 and line not in edit.removed
        ]
        kind = self.rng.choice(["first", "middle", "last", "replace", "take out", "value", "trailing"])
        if kind in ("replace", "take out", "value", "trailing") and not once:
            kind = "middle"
        if kind in ("first", "middle", "last"):
            last = len(text) - 1 if text[-1] == b"" else len(text)
            at = {"first": 0, "middle": self.rng.randint(0, last), "last": last}[kind]
            text.insert(at, own_line)
            edit.parts.append(own_line)
            return f"{kind} line {own_line!r}"
        at = self.rng.choice(once)
        if kind == "value":
            values = [number for number in once if setting(text[number]) and name.endswith((".yaml", ".yml", ".toml"))]
            at = self.rng.choice(values) if values else at
        line = text[at]
        key = setting(line)
        edit.removed.add(line)
        if kind == "take out":
            del text[at]
        elif kind == "trailing":
            text[at] = line + f"  # {self.token()}  ".encode()
            edit.parts.append(text[at][len(line) :])
        elif kind == "value" and key:
            token = self.token().encode()
            text[at] = line[: line.index(key) + len(key) + 1] + b" " + token
            edit.parts.append(token)
            edit.keys.add(key)
        else:
            text[at] = own_line
            edit.parts.append(own_line)
        return f"{kind} {line!r} → {text[at] if kind != 'take out' else ''!r}"

    def line(self) -> bytes:
        token = self.token()
        forms = ["# {} ", "{}: 1", "  {}\t", "\t{}", "======= {}", "<<<<<<< {}", "ü「{}」", "{} = true", "\\{}\\"]
        return (self.rng.choice(forms).format(token)).encode() if self.rng.random() < 0.9 else b"\xe4 " + token.encode()

    def bom(self) -> str:
        name = self.some_file()
        path = self.workspace / name
        data = path.read_bytes()
        path.write_bytes(b"\xef\xbb\xbf" + data)
        return f"BOM in {name}"

    def crlf(self) -> str:
        name = self.some_file()
        said = self.edit(name) if self.rng.random() < 0.5 else ""
        path = self.workspace / name
        path.write_bytes(lf(path.read_bytes()).replace(b"\n", b"\r\n"))
        return f"CRLF in {name} {said}"

    def answers_in_crlf(self) -> str:
        path = self.workspace / ANSWERS
        path.write_bytes(lf(path.read_bytes()).replace(b"\n", b"\r\n"))
        return "CRLF in the answers"

    def empty(self) -> str:
        name = self.some_file()
        (self.workspace / name).write_bytes(b"")
        self.edits[name] = Edit(removed=set(lines(self.old[name].data)))
        return f"empty {name}"

    def grow(self, size: int) -> None:
        """Make some file of the template larger than that."""
        name = self.some_file()
        with (self.workspace / name).open("ab") as file:
            file.write(b"\nmuch more" * size)
        self.edits.setdefault(name, Edit()).parts.append(b"much more")
        self.did.append(f"grow {name}")

    # ---- other contents

    def binary(self) -> str:
        name = self.some_file()
        (self.workspace / name).write_bytes(bytes(range(256)) + self.token().encode())
        return f"binary {name}"

    def utf_16(self) -> str:
        name = self.some_file()
        path = self.workspace / name
        path.write_bytes((path.read_bytes().decode() + self.token()).encode("utf-16"))
        return f"UTF-16 {name}"

    def chmod(self) -> str:
        name = self.some_file()
        path = self.workspace / name
        path.chmod(path.stat().st_mode ^ 0o111)
        said = self.edit(name) if self.rng.random() < 0.3 else ""
        return f"chmod {name} {said}"

    # ---- names

    def add(self, name: str = "") -> str:
        name = name or self.new_name()
        path = self.workspace / name
        taken = path.exists() or path.is_symlink() or name in self.used
        if taken or any((self.workspace / parent).is_file() for parent in Path(name).parents):
            return ""
        with_parents(path)
        self.used.add(name)
        own_lines = [self.line() for _ in range(self.rng.randint(1, 4))]
        self.edits[name] = Edit(parts=own_lines)
        path.write_bytes(b"\n".join(own_lines) + self.rng.choice([b"\n", b"", b"\r\n"]))
        if self.rng.random() < 0.25:
            path.write_bytes(b"\0" + self.token().encode())
        if self.rng.random() < 0.2:
            path.chmod(0o755)
        return f"add {name}"

    def add_what_comes_later(self) -> str:
        later = sorted({*self.new, *self.renames.values()} - set(self.old))
        return self.add(self.rng.choice(later)) if later else ""

    def delete(self) -> str:
        name = self.some_file()
        (self.workspace / name).unlink()
        return f"delete {name}"

    def delete_folder(self) -> str:
        names = sorted({name.rpartition("/")[0] for name in self.old if "/" in name})
        name = self.rng.choice(names)
        if any(used.startswith(f"{name}/") for used in self.used):
            return ""
        self.used |= {other for other in self.old if other.startswith(f"{name}/")}
        shutil.rmtree(self.workspace / name)
        return f"delete {name}/"

    def rename(self, name: str = "") -> str:
        name = name or self.some_file()
        target = self.new_name()
        if name in self.renames and self.rng.random() < 0.5 and self.renames[name] not in self.used:
            target = self.renames[name]  # as the template will call it
        self.used.add(target)
        with_parents(self.workspace / target)
        (self.workspace / name).rename(self.workspace / target)
        if name in self.edits:
            self.edits[target] = self.edits.pop(name)
        return f"rename {name} → {target}"

    def edit_and_rename(self) -> str:
        name = self.some_file()
        return f"{self.edit(name)}; {self.rename(name)}"

    def take_new_name(self) -> str:
        """Have a file of one's own under the name that the template gives to another, which is edited."""
        names = sorted(name for name in self.renames if name not in self.used and (self.workspace / name).is_file())
        name = self.rng.choice(names) if names else ""
        self.used.add(name)
        return f"{self.edit(name)}; {self.add(self.renames[name])}" if name else ""

    def link(self) -> str:
        name = self.some_file()
        path = self.workspace / name
        up = "../" * name.count("/")
        target = self.rng.choice([f"{up}README.md", f"{up}nowhere", str(self.outside("file")), f"{up}finetuning"])
        path.unlink()
        path.symlink_to(target)
        return f"link {name} → {target}"

    def outside(self, name: str) -> Path:
        """Return a file outside of the workspace, which a link may point to."""
        path = self.workspace.parent / f"{name} outside.txt"
        path.write_text(f"{name} outside\n")
        return path

    def link_folder(self) -> str:
        name = self.rng.choice(["dataset", "inference", ".vscode"])
        target = self.workspace.parent / f"{name} moved"
        if target.exists() or any(used.startswith(f"{name}/") for used in self.used):
            return ""
        self.used |= {other for other in self.old if other.startswith(f"{name}/")}
        (self.workspace / name).rename(target)
        (self.workspace / name).symlink_to(target)
        return f"link {name}/ → {target}"

    def folder(self) -> str:
        name = self.some_file()
        path = self.workspace / name
        path.unlink()
        path.mkdir()
        (path / "mine.txt").write_text(self.token())
        return f"folder {name}"

    def file_for_folder(self) -> str:
        name = self.rng.choice(sorted({name.rpartition("/")[0] for name in {*self.old, *self.new} if "/" in name}))
        if any(used.startswith(f"{name}/") for used in self.used):
            return ""
        self.used |= {name, *(other for other in self.old if other.startswith(f"{name}/"))}
        shutil.rmtree(self.workspace / name, ignore_errors=True)
        with_parents(self.workspace / name)
        (self.workspace / name).write_text(self.token())
        return f"file {name}"

    # ---- what git does not see

    def reject(self) -> str:
        """Keep what `git apply` left of a patch, as Copier leaves it too."""
        self.exclude("*.rej")
        return self.add(f"{self.rng.choice(sorted(self.old))}.rej")

    def pattern(self) -> str:
        return self.rng.choice(["*.toml", "/finetuning/", ".vscode/", "README.md", "*.py", "/setup", "*.rej", "later/"])

    def ignore(self) -> str:
        pattern = self.pattern()
        if self.rng.random() < 0.5 or ".gitignore" in self.used:
            self.exclude(pattern)
            return f"exclude {pattern}"
        self.used.add(".gitignore")
        line = f"{pattern}"
        with (self.workspace / ".gitignore").open("a") as file:
            file.write(f"# {self.token()}\n{line}\n")
        text = (self.workspace / ".gitignore").read_bytes()
        self.edits[".gitignore"] = Edit(parts=lines(text)[-2:])
        return f"ignore {pattern}"

    def exclude(self, pattern: str) -> None:
        path = self.workspace / git(self.workspace, "rev-parse", "--git-path", "info/exclude").strip()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{pattern}\n")

    def untrack(self) -> str:
        """Let git forget a file and ignore it; it may be edited, and nothing of that is committed."""
        name = self.some_file()
        git(self.workspace, "rm", "--cached", "--quiet", "--ignore-unmatch", "--", f":(literal){name}")
        self.exclude(name.replace("[", "\\["))
        return f"untrack {name}; {self.edit(name) if self.rng.random() < 0.7 else ''}"


def with_parents(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)


def setting(line: bytes) -> bytes | None:
    """Return the name in a line like `name: value` or `name = value`, with the text between it and the mark."""
    found = re.match(rb"\s*(?:- )?(\w+ ?)[:=]\s*[^\s#]", line)
    return found[1] if found else None
