"""The locks pin the packages of their inputs and the hashes of their files, for every platform, and name no index."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LOCKS = {
    REPOSITORY / "locks" / "repository.txt": ["repository.in"],
    REPOSITORY / "locks" / "site.txt": ["site.in"],
    REPOSITORY / "template" / "inference" / "flow" / "requirements.txt": ["promptflow.in"],
    REPOSITORY / "template" / "setup" / "requirements-copier.txt": ["copier.in"],
    REPOSITORY / "template" / "setup" / "requirements-cpu.txt": ["workspace-cpu.in"],
    REPOSITORY / "template" / "setup" / "requirements-gpu.txt": ["workspace-cpu.in", "workspace-gpu.in"],
}
CPU, GPU = list(LOCKS)[4:]
CUDA = ("nvidia-", "cuda-", "triton", "bitsandbytes")

every_lock = pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lock: Path) -> list[tuple[str, str, str]]:
    """Return name, version and marker of each line, which also has hashes."""
    lines = lock.read_text().splitlines()[1:]
    line_of = r"([a-z0-9-]+)==([^ ;+]+)(?: ; (.+?))?(?: --hash=sha256:[0-9a-f]{64})+"
    parts = [re.fullmatch(line_of, line) for line in lines]
    assert all(parts), [line for line, part in zip(lines, parts, strict=True) if not part]
    return [(part[1], part[2], part[3] or "") for part in parts if part]


@every_lock
def test_a_lock_has_only_pins_without_index_or_local_version(lock: Path) -> None:
    assert lock.read_text().startswith("# made by make lock; do not edit\n")
    assert len(pins(lock)) > 10


@every_lock
def test_a_lock_has_every_package_of_its_inputs_at_its_version(lock: Path) -> None:
    locked = {(name, version) for name, version, _ in pins(lock)}
    names = {name for name, _ in locked}
    for source in LOCKS[lock]:
        for line in (REPOSITORY / "locks" / source).read_text().splitlines():
            if line and not line.startswith(("#", "-r")):
                name, version = re.match(r"([\w.-]+)(?:==([^\s;,]+))?", line).groups()  # type: ignore[union-attr]
                assert canonical(name) in names, f"make lock: {name} is not in {lock.name}"
                assert not version or (canonical(name), version) in locked, f"make lock: {line} is not in {lock.name}"


@every_lock
def test_a_package_is_pinned_twice_only_for_different_pythons(lock: Path) -> None:
    markers: dict[str, list[str]] = {}
    for name, _, marker in pins(lock):
        markers.setdefault(name, []).append(marker)
    for name, several in markers.items():
        assert len(several) == 1 or all("python_full_version" in marker for marker in several), name


def test_a_package_with_native_code_has_hashes_for_every_platform() -> None:
    """Locked on Linux, a lock is installed on Windows and macOS, and with other versions of Python."""
    lines = {line.partition("==")[0]: line.count("--hash") for line in CPU.read_text().splitlines()}
    assert min(lines[name] for name in ("numpy", "pyarrow", "torch", "onnxruntime")) >= 12  # 3 Pythons, 4 platforms
    assert max(CPU.stat().st_size, GPU.stat().st_size) < 300_000


def test_the_cpu_lock_has_no_cuda_packages() -> None:
    assert not [name for name, _, _ in pins(CPU) if name.startswith(CUDA)]


def test_the_gpu_lock_adds_cuda_and_bitsandbytes_to_the_same_versions() -> None:
    assert set(pins(CPU)) < set(pins(GPU))
    more = {name: marker for name, _, marker in set(pins(GPU)) - set(pins(CPU))}
    assert {"bitsandbytes", "cuda-toolkit", "nvidia-cudnn-cu13", "triton"} <= set(more)
    assert all(name.startswith(CUDA) for name in more)
    assert all("sys_platform == 'linux'" in marker for marker in more.values())  # macOS and Windows need none of CUDA's


def test_the_index_of_torch_has_the_cuda_that_the_gpu_lock_has() -> None:
    [cuda] = {version for name, version, _ in pins(GPU) if name == "cuda-toolkit"}
    script = (REPOSITORY / "template" / "setup" / "install.py").read_text()
    assert f"whl/cu{''.join(cuda.split('.')[:2])}" in script
