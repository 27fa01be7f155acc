"""A file share in Azure Files, through its REST API: folders, files and ranges, with a SAS token made by az.

az takes 0.4 seconds to start, for every file. So az makes a SAS token for this share that is valid for some hours; the
account key stays with az. Files are then sent over a few persistent connections.
"""

from __future__ import annotations

import hashlib
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, quote, urlencode

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from az import AGAIN, UNREACHABLE, AzureError, az

CONNECTIONS = 16
RANGE = 4 * 2**20  # maximum bytes per request
HOURS = 12  # validity of the SAS token
BACKOFF = 0.5  # seconds, doubled with each retry
BUSY = (408, 429, 500, 502, 503, 504)
FULL = (
    "The file share is full: `az storage share-rm update --storage-account {0} --name {1} --quota GIB` makes it larger "
    f"(the quota in GiB), {AGAIN}."
)
REFUSED = (
    "The file share refuses the signature of az ({0}): check your access with `az storage share list "
    f"--account-name {{1}}`, {AGAIN}."
)


class Share:
    """The share of a workspace. Every method raises AzureError."""

    def __init__(self, config: dict[str, str]) -> None:
        """Get a SAS token from az; `config` is infra/*.config.json."""
        self.account, self.name = config["STORAGE_ACCOUNT_NAME"], config["FILE_SHARE_NAME"]
        until = f"{datetime.now(UTC) + timedelta(hours=HOURS):%Y-%m-%dT%H:%MZ}"
        options = ["--account-name", self.account, "--name", self.name, "--permissions", "rcwdl", "--expiry", until]
        options += ["--https-only", "--subscription", config["SUBSCRIPTION_ID"]]
        self.signature = dict(parse_qsl(str(az("storage", "share", "generate-sas", *options))))
        self.url = f"https://{self.account}.file.core.windows.net/{quote(self.name)}"
        self.session = requests.Session()
        retries = Retry(
            5, connect=2, backoff_factor=BACKOFF, status_forcelist=BUSY, allowed_methods=None, raise_on_status=False
        )
        self.session.mount("https://", HTTPAdapter(pool_maxsize=CONNECTIONS, max_retries=retries))
        # read proxy and certificates from the environment once, not for every request
        found = self.session.merge_environment_settings(self.url, {}, None, None, None)
        self.session.proxies, self.session.verify = found["proxies"], found["verify"]
        self.session.trust_env = False
        self.session.headers["x-ms-version"] = "2024-11-04"

    def ask(self, method: str, path: str, accept: tuple[int, ...] = (), **options: Any) -> requests.Response:
        """Send a request for a path of the share; error statuses in `accept` are returned, not raised."""
        query = urlencode({**options.pop("query", {}), **self.signature})
        try:
            answer = self.session.request(method, f"{self.url}/{quote(path)}?{query}", timeout=60, **options)
        except requests.RequestException:
            raise AzureError(UNREACHABLE) from None  # its text has the signature, which --debug would show
        if answer.ok or answer.status_code in accept:
            return answer
        code = answer.headers.get("x-ms-error-code", str(answer.status_code))
        if code == "ShareSizeLimitReached":
            raise AzureError(FULL.format(self.account, self.name))
        if code in ("AuthenticationFailed", "AuthorizationFailure", "InvalidAuthenticationInfo"):
            raise AzureError(REFUSED.format(code, self.account))
        if answer.status_code in BUSY:
            raise AzureError(
                f"The file share is busy ({code}): wait a minute, `az storage account show --name {self.account}` "
                f"shows its state, {AGAIN}."
            )
        if code in ("ShareNotFound", "AccountNotFound"):
            raise AzureError(
                f"The share {self.name} does not exist any more: run `python infra/azure.py provision finetuning`."
            )
        raise AzureError(
            f"The file share refuses {method} {path} ({code}): look at it with `az storage file list --share-name "
            f"{self.name} --account-name {self.account}`, {AGAIN}."
        )

    def make_folder(self, path: str) -> None:
        """Create a folder unless it exists; its parent must exist."""
        self.ask("PUT", path, (409,), query={"restype": "directory"})

    def write(self, path: str, source: BinaryIO, size: int, note: Callable[[int], object] = int) -> str:
        """Write a file of `size` bytes, replacing an existing one; return the SHA-256 of the content.

        `note` is called with the bytes of each piece.
        """
        digest = hashlib.sha256()
        self.ask("PUT", path, headers={"x-ms-type": "file", "x-ms-content-length": str(size)})
        for start in range(0, size, RANGE):
            piece = source.read(min(RANGE, size - start))
            digest.update(piece)
            headers = {"x-ms-write": "update", "x-ms-range": f"bytes={start}-{start + len(piece) - 1}"}
            self.ask("PUT", path, query={"comp": "range"}, headers=headers, data=piece)
            note(len(piece))
        return digest.hexdigest()

    def send(self, path: str, file: Path, note: Callable[[int], object] = int) -> str:
        """Send a file; return the SHA-256 of what was sent."""
        with file.open("rb") as source:
            return self.write(path, source, os.fstat(source.fileno()).st_size, note)

    def read(self, path: str) -> bytes | None:
        """Return a file's bytes; None if it does not exist."""
        answer = self.ask("GET", path, (404,))
        return answer.content if answer.ok else None

    def size(self, path: str) -> int | None:
        """Return a file's size in bytes; None if it does not exist."""
        answer = self.ask("HEAD", path, (404,))
        return int(answer.headers["Content-Length"]) if answer.ok else None

    def fetch(self, path: str, target: Path, note: Callable[[int], object] = int) -> None:
        """Download a file, piece by piece."""
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.ask("GET", path, stream=True) as answer, target.open("wb") as file:
                for piece in answer.iter_content(RANGE):
                    note(file.write(piece))
        except requests.RequestException:
            raise AzureError(UNREACHABLE) from None

    def remove(self, path: str) -> None:
        """Remove a file if it exists."""
        self.ask("DELETE", path, (404,))

    def files(self, folder: str) -> Iterator[tuple[str, int]]:
        """Yield path and size in bytes of every file below a folder; nothing if there is no such folder."""
        marker = ""
        while True:
            query = {"restype": "directory", "comp": "list", "marker": marker}
            answer = self.ask("GET", folder, (404,), query=query)
            if not answer.ok:
                return
            page = ElementTree.fromstring(answer.content)
            for entry in page.findall("Entries/File"):
                yield f"{folder}/{entry.findtext('Name')}", int(entry.findtext("Properties/Content-Length") or 0)
            for entry in page.findall("Entries/Directory"):
                yield from self.files(f"{folder}/{entry.findtext('Name')}")
            marker = page.findtext("NextMarker") or ""
            if not marker:
                return
