"""Every setting is live: changed alone, it changes what it says, and a setting that would change nothing is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import RENDERED, REPOSITORY, Run
from hub import SUNDRIES, Hub

Invoke = Callable[..., Run]
FILE = "finetuning/olive-config.yaml"
FOUR_BITS = REPOSITORY / ".cache" / "bitsandbytes"

ROWS = "data_configs.train.load_dataset_config"
TOKENS = "data_configs.train.pre_process_data_config"
PASS = "passes.finetune"
ARGS = "passes.finetune.training_args"
# a run of a third of a second: 24 rows in six batches, stopped after the fourth
SHORT = {
    f"{ROWS}.max_rows": 24,
    f"{ARGS}.num_train_epochs": 1,
    f"{ARGS}.max_steps": 4,
    f"{ARGS}.per_device_train_batch_size": 4,
    f"{ARGS}.logging_steps": 1,
    f"{ARGS}.warmup_steps": 0,  # else the first step changes nothing, and may be the best one
    f"{PASS}.eval_rows": 1000,  # all: what the settings of the rows do is seen there
}
OWN_FILE = {
    f"{ROWS}.train_file": "dataset/own.jsonl",
    f"{ROWS}.held_out_file": None,
    f"{ROWS}.eval_split": 8,
    f"{ROWS}.max_rows": None,
}
COLUMNS = OWN_FILE | {
    f"{ROWS}.dataset_format": "columns",
    f"{ROWS}.prompt_template": "Phrase: {prompt}",
    f"{ROWS}.completion_template": "{completion}",
}
LAST_COUNTS = {f"{ARGS}.load_best_model_at_end": False}


@dataclass
class Seen:
    """What a run did: what it said and left, its Trainer, and the tokens that its model was given."""

    run: Run
    folder: Path
    trainer: Any
    trained: list[Any]  # a tensor (rows, tokens) for each batch
    evaluated: list[Any]

    @property
    def adapter(self) -> dict[str, Any]:
        """What the adapter says about itself."""
        return dict(json.loads((self.folder / "models/adapter/adapter_config.json").read_text(encoding="utf-8")))

    @property
    def weights(self) -> dict[str, list[float]]:
        """The adapter's weights."""
        from safetensors.torch import load_file

        saved = load_file(self.folder / "models/adapter/adapter_model.safetensors")
        return {name: tensor.float().flatten().tolist() for name, tensor in saved.items()}

    def rows(self, part: str = "train") -> list[list[int]]:
        """The tokens of each row of a part; without those that fill up the last batch and have nothing to learn."""
        rows = [
            row for row in getattr(self.trainer, f"{part}_dataset") if any(int(label) >= 0 for label in row["labels"])
        ]
        return [list(map(int, row["input_ids"])) for row in rows]

    def text(self, part: str = "train") -> str:
        """The first row as text."""
        from preparing.tokens import load_tokenizer

        return str(load_tokenizer(str(self.folder / "models/demo")).decode(self.rows(part)[0]))

    def labels(self) -> int:
        """How many tokens of the first row are learnt."""
        return sum(int(label) != -100 for label in self.trainer.train_dataset[0]["labels"])

    def logged(self, key: str, what: str | None = None) -> list[float]:
        """The values of a key in the Trainer's log, or what else was logged with it."""
        return [entry[what or key] for entry in self.trainer.state.log_history if key in entry]

    def checkpoints(self) -> list[int]:
        """The steps whose checkpoints are on the disk."""
        found = Path(self.trainer.args.output_dir).glob("checkpoint-*")
        return sorted(int(path.name.removeprefix("checkpoint-")) for path in found)

    def modules(self, attribute: str) -> set[Any]:
        """The values that an attribute has in the adapted layers."""
        found = (getattr(module, attribute, None) for module in self.trainer.model.modules())
        return {value["default"] for value in found if isinstance(value, dict) and value}


@dataclass
class Case:
    """A setting's other value, where its effect is seen, and what is seen there."""

    value: Any
    look: Callable[[Seen], Any]
    after: Any
    given: dict[str, Any] = field(default_factory=dict)  # what else is set, before and after


def positions(text: str) -> dict[str, int]:
    """Return where each setting of the file stands: its path, and the place behind its name."""
    found: dict[str, int] = {}
    seen: set[int] = set()

    def walk(node: Any, path: str) -> None:
        if isinstance(node, yaml.MappingNode):
            if id(node) in seen:
                return  # an alias: it stands where its anchor is
            seen.add(id(node))
            for key, value in node.value:
                below = path if key.value == "<<" else f"{path}.{key.value}".lstrip(".")
                if isinstance(value, yaml.MappingNode) or (
                    value.value and isinstance(value.value[0], yaml.MappingNode)
                ):
                    walk(value, below)
                else:
                    found[below] = key.end_mark.index
        elif isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                names = [value.value for key, value in item.value if key.value == "name"]
                walk(item, f"{path}.{[*names, number][0]}")

    walk(yaml.compose(text), "")
    return found


