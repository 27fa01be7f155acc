"""What a start in Azure runs: the files of the workspace in one archive, which is named by its SHA-256.

Whoever can write to the share can change what is there. So the container gets the SHA-256 from Azure Resource Manager,
and infra/start.sh checks the archive, and with it the data files, before anything of them is used.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import tempfile
from pathlib import Path
from typing import IO, Any

from az import AzureError
from provisioned import Provisioned
from share import Share
from sync import ROOT, chosen, dataset_files, fingerprint

FOLDER = ".azure-code"  # on the share; old archives stay, since a stopped app still starts from its own
DATA = ".data.sha256"  # in the archive: the hashes of the files that the job takes from the share itself
LARGE = 2**20  # bytes; a larger file is treated as data, so that it is not sent again with each change of the code
VARIABLE = "CODE_SHA256"


def send_code(share: Share, root: Path = ROOT, with_data: bool = True) -> str:
    """Send the archive unless the share has it; return its SHA-256. Raises AzureError."""
    with tempfile.TemporaryFile() as file:
        size = pack(file, root, with_data)
        digest = hashlib.file_digest(rewound(file), "sha256").hexdigest()
        path = f"{FOLDER}/{digest}.tar"
        if share.size(path) != size:
            share.make_folder(FOLDER)
            share.write(path, rewound(file), size)
    return digest


def pack(file: IO[bytes], root: Path, with_data: bool) -> int:
    """Write the archive, the same for the same files; return its size. The app needs no data."""
    data = set(dataset_files(root))
    paths = chosen(root)
    apart = [path for path in paths if path in data or (root / path).stat().st_size > LARGE]
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in paths:
            if path not in apart:
                add(archive, path, (root / path).read_bytes())
        lines = [f"{fingerprint(root / path)}  {path}\n" for path in apart] if with_data else []
        add(archive, DATA, "".join(lines).encode())
    return file.tell()


def add(archive: tarfile.TarFile, path: str, content: bytes) -> None:
    """Add a file without time, owner and mode, which differ between machines."""
    entry = tarfile.TarInfo(path)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def rewound(file: IO[bytes]) -> Any:
    """Return the file, at its start."""
    file.seek(0)
    return file


def variable(template: dict[str, Any]) -> str:
    """Return the SHA-256 that a job or an app starts from, "none" if it has none yet."""
    variables = template["containers"][0].get("env") or []
    return next((str(one["value"]) for one in variables if one["name"] == VARIABLE), "none")


def set_variable(owner: Provisioned, template: dict[str, Any], digest: str) -> bool:
    """Write the SHA-256 into all containers of a template; return whether it differed. Raises AzureError."""
    changed = False
    for container in [*template["containers"], *(template.get("initContainers") or [])]:
        found = [one for one in container.get("env") or [] if one["name"] == VARIABLE]
        if not found or not any(one["name"] == "ENVIRONMENT_KEY" for one in container["env"]):
            raise AzureError(
                f"What runs in Azure was provisioned by an older release: run `python infra/azure.py provision "
                f"{owner.purpose}`, then the same command again."
            )
        changed = changed or found[0].get("value") != digest
        found[0]["value"] = digest
    return changed
