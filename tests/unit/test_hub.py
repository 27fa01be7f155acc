"""tests/hub.py, tested with the real hub's client: huggingface_hub, and transformers, which uses it."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import SUNDRIES, Hub

pytest.importorskip(
    "huggingface_hub.hf_api", reason="this Python has no huggingface_hub: run this file with a workspace's Python"
)
library: Any = sys.modules["huggingface_hub"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = SUNDRIES | {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"1" * 2000, "a/b/c.txt": b"deep"}


class Client:
    """The library, asking this hub and filling this cache; without a token, unless one is given."""

    def __init__(self, hub: Hub, cache: Path) -> None:
        self.cache, self.options = cache, {"endpoint": hub.url, "token": False}
        self.api = library.HfApi(**self.options)

    def snapshot(self, repo: str = "me/tiny", **options: Any) -> Path:
        return Path(library.snapshot_download(repo, **{"cache_dir": self.cache} | self.options | options))

    def file(self, name: str, repo: str = "me/tiny", **options: Any) -> Path:
        return Path(library.hf_hub_download(repo, name, **{"cache_dir": self.cache} | self.options | options))

    def tree(self, repo: str = "me/tiny", folder: str | None = None, **options: Any) -> dict[str, Any]:
        return {entry.path: entry for entry in self.api.list_repo_tree(repo, folder, **options)}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the library from asking the real hub anything on its own account, and from a proxy."""
    monkeypatch.setattr(library.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "cache")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the library would have slept."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------- what is fetched


@pytest.mark.parametrize("revision", [None, "main", "v1", "refs/pr/1", COMMIT])
def test_a_snapshot_is_in_the_cache_under_its_commit(hub: Hub, client: Client, revision: str | None) -> None:
    if revision == "refs/pr/1":
        hub.add("me/tiny", {"config.json": b"{}"})
        hub.add("me/tiny", FILES, commit=COMMIT, branch="refs/pr/1")
    else:
        hub.add("me/tiny", FILES, commit=COMMIT, tags=["v1"])
    folder = client.snapshot(revision=revision)
    storage = client.cache / "models--me--tiny"
    assert folder == storage / "snapshots" / COMMIT
    assert files_in(folder) == FILES
    refs = {} if revision == COMMIT else {revision or "main": COMMIT.encode()}
    assert files_in(storage / "refs") == refs
    assert [path.name for path in (storage / "trees").iterdir()] == [f"{COMMIT}.json"]
    known = json.loads((storage / "trees" / f"{COMMIT}.json").read_text())["files"]
    blobs = {entry.get("lfs_sha256", entry["blob_id"]) for entry in known.values()}
    assert {path.name for path in (storage / "blobs").iterdir()} == blobs
    assert {name for name in known if "lfs_sha256" in known[name]} == {
        *("model.gguf", "model.safetensors", "onnx/model.onnx", "original/consolidated.00.pth"),
        next(name for name in SUNDRIES if "tfevents" in name),
    }

    hub.asked.clear()
    assert client.snapshot(revision=revision) == folder
    assert hub.asked == [] if revision == COMMIT else len(hub.asked) == 1  # which commit it is now


def test_patterns_choose_what_is_fetched(hub: Hub, client: Client) -> None:
    hub.add("me/tiny", FILES)
    folder = client.snapshot(allow_patterns=["*.json", "*.safetensors"], ignore_patterns="*/*")
    assert set(files_in(folder)) == {"config.json", "model.safetensors"}
    assert set(hub.sent) == {"config.json", "model.safetensors"}


def test_a_new_commit_moves_the_branch_and_only_what_changed_is_fetched(hub: Hub, client: Client) -> None:
    old = hub.add("me/tiny", FILES)
    client.snapshot()
    new = hub.add("me/tiny", FILES | {"config.json": b"{}"})
    assert new != old == hub.add("me/tiny", FILES, branch="older")  # the hash comes from the content
    hub.sent.clear()
    assert client.snapshot().name == new and hub.sent == {"config.json": 2}
    assert client.snapshot(revision="older").name == old


