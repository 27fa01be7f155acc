"""The configurator agrees with Copier: the same questions, defaults, choices and refusals for the same answers."""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import copier._main
import pytest
from copier._jinja_ext import UnsetError
from copier._user_data import Question
from jinja2 import StrictUndefined
from render.test_questions import AZURE, CUSTOM, FILE, HUB, REFUSED
from update.test_every_answer import SETS, answers_of

States = dict[str, dict[str, Any]]
FOLDER = "tone"
SYSTEM = {"Darwin": "macos", "Windows": "windows"}.get(platform.system(), "linux")
# What a person mistypes, or types in another way than expected.
NUMBERS = ("", "1", "0", "-1", "3.5", " 7 ", "1e-3", "1_000", "nan", "inf", "0.12345678901", "4294967296", "x", "½")
TEXTS = ("", "a b", "owner/name", "owner/name\n", "../a ", "../`a`", "a\nb", "a\tb", "\x85", "\ud800", "😀", "Nul")
TEXTS += (
    "{}",
    "{a}",
    "{a}\u2028",
    "com1.x",
    "lpt0",
    "my-ft",
    "My",
    "a.jsonl\xa0",
    " x",
    "train[:5]",
    "v1..2",
    "~/m",
    "C:\\m",
)
TEXTS += ("yes", "Off", "no ", "-x", "x-", "a" * 40)
# Answers with which every question is asked, all together.
EVERYTHING: list[dict[str, Any]] = [
    AZURE | FILE | {"dataset_format": "columns", "advanced": True},
    CUSTOM | HUB | {"device": "gpu", "advanced": True, "platform": "windows"},
]
CHOICES = ("", "neither", "cpu", "qlora", "it's")
# The catalogue, of which the page has what the questions read.
PRUNED = ("models", "azure_gpus", "model_entry")


class Noted(Question):
    """A question that notes what Copier makes of it."""

    states: ClassVar[States] = {}
    questions: ClassVar[dict[str, Question]] = {}

    def get_when(self) -> bool:
        when = super().get_when()
        if self.var_name not in self.states:
            state = {"when": when, "ask": self.get_ask(), "given": self.var_name in self.answers.init}
            state["help"] = self.render_value(self.help)
            state["choices"] = [[c.title, c.value, c.disabled or ""] for c in self._formatted_choices]
            state["default"] = self.unanswered()
            self.states[self.var_name], self.questions[self.var_name] = state, self
        return when

    def unanswered(self) -> Any:
        """Return the default that the question has without an answer; None where one is needed or it is refused."""
        extra = {"UNSET": StrictUndefined("UNSET", exc=UnsetError)}
        try:
            return self.parse_answer(self.render_value(self.default, extra))
        except (UnsetError, ValueError):
            return None


Ask = Callable[[dict[str, Any]], tuple[States, str]]


@pytest.fixture
def ask(worker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Let Copier answer; return the state of each question that it came to, and its refusal."""
    monkeypatch.setattr(copier._main, "Question", Noted)

    def answer(answers: dict[str, Any]) -> tuple[States, str]:
        monkeypatch.setattr(Noted, "states", {})
        monkeypatch.setattr(Noted, "questions", {})
        asked = worker(Path(FOLDER), dict(answers))
        refusal = ""
        try:
            asked._ask()
        except ValueError as error:
            refusal = in_a_terminal(error)
        for name, state in Noted.states.items():
            state["value"] = asked.answers.combined.get(name)
        return Noted.states, refusal

    return answer


def evaluated(page: Any, sets: list[dict[str, Any]], names: list[str] | None = None) -> list[list[dict[str, Any]]]:
    """Let the page answer; return each set's states, or the one of a name. As JSON: some texts are no valid UTF-8."""
    script = """([sets, names, machine]) => JSON.stringify(JSON.parse(sets).map(
        (given, index) => evaluate(given, machine).filter(({ name }) => !names || name === names[index])))"""
    return json.loads(page.evaluate(script, [json.dumps(sets), names, {"folder": FOLDER, "os": SYSTEM}]))


def differences(ask: Ask, page: Any, sets: list[dict[str, Any]]) -> Iterator[str]:
    """Yield where the page and Copier differ: up to the question at which Copier stops, and in what it says there."""
    for answers, states in zip(sets, evaluated(page, sets), strict=True):
        expected, refusal = ask(answers)
        stop = list(expected)[-1] if refusal else ""
        for state in states[: len(expected)]:
            name = state["name"]
            mine = {key: state.get(key) for key in expected[name]}
            mine["choices"] = [[choice["label"], choice["value"], choice["disabled"]] for choice in mine["choices"]]
            for key in expected[name]:
                if key in ("default", "value") and name in (*PRUNED, stop):
                    continue
                if comparable(mine[key]) != comparable(expected[name][key]):
                    yield f"{answers}: {name}: {key}: {mine[key]!r}, Copier: {expected[name][key]!r}"
        said = next((state["error"] for state in states if state["error"]), "")
        if said != refusal:
            yield f"{answers}: {said!r}, Copier: {refusal!r}"


def comparable(value: Any) -> Any:
    """Return a value as JSON has it, which knows no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def test_every_valid_pair_of_answers_gives_the_questions_of_copier(ask: Ask, page: Any) -> None:
    assert list(differences(ask, page, [answers_of(row) for row in SETS])) == []


def test_every_refusal_is_copiers(ask: Ask, page: Any) -> None:
    assert list(differences(ask, page, [answers for answers, _ in REFUSED])) == []


@pytest.mark.parametrize("base", EVERYTHING, ids=["a file and Azure", "a dataset and a model of the hub"])
def test_typed_values_are_accepted_or_refused_as_in_copier(base: dict[str, Any], ask: Ask, page: Any) -> None:
    _, refusal = ask(base)
    asked = {
        name: question for name, question in Noted.questions.items() if question.get_when() and not question.secret
    }
    assert refusal == "" and len(asked) > 35
    sets = [
        (name, text)
        for name, question in asked.items()
        for text in (CHOICES if question.choices else NUMBERS if question.type in ("int", "float") else TEXTS)
    ]
    shown = evaluated(page, [base | {name: text} for name, text in sets], [name for name, _ in sets])
    for (name, text), [state] in zip(sets, shown, strict=True):
        taken = None if state["error"] else state.get("value")
        assert (state["error"], taken, text) == (*outcome(asked[name], text), text), name


def outcome(question: Question, text: str) -> tuple[str, Any]:
    """Return what Copier says to an answer, and what it makes of one that it takes."""
    try:
        value = question.parse_answer(text)
        question.validate_answer(value)
    except ValueError as error:
        return in_a_terminal(error), None
    return "", value


def in_a_terminal(error: ValueError) -> str:
    """Return what a person reads: Copier has no sentence of its own for a number that is none."""
    return re.sub(r"^(invalid literal for int|could not convert string to float).*", "Invalid input", str(error))
