"""Rows of any format → chat messages → tokens and labels.

Olive imports this file as a user script (see `user_script` in olive-config.yaml) and finds two functions in it:
`chat_rows` reads the rows, `chat_tokens` turns them into what the trainer eats. evaluate.py uses the same two,
so what is measured is tokenised exactly as what was trained.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import os
import re
import string
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
MODEL_FACTS = ROOT / "setup" / "model.yaml"
CACHE = ROOT / "models" / "cache"
# a variable of the chat template: models that can think aloud (Qwen3, SmolLM3) learn and give the answer alone
NO_THINKING = {"enable_thinking": False}
IGNORED = -100  # the label that PyTorch's cross entropy leaves out
ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}

# the bytes that a text file may start with to tell its encoding
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}

Message = dict[str, str]


class DataError(Exception):
    """What is wrong with the data, where, and what to do: one sentence."""


def chat_rows(
    part: str,
    train_file: str | None = None,
    held_out_file: str | None = None,
    dataset_name: str | None = None,
    dataset_split: str = "train",
    dataset_format: str = "auto",
    prompt_template: str | None = None,
    completion_template: str | None = None,
    eval_split: float = 0.1,
    data_seed: int = 42,
    max_rows: int | None = None,
) -> list[list[Message]]:
    """Read one part (`train` or `held_out`) of the data as conversations: lists of {role, content}.

    Without a `held_out_file` the held-out rows are taken from the train rows: a share (`eval_split` below 1) or a
    number of rows. Which ones depends on `data_seed` and the row's own content, never on its position, so that rows
    added later leave the others where they were. Raises DataError.
    """
    if held_out_file and part == "held_out":
        rows = read(held_out_file, dataset_name, dataset_split)
    else:
        rows = read(train_file, dataset_name, dataset_split)
    source = dataset_name or (held_out_file if held_out_file and part == "held_out" else train_file)
    conversations = []
    for number, row in enumerate(rows, start=1):
        try:
            conversations.append(to_messages(row, dataset_format, prompt_template, completion_template))
        except DataError as error:
            raise DataError(f"{source}, row {number}: {error}") from None
    if not held_out_file:
        held_out = held_out_positions(conversations, eval_split, data_seed)
        conversations = [row for i, row in enumerate(conversations) if (i in held_out) == (part == "held_out")]
    if not conversations:
        raise DataError(f"{source} leaves no rows for {part}: add rows or change eval_split in olive-config.yaml.")
    return conversations[:max_rows]


def read(file: str | None, dataset_name: str | None, dataset_split: str) -> list[dict[str, Any]]:
    """Return the raw rows of a local file, or of a Hugging Face dataset when one is named."""
    from datasets import load_dataset

    if dataset_name:
        return list(load_dataset(dataset_name, split=dataset_split))
    path = Path(file or "")
    if not path.is_file():
        raise DataError(f"The dataset {file} is not there: put it there, or change the path in olive-config.yaml.")
    builder = BUILDERS.get(path.suffix.removesuffix(".gz") if path.suffix != ".gz" else Path(path.stem).suffix)
    if builder is None:
        raise DataError(f"{file} has an unknown ending: use one of {', '.join(BUILDERS)}.")
    try:
        # the copy that `datasets` makes of the rows stays in the workspace
        readable = str(in_utf8(path)) if builder != "parquet" else str(path)
        return list(load_dataset(builder, data_files=readable, split="train", cache_dir=str(CACHE)))
    except Exception as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise DataError(f"{file} cannot be read as {builder}: {cause}. Repair or replace the file.") from error


def in_utf8(path: Path) -> Path:
    """Return a text file that `datasets` can read: a copy without the mark where spreadsheets and editors left one."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    encoding = next((name for mark, name in MARKS.items() if raw.startswith(mark)), None)
    if encoding is None:
        return path
    copy = CACHE / "utf-8" / f"{hashlib.sha256(raw).hexdigest()[:16]}{Path(path.name.removesuffix('.gz')).suffix}"
    copy.parent.mkdir(parents=True, exist_ok=True)
    unfinished = copy.with_suffix(f".{os.getpid()}")
    unfinished.write_text(raw.decode(encoding), encoding="utf-8", newline="")
    return unfinished.replace(copy)


