"""Answers as an attack: each is refused in one sentence, or rendered unchanged into its files, and nowhere else.

Hypothesis combines what breaks quoting, files, paths and command lines, for every question of copier.yml that takes a
text or a number. HOSTILE_SETS=20000 tries that many sets, different ones each time; unset, always the same.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "template" / "finetuning"))

from settings.config_file import read_file

ROOT = Path(__file__).resolve().parents[2]
Answers = dict[str, Any]
Leaves = dict[tuple[Any, ...], Any]

QUESTIONS = {
    name: details
    for name, details in yaml.safe_load((ROOT / "copier.yml").read_text(encoding="utf-8")).items()
    if not name.startswith("_")
}
COMPUTED = [name for name, details in QUESTIONS.items() if details.get("when") is False or "secret" in details]
# What is answered in words or numbers, with the type.
FREE = {
    name: details["type"]
    for name, details in QUESTIONS.items()
    if name not in COMPUTED and details["type"] != "bool" and "choices" not in details
}
SETS = int(os.environ.get("HOSTILE_SETS", "1000"))
WEIGHTS = {name: 3 if kind == "str" else 1 for name, kind in FREE.items()}  # in words there is more to be tried
COLUMNS = 80
# Between them, they ask every question.
SCENES: dict[str, Answers] = {
    "demo": {"environment": "auto"},
    "hub": {"model": "phi-2", "dataset_source": "huggingface", "target": "azure", "environment": "venv"},
    "file": {"model": "custom", "dataset_source": "file", "dataset_format": "columns", "environment": "conda"},
    "own": {"model": "custom", "dataset_source": "file", "device": "cpu", "platform": "windows", "environment": "none"},
}
# fmt: off
# In questions that take little but names, these are what may yet be bent.
PLAIN = [
    "-", "--", "_", ".", "..", "/", "a", "Z", "0", "1", "n", "-n", "--prefix", "~", ":", "con", "base", "null",
    "1e3", "yes", "(", ")", "[", "]",
]
ODD = [
    "'", '"', "'''", '"""', "\\", "\\n", "\\u0000", "`", "```", "$", "{", "}", "[", "]", "(", ")", "<", ">", ";",
    "|", "&", "~", "=", ",",
    "{{ 7 * 7 }}", "{% raw %}", "{% endraw %}", "{# x #}", "{{", "%}", "${HOME}", "$(touch pwned)",
    "`touch pwned`", "%PATH%", "!!", "^",
    ": ", "- ", " #", "# ", "&a", "*a", "!!python/object/apply:os.system", "|-", ">", "%YAML", "@", "? ", "---",
    "...", "<<: *rows", "//", "/*",
    "yes", "no", "null", "1e3", "0x1", "0o7", "1_000", "1.0", ".inf", ".nan", "2026-11-25", "12:30:45", " ", "  ",
    "\xa0", "\n", "\t", "\n\n",
    "\nname: x", "\n\n[tool]\nx = 1", '"\nx: "', "\n---\n", "\n# x\n", "\n```\n", "<script>alert(1)</script>",
    "](https://example.org)", "**", "_x_",
    "![x](y)", "</code>", "\ufeff", "\u202e", "\u200f", "\u200d", "שלום", "e\u0301", "日本", "😀", "👩‍💻",
    "\U0010ffff", "\xad", "\u2060", "İ", "ß",
    "../", "/../..", "..", ".", "/", "~/", "C:\\", "C:/", "\\\\server\\share\\", "CON", "nul", "aux.txt", "-",
    "--", "-n", "--prefix", "--yes", "-rf /",
]
CONTROL = [
    "\0", "\x07", "\x08", "\r", "\r\n", "\x0b", "\x0c", "\x1b[2J", "\x7f", "\x80", "\x85", "\x9b", "\u2028",
    "\u2029", "\ufffe", "\uffff",
    "\ud800", "\udcff", "\udfff",
]
NUMBERS = [
    0, -0.0, 1, -1, 1.5, 0.1 + 0.2, 1 / 3, 1e-9, 1.23456789e-5, 2**31, 2**32, 2**63, 10**30, math.nan, math.inf,
    -math.inf, True,
    "1e3", "0x1", "0o7", "1_000", " 5 ", "5\n", "+5", "-5", "5.0", "1e-5", "1E-5", "٣", "５", "NaN", "inf", "1e400",
    "", "five", "2;3",
    "0.05 # x", "1,5", "0.1\n", "{{ 7 * 7 }}", "\x00",
]
FOLDERS = [
    "ws", "my ws", "$(touch pwned)", "`touch pwned`", "it's", 'say "ws"', "a;b", "a&b", "{{ 7 * 7 }}", "{% if %}",
    "日本 😀", "#x", "a\\b",
    "base", "con", "x" * 200, "~", "*", "a\nb",
]
# fmt: on


