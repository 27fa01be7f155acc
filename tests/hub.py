"""A Hugging Face hub on the loopback interface, for tests: it answers its client as huggingface.co does.

    with Hub() as hub:
        commit = hub.add("me/tiny", SUNDRIES | {"config.json": b"{}", "model.safetensors": Path("…")})
        ...  # run a program with HF_ENDPOINT=hub.url
        assert hub.sent["model.safetensors"] == 1000

Comments say where it departs from the real hub so that the client does the same with an http address and no Xet.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import io
import json
import os
import re
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlencode

TOKENS = {"": "", "Bearer hf_good": "good", "Bearer hf_other": "other"}  # the other one has accepted no licence
LARGE = 1_000_000  # bytes; larger files lie on the CDN, and those with one of these names
LARGE_NAME = re.compile(r"\.(safetensors|bin|gguf|pth|pt)$|\.onnx[^/]*$|\.tfevents\.")
DATE = "2026-01-02T03:04:05.000Z"
API = re.compile(r"/api/(model|dataset)s/(.+?)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?")
RESOLVE = re.compile(r"/(?:(dataset)s/)?(.+?)/(resolve)/([^/]+)/(.+)")

# What every real repository has beside the model, in small.
SUNDRIES: dict[str, bytes] = {
    ".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
    "LICENSE": b"MIT License\n",
    "README.md": b"---\nlicense: mit\nlibrary_name: transformers\ntags:\n- tiny\n---\n\n# A model\n",
    "model.gguf": b"GGUF" + bytes(60),
    "modeling_odd.py": b"raise SystemExit('code from a model repository was run')\n",
    "onnx/model.onnx": b"\x08\x07" + bytes(62),
    "original/consolidated.00.pth": b"PK\x03\x04" + bytes(60),
    "runs/Jan02_03-04-05_host/events.out.tfevents.1767323045.host.1.0": bytes(64),
}


@dataclass(frozen=True)
class File:
    """A file of a commit: a small one is in git, a large one on the CDN, and a pointer to it (LFS) in git."""

    name: str
    content: bytes | Path

    def open(self) -> io.BytesIO | io.BufferedReader:
        return io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb")

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @property
    def large(self) -> bool:
        return self.size > LARGE or bool(LARGE_NAME.search(self.name))

    @property
    def sha256(self) -> str:
        changed = 0 if isinstance(self.content, bytes) else self.content.stat().st_mtime_ns
        with HASHING:  # the client asks for it from eight threads at once
            return sha256_of(self.content, self.size, changed)

    @property
    def in_git(self) -> bytes:
        if self.large:
            return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        with self.open() as file:
            return file.read()

    @property
    def oid(self) -> str:
        body = self.in_git
        return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()

    def lfs(self, hash_name: str) -> dict[str, Any]:
        known = {hash_name: self.sha256, "size": self.size, "pointerSize": len(self.in_git)} if self.large else {}
        return {"lfs": known} if known else {}

    def entry(self) -> dict[str, Any]:
        """Return the file as a tree lists it; without xetHash, which would keep the client from plain HTTP."""
        return {"type": "file", "oid": self.oid, "size": self.size, "path": self.name} | self.lfs("oid")

    def sibling(self, blobs: bool) -> dict[str, Any]:
        """Return the file as a repository's information lists it."""
        more = {"blobId": self.oid, "size": self.size} | self.lfs("sha256") if blobs else {}
        return {"rfilename": self.name} | more


HASHING = threading.Lock()


@functools.cache
def sha256_of(content: bytes | Path, size: int, changed: int) -> str:
    """Return the hash of what has this size and was changed at this time."""
    with File("", content).open() as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha1(*parts: str) -> str:
    return hashlib.sha1("\n".join(parts).encode()).hexdigest()


@dataclass
class Repository:
    name: str
    kind: str
    private: bool = False
    gated: bool = False
    tags: tuple[str, ...] = ()
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """What goes wrong with the requests that match, `times` times, or always."""

    pattern: str
    status: int = 0
    retry_after: int | None = None  # seconds
    times: float = float("inf")
    delay: float = 0  # seconds before the answer
    break_after: int | None = None  # bytes of the body, then the connection ends
    trickle: int = 0  # bytes per second
    refuse: bool = False  # the connection is reset