def to_messages(
    row: dict[str, Any], dataset_format: str, prompt_template: str | None, completion_template: str | None
) -> list[Message]:
    """Map one row to messages of the roles system, user, assistant and tool. Raises DataError."""
    if dataset_format == "auto":
        dataset_format = detect(row, prompt_template)
    if dataset_format == "messages":
        messages = [message(turn["role"], turn["content"]) for turn in need(row, "messages")]
    elif dataset_format == "sharegpt":
        turns = need(row, "conversations")
        messages = [message(ROLES.get(turn["from"], turn["from"]), turn["value"]) for turn in turns]
    elif dataset_format == "alpaca":
        question = "\n\n".join(filter(None, [need(row, "instruction"), row.get("input")]))
        messages = [message("system", row["system"])] if row.get("system") else []
        for asked, answered in row.get("history") or []:
            messages += [message("user", asked), message("assistant", answered)]
        messages += [message("user", question), message("assistant", need(row, "output"))]
    elif dataset_format == "prompt-completion":
        messages = [message("user", need(row, "prompt")), message("assistant", need(row, "completion"))]
    elif dataset_format == "columns":
        messages = [
            message("user", fill(prompt_template, row, "prompt_template")),
            message("assistant", fill(completion_template, row, "completion_template")),
        ]
    elif dataset_format == "text":
        messages = [message("assistant", need(row, "text"))]
    else:
        raise DataError(f"dataset_format {dataset_format!r} is unknown: see olive-config.yaml for the choices.")
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in messages):
        raise DataError("no assistant turn with text: there is nothing to learn from; add an answer or drop the row.")
    return messages


def detect(row: dict[str, Any], prompt_template: str | None) -> str:
    """Name the format of a row by the columns it has."""
    if prompt_template:
        return "columns"
    for column, name in (
        ("messages", "messages"),
        ("conversations", "sharegpt"),
        ("instruction", "alpaca"),
        ("completion", "prompt-completion"),
        ("text", "text"),
    ):
        if column in row:
            return name
    raise DataError(f"columns {', '.join(row)} fit no known format: set dataset_format in olive-config.yaml.")


def message(role: str, content: Any) -> Message:
    """Make one message; content is a string or a list of text parts as in OpenAI's chat format."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    if not isinstance(content, str):
        raise DataError(f"the content of a {role} turn is not text but {type(content).__name__}.")
    return {"role": role, "content": content}


def need(row: dict[str, Any], column: str) -> Any:
    """Return a column's value, or say that it is missing."""
    if not row.get(column):
        raise DataError(f"column {column!r} is missing or empty; the row has {', '.join(row)}.")
    return row[column]


def fill(template: str | None, row: dict[str, Any], setting: str) -> str:
    """Put the row's columns into a template such as `Phrase: {phrase}`; other braces stay as they are."""
    if not template:
        raise DataError(f"{setting} is empty: dataset_format columns needs it in olive-config.yaml.")
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    missing = [name for name in names if name not in row]
    if missing:
        raise DataError(f"{setting} names {{{missing[0]}}}, but the row has {', '.join(row)}.")
    return re.sub(r"\{(\w+)\}", lambda match: str(row[match[1]]), template)


def held_out_positions(conversations: list[list[Message]], eval_split: float, data_seed: int) -> set[int]:
    """Choose the held-out rows by a hash of seed and content: a share below 1, a number of rows from 1 on."""
    digests = [
        hashlib.sha256(f"{data_seed}:{json.dumps(row, sort_keys=True)}".encode()).hexdigest() for row in conversations
    ]
    if eval_split >= 1:
        by_digest = sorted(range(len(digests)), key=digests.__getitem__)
        return set(by_digest[: int(eval_split)])
    return {i for i, digest in enumerate(digests) if int(digest[:8], 16) < eval_split * 2**32}