def test_a_large_file_is_streamed_from_the_cdn_which_never_sees_the_token(
    hub: Hub, client: Client, tmp_path: Path
) -> None:
    weights, words = tmp_path / "weights", tmp_path / "tokenizer"
    weights.write_bytes(os.urandom(3_000_000))
    words.write_bytes(os.urandom(1_000_001))
    hub.add("me/tiny", {"model.safetensors": weights, "tokenizer.json": words, "config.json": b"{}"}, private=True)
    folder = client.snapshot(token="hf_good")
    assert (folder / "model.safetensors").read_bytes() == weights.read_bytes()
    assert (folder / "tokenizer.json").read_bytes() == words.read_bytes()
    assert hub.sent == {"model.safetensors": 3_000_000, "tokenizer.json": 1_000_001, "config.json": 2}
    assert (hub.tokens, hub.cdn_tokens) == ({"Bearer hf_good"}, {""})
    assert sum(request.startswith("GET cdn:/me/tiny/") for request in hub.asked) == 2
    hub.add("me/tiny", {"model.safetensors": weights})
    weights.write_bytes(os.urandom(3_000_000))  # of the same size: its hash is not the one that was computed before
    hash_of_weights = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert client.tree(token="hf_good")["model.safetensors"].lfs.sha256 == hash_of_weights


def test_a_dataset_is_fetched_from_its_own_routes(hub: Hub, client: Client) -> None:
    hub.add("me/rows", {"rows.jsonl": b"{}\n"}, kind="dataset")
    assert files_in(client.snapshot("me/rows", repo_type="dataset")) == {"rows.jsonl": b"{}\n"}
    assert client.api.dataset_info("me/rows").id == "me/rows"
    assert (
        f"GET /datasets/me/rows/resolve/{hub.repositories['dataset', 'me/rows'].refs['main']}/rows.jsonl" in hub.asked
    )
    with pytest.raises(library.errors.RepositoryNotFoundError):
        client.snapshot("me/rows")


def test_a_renamed_repository_is_found_under_its_former_name(hub: Hub, client: Client) -> None:
    hub.add("me/tiny", FILES)
    hub.renamed["me/former"] = "me/tiny"
    assert files_in(client.snapshot("me/former")) == FILES


def test_transformers_loads_from_it(hub: Hub, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "good": 1, "day": 2}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model = {
        "config.json": b'{"model_type": "llama", "hidden_size": 96}',
        "tokenizer.json": words.to_str().encode(),
        "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}',
        "chat_template.jinja": b"{{ messages }}",
    }
    hub.add("me/tiny", SUNDRIES | model)
    code = """
import sys
sys.modules["torch"] = None  # takes seconds, and is not needed
from transformers import AutoConfig, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("me/tiny")
print(AutoConfig.from_pretrained("me/tiny").hidden_size, tokenizer("good day").input_ids, tokenizer.chat_template)
"""
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1", "PATH": os.defpath}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "96 [1, 2] {{ messages }}\n"), done.stderr
    assert set(hub.sent) == set(model)


# -------------------------------------------------------------------------------------------------- what is listed


def test_a_tree_of_several_pages_is_listed_completely(hub: Hub, client: Client) -> None:
    names = {f"{number % 3}/{number:04}.txt" for number in range(2100)}
    hub.add("me/tiny", dict.fromkeys(names, b""))
    assert set(client.tree(recursive=True)) == names | {"0", "1", "2"}
    assert len(hub.asked) == 3
    hub.asked.clear()
    few = client.tree(folder="1", expand=True)
    assert set(few) == {name for name in names if name.startswith("1/")} and len(hub.asked) == 14
    assert few["1/0001.txt"].last_commit.oid and few["1/0001.txt"].security.safe


