"""The documentation: every command exists, every link has a target, and generated pages are current."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs/example"  # made from the template, whose own tests read it
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "template/AGENTS.md"]
PAGES += sorted(page for page in (ROOT / "docs").rglob("*.md") if EXAMPLE not in page.parents)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
CHECKED = ("python", "make", "copier", "olive")
# What is neither ours nor Copier's: to move about in a shell, and to install Copier or look after the code.
FOREIGN = {
    # tests/workspace/test_processes.py runs the second one, and lets accelerate parse the others, which need GPUs
    "accelerate launch --multi_gpu --num_processes 2 finetuning/invoke_olive.py",
    "torchrun --nproc-per-node 2 finetuning/invoke_olive.py",
    "accelerate launch --config_file finetuning/fsdp.yaml --num_processes 2 finetuning/invoke_olive.py",
    # tests/azure/ logs the real az in to the emulator; the live test is for whoever has a subscription
    "az login",
    "COPIER_FINETUNE_LIVE_AZURE=yes python -m pytest tests/azure/test_live.py",
    "cat models/run.json",
    "cd my-project",
    "cd my-workspace",
    """export CHAT_API_KEY="$(python -c 'import secrets; print(secrets.token_urlsafe())')\"""",
    "git add -A",
    'git commit -am "The template moved"',
    'git commit -m "Adopt the fine-tuning workspace"',
    "git diff",
    "git diff HEAD",
    'git init && git add -A && git commit -m "As rendered"',
    "git push origin main v1.2.0",
    "git status",
    "head -n 2 dataset/sample-train.jsonl",
    "hf auth login",
    "ls",
    "ls models/adapter models/report",
    "mv finetuning/olive-config.yaml.bak finetuning/olive-config.yaml",
    # tests/workspace/test_front_ends.py runs them, in the environment that `make test` makes
    "pf flow test --flow inference/flow",
    """pf flow test --flow inference/flow --inputs question="We won." api=http://127.0.0.1:7860/v1""",
    "pf flow test --flow inference/flow --interactive",
    "pipx install copier",
    "python -m pip install tensorboard",
    "rm .copier-answers.yml.bak",
    "sed -i.bak 's#^_src_path: .*#_src_path: NEW-PATH-OR-URL#' .copier-answers.yml",
    "sed -i.bak 's/num_train_epochs: [0-9]*/num_train_epochs: 1/' finetuning/olive-config.yaml",
    "source .venv/bin/activate",
    "source .venv-promptflow/bin/activate",
    "python -m pip install openai",
    # run by hand: it answers as the console does; its package is not in the environment
    "transformers serve models/merged",
    "ssh -L 7860:localhost:7860 the-machine",
    "tensorboard --logdir models/logs/tensorboard",
    "uv tool install copier",
}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def fenced(text: str) -> Iterator[str]:
    """Yield the commands of the shell blocks, without comments."""
    for language, block in FENCE.findall(text):
        if language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                if command := re.sub(r"\s+# .*|^#.*", "", line).strip():
                    yield command


def inline(text: str) -> Iterator[str]:
    """Yield the texts between backticks in the prose."""
    yield from CODE.findall(FENCE.sub("", text))


def complaint(command: str) -> str:
    """Return what is wrong with a command, "" if a user can type it as it is."""
    if command in FOREIGN or command.startswith("curl "):  # tests/workspace/test_api.py runs these
        return ""
    program, *words = shlex.split(command)
    program = Path(program.replace("\\", "/")).name
    if program == "make":
        words = [word for word in words if not word.startswith("VERSION=")]
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return f"the Makefile has no target {words}" if not words or set(words) - set(targets) else ""
    if program == "python":
        return wrong_script(words)
    if program == "copier":
        return wrong_copier(words)
    if (program, words) == ("olive", ["run", "--config", "finetuning/olive-config.yaml"]):
        return ""
    return "no test knows this command"


def wrong_script(words: list[str]) -> str:
    """Return what is wrong with the words behind `python`."""
    if words[:2] == ["-m", "pytest"]:
        return "" if words[2:] == [] and (ROOT / "template/tests").is_dir() else "the workspace has no such tests"
    name = words[0].removeprefix("my-workspace/") if words else ""
    script = next((path for path in (ROOT / "template" / name, ROOT / name) if path.suffix == ".py"), None)
    if script is None or not script.is_file():
        return f"there is no script {name!r}"
    missing = {word for word in words[1:] if word.startswith("-")} - options(script)
    return f"{name} has no option {sorted(missing)}" if missing else ""


