"""The site that `make site` built, served on loopback, and Debian's Chromium without a window to look at it."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from render.conftest import template, worker

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "site"
CHROMIUM = shutil.which("chromium")
__all__ = ["template", "worker"]  # fixtures

sys.path.append(str(ROOT / ".cache" / "playwright"))  # at the end: what the repository has comes first


class Quiet(SimpleHTTPRequestHandler):
    """A server that says nothing."""

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """The site's address on this machine."""
    if not (SITE / "index.html").is_file():
        pytest.fail("there is no site: `make site` builds it")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("chromium is not on the PATH")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=10_000)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The configurator, just opened. When it is closed it may have thrown no error, and asked no other host."""
    context = browser.new_context(
        viewport={"width": 1280, "height": 900}, permissions=["clipboard-read", "clipboard-write"]
    )
    page = context.new_page()
    thrown: list[Any] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: thrown.append(error))
    page.on("console", lambda message: thrown.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{address}/docs/configurator/index.html")
    yield page
    context.close()
    assert thrown == []
    assert [url for url in asked if not url.startswith(address)] == []