def change(text: str, changes: dict[str, Any]) -> str:
    """Give settings other values; comments and anchors stay. A setting that is not there is put into its section."""
    for path, value in changes.items():
        places = positions(text)
        section, _, key = path.rpartition(".")
        if path in places:
            start = places[path]
            end = text.index("\n", start)
            written = re.fullmatch(r"(:(?: &\w+)?) .*?(\s+#.*)?", text[start:end])
            assert written, path
            text = f"{text[:start]}{written[1]} {json.dumps(value)}{written[2] or ''}{text[end:]}"
        else:
            before = next(place for known, place in places.items() if known.rpartition(".")[0] == section)
            start = text.rindex("\n", 0, before) + 1
            indent = re.match(r" *(- )?", text[start:])
            assert indent and not indent[1], f"{section} begins with a dash"
            text = f"{text[:start]}{indent[0]}{key}: {json.dumps(value)}\n{text[start:]}"
    return text


@pytest.fixture(scope="module")
def places(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put models and data beside the sample: another model, one in the hub's cache, a file, a folder as on the hub."""
    from huggingface_hub import constants, snapshot_download

    from training.tiny_model import build_demo

    demo = workspace / "models" / "demo"
    if not demo.is_dir():
        build_demo()
    shutil.copytree(demo, workspace / "models" / "other")
    cache = tmp_path_factory.mktemp("hub")
    with Hub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        for commit in ("a" * 40, "b" * 40):
            model = {path.name: path for path in demo.iterdir()}
            hub.add("someone/demo", SUNDRIES | model | {"NOTICE": commit.encode()}, commit=commit)
            snapshot_download("someone/demo", revision=commit, cache_dir=cache, endpoint=hub.url)
    rows = [{"prompt": f"Hooray {i}!", "completion": "joy", "text": f"We won {i}."} for i in range(48)]
    (workspace / "dataset" / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workspace / "dataset" / "folder").mkdir()
    for name, part in (("train", rows[:30]), ("test", rows[30:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (workspace / "dataset" / "folder" / f"{name}.jsonl").write_text(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield


@pytest.fixture
def observe(
    places: None, invoke: Invoke, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, Any]], Seen]:
    """Run invoke_olive.py with settings changed, and watch. Generated answers and the report are left out: they take
    long and say nothing of settings.
    """
    import transformers

    from reporting import evaluate, report

    trainers: list[Any] = []
    given: tuple[list[Any], list[Any]] = ([], [])
    create = transformers.Trainer.__init__

    def watch(trainer: Any, *arguments: Any, **options: Any) -> None:
        create(trainer, *arguments, **options)
        trainers.append(trainer)

        def note(module: Any, inputs: Any) -> None:
            given[not module.training].append(inputs[0].detach().clone())

        trainer.model.get_input_embeddings().register_forward_pre_hook(note)

    def no_report(*_: Any, **__: Any) -> Path:
        return workspace / "models" / "report" / "index.html"

    monkeypatch.setattr(transformers.Trainer, "__init__", watch)
    monkeypatch.setattr(evaluate, "ANSWERS", 0)
    monkeypatch.setattr(report, "write_report", no_report)

    def run(changes: dict[str, Any], base: str | None = None) -> Seen:
        trainers.clear()
        given[0].clear()
        given[1].clear()
        done = invoke("--fresh", "--keep-worse", edit=lambda text: change(base or text, SHORT | changes))
        assert done.status == 0, done.err
        (trainer,) = trainers
        return Seen(done, workspace, trainer, [*given[0]], [*given[1]])

    return run


def peft(seen: Seen) -> Any:
    """The configuration of the adapter in the trained model."""
    return seen.trainer.model.peft_config["default"]


def optimizer(seen: Seen) -> Any:
    """PyTorch's optimizer."""
    return seen.trainer.optimizer.optimizer


CASES = {
    "input_model.model_path": Case("models/other", lambda seen: seen.run.json["base_model"], "models/other"),
    "input_model.load_kwargs.revision": Case(
        "b" * 40,
        lambda seen: seen.run.json["revision"],
        "b" * 40,
        {"input_model.model_path": "someone/demo", "input_model.load_kwargs.revision": "a" * 40},
    ),
    "input_model.load_kwargs.attn_implementation": Case(
        "eager", lambda seen: seen.trainer.model.config._attn_implementation, "eager"
    ),
    f"{ROWS}.train_file": Case("dataset/sample-heldout.jsonl", lambda seen: seen.rows() == seen.rows("eval"), True),
    f"{ROWS}.held_out_file": Case(None, lambda seen: len(seen.rows("eval")), 8, {f"{ROWS}.eval_split": 8}),
    f"{ROWS}.dataset_name": Case("dataset/folder", lambda seen: len(seen.rows()), 30 - 8, OWN_FILE),
    f"{ROWS}.dataset_split": Case(
        "test", lambda seen: len(seen.rows()), 18 - 8, OWN_FILE | {f"{ROWS}.dataset_name": "dataset/folder"}
    ),
    f"{ROWS}.dataset_format": Case("text", lambda seen: "We won" in seen.text(), True, OWN_FILE),
    f"{ROWS}.prompt_template": Case("Why {prompt}", lambda seen: "Why Hooray" in seen.text(), True, COLUMNS),
    f"{ROWS}.completion_template": Case("no {completion}", lambda seen: "no joy" in seen.text(), True, COLUMNS),
    f"{ROWS}.eval_split": Case(11, lambda seen: (len(seen.rows("eval")), len(seen.rows())), (11, 37), OWN_FILE),
    f"{ROWS}.data_seed": Case(7, lambda seen: sorted(seen.rows("eval")), ..., OWN_FILE),
    f"{ROWS}.max_rows": Case(9, lambda seen: (len(seen.rows()), len(seen.rows("eval"))), (9, 9)),
    f"{TOKENS}.system_prompt": Case("I am mournful.", lambda seen: "I am mournful." in seen.text(), True),
    f"{TOKENS}.max_seq_len": Case(25, lambda seen: max(map(len, seen.rows())), 25, {f"{TOKENS}.max_bad_rows": 1}),
    f"{TOKENS}.train_on": Case("all", lambda seen: seen.labels() == len(seen.rows()[0]), True),
    f"{TOKENS}.thinking": Case("on", lambda seen: seen.run.json["thinking"], True),
    f"{PASS}.type": Case("DoRA", lambda seen: (seen.adapter["use_dora"], seen.run.json["method"]), (True, "dora")),
    f"{PASS}.r": Case(3, lambda seen: (seen.adapter["r"], seen.modules("r")), (3, {3})),
    f"{PASS}.alpha": Case(48, lambda seen: (seen.adapter["lora_alpha"], seen.modules("scaling")), (48, {3.0})),
    f"{PASS}.lora_dropout": Case(
        0.37,
        lambda seen: max(m.p for m in seen.trainer.model.modules() if type(m).__name__ == "Dropout"),
        0.37,
    ),
    f"{PASS}.rank_dropout": Case(0.37, lambda seen: seen.modules("rank_dropout"), {0.37}),
    f"{PASS}.target_modules": Case(
        ["o_proj"], lambda seen: {name.split(".")[-3] for name in seen.weights if "lora_A" in name}, {"o_proj"}
    ),
    f"{PASS}.torch_dtype": Case(
        "bfloat16",
        lambda seen: {str(w.dtype) for w in seen.trainer.model.parameters() if not w.requires_grad},
        {"torch.bfloat16"},
    ),
    f"{PASS}.packing": Case(True, lambda seen: {len(batch) for batch in seen.trained}, {1}),
    f"{PASS}.early_stopping_patience": Case(
        2, lambda seen: seen.trainer.state.global_step, 3, {f"{ARGS}.learning_rate": 1e-12}
    ),
    f"{PASS}.eval_rows": Case(3, lambda seen: len(seen.rows("eval")), 3),
    f"{ARGS}.num_train_epochs": Case(2.5, lambda seen: seen.trainer.state.global_step, 15, {f"{ARGS}.max_steps": -1}),
    f"{ARGS}.max_steps": Case(3, lambda seen: seen.trainer.state.global_step, 3),
    f"{ARGS}.learning_rate": Case(0.0003, lambda seen: max(seen.logged("learning_rate")), 0.0003),
    f"{ARGS}.lr_scheduler_type": Case("constant", lambda seen: len(set(seen.logged("learning_rate"))), 1),
    f"{ARGS}.warmup_steps": Case(
        2, lambda seen: [rate / 0.004 for rate in seen.logged("learning_rate")], [0, 0.5, 1, 0.5], LAST_COUNTS
    ),
    f"{ARGS}.optim": Case("sgd", lambda seen: type(optimizer(seen)).__name__, "SGD"),
    f"{ARGS}.weight_decay": Case(0.25, lambda seen: optimizer(seen).param_groups[0]["weight_decay"], 0.25),
    f"{ARGS}.per_device_train_batch_size": Case(5, lambda seen: {len(batch) for batch in seen.trained}, {5}),
    f"{ARGS}.per_device_eval_batch_size": Case(10, lambda seen: max(map(len, seen.evaluated)), 10),
    f"{ARGS}.gradient_accumulation_steps": Case(
        3, lambda seen: (len(seen.trained), seen.trainer.state.global_step), (6, 2)
    ),
    f"{ARGS}.gradient_checkpointing": Case(True, lambda seen: seen.trainer.model.is_gradient_checkpointing, True),
    f"{ARGS}.eval_strategy": Case("epoch", lambda seen: seen.logged("eval_loss", "step"), [4], LAST_COUNTS),
    f"{ARGS}.eval_steps": Case(3, lambda seen: seen.logged("eval_loss", "step"), [3, 4], LAST_COUNTS),
    f"{ARGS}.save_strategy": Case("no", lambda seen: seen.checkpoints(), [], LAST_COUNTS),
    f"{ARGS}.save_steps": Case(
        3, lambda seen: seen.checkpoints(), [3, 4], LAST_COUNTS | {f"{ARGS}.save_total_limit": 9}
    ),
    f"{ARGS}.save_total_limit": Case(3, lambda seen: len(seen.checkpoints()), 3),
    f"{ARGS}.load_best_model_at_end": Case(False, lambda seen: seen.weights, ..., {f"{ARGS}.learning_rate": 100.0}),
    f"{ARGS}.logging_steps": Case(2, lambda seen: seen.logged("loss", "step"), [2, 4]),
    f"{ARGS}.seed": Case(7, lambda seen: seen.weights, ...),
    f"{ARGS}.data_seed": Case(7, lambda seen: [sorted(map(sum, batch.tolist())) for batch in seen.trained], ...),
}
# what Olive's schema needs and nobody may choose: another value is refused
FIXED = {
    "input_model.type": "PyTorchModel",
    **{
        f"data_configs.{part}.{key}": value
        for part in ("train", "held_out")
        for key, value in {
            "name": "rows",
            "user_script": "setup/get_model.py",
            "script_dir": "setup",
            "load_dataset_config.type": "huggingface_dataset",
            "load_dataset_config.part": "rows",
            "pre_process_data_config.type": "skip_pre_process",
        }.items()
    },
    f"{TOKENS}.model_path": "models/other",
    f"{TOKENS}.revision": "main",
    f"{PASS}.train_data_config": "held_out",
    f"{PASS}.eval_data_config": "train",
    "systems.local_system.type": "Docker",
}
IN_FOUR_BITS = {
    f"{PASS}.quant_type": ("fp4", lambda layer: layer.weight.quant_state.quant_type, "fp4"),
    f"{PASS}.double_quant": (False, lambda layer: layer.weight.quant_state.nested, False),
    f"{PASS}.compute_dtype": ("bfloat16", lambda layer: str(layer.compute_dtype), "torch.bfloat16"),
}
OLIVE_RUN = {"clean_cache", "cache_dir", "output_dir"}
# have tests of their own below, or in tests/unit/test_row_files.py
ELSEWHERE = {
    f"{ROWS}.encoding",
    *(f"{ROWS}.max_bad_rows", f"{TOKENS}.max_bad_rows"),
    *(f"{ARGS}.report_to", "systems.local_system.accelerators.0.device"),
}


def base_file(workspace: Path, renders: Path, method: str) -> str:
    """Return olive-config.yaml as it is rendered for a method."""
    folder = workspace if method == "lora" else renders / f"demo-{method}"
    return (folder / FILE).read_text(encoding="utf-8")


def test_every_setting_that_is_rendered_has_a_case_here(workspace: Path, renders: Path) -> None:
    texts = [base_file(workspace, renders, method) for method in ("lora", "qlora", "loha")]
    rendered = {path for text in texts for path in positions(text)}
    cases = {*CASES, *FIXED, *IN_FOUR_BITS, *OLIVE_RUN, *ELSEWHERE}
    assert rendered - cases == set(), "settings without a test"
    for path in cases - rendered:
        assert f"# {path.rpartition('.')[2]}: " in texts[0], f"{path} is no setting any more"


@pytest.fixture(scope="module")
def unchanged() -> dict[str, Any]:
    """What was seen before a change, for each of the runs that several cases start from."""
    return {}


@pytest.mark.parametrize("path", CASES)
def test_a_setting_changes_what_it_says(
    observe: Callable[..., Seen], workspace: Path, renders: Path, unchanged: dict[str, Any], path: str
) -> None:
    case = CASES[path]
    method = "loha" if path.endswith("rank_dropout") else "lora"
    base = base_file(workspace, renders, method)
    start = json.dumps([method, case.given])
    if start not in unchanged:
        seen = observe(case.given, base)
        # all that the cases with this start look at: the next run leaves other files
        unchanged[start] = {
            path: other.look(seen)
            for path, other in CASES.items()
            if other.given == case.given and ("rank_dropout" in path) == (method == "loha")
        }
    before = unchanged[start][path]
    after = case.look(observe(case.given | {path: case.value}, base))
    assert before != after, f"{path} changed nothing"
    if case.after is not ...:
        assert after == (pytest.approx(case.after) if isinstance(case.after, list) else case.after)


def refused(run: Run, *words: str) -> None:
    """One sentence on stderr that holds the words, exit status 1."""
    assert run.status == 1
    assert run.err.startswith("error: ") and run.err.count("\n") == 1, run.err
    for word in words:
        assert word in run.err


@pytest.mark.parametrize("path", FIXED)
def test_what_nobody_may_choose_is_refused_where_it_stands(invoke: Invoke, workspace: Path, path: str) -> None:
    text = (workspace / FILE).read_text(encoding="utf-8")
    line, key = text.count("\n", 0, positions(text)[path]) + 1, path.rpartition(".")[2]
    run = invoke("--check", edit=lambda text: change(text, {path: FIXED[path]}))
    refused(run, f"line {line}: ", f"{key} is {FIXED[path]!r}: ")


@pytest.mark.parametrize("path", [f"{ROWS}.max_bad_rows", f"{TOKENS}.max_bad_rows"])
def test_more_unusable_rows_than_allowed_stop_the_run(
    observe: Callable[..., Seen], invoke: Invoke, workspace: Path, path: str
) -> None:
    lines = (workspace / "dataset" / "own.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {ROWS: '{"prompt": "Hooray!"}', TOKENS: json.dumps({"prompt": "Hooray! " * 200, "completion": "joy"})}
    bad = workspace / "dataset" / "bad.jsonl"
    bad.write_text("\n".join([*lines, rows[path.rpartition(".")[0]]]) + "\n", encoding="utf-8")
    # held-out rows are taken from a file of their own, so that the bad row is one of those to train on
    given = OWN_FILE | {f"{ROWS}.train_file": "dataset/bad.jsonl", f"{ROWS}.held_out_file": "dataset/own.jsonl"}
    assert len(observe(given | {path: 0.1}).rows()) == len(lines)
    run = invoke("--fresh", edit=lambda text: change(text, SHORT | given | {path: 0}))
    assert run.status == 1
    assert "max_bad_rows" in run.err


def test_a_gpu_that_is_not_there_is_refused(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(invoke("--check", settings={"device": "gpu"}), "PyTorch sees no NVIDIA GPU")


def test_a_run_reports_to_what_is_named(invoke: Invoke, workspace: Path) -> None:
    run = invoke("--fresh", edit=lambda text: change(text, SHORT | {f"{ARGS}.report_to": "tensorboard"}))
    written = [*(workspace / "models").rglob("events.out.tfevents*")]
    assert written if run.status == 0 else "tensorboard" in run.err


def test_code_that_comes_with_a_model_is_never_run(places: None, invoke: Invoke, workspace: Path) -> None:
    folder, ran = workspace / "models" / "with-code", workspace / "models" / "it-ran"
    shutil.copytree(workspace / "models" / "demo", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "strange", "auto_map": classes}))
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    run = invoke("--fresh", edit=lambda text: change(text, SHORT | {"input_model.model_path": "models/with-code"}))
    refused(run)
    assert not ran.exists()
    trusted = {"input_model.load_kwargs.trust_remote_code": True}
    refused(invoke(edit=lambda text: change(text, trusted)), "code that comes with a model is never run")


def test_early_stopping_without_evaluations_is_refused(invoke: Invoke) -> None:
    changes = LAST_COUNTS | {f"{PASS}.early_stopping_patience": 2, f"{ARGS}.eval_strategy": "no"}
    refused(invoke("--check", edit=lambda text: change(text, changes)), "early_stopping_patience needs evaluations")


# ---- settings that do not stand in the file

# all that transformers knows beside: they reach the Trainer as they are written
# fmt: off
PASSED_ON = {
    "lr_scheduler_kwargs": {}, "optim_args": "amsgrad=False", "optim_target_modules": None, "adam_beta1": 0.8,
    "adam_beta2": 0.95, "adam_epsilon": 1e-07, "max_grad_norm": 0.5, "neftune_noise_alpha": 5.0,
    "gradient_checkpointing_kwargs": {"use_reentrant": False}, "torch_compile": False, "torch_compile_mode": None,
    "torch_compile_backend": None, "use_liger_kernel": False, "liger_kernel_config": None,
    "torch_empty_cache_steps": 3, "logging_strategy": "epoch", "logging_first_step": True, "log_on_each_node": False,
    "logging_nan_inf_filter": False, "log_level": "error", "log_level_replica": "error", "run_name": "mine",
    "project": "ours", "trackio_space_id": "a/b", "trackio_bucket_id": "a/c", "trackio_static_space_id": "a/d",
    "eval_delay": 1, "eval_on_start": True, "save_on_each_node": True, "full_determinism": False,
    "accelerator_config": None, "parallelism_config": None, "dataloader_num_workers": 0,
    "dataloader_persistent_workers": False, "dataloader_prefetch_factor": None,
    "dataloader_multiprocessing_context": None, "dataloader_in_order": False,
    "train_sampling_strategy": "sequential", "ddp_bucket_cap_mb": 10,
    "ddp_broadcast_buffers": False, "ddp_static_graph": True, "ddp_backend": None, "ddp_timeout": 100, "fsdp": None,
    "fsdp_config": None, "deepspeed": None, "debug": "", "skip_memory_metrics": False,
}
# fmt: on


def test_every_training_argument_is_in_the_file_or_refused_or_reaches_the_trainer(
    observe: Callable[..., Seen], workspace: Path, renders: Path
) -> None:
    from transformers import TrainingArguments

    from settings import allowed

    in_the_file = {path.rpartition(".")[2] for path in CASES if path.startswith(ARGS)} | {"report_to"}
    refused_ones = {key for keys in allowed.TRAINING_ARGS.values() for key in keys}
    known = {argument.name for argument in dataclasses.fields(TrainingArguments) if argument.init}
    assert not in_the_file & refused_ones
    assert known - in_the_file - refused_ones == set(PASSED_ON)

    written = {f"{ARGS}.{key}": value for key, value in PASSED_ON.items() if value not in (None, {}, "", False, 0)}
    seen = observe(written)
    for path, value in written.items():
        assert getattr(seen.trainer.args, path.rpartition(".")[2]) == value


def test_noise_on_the_embeddings_changes_the_training(observe: Callable[..., Seen]) -> None:
    quiet, noisy = observe({}), observe({f"{ARGS}.neftune_noise_alpha": 50})
    assert quiet.logged("loss") != noisy.logged("loss")


def test_rows_may_be_trained_in_the_order_of_the_file(observe: Callable[..., Seen]) -> None:
    def first_row(seen: Seen) -> bool:
        row = seen.rows()[0]
        return bool(seen.trained[0][0].tolist()[: len(row)] == row)

    assert first_row(observe({f"{ARGS}.train_sampling_strategy": "sequential"}))
    assert not first_row(observe({}))


def every_refusal() -> list[tuple[str, str, str]]:
    """Return (method, path, why) of each setting that allowed.py refuses."""
    sys.path.insert(0, str(REPOSITORY / "template" / "finetuning"))
    try:
        from settings import allowed
    finally:
        sys.path.pop(0)
    sections = {"training_args": ARGS, "passes.*": PASS, "load_kwargs": "input_model.load_kwargs"}
    return sorted(
        {
            (method if section == "passes.*" else "lora", f"{sections[section]}.{key}", why)
            for method in allowed.METHOD
            for section, table in allowed.reasons(method).items()
            for key, why in table.items()
        }
    )


def test_what_the_run_would_ignore_or_be_spoilt_by_is_refused_with_the_reason(workspace: Path, tmp_path: Path) -> None:
    from settings.config_file import ConfigError
    from settings.run_settings import read_settings
    from settings.validation import validate

    text = (workspace / FILE).read_text(encoding="utf-8")
    path = tmp_path / "olive-config.yaml"
    names = {"lora": "LoRA", "qlora": "QLoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}
    four_bits = {f"{PASS}.{key}": value for key, value in {"quant_type": "nf4", "double_quant": True}.items()}
    assert len(every_refusal()) > 60
    for method, setting, why in every_refusal():
        changes = {f"{PASS}.type": names[method], setting: None}
        if method == "qlora":
            changes |= four_bits | {f"{PASS}.compute_dtype": "float32"}
        path.write_text(change(text, changes), encoding="utf-8")
        if method in ("qlora", "loha", "lokr"):  # these files lack what is refused for the method
            kept = {"qlora": "lora_dropout", "loha": "target_modules", "lokr": "target_modules"}[method]
            dropped = {"target_modules", "lora_dropout"} - {kept, setting.rpartition(".")[2]}
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(line for line in lines if line.strip().partition(":")[0] not in dropped))
        with pytest.raises(ConfigError, match=rf"{setting.rpartition('.')[2]} cannot be set: {re.escape(why)}\.$"):
            validate(read_settings(path), path)


# what a method's pass takes beside: where it is seen, and the value seen there
OF_A_METHOD: dict[str, dict[str, tuple[Any, Callable[[Seen], Any], Any]]] = {
    "lora": {
        "allow_tf32": (False, lambda seen: tf32(), False),
    },
    "loha": {
        "module_dropout": (0.5, lambda seen: seen.modules("module_dropout"), {0.5}),
        "exclude_modules": (["o_proj"], lambda seen: any("o_proj" in name for name in seen.weights), False),
        "init_weights": (False, lambda seen: seen.logged("loss")[0], ...),  # the adapter then changes the first step
        "layers_to_transform": ([0], lambda seen: any(".layers.1." in name for name in seen.weights), False),
        "layers_pattern": (["layers"], lambda seen: peft(seen).layers_pattern, ["layers"]),
        "rank_pattern": ({"o_proj": 2}, lambda seen: seen.modules("r"), {16, 2}),
        "alpha_pattern": ({"o_proj": 48}, lambda seen: seen.modules("scaling"), {2.0, 3.0}),
    },
    "lokr": {
        "decompose_both": (True, lambda seen: any("lokr_w1_a" in name for name in seen.weights), True),
        "decompose_factor": (4, lambda seen: sum(map(len, seen.weights.values())), ...),
        "rank_dropout_scale": (False, lambda seen: seen.modules("rank_dropout_scale"), {False}),
    },
}


def tf32() -> bool:
    """Tell whether PyTorch may round in multiplications of 32 bits on a GPU."""
    import torch

    return bool(torch.backends.cuda.matmul.allow_tf32)


def test_every_setting_of_a_method_s_pass_is_tested_or_refused(workspace: Path, renders: Path) -> None:
    from settings import allowed
    from settings.setting_types import setting_types

    tested: set[str] = set()
    for method in OF_A_METHOD:
        tested |= set(OF_A_METHOD[method])
        known = set(setting_types(method)["passes.*"])
        in_the_files = {path.split(".")[2] for path in {*CASES, *FIXED} if path.startswith(PASS)}
        left_out = {
            key for table in (allowed.METHOD[method], allowed.ANY_METHOD) for keys in table.values() for key in keys
        }
        assert known - in_the_files - left_out - tested == set(), method


@pytest.mark.parametrize(("method", "key"), [(method, key) for method in OF_A_METHOD for key in OF_A_METHOD[method]])
def test_a_setting_of_a_method_that_the_file_does_not_name_is_live(
    observe: Callable[..., Seen], workspace: Path, renders: Path, unchanged: dict[str, Any], method: str, key: str
) -> None:
    value, look, expected = OF_A_METHOD[method][key]
    base = base_file(workspace, renders, "loha" if method in ("loha", "lokr") else "lora")
    given: dict[str, Any] = {f"{PASS}.type": {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}[method]}
    if key == "decompose_both":
        given |= {f"{PASS}.r": 2}
    if key == "layers_pattern":
        given |= {f"{PASS}.layers_to_transform": [0]}
    start = json.dumps(["of a method", given])
    if start not in unchanged:
        seen = observe(given, base)
        unchanged[start] = {other: case[1](seen) for other, case in OF_A_METHOD[method].items()}
    after = look(observe(given | {f"{PASS}.{key}": value}, base))
    assert after != unchanged[start][key], f"{key} changed nothing"
    assert expected is ... or after == expected


# ---- the length of a run


@pytest.mark.parametrize(
    ("changes", "decides"),
    [
        ({f"{ARGS}.max_steps": -1}, "1 epochs"),
        ({f"{ARGS}.max_steps": 5}, "max_steps ends the run before its 1 epochs (6 steps)"),
        ({f"{ARGS}.max_steps": 6}, "1 epochs"),
        ({f"{ARGS}.max_steps": 600}, "1 epochs"),
        ({f"{ARGS}.max_steps": -1, f"{ARGS}.num_train_epochs": 1.4}, "1.4 epochs"),
        ({f"{ARGS}.max_steps": -1, f"{ROWS}.max_rows": 21}, "1 epochs"),
        ({f"{ARGS}.max_steps": -1, f"{ROWS}.max_rows": 21, f"{PASS}.packing": True}, "1 epochs"),
        ({f"{ARGS}.max_steps": -1, f"{ARGS}.gradient_accumulation_steps": 4, f"{ROWS}.max_rows": 21}, "1 epochs"),
        (
            {f"{ARGS}.max_steps": 3, f"{ARGS}.gradient_accumulation_steps": 4, f"{ARGS}.num_train_epochs": 2},
            "max_steps ends the run before its 2 epochs (4 steps)",
        ),
        (OWN_FILE | {f"{ARGS}.max_steps": -1, f"{ROWS}.eval_split": 11}, "1 epochs"),
    ],
)
def test_the_check_says_how_many_steps_the_run_has_and_what_ends_it(
    observe: Callable[..., Seen], changes: dict[str, Any], decides: str
) -> None:
    seen = observe(changes)
    said = re.search(r"length\s+(\d+) steps of \d+ rows: (.*)", seen.run.out)
    assert said and said[2].startswith(decides)
    assert seen.trainer.state.global_step == int(said[1])
    if "max_steps ends" not in decides:
        epochs = changes.get(f"{ARGS}.num_train_epochs", 1)
        assert seen.trainer.state.epoch == pytest.approx(epochs, abs=0.2)


# ---- `olive run`


@pytest.fixture(scope="module")
def olive_runs(places: None, workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run Olive's own command line three times on the file, in one process: the last two with other rows."""
    folder = tmp_path_factory.mktemp("olive") / "workspace"
    shutil.copytree(workspace, folder, ignore=shutil.ignore_patterns("checkpoints", "cache", "smoke"))
    text = change((workspace / FILE).read_text(encoding="utf-8"), SHORT)
    (folder / "as-it-is.yaml").write_text(text, encoding="utf-8")
    elsewhere = {"cache_dir": "models/elsewhere/cache", "output_dir": "models/elsewhere/result"}
    (folder / "elsewhere.yaml").write_text(change(text, elsewhere), encoding="utf-8")
    (folder / "kept.yaml").write_text(change(text, elsewhere | {"clean_cache": False}), encoding="utf-8")
    script = """
import shutil, sys
from pathlib import Path
from olive.cli.launcher import main
def run(file, name, rows):
    if rows:
        shutil.copy(rows, "dataset/sample-train.jsonl")
    main(["run", "--config", file])
    result = Path("models/elsewhere/result" if file != "as-it-is.yaml" else "models/checkpoints/olive")
    shutil.copy(result / "adapter" / "adapter_model.safetensors", f"{name}.safetensors")
run("as-it-is.yaml", "first", None)
run("elsewhere.yaml", "elsewhere", None)
run("kept.yaml", "kept", "dataset/sample-heldout.jsonl")
run("elsewhere.yaml", "cleaned", None)
"""
    environment = os.environ | {"CI": "1", "OLIVE_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_olive_run_takes_the_file_as_it_is(olive_runs: Path) -> None:
    assert (olive_runs / "first.safetensors").stat().st_size > 0
    assert (olive_runs / "models/checkpoints/olive/model/model.safetensors").is_file()
    assert (olive_runs / "models/checkpoints/olive-cache").is_dir()
    assert not (olive_runs / ".olive-cache").exists()


def test_olive_run_keeps_its_cache_and_its_result_where_the_file_says(olive_runs: Path) -> None:
    assert (olive_runs / "models/elsewhere/cache").is_dir()
    assert (olive_runs / "models/elsewhere/result/model/model.safetensors").is_file()


def test_without_clean_cache_olive_run_gives_the_adapter_of_other_rows(olive_runs: Path) -> None:
    before, kept, cleaned = (
        hashlib.sha256((olive_runs / f"{name}.safetensors").read_bytes()).hexdigest()
        for name in ("elsewhere", "kept", "cleaned")
    )
    assert kept == before
    assert cleaned != before


# ---- QLoRA, in a process of its own: its library is not in the lock for the CPU


def test_the_settings_of_qlora_are_live(workspace: Path, renders: Path, tmp_path: Path) -> None:
    if not (FOUR_BITS / "bitsandbytes").is_dir():
        pytest.skip("bitsandbytes is not in .cache: `make test` puts it there")
    if "bitsandbytes" in sys.modules:
        pytest.skip("this is that process")
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "in_four_bits", "-p", "no:cacheprovider"]
    ignored = shutil.ignore_patterns(".venv", "models")
    rendered = shutil.copytree(RENDERED, tmp_path / "workspace", ignore=ignored)
    (rendered / FILE).write_text(base_file(workspace, renders, "qlora"), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(FOUR_BITS), "WORKSPACE": str(rendered)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(rf"\b{len(IN_FOUR_BITS)} passed", done.stdout) and "skipped" not in done.stdout


@pytest.mark.skipif(
    str(FOUR_BITS) not in os.environ.get("PYTHONPATH", ""), reason="runs in the process of the test above"
)
@pytest.mark.parametrize("path", IN_FOUR_BITS)
def test_a_setting_is_live_in_four_bits(observe: Callable[..., Seen], unchanged: dict[str, Any], path: str) -> None:
    import bitsandbytes

    cpu = {
        "systems.local_system.accelerators.0.device": "cpu",
        f"{PASS}.torch_dtype": "float32",
        f"{PASS}.compute_dtype": "float32",
        f"{ARGS}.optim": "adamw_torch",
    }

    def looked(changes: dict[str, Any]) -> dict[str, Any]:
        model = observe(cpu | changes).trainer.model
        layer = next(module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit))
        return {path: look(layer) for path, (_, look, _) in IN_FOUR_BITS.items()}

    if "four bits" not in unchanged:
        unchanged["four bits"] = looked({})
    value, _, expected = IN_FOUR_BITS[path]
    assert looked({path: value}) == unchanged["four bits"] | {path: expected}
    assert unchanged["four bits"][path] != expected
