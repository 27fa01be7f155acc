"""Releases of the template in a git repository of their own, and updates in this process.

The releases are those of releases.yml, out of this repository's history; OLDER, the working tree with changes of every
kind, to update from before there is a release; NOW, the working tree; and NEXT, three after it.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import copier._main
import copier._user_data
import plumbum
import pytest
import yaml
from copier._cli import CopierApp
from copier._main import Worker
from copier._settings import SettingsModel
from copier._subproject import Subproject
from copier._template import Template
from copier._types import Phase
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("copier.yml", "catalog", "hooks", "template", ".gitattributes")
RELEASES: dict[str, str] = yaml.safe_load((ROOT / "tests/update/releases.yml").read_text(encoding="utf-8"))
MAJOR = Version(list(RELEASES)[-1]).major if RELEASES else 0
OLDER, NOW = f"v{MAJOR + 1}.0.0", f"v{MAJOR + 2}.0.0"
NEXT = tuple(f"v{MAJOR + 2}.{number}.0" for number in (1, 2, 3))


def before(releases: list[str], every: bool) -> list[str]:
    """Return the releases from which workspaces are brought to the working tree, the newest stable one first."""
    newest = sorted(releases, key=Version, reverse=True)
    stable = [tag for tag in newest if not Version(tag).is_prerelease] or newest
    return list(dict.fromkeys([*stable[:1], *(newest if every else newest[-1:])])) or [OLDER]


BEFORE = before(list(RELEASES), every=os.environ.get("EVERY_ANSWER") == "1")
# Nothing here outlives the tests: git need not tidy up after itself, nor wait for the disk.
GIT_CONFIG = """
[user]
name = Test
email = test@example.org
[init]
defaultBranch = main
[maintenance]
auto = false
[gc]
auto = 0
[core]
fsync = none
compression = 0
"""
FORKED = {"worker": Worker}  # with which run_copier works
OPTIONS = {"defaults": True, "overwrite": True, "quiet": True, "unsafe": True, "skip_tasks": True}


@pytest.fixture(scope="session", autouse=True)
def _plain_git_in_memory() -> Iterator[None]:
    """Git without the settings of the person who runs the tests; temporary files in memory where there is room.

    An update writes hundreds of files, and takes half the time there.
    """
    memory = Path("/dev/shm")
    room = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**30
    with tempfile.TemporaryDirectory(dir=memory if room else None) as folder, pytest.MonkeyPatch.context() as patch:
        config = Path(folder) / "gitconfig"
        autocrlf = os.environ.get("AUTOCRLF", "false")  # true is what Git for Windows suggests
        config.write_text(f"{GIT_CONFIG}autocrlf = {autocrlf}\n")
        variables = {"GIT_CONFIG_GLOBAL": str(config), "GIT_CONFIG_NOSYSTEM": "1", "GIT_TEMPLATE_DIR": ""}
        for name, value in {**variables, "TMPDIR": folder}.items():
            patch.setenv(name, value)
            patch.setitem(plumbum.local.env, name, value)  # what Copier starts has the variables of when it was loaded
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture
def tmp_path(_plain_git_in_memory: None) -> Iterator[Path]:
    """A folder of the test's own, there."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder, and return what it says."""
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout


def commit(folder: Path, message: str) -> None:
    """Commit all of a folder, which becomes a repository with the first."""
    if not (folder / ".git").exists():
        git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", message)


def run_copier(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the program `copier` in a folder, as a user does; in a fork, since importing it takes as long as an update.

    Where a test uses `worker`, it knows what that one has cloned and compiled.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            status: Any = 1
            try:
                plumbum.local.cwd.chdir(folder)
                plumbum.local.env.clear()
                plumbum.local.env.update(os.environ)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
                copier._main.Worker = FORKED["worker"]  # type: ignore[misc]
                CopierApp.run(["copier", *words])
            except SystemExit as end:
                status = end.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status or 0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(["copier", *words], status, out.read(), err.read())


def release(template: Path, tag: str) -> None:
    """Commit what is in the template's folder, and tag it."""
    commit(template, tag)
    git(template, "tag", tag)


def empty(folder: Path) -> None:
    """Remove all but the repository."""
    for path in folder.iterdir():
        if path.name != ".git":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def working_tree(folder: Path) -> None:
    """Put the template as it is now into a folder."""
    shutil.copy2(ROOT / "copier.yml", folder)
    shutil.copy2(ROOT / ".gitattributes", folder)
    for name in PARTS[1:4]:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))


def changed(template: Path, number: int) -> None:
    """Change a template as a release may: lines in all files but rows, files that come and go, a question, a model."""
    sources = template / "template"
    for path in [path for path in sources.rglob("*") if path.is_file()]:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        comment = f"# since release {number}\n"
        match path.name.removesuffix(".jinja").rpartition(".")[2]:
            case "py" | "yml" | "toml" | "txt" | "gitignore" | "yaml" if "__" not in path.name:
                lines.append(comment)
            case "md":
                lines.append(f"\nSince release {number}.\n")
            case "html":
                lines.append(f"<!-- since release {number} -->\n")
            case "json":
                lines.insert(lines.index("{\n") + 1, f"  // since release {number}\n")
            case _:
                continue
        path.write_text("".join(lines), encoding="utf-8")
    for folder in ("finetuning", "later"):
        (sources / folder).mkdir(exist_ok=True)
        (sources / folder / f"release_{number}.py").write_text(comment)
        (sources / folder / f"release_{number - 1}.py").unlink(missing_ok=True)
    config = template / "copier.yml"
    text = config.read_text(encoding="utf-8")
    config.write_text(f"{text}\nquestion_{number}:\n  type: int\n  help: New.\n  default: {number}\n", encoding="utf-8")