class Attack(NamedTuple):
    """A set of answers: those of a scene, hostile ones in place of some, and the folder to render into."""

    scene: str
    hostile: Answers
    folder: str


class Scene(NamedTuple):
    """What a scene renders for harmless answers, each with a value that no other has."""

    samples: Answers
    asked: set[str]
    places: dict[tuple[str, tuple[Any, ...]], str]  # file and place of every answer in a file of data
    documents: dict[str, Leaves]
    readme: str


@pytest.fixture(scope="session")
def scene(
    worker: Callable[..., Any],
    answer: Callable[..., Answers],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], Scene]:
    """Return what a scene renders for harmless answers; the model's id decides what a README says of a model."""

    @cache
    def sample(name: str, number: int, kind: str) -> Any:
        """Return the first harmless answer that is not refused."""
        word = "x-" + name.replace("_", "-")[:28]
        candidates: dict[str, list[Any]] = {
            "str": [f"../{word}" if kind == "folder" else f"owner/{word}", word, f"owner/{word}", f"{{{word}}}"],
            "int": [801 + number, 201 + number, 31 + number],
            "float": [(21 + number) / 1000],
        }
        if name != "custom_model_id":
            candidates["str"] = candidates["str"][1:]
        for candidate in candidates[FREE[name]]:
            with contextlib.suppress(ValueError):
                return answer(**{name: candidate})[name]
        raise AssertionError(f"{name} takes none of {candidates[FREE[name]]}: give it one that it takes, here")

    @cache
    def render(name: str, kind: str) -> Scene:
        samples = {key: sample(key, number, kind) for number, key in enumerate(FREE)}
        folder = tmp_path_factory.mktemp("scene") / "ws"
        words = {key: value for key, value in samples.items() if isinstance(value, str)}
        worker(folder, SCENES[name] | words).run_copy()
        without_numbers = documents(folder)
        asked = worker(folder, SCENES[name] | samples)
        asked.run_copy()
        found = documents(folder)
        names = {value: key for key, value in samples.items() if key not in asked.answers.hidden}
        places = {
            (file, place): names[value]
            for file, leaves in found.items()
            for place, value in leaves.items()
            if value in names and (isinstance(value, str) or without_numbers[file][place] != value)
        }
        return Scene(samples, set(names.values()), places, found, (folder / "README.md").read_text(encoding="utf-8"))

    return render


