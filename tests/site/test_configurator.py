"""The configurator in a browser: the result of its command in a shell, its disabled choices, its accessibility."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("playwright", reason="`make test` fetches playwright")
from playwright.sync_api import Page, expect

AWKWARD = "It’s a \"test\": $HOME `id` \\n {{ no }} 'one' # ! %PATH%\n\tsecond line é 日本"
CHOSEN: list[dict[str, Any]] = [
    {
        "model": "phi-2",
        "device": "cpu",
        "dataset_source": "huggingface",
        "dataset_name": "owner/rows",
        "environment": "venv",
    },
    {
        "project_name": "odd-one",
        "platform": "windows",
        "model": "custom",
        "custom_model_id": "C:\\models\\$mine",
        "target": "azure",
        "azure_gpu": "serverless-t4",
        "azure_location": "westus3",
        "dataset_source": "file",
        "dataset_path": "../my rows/it's $HOME.jsonl",
        "environment": "conda",
        "download_model": True,
        "advanced": True,
        "azure_resource_group": "rg_(mine)",
        "dataset_format": "columns",
        "prompt_template": AWKWARD + " {phrase}",
        "completion_template": '{tone}; rm -rf "$PWD"',
        "method": "dora",
        "system_prompt": AWKWARD,
        "packing": False,
        "learning_rate": 0.00001,
        "lora_dropout": 0,
        "eval_split": 100,
        "compute_dtype": "float16",
        "seed": 4294967295,
    },
    {"platform": "macos", "advanced": True, "conda_env_name": "1.0", "epochs": 8, "gradient_checkpointing": True},
]


def answer(page: Page, name: str, value: Any) -> None:
    """Answer a question as a person does."""
    field = page.locator(f"#q-{name}")
    if isinstance(value, bool):
        field.set_checked(value)
    elif field.evaluate("field => field.matches('fieldset')"):
        field.locator(f'input[value="{value}"]').check()
    elif field.evaluate("field => field.matches('select')"):
        field.select_option(value)
    else:
        field.fill(format(value, ".10f").rstrip("0").rstrip(".") if isinstance(value, float) else str(value))


def command(page: Page, kind: str = "Make a workspace") -> str:
    """Copy a command, and return the clipboard."""
    button = page.locator(".cf-head", has_text=kind).get_by_role("button", name="Copy")
    button.click()
    expect(page.get_by_role("status").filter(has_text="Copied.")).to_be_visible()
    return str(page.evaluate("navigator.clipboard.readText()"))


def recorded(folder: Path) -> dict[str, Any]:
    """Return the answers that a workspace has, without what Copier notes of the template."""
    answers = yaml.safe_load((folder / ".copier-answers.yml").read_text(encoding="utf-8"))
    return {name: value for name, value in answers.items() if not name.startswith("_")}


def powershell(text: str) -> list[str]:
    """Return the words of a command as PowerShell reads them, as far as the configurator writes them."""
    found = [match[0] for match in re.finditer(r"'(?:[^'‘-‛]|(['‘-‛])\1)*'|[^\s'‘-‛]+", text.replace(" `\n", " "))]
    return [re.sub(r"(['‘-‛])\1", r"\1", word[1:-1]) if word.startswith("'") else word for word in found]


@pytest.mark.parametrize("chosen", CHOSEN, ids=["a few", "nearly all", "on a Mac"])
def test_the_command_pasted_into_a_shell_gives_a_workspace_with_exactly_these_answers(
    chosen: dict[str, Any], page: Page, template: Path, worker: Callable[..., Any], tmp_path: Path
) -> None:
    place = tmp_path / "the template's $place"
    place.symlink_to(template)
    folder = "my work/It's `tone`"
    page.get_by_label("Address of this template").fill(str(place))
    page.get_by_label("Folder of the workspace").fill(folder)
    for name, value in chosen.items():
        answer(page, name, value)
    pasted = command(page)

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shell = ["sh", "-c", f"{pasted} --skip-tasks"]
    done = subprocess.run(
        shell, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    worker(tmp_path / "expected" / "It's `tone`", chosen).run_copy()
    assert recorded(tmp_path / folder) == recorded(tmp_path / "expected" / "It's `tone`")
    made = recorded(tmp_path / folder)
    assert {name: value for name, value in chosen.items() if made.get(name, value) != value} == {}

    words = shlex.split(pasted.replace("\\\n", ""))
    update = shlex.split(command(page, "Change one that you have").replace("\\\n", ""))
    assert (update[:4], update[4:]) == (["copier", "update", "--trust", "--defaults"], words[4:-2])
    page.get_by_label("PowerShell").check()
    assert powershell(command(page)) == words


def test_a_choice_that_does_not_fit_is_greyed_out_with_copiers_reason(page: Page) -> None:
    gpu = page.locator("#q-device").get_by_role("radio", name="NVIDIA GPU")
    expect(gpu).to_be_enabled()
    answer(page, "platform", "macos")
    expect(gpu).to_be_disabled()
    expect(page.locator("#q-device")).to_contain_text("a Mac has no CUDA: choose cpu, or target azure")
    answer(page, "target", "azure")
    expect(gpu).to_be_enabled()


def test_a_choice_that_no_longer_fits_is_refused_at_its_field_and_at_the_command(page: Page) -> None:
    answer(page, "device", "gpu")
    answer(page, "platform", "macos")
    reason = "a Mac has no CUDA: choose cpu, or target azure"
    expect(page.locator("#q-device-error")).to_have_text(reason)
    expect(page.get_by_role("link", name=f"device: {reason}")).to_be_visible()
    expect(page.get_by_role("button", name="Copy").first).to_be_disabled()


def test_a_default_follows_the_other_answers_until_it_is_answered(page: Page) -> None:
    answer(page, "advanced", True)
    steps = page.locator("#q-epochs")
    expect(steps).to_have_value("8")
    answer(page, "model", "phi-2")
    expect(steps).to_have_value("3")
    expect(page.locator("#q-conda_env_name")).to_have_value("my-workspace")
    page.get_by_label("Folder of the workspace").fill("tone")
    expect(page.locator("#q-conda_env_name")).to_have_value("tone")
    steps.fill("5")
    answer(page, "model", "demo")
    expect(steps).to_have_value("5")
    page.locator(".cf-question", has=steps).get_by_role("button", name="Use the default").click()
    expect(steps).to_have_value("8")
    expect(steps).to_be_focused()
    assert "epochs" not in command(page)


def test_an_answer_that_is_hidden_is_not_in_the_command_and_comes_back(page: Page) -> None:
    answer(page, "advanced", True)
    answer(page, "epochs", 5)
    answer(page, "target", "azure")
    answer(page, "azure_location", "swedencentral")
    answer(page, "azure_gpu", "serverless-a100")
    assert "-d epochs=5" in command(page)
    answer(page, "advanced", False)
    answer(page, "target", "local")
    plain = "copier copy --trust --defaults PATH-OR-URL-OF-THIS-REPOSITORY my-workspace"
    assert shlex.split(command(page).replace("\\\n", "")) == plain.split()
    answer(page, "advanced", True)
    assert "-d epochs=5" in command(page)


def test_errors_have_copiers_words_and_lead_to_their_field(page: Page) -> None:
    answer(page, "advanced", True)
    answer(page, "epochs", 0)
    answer(page, "dataset_source", "file")
    expect(page.locator("#q-epochs-error")).to_have_text("1 to 100: type 3")
    expect(page.locator("#q-epochs")).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_role("link", name="dataset_path: an answer is needed")).to_be_visible()
    for copy in page.get_by_role("button", name="Copy").all():
        expect(copy).to_be_disabled()
    page.get_by_role("link", name="epochs: 1 to 100: type 3").click()
    expect(page.locator("#q-epochs")).to_be_focused()
    page.keyboard.type("4")
    answer(page, "dataset_path", "rows.jsonl")
    assert {"dataset_source=file", "dataset_path=rows.jsonl", "epochs=4"} < set(command(page).split())
    page.get_by_label("Folder of the workspace").fill("..")
    expect(page.get_by_role("link", name="type the name of a folder")).to_be_visible()


def test_an_answer_that_another_one_makes_impossible_is_forgotten(page: Page) -> None:
    answer(page, "target", "azure")
    answer(page, "azure_location", "brazilsouth")
    answer(page, "azure_gpu", "dedicated-nc24-a100")
    expect(page.locator("#q-azure_location")).to_have_value("northeurope")
    assert "azure_location" not in command(page)


def test_the_keyboard_reaches_everything_and_shows_where_it_is(page: Page) -> None:
    answer(page, "advanced", True)
    answer(page, "dataset_source", "file")
    controls = """() => [...document.querySelectorAll('.cf :is(input, select, textarea, button, pre, a)')]
        .filter(e => e.checkVisibility() && !e.disabled && (e.type !== 'radio' || e.checked)).length"""
    page.evaluate("document.querySelector('#q-project_name').focus({ focusVisible: true })")
    reached = []
    while page.evaluate("document.activeElement.closest('.cf') !== null"):
        style = page.evaluate(
            """() => { const { outlineStyle, outlineWidth } = getComputedStyle(document.activeElement);
            const box = document.activeElement.getBoundingClientRect(), header = document.querySelector('.md-header');
            return [outlineStyle, outlineWidth, box.top >= header.getBoundingClientRect().bottom - 1] }"""
        )
        name = page.evaluate("document.activeElement.id || document.activeElement.outerHTML")
        assert style == ["solid", "2px", True], name
        reached.append(name)
        page.keyboard.press("Tab")
    assert len(reached) == page.evaluate(controls) > 30


def test_every_field_has_a_name_and_a_description(page: Page) -> None:
    answer(page, "advanced", True)
    for field in page.locator(".cf :is(input, select, textarea):visible").all():
        assert field.evaluate("field => field.labels[0].textContent.trim()")
    expect(page.get_by_role("textbox", name="epochs")).to_have_accessible_description(
        re.compile("How often the training goes through all examples")
    )
    expect(page.get_by_role("group", name="device")).to_have_accessible_description(
        re.compile("The device to train on")
    )


CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const over = (color, [r, g, b]) => {
    canvas.fillStyle = `rgb(${r} ${g} ${b})`; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const background = (e) => {
    const below = e.parentElement ? background(e.parentElement) : [255, 255, 255];
    return over(getComputedStyle(e).backgroundColor, below);
  };
  const light = (rgb) => rgb.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  return [...document.querySelectorAll('.cf :is(p, code, legend, label, span, a, select, input[type=text], h2, h3)')]
    .filter((e) => e.checkVisibility() && (e.textContent || e.value) && !e.closest('.cf-off')).map((e) => {
      const below = background(e);
      const [a, b] = [light(over(getComputedStyle(e).color, below)), light(below)].sort((x, y) => y - x);
      return [Number(((a + 0.05) / (b + 0.05)).toFixed(2)), e.outerHTML.slice(0, 80)];
    }).filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_is_readable_in_light_and_dark_mode_and_on_a_phone(page: Page, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 740})
    page.reload()
    answer(page, "advanced", True)
    answer(page, "model", "custom")
    answer(page, "target", "azure")
    answer(page, "system_prompt", "a" * 200)
    expect(page.locator("body")).to_have_attribute(
        "data-md-color-scheme", {"light": "default", "dark": "slate"}[scheme]
    )
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.evaluate(CONTRAST) == []


def test_the_site_s_switch_turns_the_form_dark_too(page: Page) -> None:
    page.emulate_media(color_scheme="light")
    field = page.locator("#q-project_name")
    before = field.evaluate("field => getComputedStyle(field).backgroundColor")
    for name in ("Switch to light", "Switch to dark"):
        page.get_by_title(name).click()
    expect(page.locator("body")).to_have_attribute("data-md-color-scheme", "slate")
    assert field.evaluate("field => getComputedStyle(field).backgroundColor") != before