@pytest.fixture(scope="session")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template's repository, with a tag for each release."""
    template = tmp_path_factory.mktemp("releases")
    for tag, name in RELEASES.items():
        tree = subprocess.run(
            ["git", "ls-tree", "--name-only", name], cwd=ROOT, capture_output=True, text=True, check=False
        )
        parts = [part for part in PARTS if part in tree.stdout.split()]
        archive = subprocess.run(["git", "archive", name, *parts], cwd=ROOT, capture_output=True, check=False)
        if archive.returncode != 0:
            continue  # `known` skips the tests that need it
        empty(template)
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(template)  # our own files; filter="data" needs Python 3.11.4
        release(template, tag)
    empty(template)
    working_tree(template)
    changed(template, 0)
    release(template, OLDER)
    empty(template)
    working_tree(template)
    release(template, NOW)
    for number, tag in enumerate(NEXT, start=1):
        changed(template, number)
        release(template, tag)
    return template


def known(template: Path, tag: str) -> str:
    """Return a release's tag; skip the test when its commit is not in the history of this clone."""
    if tag not in git(template, "tag").split():
        pytest.skip(f"this clone has no commit {RELEASES[tag]} of {tag}: git fetch --unshallow")
    return tag


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files by their names, and the folders that are empty."""
    paths = [path for path in folder.rglob("*") if ".git" not in path.relative_to(folder).parts]
    return {
        path.relative_to(folder).as_posix() + "/" * path.is_dir(): path.read_bytes() if path.is_file() else b""
        for path in paths
        if path.is_file() or not any(path.iterdir())
    }


@pytest.fixture(scope="session")
def worker(releases: Path) -> Iterator[type[Worker]]:
    """Copier's worker, which clones, reads and compiles each release once; test_update.py shows it writes the same.

    An update takes seconds, most of them for cloning the template twice and for compiling the same expressions again.
    """
    environments: dict[Path, Any] = {}
    clones: list[Template] = []

    @cache
    def template(url: str, ref: str | None) -> Template:
        clones.append(Template(url=url, ref=ref))
        return clones[-1]

    def kept(compile_source: Callable[..., Any]) -> Callable[..., Any]:
        compiled = cache(compile_source)
        return lambda source: compiled(source) if isinstance(source, str) else compile_source(source)

    class QuickWorker(Worker):
        answers_relpath = Path(".copier-answers.yml")  # type: ignore[assignment]
        known: dict[str, Any] | None = None

        @cached_property
        def template(self) -> Template:  # type: ignore[override]
            return template(str(self.src_path or self.subproject.template.url), self.resolved_vcs_ref)

        @cached_property
        def subproject(self) -> Subproject:  # type: ignore[override]
            project = super().subproject
            if source := project.last_answers.get("_src_path"):
                project.__dict__["template"] = template(source, project.last_answers["_commit"])
            return project

        def _sync_git_index_executable_bit(self, *_: Any) -> None:
            """Ask nothing: it is about Windows, and asks git for every file."""

        @cached_property
        def jinja_env(self) -> Any:  # type: ignore[override]
            source = self.template.local_abspath
            if source not in environments:
                environments[source] = super().jinja_env
                environments[source].from_string = kept(environments[source].from_string)
                environments[source].filters["from_yaml"] = cache(environments[source].filters["from_yaml"])
            return environments[source]

        def _render_context(self) -> Any:
            # While files are rendered, the answers stay as they are; Copier collects them for each part of a path.
            if Phase.current() is not Phase.RENDER:
                return super()._render_context()
            self.known = self.known or dict(super()._render_context())
            return dict(self.known)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FORKED, "worker", QuickWorker)
        patch.setattr("copier._user_data.parse_yaml_string", cache(copier._user_data.parse_yaml_string))
        yield QuickWorker
        for clone in clones:
            clone._cleanup()


Copy = Callable[..., Path]


@pytest.fixture(scope="session")
def copy(releases: Path, worker: type[Worker]) -> Copy:
    """Render a workspace from a release, as `copier copy` does."""

    def run(folder: Path, tag: str, **answers: Any) -> Path:
        options: dict[str, Any] = {**OPTIONS, "settings": SettingsModel()}
        worker(src_path=str(releases), dst_path=folder, data=answers, vcs_ref=tag, **options).run_copy()
        return folder

    return run


@pytest.fixture(scope="session")
def update(releases: Path, worker: type[Worker]) -> Copy:
    """Bring a committed workspace to a release, as `copier update` does; answers may change with it."""

    def run(folder: Path, tag: str, **answers: Any) -> Path:
        options: dict[str, Any] = {**OPTIONS, "settings": SettingsModel()}
        worker(dst_path=folder, data=answers, vcs_ref=tag, **options).run_update()
        return folder

    return run