def attacks(question: str) -> st.SearchStrategy[Attack]:
    """Sets with a hostile answer to this question and, half of them, to another one."""
    wild = st.characters(categories=["Cs", "Cc", "Cf", "Cn", "Co", "Zl", "Zp", "Zs"])
    plain = st.sampled_from(PLAIN)
    odd = st.one_of(st.sampled_from(ODD), st.sampled_from(ODD), st.text(max_size=4))
    control = st.one_of(odd, st.sampled_from(CONTROL), st.text(wild, max_size=4))
    # None stands for a harmless answer to the question
    around = [
        st.tuples(st.lists(piece, max_size=2), st.lists(piece, max_size=2)).map(
            lambda parts: [*parts[0], None, *parts[1]]
        )
        for piece in (plain, plain, odd, odd, odd, control)
    ]
    texts = st.one_of(*around, *around, st.lists(plain, max_size=4), st.lists(odd, max_size=4))
    thousandths = st.integers(0, 90).map(lambda number: number / 1000)
    kinds = {
        "str": st.tuples(texts, st.sampled_from([*[1] * 15, 3000])),
        "int": st.one_of(st.integers(1, 100), st.integers(), st.sampled_from(NUMBERS)),
        "float": st.one_of(thousandths, st.floats(0, 0.1), st.floats(), st.sampled_from(NUMBERS)),
    }
    other = st.sampled_from([name for name in FREE if name != question])
    others = st.one_of(st.just({}), other.flatmap(lambda name: st.fixed_dictionaries({name: kinds[FREE[name]]})))
    hostile = st.builds(lambda one, two: one | two, st.fixed_dictionaries({question: kinds[FREE[question]]}), others)
    return st.builds(Attack, st.sampled_from(sorted(SCENES)), hostile, st.sampled_from(FOLDERS))


def spelt(value: Any, sample: Any) -> str:
    """Return an answer as the command line gives it. Of words, the pieces; None stands for a harmless answer."""
    if not isinstance(value, tuple):
        return str(value)
    pieces, times = value
    return "".join(str(sample) if piece is None else piece for piece in pieces) * times


# ------------------------------------------------------------------------------------- what is read from a workspace


def flat(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield every value of a document with its place."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from flat(value, (*path, key))
    if not items:
        yield path, node if isinstance(node, str | int | float | None) else repr(node)  # an empty list is a value too


@cache
def document(name: str, content: bytes) -> Leaves | None:
    """Read a file of data with the loader that its readers use; None for other files."""
    text = content.decode("utf-8")
    if name.endswith((".yaml", ".yml")):
        return dict(flat(yaml.safe_load(text)))
    if name.endswith(".toml"):
        return dict(flat(tomllib.loads(text)))
    if name.endswith(".json"):
        return dict(flat(json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))))  # VS Code's hold comments
    return None


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def documents(folder: Path) -> dict[str, Leaves]:
    """Return the values of every file of data in a workspace."""
    read = {
        name: document(name, content) for name, content in contents(folder).items() if name != ".copier-answers.yml"
    }
    return {name: leaves for name, leaves in read.items() if leaves is not None}


def same(one: Any, other: Any) -> bool:
    """Whether a file has an answer as it was given. Two answers have a value for «none» there."""
    return (one, isinstance(one, str)) == (other, isinstance(other, str)) or (one, other) in {("", None), (0, -1)}


def check_documents(scene: Scene, answers: Answers, found: dict[str, Leaves]) -> None:
    """The files of data hold the same as for harmless answers, but for these answers."""
    assert sorted(found) == sorted(scene.documents)
    for file, leaves in scene.documents.items():
        assert list(found[file]) == list(leaves), file
        for place, value in leaves.items():
            expected = answers[scene.places[file, place]] if (file, place) in scene.places else value
            assert same(expected, found[file][place]), (file, place, expected, found[file][place])


def check_readme(scene: Scene, answers: Answers, text: str) -> None:
    """The README is the same as for harmless answers, except for these; each is where Markdown does not change it."""
    expected = scene.readme
    for name in scene.asked:
        sample, value = scene.samples[name], answers[name]
        if not isinstance(sample, str):
            continue
        for number, block in enumerate(scene.readme.split("```")):
            for before in block.split(sample)[:-1]:
                if number % 2:
                    is_text = shlex.quote(value) == value and not value.startswith("-")
                elif before.rpartition("\n")[2].count("`") % 2:
                    is_text = not re.search(r"[`\n\r]|^\s|\s\Z", value)
                else:
                    is_text = bool(re.fullmatch(r"[A-Za-z0-9][\w./()-]*", value, re.ASCII))
                assert is_text, f"{name} is more than text in README.md: {value!r}"
        expected = expected.replace(sample, value)
    assert text == expected


