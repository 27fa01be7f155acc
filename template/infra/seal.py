"""Seal a Python environment on the share, or check its seal: exit status 1 if anything in it has changed since.

The seal is an HMAC of all its files. Its key, ENVIRONMENT_KEY, is a secret of the job and the app: whoever can write to
the share can neither change a sealed environment unseen, nor seal another. Only the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SEAL = ".seal"
READERS = 16  # on a share each file takes some milliseconds to open


def fingerprint(path: Path) -> str:
    """Return what stands for a file or a link: the SHA-256 of its content, or where it points."""
    if path.is_symlink():
        return f"link {path.readlink()}"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal_of(folder: Path, name: str, key: str) -> str:
    """Return the seal of a folder under the name that it has, or will have."""
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    paths = [path for path in paths if path != folder / SEAL]
    with ThreadPoolExecutor(READERS) as pool:
        marks = list(pool.map(fingerprint, paths))
    listing = [f"{path.relative_to(folder).as_posix()}\0{mark}" for path, mark in zip(paths, marks, strict=True)]
    return hmac.digest(key.encode(), "\0\0".join([name, *listing]).encode(), "sha256").hex()


def main() -> int:
    """Seal, or check a seal."""
    parser = argparse.ArgumentParser(description="Check the seal of an environment, or seal one.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", nargs="?", help="seal the folder, which is renamed to this next")
    options = parser.parse_args()
    folder, key = options.folder, os.environ["ENVIRONMENT_KEY"]
    if options.name:
        (folder / SEAL).write_text(seal_of(folder, options.name, key), encoding="ascii")
        return 0
    seal = (folder / SEAL).read_bytes() if (folder / SEAL).is_file() else b""
    return 0 if hmac.compare_digest(seal, seal_of(folder, folder.name, key).encode()) else 1


if __name__ == "__main__":
    sys.exit(main())
