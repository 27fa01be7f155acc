"""Rendering in this process: Copier's own worker, with what it reads and compiles again for every copy kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import copier._user_data
import pytest
import yaml
from copier._main import Worker
from copier._settings import SettingsModel
from copier._template import Template
from copier._types import Phase

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the template without its git repository: Copier takes a plain folder as it is."""
    folder = tmp_path_factory.mktemp("template")
    shutil.copy2(ROOT / "copier.yml", folder)
    unwanted = shutil.ignore_patterns("__pycache__", ".*_cache")
    for name in ("catalog", "hooks", "template"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    return folder


@pytest.fixture(scope="session")
def questions(template: Path) -> dict[str, dict[str, Any]]:
    """What copier.yml says about each question, in its order."""
    config = yaml.safe_load((template / "copier.yml").read_text(encoding="utf-8"))
    return {name: details for name, details in config.items() if not name.startswith("_")}


@pytest.fixture(scope="session")
def models(template: Path) -> dict[str, dict[str, Any]]:
    """The catalogue's models by their ids."""
    catalogue = yaml.safe_load((template / "catalog" / "models.yml").read_text(encoding="utf-8"))
    return {model["id"]: model for model in catalogue["models"]}


@pytest.fixture(scope="session")
def worker(template: Path) -> Iterator[Callable[..., Worker]]:
    """Return a worker for a folder and answers. All workers share what depends on the template alone.

    A copy takes a third of a second, nearly all of it for reading copier.yml and the catalogue and for compiling the
    same expressions again. With these kept it takes a fiftieth; test_render_matrix.py shows that it writes the same.
    """
    monkeypatch = pytest.MonkeyPatch()
    shared_template = Template(url=str(template))
    environment = Worker(src_path=str(template), settings=SettingsModel()).jinja_env
    environment.from_string = kept(environment.from_string)  # type: ignore[method-assign]
    environment.filters["from_yaml"] = cache(environment.filters["from_yaml"])
    monkeypatch.setattr("copier._user_data.parse_yaml_string", cache(copier._user_data.parse_yaml_string))
    # For every file it writes, Copier asks git whether the folder is a repository. Here none is.
    monkeypatch.setattr("copier._main.is_git_available", lambda: False)

    class QuickWorker(Worker):
        template = cached_property(lambda self: shared_template)  # type: ignore[assignment]
        jinja_env = cached_property(lambda self: environment)  # type: ignore[assignment]
        answers_relpath = Path(".copier-answers.yml")  # type: ignore[assignment]
        known: dict[str, Any] | None = None

        def _render_context(self) -> Any:
            # While files are rendered, the answers stay as they are; Copier collects them for each part of a path.
            if Phase.current() is not Phase.RENDER:
                return super()._render_context()
            self.known = self.known or dict(super()._render_context())
            return dict(self.known)

    def make(folder: Path, answers: dict[str, Any]) -> Worker:
        return QuickWorker(
            src_path=str(template),
            dst_path=folder,
            data=answers,
            settings=SettingsModel(),
            defaults=True,
            overwrite=True,
            quiet=True,
            skip_tasks=True,
        )

    yield make
    monkeypatch.undo()


def kept(compile_source: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a source once. Anything but text raises the same TypeError as before: Copier relies on it."""
    compiled = cache(compile_source)
    return lambda source: compiled(source) if isinstance(source, str) else compile_source(source)


@pytest.fixture(scope="session")
def render(worker: Callable[..., Worker]) -> Callable[..., Path]:
    """Render a workspace with these answers, and the defaults for the rest."""

    def copy(folder: Path, **answers: Any) -> Path:
        worker(folder, answers).run_copy()
        return folder

    return copy


@pytest.fixture(scope="session")
def answer(worker: Callable[..., Worker]) -> Callable[..., dict[str, Any]]:
    """Answer all questions without rendering anything, and return the answers: recorded and computed ones."""

    def ask(**answers: Any) -> dict[str, Any]:
        asked = worker(Path("my-workspace"), answers)
        asked._ask()
        return dict(asked.answers.combined)

    return ask
