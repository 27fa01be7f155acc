"""Azure on 127.0.0.1, for the real az CLI: a forward proxy that ends TLS and answers for the hosts that we use.

It answers for Entra ID, Azure Resource Manager, Azure Files, and the log streams and apps of Container Apps, and
refuses every other host. It checks what it is sent, keeps a list of it, and can be told to fail (`faults`). It proves
the shape of requests, the flags of az and the flow of our commands; not permissions, quotas or what Azure makes of a
template.
"""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import IPPROTO_TCP, TCP_NODELAY
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import arm
import containers
import files

TENANT = arm.TENANT
SUBSCRIPTION = "22222222-2222-2222-2222-222222222222"
PROVIDERS = ("Microsoft.App", "Microsoft.Storage", "Microsoft.OperationalInsights", "Microsoft.ManagedIdentity")
TOKEN = "eyJhbGciOiJub25lIn0.eyJvaWQiOiJtZSIsInRpZCI6InQifQ.c2ln"  # the shape of a token is all that az looks at
HOSTS = ("login.microsoftonline.com", "management.azure.com", "*.file.core.windows.net")
HOSTS += ("*.swedencentral.azurecontainerapps.io", "swedencentral.azurecontainerapps.dev", "api.loganalytics.io")
CERTIFICATES = """
import sys, trustme
ca, folder, hosts = trustme.CA(), sys.argv[1], sys.argv[2:]
ca.cert_pem.write_to_path(folder + "/ca.pem")
ca.issue_cert(*hosts).private_key_and_cert_chain_pem.write_to_path(folder + "/server.pem")
"""


@dataclass
class Request:
    """What was asked for."""

    method: str
    host: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, where it is JSON; az sends a deployment's template with a key that is not quoted."""
        return json.loads(re.sub(rb"([{,]\s*)template:", rb'\1"template":', self.body, count=1) or b"{}")


@dataclass
class Answer:
    """A status, a body (JSON unless it is bytes or pieces of them), and headers."""

    status: int = 200
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)