@dataclass
class Answer:
    body: File | bytes | dict[str, Any] | list[dict[str, Any]]
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200


class AnswerError(Exception):
    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message} | dict(headers or {})
        if code:
            self.headers["X-Error-Code"] = code
        if status == 401:
            self.headers["WWW-Authenticate"] = 'Bearer realm="Authentication required", charset="UTF-8"'


class Hub:
    """The hub and its CDN, while the context lasts. `renamed` maps a repository's former name to its name."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.renamed: dict[str, str] = {}
        self.signed: dict[str, File] = {}  # what the hub redirected to; the CDN has nothing else
        self.asked: list[str] = []
        self.tokens: set[str] = set()
        self.cdn_tokens: set[str] = set()
        self.sent: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.servers = [Server(self, ""), Server(self, "cdn:")]
        self.url = f"http://127.0.0.1:{self.servers[0].server_port}"
        self.cdn = f"http://localhost:{self.servers[1].server_port}"

    def __enter__(self) -> Self:
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in self.servers:
            server.close()

    def add(
        self,
        repo: str,
        files: Mapping[str, bytes | Path],
        *,
        commit: str | None = None,
        branch: str = "main",
        tags: Sequence[str] = (),
        gated: bool = False,
        private: bool = False,
        kind: str = "model",
    ) -> str:
        """Add a commit of these files, and no others, to a repository; the branch moves to it. Returns its hash.

        `branch` may be a ref: refs/pr/1. `kind` is model or dataset. Once gated or private, a repository stays so.
        """
        repository = self.repositories.setdefault((kind, repo), Repository(repo, kind))
        repository.gated, repository.private = repository.gated or gated, repository.private or private
        tree = {name: File(name, files[name]) for name in sorted(files)}
        commit = commit or sha1(repo, *(f"{file.oid} {file.name}" for file in tree.values()))
        repository.commits[commit] = tree
        repository.refs |= dict.fromkeys((branch, *tags), commit)
        return commit

    def fail(self, pattern: str, **fault: Any) -> None:
        """Let requests go wrong (see Fault) where the pattern is found in "METHOD /path" or "METHOD cdn:/path".

        The path has no query. Of several that match, the first happens; when its `times` are over, the next.
        """
        self.faults.append(Fault(pattern, **fault))

    def mend(self) -> None:
        """Forget all faults."""
        self.faults.clear()

    def fault_of(self, request: str) -> Fault:
        """Return what goes wrong with a request, and count it."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return Fault("")

    def answer(self, target: str, authorization: str) -> Answer:
        """Answer a GET for the hub. Raises AnswerError."""
        route, _, query = target.partition("?")
        if authorization not in TOKENS:
            raise AnswerError(401, "", "Invalid credentials in Authorization header")
        user = TOKENS[authorization]
        if route == "/api/whoami-v2":
            if not user:
                raise AnswerError(401, "", "Invalid username or password.")
            access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "read"}}
            return Answer({"type": "user", "id": sha1(user)[:24], "name": user, "auth": access})
        match = RESOLVE.fullmatch(route) or API.fullmatch(route)
        if not match:
            raise AnswerError(404, "", "Sorry, we can't find the page you are looking for.")
        kind, name, what, revision, path = match.groups()
        if new := self.renamed.get(name):
            new = target.replace(name, new, 1)
            return Answer(f"Temporary Redirect. Redirecting to {new}".encode(), {"Location": new}, 307)
        repository = self.repositories.get((kind or "model", name))
        if not repository or (repository.private and user != "good"):
            if user:
                raise AnswerError(404, "RepoNotFound", "Repository not found")
            # The hub sends no code here: its client takes every 401 from an https address for this.
            raise AnswerError(401, "RepoNotFound", "Invalid username or password.")
        revision, path = unquote(revision or "main"), unquote(path or "")
        commit = revision if revision in repository.commits else repository.refs.get(revision)
        if commit is None:
            raise AnswerError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if what == "resolve":
            return self.resolve(repository, commit, path, user)
        asked = parse_qs(query)
        if what == "tree":
            rows = list_tree(repository.commits[commit], path, asked.get("recursive") == ["true"])
            if path and not rows:
                raise AnswerError(404, "EntryNotFound", f'{path} does not exist on "{revision}"')
            return page_of(rows, f"{self.url}{route}", asked, commit)
        return about(repository, commit, asked)

    def resolve(self, repository: Repository, commit: str, path: str, user: str) -> Answer:
        """Answer with a small file, or the location of a large one. The real hub redirects to small ones as well."""
        if repository.gated and user != "good":
            limit = f"Access to {repository.kind} {repository.name} is restricted"
            if not user:
                limit += ". You must have access to it and be authenticated to access it. Please log in."
                raise AnswerError(401, "GatedRepo", limit)
            page = f"{self.url}/{repository.name}"
            limit += f" and you are not in the authorized list. Visit {page} to ask for access."
            raise AnswerError(403, "GatedRepo", limit)
        file = repository.commits[commit].get(path)
        if file is None:
            raise AnswerError(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        if not file.large:
            return Answer(file, {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"'})
        headers = {"X-Repo-Commit": commit, "X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        route = f"/{repository.name}/{file.sha256}/{quote(file.name)}"
        route += f"?Expires=4102444800&Signature={sha1(route)}&Key-Pair-Id=K1TEST"
        self.signed[route] = file
        body = f"Found. Redirecting to {self.cdn}{route}".encode()
        return Answer(body, headers | {"Location": self.cdn + route, "Cache-Control": "no-store"}, 302)

    def answer_of_cdn(self, target: str) -> Answer:
        """Answer a GET for the CDN, whose ETag is not the hub's. Raises AnswerError."""
        if file := self.signed.get(target):
            return Answer(file, {"ETag": f'"{hashlib.sha256(file.sha256.encode()).hexdigest()}"'})
        raise AnswerError(403, "", "Access denied")


def about(repository: Repository, commit: str, asked: Mapping[str, list[str]]) -> Answer:
    """Answer with what is known of a repository, of a gated one too."""
    files = repository.commits[commit].values()
    known: dict[str, Any] = {
        "author": repository.name.partition("/")[0],
        "sha": commit,
        "lastModified": DATE,
        "private": repository.private,
        "gated": "manual" if repository.gated else False,
        "tags": [*repository.tags],
        "siblings": [file.sibling("blobs" in asked) for file in files],
        "usedStorage": sum(file.size for file in files),
    }
    wanted = asked.get("expand", known)
    identity = {"_id": sha1(repository.name)[:24], "id": repository.name}
    return Answer(identity | {key: value for key, value in known.items() if key in wanted})


def list_tree(files: Mapping[str, File], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Return the content of a folder: files and folders, by name."""
    top, rows = f"{folder}/" if folder else "", {}
    for name, file in files.items():
        if name.startswith(top):
            steps = name[len(top) :].split("/")
            for depth in range(1, len(steps) if recursive else min(len(steps), 2)):
                path = top + "/".join(steps[:depth])
                rows[path] = {"type": "directory", "oid": sha1(path), "size": 0, "path": path}
            if recursive or len(steps) == 1:
                rows[name] = file.entry()
    return [rows[path] for path in sorted(rows)]


def page_of(rows: list[dict[str, Any]], url: str, asked: Mapping[str, list[str]], commit: str) -> Answer:
    """Answer with the rows after the cursor, as many as fit a page, and the address of the next page."""
    expand = asked.get("expand") == ["true"]
    limit = 50 if expand else 1000
    rest = [row for row in rows if row["path"] > asked.get("cursor", [""])[0]]
    page = rest[:limit]
    if expand:
        last = {"id": commit, "title": "Add files", "date": DATE}
        safe = {"status": "safe", "avScan": None, "pickleImportScan": None}
        page = [row | {"lastCommit": last, "securityFileStatus": safe} for row in page]
    if len(rest) <= limit:
        return Answer(page)
    query = {name: values[0] for name, values in asked.items()} | {"limit": limit, "cursor": page[-1]["path"]}
    return Answer(page, {"Link": f'<{url}?{urlencode(query)}>; rel="next"'})


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = False  # so that nothing goes on after close()
    request_queue_size = 128

    def __init__(self, hub: Hub, prefix: str) -> None:
        self.hub, self.prefix, self.connections = hub, prefix, set[socket.socket]()
        super().__init__(("127.0.0.1", 0), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may go away
            super().handle_error(request, client_address)

    def close(self) -> None:
        """End the connections that are kept alive, and wait for their threads."""
        self.shutdown()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        """Note the request, let happen what goes wrong with it, and answer."""
        hub, prefix, token = self.server.hub, self.server.prefix, self.headers.get("Authorization", "")
        route = self.path.partition("?")[0]
        request = f"{self.command} {prefix}{route}"
        hub.asked.append(request)
        (hub.cdn_tokens if prefix else hub.tokens).add(token)
        fault = hub.fault_of(request)
        if fault.refuse or (fault.delay and hub.closing.wait(fault.delay)):
            return self.cut(reset=fault.refuse)
        try:
            if fault.status:
                raise failure(fault)
            answer = hub.answer_of_cdn(self.path) if prefix else hub.answer(self.path, token)
        except AnswerError as error:
            message = {"error": str(error)} if route.startswith("/api/") else str(error).encode()
            answer = Answer(message, error.headers, error.status)
        return self.send(answer, fault)

    do_HEAD = do_GET  # noqa: N815

    def send(self, answer: Answer, fault: Fault) -> None:
        """Send an answer, or the range of a file that is asked for, as far and as fast as the fault lets it."""
        body, mime = answer.body, "text/plain"
        if isinstance(body, dict | list):
            body, mime = json.dumps(body).encode(), "application/json"
        file = body if isinstance(body, File) else File("", body)
        size, status, headers = file.size, answer.status, {"Content-Type": f"{mime}; charset=utf-8"} | answer.headers
        start, stop = 0, size
        if file.name:
            name = quote(Path(file.name).name)
            headers |= {"Accept-Ranges": "bytes"}
            headers |= {"Content-Disposition": f"inline; filename*=UTF-8''{name}; filename=\"{name}\";"}
            if asked := re.fullmatch(r"bytes=(?:(\d+)-(\d*)|-(\d+))", self.headers.get("Range", "")):
                first, last, tail = asked.groups()
                start = int(first) if first else max(0, size - int(tail))
                stop = max(start, min(size, int(last) + 1) if last else size)
                status = 206 if start < stop else 416
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}" if start < stop else f"bytes */{size}"
        headers |= {"Content-Length": str(stop - start), "X-Request-Id": f"Root=1-{len(self.server.hub.asked):08x}"}
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.send_body(file, start, stop, fault)

    def send_body(self, file: File, start: int, stop: int, fault: Fault) -> None:
        """Send the bytes from `start` to `stop`; the connection may end before."""
        hub = self.server.hub
        end = stop if fault.break_after is None else min(stop, start + fault.break_after)
        with file.open() as source:
            source.seek(start)
            while start < end:
                piece = source.read(min(end - start, fault.trickle // 20 + 1 if fault.trickle else 1 << 18))
                if not piece or (fault.trickle and hub.closing.wait(len(piece) / fault.trickle)):
                    break
                if file.name:
                    with hub.lock:
                        hub.sent[file.name] += len(piece)  # counted before: the client may be done and look
                self.wfile.write(piece)
                start += len(piece)
        if start < stop:
            self.cut()

    def cut(self, reset: bool = False) -> None:
        """End the connection, in order or by a reset."""
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        with contextlib.suppress(OSError):  # it may have ended before
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def failure(fault: Fault) -> AnswerError:
    """Return the answer that a fault asks for. Of a rate limit the hub says in two headers when it ends."""
    seconds = fault.retry_after
    headers = {} if seconds is None else {"Retry-After": str(seconds)}
    if headers and fault.status == 429:
        headers["RateLimit"] = f'"api";r=0;t={seconds}'
        headers["RateLimit-Policy"] = '"fixed window";"api";q=500;w=300'
    return AnswerError(fault.status, "", HTTPStatus(fault.status).phrase, headers)