def test_a_folder_is_listed_with_its_folders(hub: Hub, client: Client) -> None:
    hub.add("me/tiny", FILES)
    top = client.tree()
    assert set(top) == {name for name in FILES if "/" not in name} | {"a", "onnx", "original", "runs"}
    assert isinstance(top["a"], library.hf_api.RepoFolder) and top["a"].tree_id
    assert set(client.tree(folder="a/b")) == {"a/b/c.txt"}
    assert set(client.tree(folder="a", recursive=True)) == {"a/b", "a/b/c.txt"}
    with pytest.raises(library.errors.RemoteEntryNotFoundError, match='no/such does not exist on "main"'):
        client.tree(folder="no/such")


def test_information_and_tree_agree(hub: Hub, client: Client) -> None:
    commit = hub.add("me/tiny", FILES, tags=["v1"])
    about = client.api.model_info("me/tiny", revision="v1", files_metadata=True)
    assert (about.id, about.sha, about.private, about.gated) == ("me/tiny", commit, False, False)
    tree = client.tree(recursive=True)
    assert {file.rfilename: file.size for file in about.siblings} == {name: len(body) for name, body in FILES.items()}
    for file in about.siblings:
        assert (file.blob_id, file.lfs) == (tree[file.rfilename].blob_id, tree[file.rfilename].lfs)
    assert tree["config.json"].blob_id == "230d5f4da0da586aad26ead694ea67cd15bd6df1"  # as git hash-object says
    plain = client.api.model_info("me/tiny")
    assert [file.rfilename for file in plain.siblings] == sorted(FILES) and plain.siblings[0].size is None
    assert client.api.model_info("me/tiny", expand=["gated"]).siblings is None


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("token", "status", "words"),
    [
        (False, 401, "You must have access to it and be authenticated to access it. Please log in."),
        ("hf_other", 403, "you are not in the authorized list. Visit {url}/me/gated to ask for access."),
        ("hf_good", None, ""),
    ],
)
def test_a_gated_repository_shows_its_information_to_everyone_and_its_files_to_some(
    hub: Hub, client: Client, token: str | bool, status: int | None, words: str
) -> None:
    hub.add("me/gated", FILES, gated=True)
    assert client.api.model_info("me/gated", token=token).gated == "manual"
    assert "config.json" in client.tree("me/gated", token=token)
    if status is None:
        assert files_in(client.snapshot("me/gated", token=token)) == FILES
        return
    with pytest.raises(library.errors.GatedRepoError) as caught:
        client.snapshot("me/gated", token=token)
    assert caught.value.response.status_code == status and words.format(url=hub.url) in str(caught.value)
    assert not hub.sent


@pytest.mark.parametrize(("token", "status"), [(False, 401), ("hf_other", 404)])
@pytest.mark.parametrize("repository", ["me/private", "me/unknown"])
def test_a_private_repository_looks_like_an_unknown_one(
    hub: Hub, client: Client, repository: str, token: str | bool, status: int
) -> None:
    hub.add("me/private", FILES, private=True)
    for ask in (client.snapshot, client.api.model_info):
        with pytest.raises(library.errors.RepositoryNotFoundError) as caught:
            ask(repository, token=token)
        assert caught.value.response.status_code == status
        assert not isinstance(caught.value, library.errors.GatedRepoError)


def test_an_invalid_token_is_refused_even_for_public_files(hub: Hub, client: Client) -> None:
    hub.add("me/tiny", FILES)
    for ask in (client.snapshot, client.api.model_info):
        with pytest.raises(
            library.errors.HfHubHTTPError, match="Invalid credentials in Authorization header"
        ) as caught:
            ask("me/tiny", token="hf_expired")
        assert type(caught.value) is library.errors.HfHubHTTPError
    with pytest.raises(library.errors.HfHubHTTPError, match="Invalid user token"):
        client.api.whoami(token="hf_expired")
    assert client.api.whoami(token="hf_good")["name"] == "good"


