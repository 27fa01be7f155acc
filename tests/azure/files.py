"""What the emulator has of Azure Files: shares, folders and files with their ranges, in a folder on disk."""

from __future__ import annotations

import base64
import hashlib
import hmac
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote
from xml.sax.saxutils import escape

from arm import answer, list_keys, refused

if TYPE_CHECKING:
    from emulator import Answer, Emulator, Request

RANGE = 4 * 2**20  # bytes of a range, at most


def serve(emulator: Emulator, request: Request) -> Answer:
    """Answer a request. Raises RefusedError."""
    account, parts = request.host.split(".")[0], [unquote(part) for part in request.path.strip("/").split("/")]
    authorise(emulator, request, account, parts[0])
    if "x-ms-version" not in request.headers and "sv" not in request.query:
        raise refused(400, "MissingRequiredHeader", "x-ms-version is missing.")
    if emulator.fails("busy share"):
        raise refused(503, "ServerBusy", "The server is currently unable to receive requests.")
    share = emulator.share(account, parts[0])
    if not share.is_dir():
        raise refused(404, "ShareNotFound", "The specified share does not exist.")
    if ".." in parts or any(set(part) & set('"\\:|<>*?') for part in parts):
        raise refused(400, "InvalidResourceName", "The specified resource name contains invalid characters.")
    path, kind, part = share.joinpath(*parts[1:]), request.query.get("restype"), request.query.get("comp")
    if kind == "share":
        return answer(200, b"", **{"x-ms-share-quota": "100"})
    if kind == "directory":
        return listing(path, request) if part == "list" else directory(request, path)
    if request.method == "PUT":
        return write(emulator, request, path, part)
    if not path.is_file():
        raise refused(404, "ResourceNotFound", "The specified resource does not exist.")
    if request.method == "DELETE":
        path.unlink()
        return answer(202)
    return read(request, path)


def authorise(emulator: Emulator, request: Request, account: str, share: str) -> None:
    """Refuse a request that is neither signed with the account's key nor comes with a signature for the share."""
    keys = [one for one in emulator.resources.values() if one["name"] == account and "storageAccounts" in one["type"]]
    if not keys:
        raise refused(404, "AccountNotFound", f"There is no storage account {account}.")
    key = base64.b64decode(list_keys(emulator, keys[0]["id"])["keys"][0]["value"])
    if "sig" not in request.query:
        if request.headers.get("authorization", "").startswith(f"SharedKey {account}:"):
            return
        raise refused(403, "AuthenticationFailed", "Server failed to authenticate the request.")
    given = {name: request.query.get(name, "") for name in ("sp", "st", "se", "si", "sip", "spr", "sv")}
    canonical = f"/file/{account}/{share}"
    signed = [given["sp"], given["st"], given["se"], canonical, given["si"], given["sip"], given["spr"], given["sv"]]
    signed += [""] * 5
    expected = base64.b64encode(hmac.digest(key, "\n".join(signed).encode(), hashlib.sha256)).decode()
    if request.query["sig"] != expected or emulator.fails("signature"):
        raise refused(403, "AuthenticationFailed", "Signature did not match.")


def directory(request: Request, path: Path) -> Answer:
    """Make a folder, remove it, or say that it is there."""
    if request.method == "PUT":
        if path.exists():
            raise refused(409, "ResourceAlreadyExists", "The specified resource already exists.")
        if not path.parent.is_dir():
            raise refused(404, "ParentNotFound", "The specified parent path does not exist.")
        path.mkdir()
        return answer(201)
    if not path.is_dir():
        raise refused(404, "ResourceNotFound", "The specified resource does not exist.")
    if request.method == "DELETE":
        if any(path.iterdir()):
            raise refused(409, "DirectoryNotEmpty", "The specified directory is not empty.")
        path.rmdir()
        return answer(202)
    return answer(200)


def listing(path: Path, request: Request) -> Answer:
    """List a folder, in pages of two thirds of what is asked for at most, so that paging is always exercised."""
    if not path.is_dir():
        raise refused(404, "ResourceNotFound", "The specified resource does not exist.")
    names, start = sorted(path.iterdir()), int(request.query.get("marker") or 0)
    size = min(int(request.query.get("maxresults") or 5000), 200)
    entries = ""
    for entry in names[start : start + size]:
        name = f"<Name>{escape(entry.name)}</Name>"
        content = "" if entry.is_dir() else f"<Content-Length>{entry.stat().st_size}</Content-Length>"
        tag = "Directory" if entry.is_dir() else "File"
        entries += f"<{tag}>{name}<Properties>{content}</Properties></{tag}>"
    marker = str(start + size) if start + size < len(names) else ""
    text = f"<?xml version='1.0' encoding='utf-8'?><EnumerationResults><Entries>{entries}</Entries>"
    text += f"<NextMarker>{marker}</NextMarker></EnumerationResults>"
    return answer(200, text.encode(), **{"Content-Type": "application/xml"})


def write(emulator: Emulator, request: Request, path: Path, part: str | None) -> Answer:
    """Make a file of a size, write a range of one, or rename one."""
    if not path.parent.is_dir():
        raise refused(404, "ParentNotFound", "The specified parent path does not exist.")
    if part == "range":
        first, _, last = request.headers["x-ms-range"].removeprefix("bytes=").partition("-")
        if not path.is_file():
            raise refused(404, "ResourceNotFound", "The specified resource does not exist.")
        if int(last) - int(first) + 1 != len(request.body) or len(request.body) > RANGE:
            raise refused(400, "InvalidHeaderValue", "x-ms-range does not fit the body.")
        if int(last) >= path.stat().st_size:
            raise refused(416, "InvalidRange", "The range is outside of the file.")
        if emulator.room is not None and emulator.room < len(request.body):
            raise refused(403, "ShareSizeLimitReached", "The share has reached its size limit.")
        with path.open("r+b") as file:
            file.seek(int(first))
            file.write(request.body)
        return answer(201)
    if part in ("properties", "metadata"):
        return answer(200)
    if part == "rename":
        source = unquote(request.headers["x-ms-file-rename-source"].partition("?")[0]).split("/", 4)[4]
        share = emulator.share(request.host.split(".")[0], request.path.split("/")[1])
        (share / source).replace(path)
        return answer(200)
    if request.headers.get("x-ms-type") != "file":
        raise refused(400, "MissingRequiredHeader", "x-ms-type is missing.")
    if path.is_dir():
        raise refused(409, "ResourceTypeMismatch", "The specified resource is a directory.")
    with path.open("wb") as file:
        file.truncate(int(request.headers["x-ms-content-length"]))
    return answer(201)


def read(request: Request, path: Path) -> Answer:
    """Return a file, or a range of it, or its properties."""
    data, asked = path.read_bytes(), request.headers.get("x-ms-range") or request.headers.get("range")
    headers = {"Accept-Ranges": "bytes", "ETag": '"1"', "Last-Modified": "Sun, 01 Nov 2026 00:00:00 GMT"}
    headers |= {"x-ms-type": "File", "Content-Type": "application/octet-stream"}
    if request.method == "HEAD":
        return answer(200, b"", **headers, **{"Content-Length": str(len(data))})
    if not asked:
        return answer(200, data, **headers)
    first, _, last = asked.removeprefix("bytes=").partition("-")
    piece = data[int(first) : int(last) + 1 if last else None]
    if not piece and data:
        raise refused(416, "InvalidRange", "The range is outside of the file.")
    end = int(first) + len(piece) - 1
    return answer(206 if data else 416, piece, **headers, **{"Content-Range": f"bytes {first}-{end}/{len(data)}"})
