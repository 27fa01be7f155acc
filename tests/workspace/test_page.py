"""The chat page in a browser: Debian's Chromium, headless, on the demo with a random adapter."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, inference_of
from served import served, wait_for_health

sys.path.append(str(REPOSITORY / ".cache" / "playwright"))  # at the end: what a workspace has comes first
from playwright.sync_api import BrowserContext, Locator, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
if not CHROMIUM:
    pytest.skip("chromium is not on the PATH", allow_module_level=True)

QUESTIONS = ("She grinned at the market.", "Why was Dad so mournful?")
SHORT, LONG = 12, 256  # tokens of an answer: as the tests set it, and as the page does


@pytest.fixture(scope="module")
def engine(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The demo with a random adapter, which says letters and spaces and never ends by itself."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from training.tiny_model import build_demo

    build_demo()
    root = tmp_path_factory.mktemp("page")
    shutil.copytree(workspace / "models/demo", root / "models/demo")
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(root / "models/demo"), config)
    torch.manual_seed(0)
    for weight in filter(lambda weight: weight.requires_grad, adapted.parameters()):
        torch.nn.init.normal_(weight)
    adapted.save_pretrained(root / "models/adapter")
    AutoTokenizer.from_pretrained(root / "models/demo").save_pretrained(root / "models/adapter")
    metrics = {"eval_loss": 1.5, "perplexity": 4.4817, "accuracy": 0.27}
    run = {"metrics": {"before": metrics, "after": metrics | {"accuracy": 0.98}}}
    with inference_of(workspace):
        from engine import Engine, Source
        from torch_backend import TorchBackend

        source = Source("models/demo", None, "models/adapter", "lora", "float32", "", run)
        backend = TorchBackend(source, root / "models/demo", root)
        words = [backend.decode([token]) for token in range(backend.model.config.vocab_size)]
        settings = backend.model.generation_config
        settings.suppress_tokens = [token for token, word in enumerate(words) if not re.fullmatch(r" ?[a-z]+", word)]
        backend.stops, settings.eos_token_id = [], None
        yield Engine(source, backend)


@pytest.fixture(scope="module")
def steps(engine: Any) -> list[int]:
    """A list that grows with each token that the model computes."""
    taken: list[int] = []

    def compute_slowly(*_: Any) -> None:
        taken.append(1)
        time.sleep(0.01)

    engine.backend.model.get_base_model().register_forward_pre_hook(compute_slowly)
    return taken


@pytest.fixture(scope="module")
def address(engine: Any) -> Iterator[str]:
    with served(lambda: engine) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[BrowserContext]:
    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium.new_context(viewport={"width": 1000, "height": 760})
        chromium.close()


@pytest.fixture
def page(browser: BrowserContext, address: str, steps: list[int]) -> Iterator[Page]:
    """The page, just opened. It may not have thrown errors when it is closed."""
    page = browser.new_page()
    thrown: list[Any] = []
    page.on("pageerror", lambda error: thrown.append(error))
    page.goto(address)
    expect(message(page)).to_be_focused()
    steps.clear()
    yield page
    page.close()
    assert thrown == []


def message(page: Page) -> Locator:
    return page.get_by_label("Your message")


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def answers(page: Page, column: int = 0) -> Locator:
    """The answers in a column: 0 the tuned model's, 1 the base model's."""
    return page.get_by_role("log").nth(column).locator(".bot.message")


def set_longest(page: Page, tokens: int) -> None:
    """Open the settings, and set the longest answer."""
    page.get_by_role("button", name="Settings").click()
    number = page.get_by_label("number input for Longest answer")
    expect(number).to_be_visible()
    # what is typed as soon as a slider is drawn, gradio replaces by what it begins with
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    number.fill(str(tokens))
    number.blur()


def send(page: Page, question: str) -> None:
    message(page).fill(question)
    message(page).press("Enter")


def wait_for_rest(page: Page) -> None:
    """Wait until nothing is answered any more."""
    expect(button(page, "Stop")).to_be_disabled()
    expect(button(page, "Send")).to_be_enabled()


def said(engine: Any, *turns: str, adapter: bool = True) -> str:
    """What the engine says to a conversation in SHORT tokens, with the spaces that a browser shows."""
    from engine import Generation

    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return "".join(engine.stream(messages, Generation(SHORT, adapter=adapter), lambda _: None))


def test_an_answer_is_streamed_and_stop_ends_its_computation(page: Page, address: str, steps: list[int]) -> None:
    page.keyboard.type(QUESTIONS[0])
    page.keyboard.press("Enter")
    expect(message(page)).to_have_value("")
    expect(answers(page)).to_have_text(re.compile(r"\w"))
    begun = answers(page).inner_text()
    expect(answers(page)).not_to_have_text(begun)
    expect(button(page, "Send")).to_be_disabled()
    button(page, "Stop").click()
    wait_for_rest(page)
    assert answers(page).inner_text().startswith(begun)
    wait_for_health(address)
    assert 0 < len(steps) < LONG / 2
    send(page, QUESTIONS[1])  # and the next one is answered
    expect(answers(page)).to_have_count(2)
    button(page, "Stop").click()
    wait_for_rest(page)


def test_closing_the_page_during_an_answer_stops_the_computation(
    browser: BrowserContext, address: str, engine: Any, steps: list[int]
) -> None:
    page = browser.new_page()
    page.goto(address)
    steps.clear()
    send(page, QUESTIONS[0])
    expect(answers(page)).to_have_text(re.compile(r"\w"))
    page.close()
    wait_for_health(address)
    assert 0 < len(steps) < LONG / 2


def test_the_settings_reach_the_model_and_retry_answers_once_more(
    page: Page, engine: Any, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine import Generation

    asked: list[Any] = []
    generate, encode = engine.backend.generate, engine.backend.encode
    monkeypatch.setattr(engine.backend, "generate", lambda prompt, how: asked.append(how) or generate(prompt, how))
    monkeypatch.setattr(engine.backend, "encode", lambda text: asked.append(text) or encode(text))
    set_longest(page, SHORT)
    send(page, QUESTIONS[0])
    expect(page.get_by_text(f"The answer was cut at {SHORT} tokens.")).to_be_visible()
    wait_for_rest(page)
    user = {"role": "user", "content": QUESTIONS[0]}
    assert asked == [engine.backend.render([user]), Generation(SHORT, top_k=1000)]  # 0 means that many
    asked.clear()
    steps.clear()
    page.get_by_label("System prompt").fill("Be kind.")
    for name, key in (("Longest answer", "Home"), ("Temperature", "End"), ("Top p", "ArrowLeft")):
        page.get_by_label(f"range slider for {name}").press(key)
    for name, value in (("number input for Top k", 5), ("number input for Repetition penalty", 1.5), ("Seed", 7)):
        page.get_by_label(name).fill(str(value))
        page.get_by_label(name).blur()
    button(page, "Retry").click()
    expect(page.get_by_text("The answer was cut at 1 tokens.")).to_be_visible()
    wait_for_rest(page)
    with_system = engine.backend.render([{"role": "system", "content": "Be kind."}, user])
    assert asked == [with_system, Generation(1, 2.0, 0.95, 5, 1.5, 7)]
    assert len(steps) == 1
    expect(answers(page)).to_have_count(1)


def test_clear_starts_a_new_chat_even_during_an_answer(page: Page, engine: Any) -> None:
    alone = said(engine, QUESTIONS[1])
    send(page, QUESTIONS[0])
    expect(answers(page)).to_have_text(re.compile(r"\w"))
    button(page, "Clear").click()
    wait_for_rest(page)
    expect(page.get_by_text(QUESTIONS[0])).to_have_count(0)
    expect(answers(page)).to_have_count(0)
    set_longest(page, SHORT)
    send(page, QUESTIONS[1])
    expect(answers(page)).to_have_text(alone)


def test_both_models_answer_side_by_side_and_each_continues_its_own_conversation(
    page: Page, engine: Any, steps: list[int]
) -> None:
    first, second = QUESTIONS
    expected = []
    for adapter in (True, False):
        begun = said(engine, first, adapter=adapter)
        expected.append([begun, said(engine, first, begun, second, adapter=adapter)])
    assert expected[0] != expected[1]
    set_longest(page, SHORT)
    send(page, first)
    expect(answers(page)).to_have_text([expected[0][0]])
    wait_for_rest(page)
    page.get_by_label("Compare with the base model").check()  # what was asked already is answered at once
    expect(answers(page, 1)).to_have_text([expected[1][0]])
    wait_for_rest(page)
    send(page, second)
    for column, texts in enumerate(expected):
        expect(answers(page, column)).to_have_text(texts)
    wait_for_rest(page)
    left, right = (page.get_by_role("log").nth(column).bounding_box() for column in (0, 1))
    assert left and right and left["x"] + left["width"] < right["x"]
    assert left["y"] == right["y"]
    steps.clear()
    button(page, "Retry").click()
    expect(button(page, "Stop")).to_be_enabled()
    wait_for_rest(page)
    assert len(steps) == 2 * SHORT
    for column, texts in enumerate(expected):
        expect(answers(page, column)).to_have_text(texts)
    page.get_by_label("Compare with the base model").uncheck()
    expect(page.get_by_role("log")).to_have_count(1)
    button(page, "Clear").click()
    expect(answers(page)).to_have_count(0)


def test_text_that_is_typed_during_an_answer_stays(page: Page) -> None:
    send(page, QUESTIONS[0])
    expect(answers(page)).to_have_text(re.compile(r"\w"))
    send(page, QUESTIONS[1])
    begun = answers(page).inner_text()
    expect(answers(page)).not_to_have_text(begun)
    button(page, "Stop").click()
    wait_for_rest(page)
    expect(message(page)).to_have_value(QUESTIONS[1])
    expect(answers(page)).to_have_count(1)


def test_a_refused_or_failed_answer_is_one_sentence(page: Page, engine: Any) -> None:
    send(page, "very " * 600 + "long")
    expect(page.get_by_text("shorten the message or ask for a shorter answer.")).to_be_visible()
    wait_for_rest(page)

    def fail(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    hook = engine.backend.model.get_base_model().register_forward_pre_hook(fail)
    send(page, QUESTIONS[0])
    expect(page.get_by_text("The answer failed (RuntimeError); the server's log says more.")).to_be_visible()
    wait_for_rest(page)
    hook.remove()
    assert "Traceback" not in page.inner_text("body")
    set_longest(page, SHORT)
    button(page, "Retry").click()
    expect(answers(page)).to_have_text(said(engine, QUESTIONS[0]))


def test_everything_works_with_the_keyboard_alone(page: Page) -> None:
    def focused() -> str:
        name = "e => e.getAttribute('aria-label') || (e.labels ? e.labels[0]?.innerText : '') || e.innerText"
        return str(page.locator(":focus").evaluate(name)).split("\n")[0].strip()

    page.keyboard.type(QUESTIONS[0])
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text(re.compile(r"\w"))
    page.keyboard.press("Tab")  # Send has nothing to do now
    assert focused() == "Stop"
    page.keyboard.press("Enter")
    wait_for_rest(page)
    message(page).focus()
    order = []
    for _ in range(6):
        page.keyboard.press("Tab")
        order.append(focused())
    assert order == [
        "Send",
        "Retry",
        "Clear",
        "Compare with the base model",
        "Settings",
        "Before and after fine-tuning",
    ]
    page.keyboard.press("Enter")
    expect(page.get_by_role("cell", name="98.0%")).to_be_visible()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_label("System prompt")).to_be_visible()
    page.keyboard.press("Tab")
    assert focused() == "System prompt"
    page.keyboard.press("Tab")
    page.keyboard.type(str(SHORT))
    for _ in range(3):
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    expect(answers(page, 1)).to_have_count(1)


@pytest.fixture(scope="module")
def everything(browser: BrowserContext, address: str, steps: list[int]) -> Iterator[Page]:
    """The page with all that it can show."""
    page = browser.new_page()
    page.goto(address)
    page.add_style_tag(content="* { transition: none !important }")
    set_longest(page, SHORT)
    page.get_by_role("button", name="Before and after").click()
    send(page, QUESTIONS[0])
    expect(answers(page)).to_have_count(1)
    wait_for_rest(page)
    page.get_by_label("Compare with the base model").check()
    expect(answers(page, 1)).to_have_count(1)
    wait_for_rest(page)
    yield page
    page.close()


def test_every_control_has_a_name(everything: Page) -> None:
    tree = everything.context.new_cdp_session(everything).send("Accessibility.getFullAXTree")
    controls = {"button", "checkbox", "log", "slider", "spinbutton", "textbox"}
    found = [
        (node["role"]["value"], node.get("name", {}).get("value", "").strip())
        for node in tree["nodes"]
        if not node.get("ignored") and node["role"]["value"] in controls
    ]
    assert {role for role, _ in found} == controls
    assert [role for role, name in found if not name] == []
    assert [name for _, name in found].count("Clear") == 1


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_every_text_has_enough_contrast(everything: Page, scheme: Any) -> None:
    everything.emulate_media(color_scheme=scheme)
    background = expect(everything.locator("gradio-app"))
    background.to_have_css("background-color", "rgb(255, 255, 255)" if scheme == "light" else "rgb(15, 15, 17)")
    assert everything.evaluate(FAINT) == []


def test_nothing_is_cut_off_or_wider_than_a_phone(everything: Page) -> None:
    everything.set_viewport_size({"width": 360, "height": 740})
    assert everything.evaluate("document.documentElement.scrollWidth") <= 360
    assert everything.evaluate(CUT) == []
    above, below = (everything.get_by_role("log").nth(column).bounding_box() for column in (0, 1))
    assert above and below and above["y"] + above["height"] < below["y"]


# Parts of the page that reach beyond its edges, or whose contents do beyond theirs.
CUT = """() => [...document.querySelectorAll('main *')].filter(e => {
  const {width, left, right} = e.getBoundingClientRect()
  const cut = e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX != 'visible'
  return width && (left < 0 || right > 360 || cut)
}).map(e => e.outerHTML.slice(0, 200))"""

# Texts whose contrast is below 4.5, as WCAG measures it; those of controls that are switched off may be.
FAINT = """() => {
  const parts = color => { const c = color.match(/[\\d.]+/g).map(Number); return c.length < 4 ? [...c, 1] : c }
  const light = ([r, g, b]) => [[r, .2126], [g, .7152], [b, .0722]].reduce((sum, [c, share]) =>
    sum + share * ((c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4), 0)
  const behind = e => { for (; e; e = e.parentElement) {
    const c = parts(getComputedStyle(e).backgroundColor); if (c[3] > .5) return c } return [255, 255, 255] }
  const faint = []
  for (const e of document.querySelectorAll('main *')) {
    const typed = e.matches('input:not([type=checkbox]), textarea')
    const says = typed || [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())
    if (!says || !e.checkVisibility() || e.closest('[disabled]')) continue
    for (const pseudo of e.placeholder ? [null, '::placeholder'] : [null]) {
      const [a, b] = [light(parts(getComputedStyle(e, pseudo).color)), light(behind(e))]
      const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05)
      if (contrast < 4.5) faint.push(`${contrast.toFixed(1)} ${e.tagName} ${e.className} ${e.innerText ?? ''}`)
    }
  }
  return faint
}"""
