"""The types of setting values: as YAML writes them, in words, and whether a value has a type."""

from __future__ import annotations

import contextlib
import json
from enum import Enum
from functools import cache, reduce
from operator import or_
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

WORDS = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false"}
WORDS |= {"object": "settings of its own, indented below it", "null": "null"}
LIMITS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}


def as_yaml(annotation: Any) -> Any:
    """Return a library's type as YAML can write it: an enum by its values, a path as text, a model as a dict.

    A union of an enum and text is the enum: the libraries take the text for one of its values. Types that YAML cannot
    write, like arbitrary classes, are left out of a union.
    """
    if annotation in (None, NoneType, Any, str, int, float, bool) or get_origin(annotation) is Literal:
        return annotation
    if get_origin(annotation) in (Union, UnionType):
        members = [as_yaml(member) for member in get_args(annotation)]
        if any(isinstance(member, type) and issubclass(member, Enum) for member in get_args(annotation)):
            members = [member for member in members if member is not str]
        return reduce(or_, (member for member in members if member is not object))
    if get_origin(annotation) is list:
        return list[as_yaml(get_args(annotation)[0])]  # type: ignore[misc]
    if annotation is dict or get_origin(annotation) is dict or hasattr(annotation, "model_fields"):
        return dict[str, Any]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return Literal[tuple(member.value for member in annotation)]
    return str if annotation is Path else object


def within(kind: Any, limits: tuple[Any, ...]) -> Any:
    """Return a type whose numbers are within the limits, for example annotated_types.Ge(1)."""
    if limits and kind in (int, float):
        return Annotated[kind, *limits]
    if limits and get_origin(kind) in (Union, UnionType):
        return reduce(or_, (within(member, limits) for member in get_args(kind)))
    return kind


@cache
def adapter(kind: Any) -> Any:
    """Return pydantic's adapter for a type."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def complaint(kind: Any, value: Any) -> str | None:
    """Return what to do about a value that does not have the type; None if it has."""
    from pydantic import ValidationError

    try:
        adapter(kind).validate_python(value, strict=True)
    except ValidationError:
        schema = adapter(kind).json_schema()
        return (
            f"choose one of {', '.join(map(written, schema['enum']))}"
            if "enum" in schema
            else f"write {in_words(schema)}"
        )
    return None


def in_words(schema: dict[str, Any]) -> str:
    """Return what a JSON schema accepts, as in «a, b or c»."""
    *others, last = dict.fromkeys(options(schema))
    return f"{', '.join(others)} or {last}" if others else last


def options(schema: dict[str, Any]) -> list[str]:
    """Return each alternative of a JSON schema in words."""
    if "anyOf" in schema:
        return [words for option in schema["anyOf"] for words in options(option)]
    if "const" in schema or "enum" in schema:
        return [*map(written, schema.get("enum", [schema.get("const")]))]
    if schema.get("type") == "array":
        return [f"a list of values, each {in_words(schema.get('items', {}))}"]
    limits = [f"{word} {schema[limit]}" for limit, word in LIMITS.items() if limit in schema]
    return [" ".join([WORDS.get(schema.get("type", ""), "a value"), *limits])]


def written(value: Any) -> str:
    """Return a value as YAML writes it: a text like no, which YAML reads as another value, in quotes."""
    with contextlib.suppress(yaml.YAMLError):
        if isinstance(value, str) and yaml.safe_load(value) == value:
            return value
    return json.dumps(value)
