"""After an update, the user's edits are kept, or marked as a conflict that git shows."""

from __future__ import annotations

import importlib.util
import runpy
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from .conftest import BEFORE, NEXT, NOW, ROOT, commit, contents, git, known

Copy = Callable[..., Path]
CONFIG = "finetuning/olive-config.yaml"
TRAIN, SMOKE = "finetuning/training/train.py", "finetuning/training/smoke.py"
REPORT, CARD = "finetuning/reporting/report.html", "finetuning/reporting/model_card.md"


@pytest.fixture
def workspace(copy: Copy, releases: Path, tmp_path: Path) -> Path:
    """A workspace of the release before this one, committed."""
    folder = copy(tmp_path / "ws/tone", known(releases, BEFORE[0]), platform="linux", environment="venv")
    commit(folder, "As copied")
    return folder


def renamed() -> dict[str, str]:
    """Return the names that releases gave to files: old → new."""
    return dict(runpy.run_path(str(ROOT / "hooks/renames.py"))["RENAMED_FILES"])


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_every_kind_of_edit_is_kept(
    workspace: Path, copy: Copy, update: Copy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    renames = {old: new for old, new in renamed().items() if (workspace / old).exists()}

    def before(name: str) -> str:
        """Return what a file of this release is called in the one before."""
        return next((old for old, new in renames.items() if new == name), name)

    replace(workspace / CONFIG, "max_rows: null", "max_rows: 100")
    replace(workspace / "README.md", "## Start\n", "## Start\n\nAsk Ada first.\n")
    replace(workspace / before(TRAIN), "from __future__ import annotations\n", "# mine\n\nimport os  # noqa\n")
    with (workspace / "dataset/sample-train.jsonl").open("a") as rows:
        rows.write('{"messages": []}\n')
    (workspace / "dataset/sample-heldout.jsonl").unlink()
    (workspace / "finetuning/mine.py").write_text("print('mine')\n")
    (workspace / before(SMOKE)).unlink()
    git(workspace, "mv", before(REPORT), "finetuning/my_report.html")
    (workspace / "notes.bin").write_bytes(bytes(range(256)))
    released = (workspace / before(CARD)).read_bytes()
    (workspace / before(CARD)).write_bytes("Meine Karte: schön\n".encode("utf-16"))
    commit(workspace, "My edits")
    mine = contents(workspace)

    update(workspace, NOW)

    fresh = contents(copy(tmp_path / "fresh/tone", NOW, platform="linux", environment="venv"))
    for name in ("dataset/sample-heldout.jsonl", SMOKE, REPORT):
        del fresh[name]
    changed = fresh[CARD] != released  # by this release
    kept = ("dataset/sample-train.jsonl", "finetuning/mine.py", "finetuning/my_report.html", "notes.bin", CARD)
    fresh |= {name: mine[before(name)] for name in kept}
    fresh[CONFIG] = fresh[CONFIG].replace(b"max_rows: null", b"max_rows: 100")
    fresh["README.md"] = fresh["README.md"].replace(b"## Start\n", b"## Start\n\nAsk Ada first.\n")
    fresh[TRAIN] = fresh[TRAIN].replace(b"from __future__ import annotations\n", b"# mine\n\nimport os  # noqa\n", 1)
    assert contents(workspace) == fresh
    said = f"{CARD} is not text and cannot be merged; yours is kept, without the template's changes."
    assert (said in capfd.readouterr().err) is changed


def test_a_line_that_both_changed_is_a_conflict_that_git_shows(workspace: Path, update: Copy) -> None:
    update(workspace, NOW)
    commit(workspace, "Now")
    with (workspace / CONFIG).open("a") as config:
        config.write("# my last line\n")
    commit(workspace, "My edits")
    update(workspace, NEXT[0])
    text = (workspace / CONFIG).read_text(encoding="utf-8")
    assert "<<<<<<< before updating" in text and "# my last line" in text
    assert f"UU {CONFIG}" in git(workspace, "status", "--porcelain")
    assert not list(workspace.rglob("*.rej"))


def test_an_edited_file_that_a_release_removes_stays(
    workspace: Path, update: Copy, capfd: pytest.CaptureFixture[str]
) -> None:
    update(workspace, NOW)
    commit(workspace, "Now")
    update(workspace, NEXT[0])
    commit(workspace, "Next")
    replace(workspace / "later/release_1.py", "#", "# mine\n#")
    commit(workspace, "My edits")
    update(workspace, NEXT[1])
    assert (workspace / "later/release_1.py").read_text().startswith("# mine\n")
    assert not (workspace / "finetuning/release_1.py").exists()
    assert (
        "later/release_1.py is no longer part of the workspace; yours is kept: delete it if you do not need it."
        in capfd.readouterr().err
    )


def test_a_workspace_inside_a_larger_repository_keeps_its_edits(copy: Copy, update: Copy, tmp_path: Path) -> None:
    workspace = copy(tmp_path / "all/of/tone", NOW)
    (tmp_path / "all/other.txt").write_text("other\n")
    replace(workspace / CONFIG, "max_rows: null", "max_rows: 100")
    (workspace / "finetuning/reporting/model_card.md").write_bytes(b"\xff\xfea\x00")
    commit(tmp_path / "all", "As copied")
    update(workspace, NEXT[0])
    assert "max_rows: 100" in (workspace / CONFIG).read_text(encoding="utf-8")
    assert (workspace / "finetuning/reporting/model_card.md").read_bytes() == b"\xff\xfea\x00"
    assert not list((tmp_path / "all").rglob("*edits.json"))


PHI, GPU, AZURE = {"model": "phi-3-mini-4k-instruct"}, {"device": "gpu"}, {"target": "azure"}
HUB = {"dataset_source": "huggingface", "dataset_name": "owner/rows"}


@pytest.mark.parametrize(
    "steps",
    [
        [PHI | {"device": "cpu"}],
        [GPU],
        [PHI | GPU | AZURE, {"target": "local"}],
        [PHI | GPU, {"model": "demo", "device": "cpu"}],
        [HUB, {"dataset_source": "sample"}],
        [{"dataset_source": "file", "dataset_path": "dataset/mine.jsonl"}],
        [{"environment": "none"}, {"environment": "conda"}],
    ],
    ids=lambda steps: " then ".join(" ".join(step.values()) for step in steps),
)
def test_changed_answers_give_a_fresh_render_plus_the_edits(
    steps: list[dict[str, str]], copy: Copy, update: Copy, tmp_path: Path
) -> None:
    first = {"platform": "linux", "environment": "venv", "device": "cpu"}
    workspace, given = copy(tmp_path / "ws/tone", NOW, **first), dict(first)
    replace(workspace / CONFIG, "max_rows: null", "max_rows: 100")
    (workspace / "dataset/mine.jsonl").write_text("{}\n")
    commit(workspace, "My edits")
    for number, answers in enumerate(steps):
        given |= answers
        update(workspace, NOW, **answers)
        fresh = contents(copy(tmp_path / str(number) / "tone", NOW, **given))
        fresh |= {"dataset/mine.jsonl": b"{}\n"}
        fresh[CONFIG] = fresh[CONFIG].replace(b"max_rows: null", b"max_rows: 100")
        assert contents(workspace) == fresh
        commit(workspace, "Updated")


def test_an_edited_file_of_the_previous_choice_stays(copy: Copy, update: Copy, tmp_path: Path) -> None:
    workspace = copy(tmp_path / "tone", NOW, platform="linux", device="cpu")
    with (workspace / "setup/requirements-cpu.txt").open("a") as lock:
        lock.write("mine==1.0\n")
    commit(workspace, "My edits")
    update(workspace, NOW, device="gpu")
    assert (workspace / "setup/requirements-cpu.txt").read_text().endswith("mine==1.0\n")
    assert (workspace / "setup/requirements-gpu.txt").exists()


def test_the_old_release_is_rendered_again_if_copiers_copy_cannot_be_found(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    migrate = hook()
    update = migrate.Update(workspace, ".copier-answers.yml", ROOT)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    rendered = contents(update.old_render())
    assert {name: rendered[name] for name in contents(workspace)} == contents(workspace)


def test_the_copy_of_another_update_is_never_used(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    migrate = hook()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    answers = (workspace / ".copier-answers.yml").read_text(encoding="utf-8")
    quoted = answers.replace("platform: linux", 'platform: "linux"').replace(
        "\n", "\r\n"
    )  # as another editor writes it
    others = {"later": answers, "other": answers.replace("42", "43"), "torn": None, "mine": quoted}
    for name, text in others.items():
        (tmp_path / f"old_copy.{name}").mkdir()
        if text:
            (tmp_path / f"old_copy.{name}/.copier-answers.yml").write_bytes(text.encode())
    (tmp_path / "old_copy.later/.git").mkdir()
    update = migrate.Update(workspace, ".copier-answers.yml", ROOT)
    assert update.old_render() == tmp_path / "old_copy.mine"


def test_an_incomplete_copy_left_by_a_killed_update_is_never_used(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    migrate = hook()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    for name in ("left", "mine"):
        (tmp_path / f"old_copy.{name}").mkdir()
        shutil.copy2(workspace / ".copier-answers.yml", tmp_path / f"old_copy.{name}")
    shutil.copytree(workspace, tmp_path / "old_copy.mine", dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git"))
    rendered = contents(migrate.Update(workspace, ".copier-answers.yml", ROOT).old_render())
    assert {name: rendered.get(name) for name in contents(workspace)} == contents(workspace)


def hook() -> ModuleType:
    """Import hooks/migrate.py."""
    spec = importlib.util.spec_from_file_location("migrate", ROOT / "hooks/migrate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
