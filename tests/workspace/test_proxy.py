"""The page and the API behind a reverse proxy, with nginx's default headers and with its usual recipes."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, inference_of
from proxy import Location, proxying
from served import served, serving
from test_api import HELLO, KEY, Echo, client_of, fetch, openai

sys.path.append(str(REPOSITORY / ".cache" / "playwright"))  # at the end: what a workspace has comes first
from playwright.sync_api import Browser, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
FORWARDED = {"X-Forwarded-Host": "{host}"}
PUBLIC = "http://public.example:{port}"  # as the browser knows the proxy
SETTINGS: dict[str, tuple[Location, dict[str, Any]]] = {
    "nginx's default": (Location(), {"root_path": PUBLIC}),
    "a path": (Location("/chat/"), {"root_path": f"{PUBLIC}/chat"}),
    "a path that is passed on": (Location("/chat/", keep=True), {"root_path": f"{PUBLIC}/chat"}),
    "the name in Host": (Location(headers={"Host": "{host}"}), {"root_path": PUBLIC}),
    "the name in X-Forwarded-Host": (Location(headers=FORWARDED), {"proxy_headers": True}),
    "both": (Location("/chat/", headers=FORWARDED), {"root_path": "/chat", "proxy_headers": True}),
}


@pytest.fixture(scope="module", autouse=True)
def modules(workspace: Path) -> Iterator[None]:
    with inference_of(workspace):
        yield


def echo() -> Any:
    """Return an engine that answers with the prompt."""
    from engine import Engine, Source

    return Engine(Source("models/demo", None, None, "lora", "float32", ""), Echo())


@contextlib.contextmanager
def behind(location: Location, key: str = "", page: bool = True, **options: Any) -> Iterator[str]:
    """Serve behind a proxy; yield the address that a browser knows."""
    from fastapi import FastAPI

    with proxying(location):
        options = {
            name: value.format(port=location.port) if name == "root_path" else value for name, value in options.items()
        }
        with contextlib.ExitStack() as stack:
            if page:
                address, _ = stack.enter_context(served(echo, key, **options))
            else:
                address, _, ready = stack.enter_context(serving(echo, lambda _: FastAPI(), key, **options))
                assert ready.wait(60)
            location.upstream = int(address.rstrip("/").rpartition(":")[2])
            yield PUBLIC.format(port=location.port) + location.path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("chromium is not on the PATH")
    with sync_playwright() as playwright:
        known = "--host-resolver-rules=MAP public.example 127.0.0.1"
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", known])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("setting", SETTINGS)
def test_page_and_api_answer_behind_a_proxy(setting: str, browser: Browser) -> None:
    location, options = SETTINGS[setting]
    with behind(location, **options) as address:
        page = browser.new_page()
        failed: list[str] = []
        page.on("pageerror", lambda error: failed.append(str(error)))
        # the page itself breaks off a stream of events that has ended
        page.on("requestfailed", lambda request: "ABORTED" in request.failure or failed.append(request.url))
        page.on("response", lambda response: response.status >= 400 and failed.append(response.url))
        page.goto(address)
        page.get_by_label("Your message").fill("Hello there")
        page.get_by_label("Your message").press("Enter")
        expect(page.locator(".bot.message")).to_contain_text("[user]Hello there", timeout=30_000)
        expect(page.get_by_role("button", name="Stop", exact=True)).to_be_disabled(timeout=30_000)
        body = json.dumps({"model": "base", "messages": [{"role": "user", "content": "from a page"}]})
        ask = "async ([path, body]) => (await (await fetch(path, {method: 'POST', body})).json()).choices[0].message"
        said = page.evaluate(ask, [f"{location.path}v1/chat/completions", body])["content"]
        assert said == "[user]from a page"
        assert [url for url in failed if "favicon" not in url] == []
        page.close()
        near = address.replace("public.example", "127.0.0.1")
        answer = client_of(near).chat.completions.create(model="base", messages=HELLO, stream=True)  # type: ignore[arg-type]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == "[user]" + HELLO[0]["content"]


def test_the_password_is_required_behind_a_proxy(browser: Browser) -> None:
    location, options = SETTINGS["a path"]
    with behind(location, KEY, **options) as address:
        page = browser.new_page()
        page.goto(address)
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Login").click()
        page.get_by_label("Your message").fill("Hello there")
        page.get_by_label("Your message").press("Enter")
        expect(page.locator(".bot.message")).to_contain_text("[user]Hello there", timeout=30_000)
        page.close()
        near = address.replace("public.example", "127.0.0.1")
        assert client_of(near, KEY).models.list().data
        with pytest.raises(openai.AuthenticationError):
            client_of(near).models.list()


def test_the_page_of_an_https_proxy_loads_its_parts_by_https() -> None:
    with served(echo, "", "/chat", True) as (address, _):
        headers = {"X_Forwarded_Host": "public.example", "X_Forwarded_Proto": "https"}
        assert json.loads(fetch(address, "/config", **headers)[2])["root"] == "https://public.example/chat"
        assert json.loads(fetch(address, "/chat/config", **headers)[2])["root"] == "https://public.example/chat"


BODY = json.dumps({"model": "base", "messages": HELLO}).encode()
ORIGIN = "https://public.example"


@pytest.mark.parametrize(
    ("headers", "options", "hint"),
    [
        ({}, {}, f"start the server with --root-path {ORIGIN}."),
        ({}, {"root_path": "/chat"}, f"start the server with --root-path {ORIGIN}."),
        (FORWARDED, {}, "if your proxy sent the header X-Forwarded-Host, start the server with --proxy-headers."),
        ({}, {"proxy_headers": True}, "let it send the header X-Forwarded-Host (nginx: proxy_set_header"),
        ({"Host": "{host}"}, {}, f"if a proxy sends this name, start the server with --root-path {ORIGIN}."),
    ],
)
def test_the_missing_proxy_setting_is_named(headers: dict[str, str], options: dict[str, Any], hint: str) -> None:
    location = Location(headers=headers)
    with behind(location, page=False, **options):
        near = f"http://127.0.0.1:{location.port}/"
        status, _, text = fetch(near, "/v1/chat/completions", BODY, Host="public.example", Origin=ORIGIN)
        assert (status, hint in text) == (403, True), text
        if "Host" not in headers:  # a program sends no Origin
            assert fetch(near, "/v1/chat/completions", BODY, Host="public.example")[0] == 200


@pytest.mark.parametrize(
    "options", [{}, {"root_path": f"{ORIGIN}/chat"}, {"root_path": "/chat", "proxy_headers": True}], ids=str
)
def test_a_proxy_opens_the_server_to_no_other_site(options: dict[str, Any]) -> None:
    from fastapi import FastAPI

    evil = "http://evil.example"
    with serving(echo, lambda _: FastAPI(), "", **options) as (address, _, ready):
        assert ready.wait(60)
        for headers in (
            {"Origin": evil},
            {"Origin": "null"},
            {"Host": "evil.example"},
            # a page whose name was rebound to this machine may set this header, but not Host
            {"Host": "evil.example", "Origin": evil, "X_Forwarded_Host": "evil.example"},
            {"Host": "evil.example", "Origin": evil, "X_Forwarded_Host": "127.0.0.1"},
            {"Origin": evil, "X_Forwarded_Host": "public.example"},
        ):
            for path in ("/v1/chat/completions", "/chat/v1/chat/completions", "//v1//chat/completions/"):
                status, given, text = fetch(address, path, BODY, **headers)
                assert (status, json.loads(text)["error"]["type"]) == (403, "permission_error"), (path, headers)
                assert "access-control-allow-origin" not in given


@pytest.mark.parametrize("wrong", ["chat", "public.example/chat", "https://", "ftp://a", "/chat?x", "https://a b/"])
def test_an_invalid_root_path_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    import gradio_chat
    from guard import check_root_path

    assert gradio_chat.main(["--root-path", wrong]) == 1
    assert capsys.readouterr().err.startswith(f"error: --root-path {wrong} is neither a path nor an address: write")
    for right in ("", "/chat", "/a/b", "https://public.example", "http://localhost:8080/chat"):
        check_root_path(right)
