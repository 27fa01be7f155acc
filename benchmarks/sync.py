"""Sending 1,000 small files to Azure Files: infra/sync.py beside `az storage file upload-batch`, to the same emulator.

Run by `make bench`, in the environment of the workspace. The emulator is on this machine, so the time that a request
takes on its way is not in it: only what each side does for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AZ = ROOT / ".cache" / "azure-cli" / "bin" / "az"
FILES, ACCOUNT, GROUP = 1000, "benchmark", "/resourceGroups/rg-benchmark"
sys.path[:0] = [str(ROOT / "tests" / "azure"), str(ROOT / "template" / "infra")]

import arm  # noqa: E402
from emulator import SUBSCRIPTION, TENANT, Emulator  # noqa: E402


def main() -> int:
    """Time both, and print the ratio."""
    with tempfile.TemporaryDirectory() as folder, Emulator(Path(folder), AZ.with_name("python")) as emulator:
        os.environ.update(emulator.environment(Path(folder) / "login"))
        os.environ["PATH"] = f"{AZ.parent}{os.pathsep}{os.environ['PATH']}"
        login = ["login", "--service-principal", "--username", "me", "--password", "pass", "--tenant", TENANT]
        subprocess.run([AZ, *login, "--output", "none"], check=True)
        account = f"/subscriptions/{SUBSCRIPTION}{GROUP}/providers/Microsoft.Storage/storageAccounts/{ACCOUNT}"
        arm.store(emulator, {"id": account, "name": ACCOUNT, "type": "Microsoft.Storage/storageAccounts"})
        for name in ("ours", "theirs"):
            emulator.share(ACCOUNT, name).mkdir(parents=True)
        workspace = make_files(Path(folder) / "workspace")

        from share import Share
        from sync import send

        config = {"SUBSCRIPTION_ID": SUBSCRIPTION, "STORAGE_ACCOUNT_NAME": ACCOUNT, "FILE_SHARE_NAME": "ours"}
        started = time.perf_counter()
        sent, _ = send(Share(config), workspace)
        ours = time.perf_counter() - started
        started = time.perf_counter()
        again, _ = send(Share(config), workspace)
        second = time.perf_counter() - started
        started = time.perf_counter()
        options = ["--destination", "theirs", "--source", str(workspace), "--account-name", ACCOUNT, "--output", "none"]
        subprocess.run([AZ, "storage", "file", "upload-batch", *options], check=True, capture_output=True)
        theirs = time.perf_counter() - started
        arrived = sum(path.is_file() for path in emulator.share(ACCOUNT, "theirs").rglob("*"))
        assert (sent, again, arrived) == (FILES + 1, 0, FILES + 1)
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    print(f"{sent} files: ours {ours:.1f} s, of it one start of az; again, unchanged: {second:.1f} s")
    print(f"az storage file upload-batch {theirs:.1f} s: {theirs / ours:.1f} times as long")
    return int(ours > theirs / 3)


def make_files(workspace: Path) -> Path:
    """Make a workspace of many small files in ten folders."""
    (workspace / "finetuning").mkdir(parents=True)
    settings = "input_model: {model_path: owner/name}\ndata_configs: []\n"
    (workspace / "finetuning" / "olive-config.yaml").write_text(settings, encoding="utf-8")
    for number in range(FILES):
        file = workspace / f"folder-{number % 10}" / f"file-{number}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{number}\n" * 200, encoding="utf-8")
    return workspace


if __name__ == "__main__":
    sys.exit(main())
