"""Checks resources that are written in Bicep against the type data of the Bicep compiler.

Every branch of every condition is looked at, whatever the parameters are. What is known only when Azure runs it, such
as the result of a function, passes; lists of known values are taken as complete, which the compiler does not do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from bicep_to_arm import Bicep, Resource
from tree_sitter import Node

REQUIRED, READ_ONLY = 1, 2  # flags of a property
KINDS = {
    "string": "StringType",
    "int": "IntegerType",
    "bool": "BooleanType",
    "array": "ArrayType",
    "object": "ObjectType",
}
# What stands in the declaration, or is no property of the resource.
DECLARED = {"id", "type", "apiVersion", "parent", "scope", "dependsOn"}


class Types:
    """The types of one namespace and API version."""

    def __init__(self, file: Path) -> None:
        """Read a file: an array, in which `{"$ref": "#/N"}` points to the entry N."""
        self.entries: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))

    def body(self, name: str) -> dict[str, Any] | None:
        """Return the type of a resource, Type@api-version."""
        for entry in self.entries:
            if entry["$type"] == "ResourceType" and entry["name"].lower() == name.lower():
                return self.at(entry["body"])
        return None

    def at(self, reference: dict[str, str]) -> dict[str, Any]:
        """Return what a reference points to."""
        return self.entries[int(reference["$ref"].removeprefix("#/"))]


def mistakes(bicep: Bicep, folder: Path) -> tuple[list[str], list[str]]:
    """Return what is wrong with the resources of a file, and the types that the folder has no data for."""
    wrong, unknown = [], []
    for resource in bicep.resources.values():
        name = f"{resource.type}@{resource.api_version}"
        file = folder / f"{resource.type.partition('/')[0].lower()}@{resource.api_version}.json"
        body = types_of(file).body(name) if file.is_file() else None
        if body is None:
            unknown.append(name)
        elif not resource.existing:
            wrong += Checker(bicep, types_of(file)).resource(resource, body)
    return wrong, unknown


@cache
def types_of(file: Path) -> Types:
    """Read a file once."""
    return Types(file)


class Checker:
    """Compares expressions with types."""

    def __init__(self, bicep: Bicep, types: Types) -> None:
        """Check what this file says against these types."""
        self.bicep, self.types = bicep, types

    def resource(self, resource: Resource, wanted: dict[str, Any]) -> Iterator[str]:
        """Yield what is wrong with a resource."""
        given = {key: value for key, value in resource.body.items() if key not in DECLARED}
        known = {key: value for key, value in wanted["properties"].items() if key not in DECLARED}
        yield from self.properties(given, known, None)
        yield from self.missing(resource.node, set(given), known)

    def check(self, node: Node, wanted: dict[str, Any]) -> Iterator[str]:
        """Yield what is wrong with an expression that must have this type."""
        for value in self.possible(node):
            yield from self.value(value, wanted)

    def possible(self, node: Node) -> Iterator[Node]:
        """Yield all that an expression may come to: both branches of a condition, the value of a variable."""
        children = [child for child in node.named_children if child.type != "comment"]
        if node.type == "parenthesized_expression":
            yield from self.possible(children[0])
        elif node.type == "ternary_expression":
            yield from self.possible(children[1])
            yield from self.possible(children[2])
        elif node.type == "identifier" and self.text(node) in self.bicep.variables:
            yield from self.possible(self.bicep.variables[self.text(node)].named_children[-1])
        elif node.type in ("member_expression", "subscript_expression"):
            of = [one for one in self.possible(children[0]) if one.type == "object"]
            name = self.text(children[1]) if node.type == "member_expression" else None
            for entry in (entry for one in of for entry in one.named_children if entry.type == "object_property"):
                if name in (None, self.bicep.key(entry.named_children[0])):
                    yield from self.possible(entry.named_children[1])
            if not of:
                yield node
        else:
            yield node

    def value(self, node: Node, wanted: dict[str, Any]) -> Iterator[str]:
        """Yield what is wrong with a value that is neither condition nor variable."""
        kind = wanted["$type"]
        if node.type == "call_expression" and self.text(node).startswith("concat("):
            for argument in node.named_children[-1].named_children:
                yield from self.check(argument, wanted)
        elif node.type == "call_expression" and self.text(node).startswith("union(") and kind == "ObjectType":
            yield from self.merged(node, wanted)
        elif kind == "UnionType":
            choices = [self.types.at(element) for element in wanted["elements"]]
            literals = [choice["value"] for choice in choices if choice["$type"] == "StringLiteralType"]
            if node.type == "string" and self.is_plain(node) and literals:
                if self.bicep.plain(node) not in literals:
                    yield self.wrong(node, f"{self.text(node)} is none of {', '.join(literals)}")
            elif all(list(self.value(node, choice)) for choice in choices):
                yield self.wrong(node, f"{self.text(node)} fits no type of the union")
        elif kind == "DiscriminatedObjectType":
            yield self.wrong(node, "has several shapes, which this check does not know")
        elif kind == "AnyType" or node.type in ("member_expression", "call_expression", "subscript_expression"):
            return
        elif node.type == "identifier":
            yield from self.parameter(node, wanted)
        elif kind == "ObjectType" and node.type == "object":
            given = self.given(node)
            yield from self.properties(given, wanted["properties"], wanted.get("additionalProperties"))
            yield from self.missing(node, set(given), wanted["properties"])
        elif kind == "ArrayType" and node.type == "array":
            for item in (child for child in node.named_children if child.type != "comment"):
                yield from self.check(item, self.types.at(wanted["itemType"]))
        elif kind in ("StringType", "StringLiteralType") and node.type == "string":
            yield from self.string(node, wanted)
        elif (kind, node.type) not in (("IntegerType", "number"), ("BooleanType", "boolean")):
            yield self.wrong(node, f"{self.text(node)[:60]} is no {kind}")

    def given(self, node: Node) -> dict[str, Node]:
        """Return the properties that an object has."""
        entries = [entry for entry in node.named_children if entry.type == "object_property"]
        return {self.bicep.key(entry.named_children[0]): entry.named_children[1] for entry in entries}

    def merged(self, node: Node, wanted: dict[str, Any]) -> Iterator[str]:
        """Yield what is wrong with an object that union() puts together."""
        sure: set[str] = set()
        for argument in node.named_children[-1].named_children:
            parts = [self.given(part) for part in self.possible(argument) if part.type == "object"]
            for part in parts:
                yield from self.properties(part, wanted["properties"], wanted.get("additionalProperties"))
            sure |= set.intersection(*map(set, parts)) if parts else set()
        yield from self.missing(node, sure, wanted["properties"])

    def properties(self, given: dict[str, Node], known: dict[str, Any], others: dict[str, str] | None) -> Iterator[str]:
        """Yield what is wrong with the properties that an object has."""
        for name, value in given.items():
            if name in known and known[name]["flags"] & READ_ONLY:
                yield self.wrong(value, f"{name} is set by Azure alone")
            elif name in known:
                yield from self.check(value, self.types.at(known[name]["type"]))
            elif others:
                yield from self.check(value, self.types.at(others))
            else:
                yield self.wrong(value, f"there is no property {name}")

    def missing(self, node: Node, given: set[str], known: dict[str, Any]) -> Iterator[str]:
        """Yield the properties that an object must have and has not."""
        for name, about in known.items():
            if about["flags"] & REQUIRED and name not in given:
                yield self.wrong(node, f"{name} is missing")

    def parameter(self, node: Node, wanted: dict[str, Any]) -> Iterator[str]:
        """Yield whether a parameter has another type."""
        declared = self.bicep.parameters.get(self.text(node))
        kind = KINDS[self.text(declared.named_children[1])] if declared else "a resource"
        if kind != wanted["$type"]:
            yield self.wrong(node, f"{self.text(node)} is {kind}, no {wanted['$type']}")

    def string(self, node: Node, wanted: dict[str, Any]) -> Iterator[str]:
        """Yield what is wrong with a string that nothing is put into."""
        if not self.is_plain(node):
            return
        text = self.bicep.plain(node)
        if wanted["$type"] == "StringLiteralType" and text != wanted["value"]:
            yield self.wrong(node, f"{text} is not {wanted['value']}")
        if not wanted.get("minLength", 0) <= len(text) <= wanted.get("maxLength", len(text)):
            yield self.wrong(node, f"{text} is too short or too long")
        if "pattern" in wanted and not re.search(wanted["pattern"], text):
            yield self.wrong(node, f"{text} does not match {wanted['pattern']}")

    def is_plain(self, node: Node) -> bool:
        """Tell whether nothing is put into a string."""
        return not any(child.type == "interpolation" for child in node.named_children)

    def text(self, node: Node) -> str:
        """Return the source of a node."""
        return self.bicep.text(node)

    def wrong(self, node: Node, message: str) -> str:
        """Return a mistake with its place."""
        return str(self.bicep.error(node, message))