def load_tokenizer(model_path: str, revision: str | None = None) -> Any:
    """Load the tokenizer; one without a chat template (a base model's) gets the template of setup/model.yaml."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path, revision=revision, local_files_only=True)
    if not tokenizer.chat_template:
        tokenizer.chat_template = yaml.safe_load(MODEL_FACTS.read_text(encoding="utf-8"))["chat_template"]
    if tokenizer.pad_token_id is None:  # padding is masked, so that any token serves
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def chat_tokens(
    rows: list[list[Message]],
    model_path: str,
    revision: str | None = None,
    system_prompt: str | None = None,
    max_seq_len: int = 1024,
    train_on: str = "responses",
) -> list[dict[str, list[int]]]:
    """Tokenise conversations into {input_ids, attention_mask, labels}, each of the same length up to max_seq_len.

    Labels are the tokens of the assistant's turns with their end of turn, IGNORED elsewhere; with `train_on: all`
    every token is a label. Rows that are cut at max_seq_len are counted on the screen; one whose answers are cut off
    entirely is left out, as it has nothing to learn from. Raises DataError when no row is left.
    """
    tokenizer = load_tokenizer(model_path, revision)
    examples = [tokenise(tokenizer, with_system(row, system_prompt), train_on) for row in rows]
    cut = [{key: ids[:max_seq_len] for key, ids in example.items()} for example in examples]
    kept = [example for example in cut if any(label != IGNORED for label in example["labels"])]
    longer = sum(len(example["input_ids"]) > max_seq_len for example in examples)
    if longer:
        print(
            f"{longer} of {len(rows)} rows are longer than max_seq_len {max_seq_len} and were cut; "
            f"{len(rows) - len(kept)} of them lost their whole answer and were left out."
        )
    if not kept:
        raise DataError(f"max_seq_len {max_seq_len} cuts off every answer: raise it in olive-config.yaml.")
    return kept


def with_system(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """Put the system prompt first, unless the conversation brings its own."""
    if not system_prompt or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def tokenise(tokenizer: Any, messages: list[Message], train_on: str) -> dict[str, list[int]]:
    """Tokenise one conversation with the tokenizer's own chat template."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, **NO_THINKING)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    if train_on == "all":
        labels = list(ids)
    else:
        labels = [IGNORED] * len(ids)
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        offsets = encoded["offset_mapping"]
        for start, end in answer_spans(tokenizer, messages, text):
            after = next((i for i, (left, _) in enumerate(offsets) if left >= end), len(ids))
            # the token that ends the turn is learnt too, with a blank that a template may put before it
            while after < len(ids) and ids[after] not in special and not text[slice(*offsets[after])].strip():
                after += 1
            ends_turn = after < len(ids) and ids[after] in special
            for i, (left, right) in enumerate(offsets):
                if left >= start and (right <= end or (ends_turn and i <= after)):
                    labels[i] = ids[i]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def answer_spans(tokenizer: Any, messages: list[Message], text: str) -> list[tuple[int, int]]:
    """Find where each assistant turn stands in the rendered text: (first, last + 1) in characters."""
    spans = []
    for i, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        options = {"tokenize": False, "add_generation_prompt": True, **NO_THINKING}
        prompt = tokenizer.apply_chat_template(messages[:i], **options) if i else ""
        content = turn["content"].strip()
        start = len(os.path.commonprefix([text, prompt]))  # noqa: RUF071 - of any texts, not of paths
        found = text.find(content, start)
        # a template may shorten earlier turns (Qwen3 drops their empty thoughts), but must not change the rest
        if found < 0 or (start < len(prompt) and text[start:found].strip()):
            raise DataError(
                "the chat template changes earlier turns, so that the answers cannot be found: set train_on: all."
            )
        spans.append((start, found + len(content)))
    return spans


def register() -> None:
    """Make the two functions known to Olive by their names."""
    from olive.data.registry import Registry

    Registry.register_dataset()(chat_rows)
    Registry.register_pre_process()(chat_tokens)


if "olive" in sys.modules:  # `olive run` imports this file as its user script
    register()
