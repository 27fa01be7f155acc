"""The built site: every link has a target, no page contacts another host, every page fits a phone, the search works."""

from __future__ import annotations

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT, SITE

HTML = sorted(SITE.rglob("*.html"))
each_page = pytest.mark.parametrize("page", HTML, ids=lambda page: page.relative_to(SITE).as_posix())


class Page(HTMLParser):
    """The content of a page: its links, what it loads, its anchors, its titles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.places.add(value)
            elif name == "href" and tag == "a":
                self.links.append(value or "")
            elif name in ("src", "href", "srcset", "poster", "data") and tag != "a":
                self.loaded.append(value or "")


@cache
def parsed(path: Path) -> Page:
    return Page(path)


def broken(page: Path, link: str) -> str:
    """Return why a link leads nowhere, "" when it leads somewhere. Another site is taken at its word."""
    parts = urlsplit(link)
    if parts.scheme in ("https", "mailto"):
        return ""
    if parts.scheme or parts.netloc:
        return "not https"
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    target = target / "index.html" if target.is_dir() else target
    if not target.is_relative_to(SITE) or not target.is_file():
        return "no such file"
    there = not parts.fragment or parts.fragment in parsed(target).places
    return "" if there or parts.fragment == "__skip" else "no such place"


def test_every_page_of_the_documentation_is_there() -> None:
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "CHANGELOG.md", ROOT / "benchmarks/README.md"]
    pages = [path for path in pages if "example" not in path.parts or path == ROOT / "docs/example/README.md"]
    built = {path.relative_to(SITE).with_suffix(".md").as_posix() for path in HTML}
    expected = {path.relative_to(ROOT).as_posix().replace("README.md", "index.md") for path in pages}
    assert expected <= built
    home = (SITE / "index.html").read_text(encoding="utf-8")
    for section in ("Configurator", "Tutorial", "How-to", "Reference", "Decisions", "Changelog"):
        assert re.search(rf">\s*{section}\s*<", home), section


@each_page
def test_every_link_has_a_target_and_everything_loaded_is_local(page: Path) -> None:
    if page.name == "404.html":  # it is shown at any address: its links begin with a slash
        return
    found = parsed(page)
    assert {link: why for link in found.links if (why := broken(page, link))} == {}
    assert {link: why for link in found.loaded if (why := broken(page, link) or link.startswith("https:"))} == {}


def test_no_script_and_no_style_names_a_font_or_a_script_of_another_host() -> None:
    for path in SITE.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", path.read_text(encoding="utf-8")), path


def test_no_page_contacts_another_host_throws_or_is_wider_than_a_phone(browser: Any, address: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740})
    page = context.new_page()
    wrong: list[str] = []
    page.on("request", lambda request: request.url.startswith(address) or wrong.append(request.url))
    page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
    page.on("response", lambda response: response.status < 400 or wrong.append(f"{response.status} {response.url}"))
    decisions = [path for path in HTML if path.parent.name == "decisions"]
    for path in [*(path for path in HTML if path not in decisions), *decisions[-3:]]:  # these are all of one kind
        page.goto(f"{address}/{path.relative_to(SITE).as_posix()}")
        if page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
            wrong.append(f"{page.url}: wider than a phone")
    context.close()
    assert wrong == []


def test_the_search_finds_a_question(browser: Any, address: str) -> None:
    page = browser.new_page()
    with page.expect_response(re.compile(r"search\.json")):
        page.goto(address)
    page.get_by_role("button", name="Search").click()
    page.get_by_role("combobox", name="Search").fill("gradient_accumulation_steps")
    page.get_by_role("option", name="gradient_accumulation_steps").click()
    page.wait_for_url(re.compile(r"questions\.html.*#gradient_accumulation_steps"))
    page.close()
