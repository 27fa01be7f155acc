"""What the share answers, over HTTP: each refusal is one sentence, busy moments are waited out, lists have pages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import Azure

Reply = tuple[int, str, bytes]  # status, error code, content


@pytest.fixture
def share(azure: Azure) -> Any:
    """A share without az: its signature is given, and it does not wait between its tries."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    from share import BUSY, Share

    share = object.__new__(Share)
    share.account, share.name, share.signature, share.session = "acc", "rows", {"sig": "s"}, requests.Session()
    retries = Retry(5, connect=2, backoff_factor=0, status_forcelist=BUSY, allowed_methods=None, raise_on_status=False)
    share.session.mount("http://", HTTPAdapter(max_retries=retries))
    share.session.trust_env = False
    return share


@pytest.fixture
def answers(share: Any) -> Iterator[Callable[..., list[str]]]:
    """Let a server answer with these replies, the last one for ever. Return the requests that it gets."""
    servers: list[ThreadingHTTPServer] = []

    def serve(*replies: Reply) -> list[str]:
        left, asked = [*replies], []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(f"{self.command} {self.path}")
                self.rfile.read(int(self.headers.get("content-length") or 0))
                status, code, content = left.pop(0) if len(left) > 1 else left[0]
                self.send_response(status)
                if code:
                    self.send_header("x-ms-error-code", code)
                self.send_header("content-length", str(len(content.removesuffix(b"..."))))
                self.end_headers()
                self.wfile.write(content[:3] if content.endswith(b"...") else content)

            do_PUT = do_DELETE = do_GET  # noqa: N815

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        share.url = f"http://127.0.0.1:{servers[-1].server_port}/rows"
        return asked

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "sentence", "tries"),
    [
        (413, "ShareSizeLimitReached", "The file share is full: `az storage share-rm update --storage-account acc", 1),
        (403, "AuthenticationFailed", "refuses the signature of az (AuthenticationFailed): check your access with", 1),
        (403, "AuthorizationFailure", "refuses the signature of az (AuthorizationFailure)", 1),
        (403, "InvalidAuthenticationInfo", "refuses the signature of az (InvalidAuthenticationInfo)", 1),
        (404, "ShareNotFound", "The share rows does not exist any more: run `python infra/azure.py provision", 1),
        (404, "AccountNotFound", "The share rows does not exist any more", 1),
        (
            429,
            "TooManyRequests",
            "The file share is busy (TooManyRequests): wait a minute, `az storage account show",
            6,
        ),
        (408, "", "The file share is busy (408)", 6),
        (500, "InternalError", "The file share is busy (InternalError)", 6),
        (502, "", "The file share is busy (502)", 6),
        (503, "ServerBusy", "The file share is busy (ServerBusy)", 6),
        (504, "", "The file share is busy (504)", 6),
        (400, "InvalidHeaderValue", "refuses PUT a b (InvalidHeaderValue): look at it with `az storage file list", 1),
        (412, "", "refuses PUT a b (412)", 1),
    ],
)
def test_a_refusal_is_one_sentence_that_says_what_to_do(
    share: Any, answers: Callable[..., list[str]], status: int, code: str, sentence: str, tries: int
) -> None:
    from az import AzureError

    asked = answers((status, code, b""))
    with pytest.raises(AzureError) as raised:
        share.make_folder("a b")
    said = str(raised.value)
    assert sentence in said and said.count("\n") == 0 and said.endswith(".")
    assert asked == ["PUT /rows/a%20b?restype=directory&sig=s"] * tries


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_moment_is_waited_out(share: Any, answers: Callable[..., list[str]], status: int) -> None:
    asked = answers((status, "", b""), (status, "", b""), (200, "", b"there"))
    assert share.read("file") == b"there"
    assert len(asked) == 3


def test_what_may_be_missing_or_there_is_no_error(share: Any, answers: Callable[..., list[str]]) -> None:
    answers((404, "ResourceNotFound", b""))
    assert share.read("file") is None
    assert [*share.files("folder")] == []
    share.remove("file")
    answers((409, "ResourceAlreadyExists", b""))
    share.make_folder("folder")


def test_a_list_is_read_to_its_last_page_and_with_its_folders(share: Any, answers: Callable[..., list[str]]) -> None:
    def page(entries: str, marker: str = "") -> Reply:
        return 200, "", f"<E><Entries>{entries}</Entries><NextMarker>{marker}</NextMarker></E>".encode()

    def file(name: str, size: str) -> str:
        return f"<File><Name>{name}</Name><Properties>{size}</Properties></File>"

    asked = answers(
        page(file("a", "<Content-Length>7</Content-Length>"), "next"),
        page(file("b", "") + "<Directory><Name>deep</Name></Directory>"),
        page(file("c", "<Content-Length>9</Content-Length>")),
    )
    assert [*share.files("models")] == [("models/a", 7), ("models/b", 0), ("models/deep/c", 9)]
    markers = [parse_qs(urlsplit(one).query, keep_blank_values=True)["marker"] for one in asked]
    assert markers == [[""], ["next"], [""]]


def test_a_share_that_does_not_answer_or_stops_in_a_file_is_unreachable(
    share: Any, answers: Callable[..., list[str]], tmp_path: Path
) -> None:
    from az import UNREACHABLE, AzureError

    answers((200, "", b"half of it..."))
    with pytest.raises(AzureError, match=UNREACHABLE[:20]):
        share.fetch("file", tmp_path / "deep" / "file")
    share.url = "http://127.0.0.1:1/rows"  # nobody listens there
    with pytest.raises(AzureError, match=UNREACHABLE[:20]):
        share.read("file")


def test_a_file_arrives_as_it_is_and_its_bytes_are_counted(
    share: Any, answers: Callable[..., list[str]], tmp_path: Path
) -> None:
    content, counted = bytes(range(256)) * 20_000, list[int]()  # 5 MB: two pieces
    answers((200, "", content))
    share.fetch("file", tmp_path / "file", counted.append)
    assert (tmp_path / "file").read_bytes() == content
    assert sum(counted) == len(content)
