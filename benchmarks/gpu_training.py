"""The trainings that gpu.py measures: the workspace's own, a bare loop of transformers and PEFT, and TRL's."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from typing import Any

import torch
from gpu_models import ADAPTER, BATCH, GIB, STEPS, MeasureError, configured, device, draw_rows, facts_of, folder

WARM_UP = 3  # steps that are not counted
HELD_OUT = 4  # rows, which nothing evaluates


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """Train with the workspace's own finetuning/training/train.py, beside what its plan estimates."""
    from settings.startup import leave_out, quiet

    quiet()
    leave_out("torchmetrics")
    from planning import cost, hardware
    from planning.memory import memory
    from planning.model_facts import shape_in
    from planning.row_lengths import Lengths
    from settings.run_settings import Settings
    from training import batches
    from training.train import train
    from training.whole_files import new_folder

    on = device(options)
    if options.attention == "varlen":
        import varlen

        if on == "cpu":
            varlen.register_cpu_kernel()
        batches.AttentionInterface.register(batches.PACKED_SDPA, varlen.attend_all_rows)
    never = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "logging_steps": 1}
    settings = Settings.of(configured(options, **never))
    rows = draw_rows(options)
    shape = shape_in(json.loads((folder(options) / "config.json").read_text(encoding="utf-8")))
    masks = [bytes(label != -100 for label in row["labels"]) for row in rows]
    lengths, held_out = Lengths(masks), Lengths(masks[:HELD_OUT])
    estimated = memory(shape, settings, lengths, held_out)
    flops = hardware.speed(shape, settings)
    # of a run on twice the rows and of one on these: they differ by the training on these rows, without all else
    twice, once = (cost.seconds(shape, settings, Lengths(n * masks), held_out, flops, measured=True) for n in (2, 1))
    if on == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times: list[tuple[float, float]] = []
    run, tokens = new_folder(options.workspace / "models" / "measured"), {"train": rows, "held_out": rows[:HELD_OUT]}
    _, used, losses = train(settings, tokens, run, lambda **now: times.append((now["training"], now["tokens"])))
    if not used["packing"]:
        raise MeasureError("the rows were padded: the model or its attention lets packed rows see each other")
    return {
        "speed": speed_of(times),
        "estimated_speed": sum(lengths.tokens) / (twice - once),
        "estimated": estimated.total / GIB,
        "estimated_parts": {part: size / GIB for part, size in vars(estimated).items()},
        "matrix_tflops": flops / 1e12,
        "losses": [entry["loss"] for entry in losses if "loss" in entry],
        **peaks(),
    }


def bare(options: argparse.Namespace) -> dict[str, Any]:
    """Train in a loop of transformers and PEFT on packed rows, and nothing else."""
    import peft

    from training import batches

    model, adapter = loaded(options)
    model = peft.get_peft_model(model, adapter)
    model.train()
    rows, on = draw_rows(options), device(options)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if options.method == "qlora" and on == "cuda":
        from bitsandbytes.optim import PagedAdamW8bit

        optimizer = PagedAdamW8bit(weights, lr=2e-4)
    else:
        optimizer = torch.optim.AdamW(weights, lr=2e-4)
    times: list[tuple[float, float]] = []
    losses, tokens, started = [], 0, time.perf_counter()
    for step in range(STEPS):
        batch = batches.pack(rows[step * BATCH : (step + 1) * BATCH], on)
        tokens += batch["input_ids"].numel()
        loss = model(**{key: batch[key] for key in ("input_ids", "position_ids", "labels", "use_cache")}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the GPU
        times.append((time.perf_counter() - started, tokens))
    return {"speed": speed_of(times), "losses": losses, **peaks(), "note": how_packed(model, rows)}


def trl(options: argparse.Namespace) -> dict[str, Any]:
    """Train with TRL's SFTTrainer on packed rows, as its documentation shows it."""
    import datasets
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times: list[tuple[float, float]] = []
    rows, on = draw_rows(options), device(options)

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if on == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter(), state.num_input_tokens_seen))

    datasets.disable_progress_bars()
    model, adapter = loaded(options)
    in_8_bits = options.method == "qlora" and on == "cuda"
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(folder(options)),
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=adapter,
        callbacks=[Clock()],
        args=SFTConfig(
            output_dir=str(options.workspace / "models" / "trl"),
            packing=True,
            max_length=sum(len(row["input_ids"]) for row in rows) // STEPS,  # as many tokens in a batch as ours
            per_device_train_batch_size=1,
            max_steps=STEPS,
            learning_rate=2e-4,
            optim="paged_adamw_8bit" if in_8_bits else "adamw_torch",
            gradient_checkpointing=False,
            bf16=on == "cuda",
            use_cpu=on == "cpu",
            include_num_input_tokens_seen="all",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    attention = trainer.model.get_base_model().config._attn_implementation
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    note = ", ".join(filter(None, [f"packed, padding-free, {attention}", how_packed(trainer.model, rows)]))
    return {"speed": speed_of(times), "losses": losses, **peaks(), "note": note}


def loaded(options: argparse.Namespace) -> tuple[Any, Any]:
    """Load the model as the peers do, in 4 bits for QLoRA, and return it with the settings of its adapter."""
    import peft
    import transformers

    dtype, quantised = getattr(torch, options.dtype), {}
    place = {"": 0 if device(options) == "cuda" else "cpu"}
    if options.method == "qlora":
        quantised["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder(options),
        dtype=dtype,
        device_map=place,
        attn_implementation="sdpa",
        **quantised,
    )
    targets = facts_of(options)["target_modules"]
    return model, peft.LoraConfig(**ADAPTER, target_modules=targets, task_type="CAUSAL_LM")


def how_packed(model: Any, rows: list[dict[str, list[int]]]) -> str:
    """Return what a peer does with packed rows, by the workspace's own test; "" if they do not see each other."""
    from training.batches import keeps_apart

    return "" if keeps_apart(model, rows) else "packed rows see each other"


def speed_of(times: list[tuple[float, float]]) -> float:
    """Return tokens a second behind the first steps; `times` are the seconds and the tokens at each step's end."""
    (began, before), (ended, after) = times[WARM_UP - 1], times[STEPS - 1]
    return (after - before) / (ended - began)


def peaks() -> dict[str, float]:
    """Return what the GPU held for PyTorch at most, and that with CUDA's own; on a CPU, the peak of this process."""
    if not torch.cuda.is_available():
        import resource

        return {"used": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
    free, total = torch.cuda.mem_get_info()
    own = total - free - torch.cuda.memory_reserved()
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"allocated": allocated / GIB, "reserved": reserved / GIB, "used": (reserved + own) / GIB}
