"""What benchmarks/gpu.py measures on a GPU, as far as a CPU can: attention in one call, its wheels, a dry run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import four_bits
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
KIT = REPOSITORY / "benchmarks" / "gpu.py"
LENGTHS = (3, 40, 1, 17, 64)
ATTENTION = pytest.mark.parametrize(
    ("heads", "groups", "window"), [(4, 4, None), (6, 2, None), (4, 4, 8), (6, 2, 2), (4, 1, 100)]
)


@pytest.fixture(scope="module")
def varlen(workspace: Path) -> Any:
    """Return benchmarks/varlen.py, with a kernel for the CPU."""
    sys.path.append(str(KIT.parent))
    import varlen

    varlen.register_cpu_kernel()
    return varlen


def states(heads: int, groups: int, dtype: Any, width: int = 16, device: str = "cpu") -> list[Any]:
    """Return random queries, keys and values that take gradients."""
    import torch

    torch.manual_seed(1)
    shapes = [(1, count, sum(LENGTHS), width) for count in (heads, groups, groups)]
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def attended(attend: Any, inputs: list[Any], window: int | None, **more: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the result of packed rows, and the gradients of queries, keys and values for a random one of its."""
    import torch

    module = SimpleNamespace(num_key_value_groups=inputs[0].shape[1] // inputs[1].shape[1], is_causal=True)
    options = {"row_ends": list(accumulate(LENGTHS)), "sliding_window": window, "scaling": 0.3, "dropout": 0.0, **more}
    output, weights = attend(module, *inputs, None, **options)
    assert weights is None
    torch.manual_seed(2)
    gradient = torch.randn(output.shape, device=output.device).to(output.dtype)
    return output, torch.autograd.grad(output, inputs, gradient)


def error(found: Any, right: Any) -> float:
    return float((found.detach().float() - right.detach().float()).norm() / right.detach().float().norm())


@ATTENTION
def test_attention_in_one_call_is_that_row_by_row_with_its_gradients(
    varlen: Any, heads: int, groups: int, window: int | None
) -> None:
    import torch

    from training.batches import attend_row_by_row

    inputs = states(heads, groups, torch.bfloat16)
    exact, gradients = attended(attend_row_by_row, [one.detach().float().requires_grad_() for one in inputs], window)
    for attend in (attend_row_by_row, varlen.attend_all_rows):
        found, found_gradients = attended(attend, inputs, window)
        assert found.dtype == torch.bfloat16 and found.shape == (1, sum(LENGTHS), heads, 16)
        assert error(found, exact) < 0.01
        for name, one, right in zip(("query", "key", "value"), found_gradients, gradients, strict=True):
            assert one.shape == right.shape and error(one, right) < 0.02, name


def test_attention_in_one_call_knows_where_each_row_ends_and_how_far_the_window_reaches(varlen: Any) -> None:
    """The test above could not fail if these did not matter."""
    import torch

    inputs = states(4, 4, torch.bfloat16)
    right, _ = attended(varlen.attend_all_rows, inputs, 8)
    for other in ({"window": 9}, {"window": None}, {"window": 8, "row_ends": [sum(LENGTHS)]}):
        assert error(attended(varlen.attend_all_rows, inputs, **other)[0], right) > 0.05


@ATTENTION
def test_pytorch_s_own_operator_takes_what_it_is_given(
    varlen: Any, heads: int, groups: int, window: int | None
) -> None:
    """Without a kernel: on the device `meta`, its own description of the kernel says what comes back."""
    import torch

    output, gradients = attended(varlen.attend_all_rows, states(heads, groups, torch.float16, device="meta"), window)
    assert output.shape == (1, sum(LENGTHS), heads, 16) and output.dtype == torch.float16
    assert [one.shape[1] for one in gradients] == [heads, groups, groups]


@pytest.mark.parametrize(
    ("dtype", "width", "more"),
    [("float32", 16, {}), ("bfloat16", 16, {"dropout": 0.5}), ("bfloat16", 12, {}), ("bfloat16", 264, {})],
)
def test_what_the_kernel_cannot_do_is_done_row_by_row(
    varlen: Any, monkeypatch: pytest.MonkeyPatch, dtype: str, width: int, more: dict[str, Any]
) -> None:
    import torch

    from training.batches import attend_row_by_row

    monkeypatch.setattr(varlen.varlen, "varlen_attn", None)  # would fail if it were called
    inputs = states(4, 2, getattr(torch, dtype), width)
    torch.manual_seed(3)
    found, _ = attended(varlen.attend_all_rows, inputs, None, **more)
    torch.manual_seed(3)
    assert torch.equal(found, attended(attend_row_by_row, inputs, None, **more)[0])


def test_under_autocast_attention_is_computed_in_its_precision(varlen: Any) -> None:
    import torch

    from training.batches import attend_row_by_row

    inputs = states(4, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, gradients = attended(varlen.attend_all_rows, inputs, None)
        right, of_rows = attended(attend_row_by_row, inputs, None)
    assert found.dtype == right.dtype == torch.bfloat16 and error(found, right) < 0.01
    assert all(error(one, other) < 0.02 for one, other in zip(gradients, of_rows, strict=True))


def test_attention_in_one_call_refuses_a_batch_that_is_not_packed(varlen: Any) -> None:
    import torch

    with pytest.raises(ValueError, match="packed batches only"):
        attended(varlen.attend_all_rows, states(4, 4, torch.bfloat16), None, row_ends=None)


def needed_by(roots: list[str]) -> set[str]:
    """Return the packages and all that they need here, by the metadata of this environment; normalised names."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    waiting = [Requirement(root) for root in roots]
    while waiting:
        one = waiting.pop()
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        if name in found:
            continue
        try:
            needs = importlib.metadata.requires(one.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        found.add(name)
        needs = [Requirement(need) for need in needs]
        waiting += [need for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    return found


def test_the_wheels_are_all_that_the_training_needs_beside_torch_transformers_peft_and_accelerate(
    workspace: Path,
) -> None:
    sys.path.append(str(KIT.parent))
    import gpu_plan

    there = needed_by(["torch", "transformers", "peft", "accelerate"])
    older = needed_by(["pydantic", "rich"]) - {"typing-extensions"}  # which transformers has needed for some time only
    needed = needed_by(["olive-ai", "datasets", "pydantic", "rich", "psutil", "PyYAML", "filelock"])
    assert set(gpu_plan.TRAINING.split()) == needed - there | older


def dry(tmp_path: Path, only: str | None) -> tuple[dict[str, dict[str, Any]], str]:
    """Return the results of a dry run by their names, and its tables."""
    if not (four_bits.PACKAGES / "bitsandbytes").is_dir():
        pytest.skip("bitsandbytes is not in .cache: `make test` puts it there")
    command = [sys.executable, str(KIT), "--dry", "--minutes", "60", "--out", str(tmp_path)]
    command += ["--only", only] if only else []
    env = os.environ | {"PYTHONPATH": str(four_bits.PACKAGES)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads((tmp_path / "gpu.json").read_text())
    return {one["name"]: one for one in made["results"]}, (tmp_path / "gpu.md").read_text()


def test_a_dry_run_trains_and_says_which_wheel_is_missing(tmp_path: Path) -> None:
    results, text = dry(tmp_path, "ours-qwen3-qlora,trl-llama-lora")
    missing = results.pop("trl-llama-lora")
    assert missing["reason"].startswith("failed: trl is not installed: put the wheel of trl==")
    assert {one["status"] for one in results.values()} == {"measured"}, (tmp_path / "gpu.log").read_text()
    figures = results["ours-qwen3-qlora"]["figures"]
    assert figures["losses"][0] == pytest.approx(6.93, abs=0.5)  # of 1,024 tokens, none likelier than the others
    assert min(figures[name] for name in ("speed", "estimated_speed", "estimated", "used")) > 0
    assert "no GPU" in text and text.count("failed: trl is not installed") == 1


def test_all_of_a_dry_run_works_where_the_wheels_are_there(tmp_path: Path) -> None:
    results, _ = dry(tmp_path, None)
    missing = {name for name, one in results.items() if one["status"] != "measured"}
    assert missing == {name for name in results if name.startswith("trl-")}, (tmp_path / "gpu.log").read_text()
    assert re.search(r"resumed from step \d+ of 20", results["resumed"]["figures"]["text"])
    by_row, varlen, bare = (
        results[name]["figures"]["losses"] for name in ("ours-llama-lora", "ours-llama-lora-varlen", "bare-llama-lora")
    )
    assert varlen == pytest.approx(by_row, abs=0.05)
    assert bare[0] == pytest.approx(by_row[0], abs=0.2)  # of other rows of the same kind