def test_an_unknown_revision_or_file_is_reported(hub: Hub, client: Client) -> None:
    commit = hub.add("me/tiny", FILES)
    for revision in ("v9", "f" * 40):
        with pytest.raises(library.errors.RevisionNotFoundError, match=f"Invalid rev id: {revision}"):
            client.snapshot(revision=revision)
    with pytest.raises(library.errors.RemoteEntryNotFoundError):
        client.file("no/such.json")
    assert (client.cache / "models--me--tiny" / ".no_exist" / commit / "no" / "such.json").is_file()


# --------------------------------------------------------------------------------------------------- what goes wrong


def test_a_broken_download_is_resumed_with_a_range(
    hub: Hub, client: Client, waits: list[float], tmp_path: Path
) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(os.urandom(1_000_000) * 22)
    hub.add("me/tiny", {"model.safetensors": weights})
    hub.fail("GET cdn:.*model.safetensors", break_after=15_000_000, times=1)
    assert client.file("model.safetensors").read_bytes() == weights.read_bytes()
    kept = library.constants.DOWNLOAD_CHUNK_SIZE  # the library keeps whole chunks
    assert hub.sent["model.safetensors"] == 15_000_000 + 22_000_000 - kept
    assert waits == [1]


def test_a_rate_limit_is_waited_for(hub: Hub, client: Client, waits: list[float]) -> None:
    hub.add("me/tiny", FILES)
    hub.fail("GET /api/.*/tree/", status=429, retry_after=1, times=1)
    hub.fail("GET cdn:.*model.safetensors", status=429, retry_after=7, times=2)
    assert client.snapshot(allow_patterns="model.safetensors").is_dir()
    assert waits == [2, 8, 8]  # one second is added
    hub.fail("/api/", status=429, retry_after=30)
    with pytest.raises(library.errors.HfHubHTTPError, match="Retry after 30 seconds"):
        client.api.model_info("me/tiny")


def test_a_hub_that_is_down_is_retried_until_it_works(hub: Hub, client: Client, waits: list[float]) -> None:
    hub.add("me/tiny", FILES)
    hub.fail("HEAD", status=503)
    with pytest.raises(library.errors.LocalEntryNotFoundError):
        client.file("config.json")
    assert waits == [1, 2, 4, 8, 8]
    hub.mend()
    hub.fail("GET .*config", status=500, times=1)
    hub.fail("GET .*config", status=503, times=1)
    for status in (500, 503):
        with pytest.raises(library.errors.HfHubHTTPError) as caught:
            client.file("config.json")
        assert caught.value.response.status_code == status
    assert client.file("config.json").read_bytes() == FILES["config.json"]


# --------------------------------------------------------------------------------------------------- the connections


def connect(hub: Hub) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=20)


def wait_until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.001)


def ask(connection: http.client.HTTPConnection, method: str, path: str, **headers: str) -> tuple[Any, bytes]:
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer, answer.read()


def test_ranges_are_answered_over_one_connection(hub: Hub) -> None:
    hub.add("me/tiny", {"digits.txt": b"0123456789"}, commit=COMMIT)
    connection, path = connect(hub), "/me/tiny/resolve/main/digits.txt"
    for asked, body, span in [
        ("bytes=2-4", b"234", "bytes 2-4/10"),
        ("bytes=7-", b"789", "bytes 7-9/10"),
        ("bytes=8-99", b"89", "bytes 8-9/10"),
        ("bytes=-3", b"789", "bytes 7-9/10"),
    ]:
        answer, got = ask(connection, "GET", path, Range=asked)
        assert (answer.status, got, answer.headers["Content-Range"]) == (206, body, span)
    answer, got = ask(connection, "GET", path, Range="bytes=10-")
    assert (answer.status, got, answer.headers["Content-Range"]) == (416, b"", "bytes */10")
    answer, got = ask(connection, "HEAD", path)
    assert (answer.status, got, answer.headers["Content-Length"]) == (200, b"", "10")
    assert (
        answer.headers["X-Repo-Commit"] == COMMIT
        and answer.headers["ETag"] == '"ad471007bd7f5983d273b9584e5629230150fd54"'
    )
    answer, got = ask(connection, "GET", "/nowhere")
    assert answer.status == 404 and len(hub.servers[0].connections) == 1
    connection.close()