@cache
def options(script: Path) -> set[str]:
    """Return the options that a script gives to argparse."""
    calls = [node for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return {
        argument.value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"
        for argument in call.args
        if isinstance(argument, ast.Constant) and str(argument.value).startswith("-")
    }


def wrong_copier(words: list[str]) -> str:
    """Return what is wrong with the words behind `copier`: its commands, its options, and the answers given to it."""
    if words[0] not in ("copy", "update", "recopy", "check-update"):
        return f"copier has no command {words[0]!r}"
    known = copier_options(words[0])
    for word, following in pairwise([*words[1:], ""]):
        if word.startswith("-") and word not in known:
            return f"copier {words[0]} has no option {word}"
        if word in ("-d", "--data") and (wrong := wrong_answer(*following.partition("=")[::2])):
            return wrong
    return ""


@cache
def copier_options(command: str) -> set[str]:
    """Return the options that Copier itself names for a command."""
    shown = subprocess.run(
        [sys.executable, "-m", "copier", command, "--help"], capture_output=True, text=True, check=True
    )
    return set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", shown.stdout))


def wrong_answer(name: str, value: str) -> str:
    """Return what is wrong with an answer on the command line; `…` is any."""
    question = questions().get(name)
    if question is None:
        return f"there is no question {name}"
    choices = question.get("choices", [])
    if name == "model":
        values = [model["id"] for model in yaml.safe_load((ROOT / "catalog/models.yml").read_text("utf-8"))["models"]]
    elif isinstance(choices, dict):
        values = [choice["value"] if isinstance(choice, dict) else choice for choice in choices.values()]
    else:
        values = choices if isinstance(choices, list) else []
    return f"{name} cannot be {value}" if values and value not in (*values, "…", "value") else ""


@cache
def questions() -> dict[str, dict]:
    """Return the questions of copier.yml, and for the docs' placeholder `name=value` one that takes all."""
    config = yaml.safe_load((ROOT / "copier.yml").read_text(encoding="utf-8"))
    return {name: details for name, details in config.items() if not name.startswith("_")} | {"name": {}}


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_fenced_command_is_valid_as_written(page: Path) -> None:
    commands = list(fenced(page.read_text(encoding="utf-8")))
    assert {command: wrong for command in commands if (wrong := complaint(command))} == {}


@each_page
def test_every_command_in_the_prose_exists(page: Path) -> None:
    texts = inline(page.read_text(encoding="utf-8"))
    texts = [f"copier copy {text}" if text.startswith("-d ") else text for text in texts]
    named = [text for text in texts if text.split()[0] in CHECKED and " " in text]
    assert {command: wrong for command in named if (wrong := complaint(command))} == {}


@each_page
def test_every_option_in_the_prose_is_one_of_a_script_or_of_copier(page: Path) -> None:
    scripts = [*(ROOT / "template").rglob("*.py"), *(ROOT / "docs").glob("*.py")]
    known = copier_options("copy").union(*map(options, scripts))
    named = {text for text in inline(page.read_text(encoding="utf-8")) if re.fullmatch(r"--[a-z-]+", text)}
    assert named <= known


@each_page
def test_every_block_of_a_page_names_its_language(page: Path) -> None:
    languages = {language for language, _ in FENCE.findall(page.read_text(encoding="utf-8"))}
    assert languages <= {"bash", "json", "python", "text", "yaml"}


@each_page
def test_every_relative_link_has_a_target(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@each_page
def test_every_workspace_file_in_the_prose_is_one_that_a_workspace_has(page: Path) -> None:
    for text in inline(page.read_text(encoding="utf-8")):
        if re.fullmatch(r"(finetuning|inference|setup|hooks|catalog)/[\w./-]+\.\w+", text):
            places = [ROOT / "template" / text, ROOT / "template" / f"{text}.jinja", ROOT / text]
            assert any(place.exists() for place in places), text


@pytest.mark.parametrize(
    "command",
    [
        "make coffee",
        "python finetuning/exporter.py",
        "python finetuning/invoke_olive.py --estimate",
        "copier frobnicate",
        "copier copy --trusted PATH-OR-URL-OF-THIS-REPOSITORY my-workspace",
        "copier copy -d modle=demo PATH-OR-URL-OF-THIS-REPOSITORY my-workspace",
        "copier copy -d device=tpu PATH-OR-URL-OF-THIS-REPOSITORY my-workspace",
        "rm -rf my-workspace",
    ],
)
def test_a_command_that_does_not_exist_is_found(command: str) -> None:
    assert complaint(command)


def test_the_commands_of_the_first_page_are_found() -> None:
    commands = list(fenced((ROOT / "README.md").read_text(encoding="utf-8")))
    assert {"make demo", "make test"} <= set(commands)
    assert any(command.startswith("copier copy --trust ") for command in commands)


def test_a_file_is_restored_from_the_workspaces_own_release() -> None:
    """Without `--vcs-ref :current:`, `copier recopy` renders the newest release, into a workspace of an older one."""
    texts = [*PAGES, *(path for path in (ROOT / "template").rglob("*") if path.suffix in (".py", ".jinja", ".md"))]
    named = [text for path in texts for text in re.findall(r"copier recopy[^`]*", path.read_text(encoding="utf-8"))]
    assert set(named) == {"copier recopy --trust --vcs-ref :current:"}


def test_no_foreign_command_is_left_over() -> None:
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    used = {command for text in texts for command in (*fenced(text), *inline(text))}
    assert used >= FOREIGN


def test_the_reference_is_current() -> None:
    shown = make_reference(ROOT)
    assert shown.returncode == 0, shown.stderr


def test_an_outdated_reference_is_reported_and_generated_again(tmp_path: Path) -> None:
    for name in ("catalog", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    config = (ROOT / "copier.yml").read_text(encoding="utf-8")
    (tmp_path / "copier.yml").write_text(config.replace("  default: 16\n", "  default: 17\n"), encoding="utf-8")
    before = (tmp_path / "docs/reference/questions.md").read_bytes()

    stale = make_reference(tmp_path)

    assert (stale.returncode, stale.stdout) == (1, "")
    assert stale.stderr == "docs/reference/questions.md: out of date; run `make docs`.\n"
    assert (tmp_path / "docs/reference/questions.md").read_bytes() == before
    assert make_reference(tmp_path, check=False).returncode == 0
    assert make_reference(tmp_path).returncode == 0


def test_the_example_is_current() -> None:
    command = [sys.executable, str(ROOT / "docs/make_example.py"), "--check"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    text = b"".join(path.read_bytes() for path in EXAMPLE.rglob("*") if path.is_file())
    assert b"\0" not in text


def test_the_reference_has_every_question_that_can_be_answered_and_every_model() -> None:
    page = (ROOT / "docs/reference/questions.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^### `(\w+)`$", page, re.MULTILINE))
    hidden = {name for name, details in questions().items() if details.get("when") is False or details.get("secret")}
    assert shown == set(questions()) - hidden - {"name"}
    models = (ROOT / "docs/reference/models.md").read_text(encoding="utf-8")
    for model in yaml.safe_load((ROOT / "catalog/models.yml").read_text(encoding="utf-8"))["models"]:
        assert f"`{model['id']}`" in models


def test_decisions_are_numbered_and_have_their_three_parts() -> None:
    files = sorted((ROOT / "docs/decisions").glob("*.md"))
    for number, file in enumerate(files, start=1):
        text = file.read_text(encoding="utf-8")
        assert re.fullmatch(rf"{number:04}-[a-z0-9-]+\.md", file.name)
        assert text.startswith(f"# {number}. ")
        assert re.findall(r"^\*\*(\w+)\.\*\*", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]


def test_pictures_are_small_self_contained_and_used() -> None:
    texts = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    pictures = list((ROOT / "docs/pictures").iterdir())
    assert pictures
    for picture in pictures:
        assert f"pictures/{picture.name})" in texts
        assert picture.stat().st_size < 150_000
        if picture.suffix == ".svg":
            text = picture.read_text(encoding="utf-8")
            assert not re.search(r"url\(['\"]?http|href=['\"]http|@import", text)


def make_reference(root: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "docs/make_reference.py"), *(["--check"] if check else [])]
    return subprocess.run(command, capture_output=True, text=True, check=False)
