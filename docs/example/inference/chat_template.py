"""Conversations → the text that a model reads: its chat template, as both engines render it.

This renders as transformers does, without importing it, and with the date of the training in place of today's.
"""

from __future__ import annotations

import json
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine import ChatError, Message, Source


class ChatTemplate:
    """A model's chat template."""

    def __init__(self, text: str, marks: dict[str, Any], source: Source) -> None:
        """Compile the template; `marks` are the tokenizer's special tokens by name, as eos_token. Raises ChatError."""
        try:
            self.template = compile_template(text)
        except TemplateError as error:
            raise ChatError(f"The model's chat template cannot be read: {error}.") from error
        self.variables = marks | {"tools": None, "documents": None, "enable_thinking": source.thinking}
        self.variables["strftime_now"] = source.strftime_now

    def render(self, messages: list[Message]) -> str:
        """Render messages, up to the start of the answer. Raises ChatError."""
        try:
            return str(self.template.render(messages=messages, add_generation_prompt=True, **self.variables))
        except TemplateError as error:
            raise ChatError(f"The model's chat template does not take this conversation: {error}.") from error


def compile_template(text: str) -> Any:
    """Return a chat template that renders as in transformers, with the functions that templates expect."""
    world = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **({"ensure_ascii": False} | options))

    world.filters["tojson"] = to_json
    world.globals["raise_exception"] = refuse
    return world.from_string(text)


class GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's text for training: it has no effect here."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's name for it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the content of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