def test_the_cdn_has_only_what_the_hub_has_redirected_to(hub: Hub) -> None:
    hub.add("me/tiny", FILES)
    connection = connect(hub)
    answer, _ = ask(connection, "HEAD", "/me/tiny/resolve/main/model.safetensors")
    assert answer.status == 302 and answer.headers["X-Linked-Size"] == "2000"
    signed = answer.headers["Location"].removeprefix(hub.cdn)
    connection.close()
    assert hub.cdn.startswith("http://localhost:")  # another host than the hub's
    cdn = http.client.HTTPConnection(hub.cdn.removeprefix("http://"), timeout=20)
    answer, got = ask(cdn, "GET", signed)
    assert got == FILES["model.safetensors"] and answer.headers["ETag"] != answer.headers["X-Linked-ETag"]
    answer, _ = ask(cdn, "GET", signed.partition("?")[0])
    assert answer.status == 403
    cdn.close()


def test_a_connection_is_reset_broken_slow_or_delayed_as_asked(hub: Hub) -> None:
    hub.add("me/tiny", {"some.txt": b"1" * 20_000})
    connection, path = connect(hub), "/me/tiny/resolve/main/some.txt"
    hub.fail("GET", refuse=True, times=1)
    hub.fail("GET", break_after=7_000, times=1)
    hub.fail("GET", trickle=100_000, times=1)
    hub.fail("GET", delay=0.1, times=1)
    hub.fail("HEAD", break_after=0)  # there is no body to break
    with pytest.raises(ConnectionResetError) as caught:
        ask(connection, "GET", path)
    assert type(caught.value) is ConnectionResetError  # and not its kind that says: closed without an answer
    with pytest.raises(http.client.IncompleteRead) as broken:
        ask(connection, "GET", path)
    assert len(broken.value.partial) == 7_000
    connection.close()
    for least in (0.19, 0.1):
        start = time.monotonic()
        assert len(ask(connection, "GET", path)[1]) == 20_000
        assert time.monotonic() - start >= least
    assert ask(connection, "HEAD", path)[0].status == 200
    connection.close()


def test_closing_ends_what_is_delayed_and_what_is_kept_alive() -> None:
    before = set(threading.enumerate())
    with Hub() as hub:
        hub.add("me/tiny", {"some.txt": b"1"})
        hub.fail("delayed", delay=600)
        kept, delayed = connect(hub), connect(hub)
        ask(kept, "GET", "/me/tiny/resolve/main/some.txt")
        delayed.request("GET", "/delayed")
        wait_until(lambda: "GET /delayed" in hub.asked)
        start = time.monotonic()
    assert time.monotonic() - start < 5 and set(threading.enumerate()) <= before
    for connection in (kept, delayed):
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            ask(connection, "GET", "/me/tiny/resolve/main/some.txt") if connection is kept else delayed.getresponse()
        connection.close()


def test_a_client_that_goes_away_leaves_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with Hub() as hub:
        hub.add("me/tiny", {"some.txt": b"1" * 900_000})
        hub.fail("GET", trickle=2_000_000)
        for _ in range(3):
            connection = connect(hub)
            connection.request("GET", "/me/tiny/resolve/main/some.txt")
            connection.getresponse().read(10)
            connection.close()
        wait_until(lambda: not hub.servers[0].connections)
    assert capfd.readouterr() == ("", "")