class RefusedError(Exception):
    """A request that Azure refuses: the status, and the code and message of its error."""

    def __init__(self, status: int, code: str, message: str = "", **headers: str) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status, self.code, self.message = status, code, message or f"The emulator says {code}."
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Emulator:
    """The services, what they hold, and what they were asked."""

    def __init__(self, folder: Path, python: Path) -> None:
        """`folder` takes certificates and shares; `python` has trustme, to make the certificates."""
        self.folder = folder
        self.requests: list[Request] = []
        self.unknown: list[str] = []  # other hosts that were asked for
        self.broken: list[str] = []  # what the emulator itself did wrong
        self.faults: Counter[str] = Counter()  # a fault's name → how many more times it happens
        self.resources: dict[str, dict[str, Any]] = {}  # by id, in small letters
        self.deployments: dict[str, dict[str, Any]] = {}
        self.watch: Callable[[Request], None] = lambda request: None  # sees every request before it is answered
        self.room: int | None = None  # the largest piece that a share still takes, in bytes; None: any
        self.containers = containers.Containers(self)
        self.lock = threading.RLock()
        subprocess.run([python, "-c", CERTIFICATES, folder, *HOSTS], check=True)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(folder / "server.pem")
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Connection,), {"emulator": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> Emulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.containers.stop()
        self.server.shutdown()
        self.server.server_close()

    def environment(self, config: Path) -> dict[str, str]:
        """Return the variables that lead az, and whatever honours a proxy, here. `config` keeps az's login."""
        proxy, authority = f"http://127.0.0.1:{self.server.server_port}", str(self.folder / "ca.pem")
        return {
            **dict.fromkeys(("HTTPS_PROXY", "https_proxy"), proxy),
            **dict.fromkeys(("NO_PROXY", "no_proxy"), ""),
            **dict.fromkeys(("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"), authority),
            "AZURE_CONFIG_DIR": str(config),
            "AZURE_CORE_COLLECT_TELEMETRY": "0",
            "AZURE_AUTO_UPGRADE_ENABLE": "no",
            "AZURE_BICEP_USE_BINARY_FROM_PATH": "true",
            "AZURE_BICEP_CHECK_VERSION": "false",
        }

    def share(self, account: str, name: str) -> Path:
        """Return the folder that stands in for a share."""
        return self.folder / "shares" / account / name

    def fails(self, fault: str) -> bool:
        """Tell whether this fault is to happen now, and count it."""
        with self.lock:
            if self.faults[fault] <= 0:
                return False
            self.faults[fault] -= 1
            return True

    def find(self, kind: str, name: str = "") -> dict[str, Any]:
        """Return the one resource of a type, or that of a name. Raises KeyError."""
        for resource in self.resources.values():
            if resource["type"].lower() == kind.lower() and name in ("", resource["name"]):
                return resource
        raise KeyError(f"{kind} {name}")

    def answer(self, request: Request) -> Answer:
        """Answer a request. Raises RefusedError."""
        self.requests.append(request)
        self.watch(request)
        if request.host == "login.microsoftonline.com":
            return self.entra(request)
        if request.host == "management.azure.com":
            return self.manage(request)
        if request.host.endswith(".file.core.windows.net"):
            return files.serve(self, request)
        return self.containers.serve(request)

    def entra(self, request: Request) -> Answer:
        """Answer what is asked of Entra ID: what there is, and a token."""
        authority = f"https://{request.host}/{TENANT}"
        if request.path.endswith("/discovery/instance"):
            metadata = {"preferred_network": request.host, "preferred_cache": request.host, "aliases": [request.host]}
            return Answer(body={"tenant_discovery_endpoint": f"{authority}/v2.0", "metadata": [metadata]})
        if request.path.endswith("/openid-configuration"):
            endpoints = {"authorization": "authorize", "token": "token", "device_authorization": "devicecode"}
            urls = {f"{name}_endpoint": f"{authority}/oauth2/v2.0/{end}" for name, end in endpoints.items()}
            return Answer(body={"issuer": f"{authority}/v2.0", **urls})
        if self.fails("signed out"):
            text = "AADSTS700082: The refresh token has expired due to inactivity."
            return Answer(400, {"error": "invalid_grant", "error_description": text})
        return Answer(body={"token_type": "Bearer", "expires_in": 3600, "access_token": TOKEN})

    def manage(self, request: Request) -> Answer:
        """Answer what is asked of Azure Resource Manager."""
        if not request.headers.get("authorization", "").startswith("Bearer "):
            raise RefusedError(
                401, "AuthenticationFailed", "Authentication failed. The 'Authorization' header is missing."
            )
        if "api-version" not in request.query:
            raise RefusedError(400, "MissingApiVersionParameter")
        if self.fails("expired token"):
            challenge = 'Bearer authorization_uri="https://login.microsoftonline.com/", error="invalid_token"'
            raise RefusedError(
                401, "ExpiredAuthenticationToken", "The access token expiry has passed.", WWW_Authenticate=challenge
            )
        if self.fails("throttle"):
            raise RefusedError(429, "TooManyRequests", "The request is being throttled.", Retry_After="0")
        for method, pattern, handler in ROUTES:
            if request.method in method.split() and (match := re.fullmatch(pattern, request.path, re.IGNORECASE)):
                return handler(self, request, *(unquote(group) for group in match.groups()))
        raise RefusedError(404, "NotFound", f"The emulator has no {request.method} {request.path}")


class Connection(BaseHTTPRequestHandler):
    """A connection through the proxy: a CONNECT, then requests within TLS."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is sent at once
    emulator: Emulator
    host = ""

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_CONNECT(self) -> None:
        """Begin TLS for a host that is emulated; any other is refused."""
        name = self.path.rpartition(":")[0]
        if self.emulator.fails("network"):
            self.close_connection = True
            self.connection.close()
            return
        if not any(name == host or (host[0] == "*" and name.endswith(host[1:])) for host in HOSTS):
            self.emulator.unknown.append(name)
            self.send_error(502, f"no way to {name}")
            return
        self.host = name
        self.send_response(200)
        self.end_headers()
        self.wfile.flush()
        self.connection.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
        try:
            self.connection = self.emulator.tls.wrap_socket(self.connection, server_side=True)
            self.setup_streams()
            while not self.close_connection:
                self.handle_one_request()
        except OSError:
            self.close_connection = True

    def setup_streams(self) -> None:
        """Read and write through TLS from here on."""
        self.rfile = self.connection.makefile("rb", -1)
        self.wfile = self.connection.makefile("wb", -1)
        self.close_connection = False

    def handle_one_request(self) -> None:
        """Answer a request within TLS; before, it can only be a CONNECT."""
        if not self.host:
            super().handle_one_request()
            return
        line = self.rfile.readline(65537)
        if not line:
            self.close_connection = True
            return
        self.raw_requestline = line
        if not self.parse_request():
            return
        request = self.read()
        if self.emulator.fails("dropped") or (request.method == "PUT" and self.emulator.fails("dropped upload")):
            self.close_connection = True
            self.connection.close()
            return
        try:
            answer = self.emulator.answer(request)
        except Exception as error:  # a defect of the emulator, which a test shall show
            if not isinstance(error, RefusedError):
                self.emulator.broken.append(traceback.format_exc())
                error = RefusedError(500, "EmulatorError", repr(error))
            answer = Answer(error.status, {"error": {"code": error.code, "message": error.message}}, error.headers)
            if request.host.endswith(".file.core.windows.net"):
                answer.headers["x-ms-error-code"] = error.code
                text = f"<Error><Code>{error.code}</Code><Message>{error.message}</Message></Error>"
                answer.body = f"<?xml version='1.0'?>{text}".encode()
        self.reply(answer, request.method == "HEAD")

    def read(self) -> Request:
        """Read what is asked for."""
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(headers.get("content-length") or 0))
        query = {name.lower(): values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        return Request(self.command, self.host, parts.path, query, headers, body)

    def reply(self, answer: Answer, bodyless: bool) -> None:
        """Send an answer; pieces are sent as they come."""
        pieces = answer.body if isinstance(answer.body, Iterator) else None
        body = b"" if pieces else answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        if not isinstance(answer.body, bytes) and not pieces:
            self.send_header("Content-Type", "application/json; charset=utf-8")
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if pieces is None:
            if "Content-Length" not in answer.headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if not bodyless:
                self.wfile.write(body)
            self.wfile.flush()
            return
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for piece in pieces:
            self.wfile.write(piece)
            self.wfile.flush()


Handler = Callable[..., Answer]
ROUTES: list[tuple[str, str, Handler]] = []


def subscriptions(emulator: Emulator, request: Request) -> Answer:
    """Return the one subscription, or the one tenant."""
    if request.path.startswith("/tenants"):
        return Answer(body={"value": [{"id": f"/tenants/{TENANT}", "tenantId": TENANT}]})
    one = {"id": f"/subscriptions/{SUBSCRIPTION}", "subscriptionId": SUBSCRIPTION, "tenantId": TENANT}
    one |= {
        "displayName": "Emulated",
        "state": "Enabled",
        "subscriptionPolicies": {},
        "authorizationSource": "RoleBased",
    }
    return Answer(body=one if request.path.strip("/").count("/") else {"value": [one]})


def providers(emulator: Emulator, request: Request, subscription: str, namespace: str = "") -> Answer:
    """Return whether the resource providers are registered, or one of them is."""
    kinds = ("jobs", "containerApps", "managedEnvironments", "storageAccounts", "workspaces", "userAssignedIdentities")
    entries = []
    for name in PROVIDERS:
        state = "NotRegistered" if emulator.faults[f"unregistered {name}"] else "Registered"
        types = [
            {"resourceType": kind, "locations": ["Sweden Central"], "apiVersions": ["2025-07-01"]} for kind in kinds
        ]
        entries.append({"namespace": name, "registrationState": state, "resourceTypes": types})
    if not namespace:
        return Answer(body={"value": entries})
    return Answer(body=next(entry for entry in entries if entry["namespace"].lower() == namespace.lower()))


S = r"/subscriptions/([^/]+)"
ROUTES += [
    ("GET", r"/tenants|/subscriptions/?|/subscriptions/[^/]+", subscriptions),
    ("GET", S + r"/providers", providers),
    ("GET", S + r"/providers/([\w.]+)", providers),
    *containers.ROUTES,
    *arm.ROUTES,
]