def folder_kind(answers: Answers) -> str:
    return "folder" if re.match(r"[./~\\]|[A-Za-z]:", str(answers.get("custom_model_id", ""))) else "hub"


# --------------------------------------------------------------------------------------- what is done with the answers


def check_refusal(error: Exception, hostile: Answers) -> str:
    """An answer is refused in one sentence that says what to type; return the question's name."""
    found = re.fullmatch(r"Validation error for question '(\w+)': ([^\n]+)", str(error))
    if found:
        name, words = found.groups()
        assert name in hostile, error
        assert "type " in words, error
        assert len(str(error)) <= COLUMNS, error
        return name
    # Copier itself asks for a number again; with --data it says what is none.
    assert re.match(r"invalid literal for int|could not convert string to float|cannot convert float", str(error)), (
        error
    )
    numbers = [name for name in hostile if FREE[name] in {"int", "float"}]
    assert numbers, error
    return numbers[0]


CHANGES = {f"os.{name}" for name in ("mkdir", "rename", "remove", "rmdir", "symlink", "link", "chmod", "truncate")}


class Watch:
    """Notes what this process writes and starts while it is on, wherever it does."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(flags, int) else False
            if writes and not isinstance(path, int):
                self.seen.append(os.fsdecode(path))
        elif event in CHANGES:
            self.seen += [os.fsdecode(path) for path in arguments[:2] if isinstance(path, str | bytes | os.PathLike)]
        elif event in {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}:
            self.seen.append(f"$ {arguments}")

    @contextlib.contextmanager
    def only(self, folder: Path) -> Iterator[None]:
        """Nothing may be written but in this folder, and nothing started."""
        self.seen.clear()
        self.on = True
        try:
            yield
        finally:
            self.on = False
        outside = [path for path in self.seen if not Path(os.path.normpath(path)).is_relative_to(folder)]
        assert outside == []


@pytest.fixture(scope="session")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def create_env(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, Path]:
    """setup/create_env.py as a module, and where the machine's conda is."""
    setup = ROOT / "template" / "setup"
    spec = importlib.util.spec_from_file_location("attacked_create_env", setup / "create_env.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(setup)
        spec.loader.exec_module(module)
    conda = tmp_path_factory.mktemp("machine") / "my-conda" / "bin" / "conda"
    conda.parent.mkdir(parents=True)
    conda.write_text("#!/bin/sh\necho '{}'\n")  # no environment yet, and no settings of where they are
    conda.chmod(0o755)
    return module, conda


def check_workspace(asked: Any, workspace: Path, harmless: Scene, hostile: Answers, plain: dict[str, bytes]) -> None:
    """Every file holds what it should, each answer as it was given; messages and tasks hold nothing else."""
    answers = asked.answers.combined
    for name in harmless.asked & set(hostile):
        given_as = hostile[name] if FREE[name] == "str" else float(hostile[name])
        assert answers[name] == given_as
    found = contents(workspace)
    assert found["mine.txt"] == b"mine"
    assert {name: content for name, content in found.items() if plain.get(name, content) != content} == {}
    check_documents(harmless, answers, documents(workspace))
    check_readme(harmless, answers, found["README.md"].decode("utf-8"))
    config = "finetuning/olive-config.yaml"
    assert dict(flat(read_file(workspace / config))) == document(config, found[config])
    recorded = yaml.safe_load(found[".copier-answers.yml"])
    defaults = answers["defaults"] if answers["advanced"] else {}  # only confirmed: not recorded, they follow others
    given = {name: answers[name] for name in harmless.asked if answers[name] != defaults.get(name, not answers[name])}
    assert {name: recorded[name] for name in given} == given
    check_message(asked, workspace)
    for task in asked.template.tasks:
        hook = str(asked.template.local_abspath / "hooks" / "create_env.py")
        *command, option = [asked._render_string(part) for part in task.cmd]
        assert command == [sys.executable, "-I", hook]
        assert option in {"--download-model", "--no-download-model"}


def check_environment(module: ModuleType, conda: Path, workspace: Path, name: str) -> None:
    """The conda environment is next to the others under the given name, which never becomes an option."""
    prefix = conda.parents[1] / "envs" / name
    assert prefix == Path(os.path.normpath(prefix))
    commands: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.setenv("CONDA_EXE", str(conda))
        patch.setenv("PATH", "")
        patch.setattr(module, "ROOT", workspace)
        patch.setattr(module, "SETUP", workspace / "setup")
        patch.setattr(sys.modules[module.conda_lists.__module__], "FILE", workspace / "setup" / "conda-environment.yml")
        for part in (module, sys.modules[module.install.__module__]):
            patch.setattr(part, "step", lambda title, command, *_, **__: commands.append(command) or True)
        module.create("conda", "finetuning", dry_run=True)
    create, update, *installs = commands
    place = ["--prefix", str(prefix), "--override-channels", "--channel", "conda-forge"]
    assert create == [str(conda), "create", *place, "--no-default-packages"]
    assert update == [str(conda), "install", *place, "python=3.11", "pip"]
    assert {tuple(command[:3]) for command in installs} == {
        (str(prefix / "bin" / "python"), "-m", module) for module in ("pip", "compileall")
    }
    following = shown.getvalue().splitlines()[-1]
    assert shlex.split(following)[:2] == [str(prefix / "bin" / "python"), "finetuning/invoke_olive.py"]
    assert not name.startswith("-")


def check_message(asked: Any, folder: Path) -> None:
    """What is shown to be copied is quoted: a shell sees the folder and the environment as one word each."""
    message = asked._render_string(asked.template.message_after_copy)
    answers = asked.answers.combined
    for_windows = str(folder) if re.fullmatch(r"[\w.:/\\-]+", str(folder)) else f'"{folder}"'
    quoted = for_windows if answers["platform"] == "windows" else shlex.quote(str(folder))
    assert f"\n  cd {quoted}\n" in message
    activated = re.findall(r"^  conda activate (.*)", message, flags=re.MULTILINE)
    assert activated == ([shlex.quote(answers["conda_env_name"])] if answers["environment"] == "conda" else [])


# ----------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("question", FREE)
def test_a_hostile_answer_is_refused_in_one_sentence_or_rendered_unchanged(
    question: str,
    scene: Callable[[str, str], Scene],
    worker: Callable[..., Any],
    template: Path,
    watch: Watch,
    create_env: tuple[ModuleType, Path],
    tmp_path: Path,
) -> None:
    plain = {name: content for name, content in contents(template / "template").items() if ".jinja" not in name}
    ours = contents(template)
    count: Counter[str] = Counter()
    (tmp_path / "beside.txt").write_text("mine")

    @settings(
        max_examples=math.ceil(SETS * WEIGHTS[question] / sum(WEIGHTS.values())),
        derandomize="HOSTILE_SETS" not in os.environ,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(attacks(question))
    def one_set(attack: Attack) -> None:
        count["tried"] += 1
        samples = scene(attack.scene, "hub").samples
        hostile = {name: spelt(value, samples[name]) for name, value in attack.hostile.items()}
        harmless = scene(attack.scene, folder_kind(hostile))
        workspace = tmp_path / attack.folder
        workspace.mkdir()
        (workspace / "mine.txt").write_text("mine")
        asked = worker(workspace, SCENES[attack.scene] | harmless.samples | hostile)
        try:
            with watch.only(workspace):
                asked.run_copy()
        except (ValueError, OverflowError) as error:
            count["refused"] += check_refusal(error, hostile) == question
            assert contents(workspace) == {"mine.txt": b"mine"}
        else:
            count["carried"] += question in harmless.asked
            check_workspace(asked, workspace, harmless, hostile, plain)
            if "conda_env_name" in harmless.asked:
                check_environment(*create_env, workspace, asked.answers.combined["conda_env_name"])
            first = contents(workspace)
            with watch.only(workspace):
                worker(workspace, {}).run_copy()  # from the answers file alone, as a recopy
            assert contents(workspace) == first
        finally:
            shutil.rmtree(workspace)
        assert [path.name for path in tmp_path.iterdir()] == ["beside.txt"]

    one_set()
    assert contents(template) == ours
    # Neither does the validator refuse all that comes, nor does it let all pass.
    assert min(count["refused"], count["carried"]) >= 1 or FREE[question] != "str", count


def test_every_question_is_asked_in_a_scene_and_its_answer_checked(scene: Callable[[str, str], Scene]) -> None:
    looked_for = set()
    for name in SCENES:
        rendered = scene(name, "hub")
        in_readme = {key for key in rendered.asked if str(rendered.samples[key]) in rendered.readme}
        looked_for |= set(rendered.places.values()) | in_readme
    assert looked_for == set(FREE)


def test_at_least_a_thousand_sets_are_tried_by_default() -> None:
    assert sum(math.ceil(1000 * weight / sum(WEIGHTS.values())) for weight in WEIGHTS.values()) >= 1000


@pytest.mark.parametrize(("name", "value"), [("hub_id", "../`x`\n"), ("revision", '"a/../b"')])
def test_no_model_bypasses_its_question(name: str, value: str, answer: Callable[..., Answers]) -> None:
    with pytest.raises(ValueError, match=f"^Validation error for question '{name}': computed: type custom_model_"):
        answer(**{name: value})


@pytest.mark.skipif(sys.platform == "win32", reason="the programs on PATH are shell scripts")
def test_copier_s_own_copy_and_recopy_run_the_hook_whatever_the_answers_and_the_folder(
    template: Path, tmp_path: Path
) -> None:
    """Through the command line, with trust: what starts is the hook, and the conda that notes what it is given."""
    root = tmp_path / "a;touch${IFS}pwned"  # a blank is refused
    conda = root / "bin" / "conda"
    conda.parent.mkdir(parents=True)
    conda.write_text('#!/bin/sh\nprintf \'%s\\0\' "$@" >>"$CONDA_SAYS"\necho \'{"envs": []}\'\ntest "$1" != create\n')
    conda.chmod(0o755)
    folder = tmp_path / "it's `touch pwned` {{ 7 * 7 }}; 😀"
    answers = {
        "environment": "conda",
        "conda_env_name": "n--prefix",
        "model": "custom",
        "custom_model_id": "../$(touch pwned); {{ 7 * 7 }} 😀",
        "dataset_source": "file",
        "dataset_path": "-rf ~ & 'x' \"y\" %PATH% שלום.jsonl",
        "dataset_format": "columns",
        "prompt_template": "{q}\n---\n- &a !!python/object/apply:os.system ['touch pwned']",
        "completion_template": "{a}\n```\n${HOME}{% raw %}",
        "system_prompt": "yes: {# no #} \ufeff\u202e😀",
    }
    data = [part for name, value in answers.items() for part in ("-d", f"{name}={value}")]
    command = [sys.executable, "-m", "copier"]
    env = os.environ | {"CONDA_EXE": str(conda), "CONDA_SAYS": str(tmp_path / "says")}
    options = ["--trust", "--defaults", "--overwrite"]
    for arguments in (["copy", *options, *data, str(template), str(folder)], ["recopy", *options, str(folder)]):
        done = subprocess.run([*command, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("The workspace is complete, but its setup is not.") == 1
        recorded = yaml.safe_load((folder / ".copier-answers.yml").read_text(encoding="utf-8"))
        assert {name: recorded[name] for name in answers} == answers
        said = (tmp_path / "says").read_text().split("\0")
        assert said[:7] == ["env", "list", "--json", "info", "--json", "create", "--prefix"]
        assert said[7] == str(root / "envs" / "n--prefix")
        assert said[8:] == ["--override-channels", "--channel", "conda-forge", "--no-default-packages", ""]
        (tmp_path / "says").unlink()
        assert {path.name for path in tmp_path.iterdir()} == {root.name, folder.name}
        assert not list(tmp_path.rglob("pwned"))
