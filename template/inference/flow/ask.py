"""The flow's only step: a question and the chat history → the answer of the served model."""

from __future__ import annotations

import os
from typing import Any

from openai import APIConnectionError, APIStatusError, OpenAI
from promptflow.core import tool


class AskError(Exception):
    """Why the request failed, and what to do."""


@tool
def ask(question: str, chat_history: list[dict[str, Any]], api: str, max_tokens: int, temperature: float) -> str:
    """Ask the API that `python inference/gradio_chat.py` serves, with the key in CHAT_API_KEY if it requires one.

    `api` is its address with /v1. The server adds the system prompt of the training. Raises AskError.
    """
    messages: list[Any] = []
    for turn in chat_history:
        messages.append({"role": "user", "content": turn["inputs"]["question"]})
        messages.append({"role": "assistant", "content": turn["outputs"]["answer"]})
    messages.append({"role": "user", "content": question})
    client = OpenAI(base_url=api, api_key=os.environ.get("CHAT_API_KEY") or "none", max_retries=0)
    try:
        (model, *_) = client.models.list().data  # the tuned one comes first
        answer = client.chat.completions.create(
            model=model.id, messages=messages, max_tokens=max_tokens, temperature=temperature
        )
    except APIConnectionError:
        raise AskError(
            f"Nothing answers at {api}: run `python inference/gradio_chat.py`, or correct `api` in "
            "inference/flow/flow.dag.yaml."
        ) from None
    except APIStatusError as error:
        hint = " (the variable CHAT_API_KEY)" if error.status_code == 401 else ""
        raise AskError(f"{api} refuses the question{hint}: {error.message}") from None
    return answer.choices[0].message.content or ""
