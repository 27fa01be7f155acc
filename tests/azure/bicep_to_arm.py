"""Bicep to an ARM template, for the part of Bicep that infra/provision/ is written in; no replacement of the compiler.

It has the compiler's command line as far as az uses it, so that on PATH under the name `bicep` it lets the real az
deploy .bicep files where the compiler cannot be downloaded. What it does not know is an error, never a guess: modules,
loops, lambdas, own types and functions.

    python bicep_to_arm.py build FILE --stdout | lint FILE | --version
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / ".cache" / "bicep-tools"))  # made by the Makefile

import tree_sitter_bicep
from tree_sitter import Language, Node, Parser

VERSION = "Bicep CLI version 0.39.26 (tree-sitter)"
OPERATORS = {"==": "equals", "&&": "and", "||": "or", ">": "greater", ">=": "greaterOrEquals", "<": "less"}
OPERATORS |= {"<=": "lessOrEquals", "+": "add", "-": "sub", "*": "mul", "/": "div", "%": "mod", "??": "coalesce"}
# Decorators that become a key of the parameter; the others are dealt with one by one.
CONSTRAINTS = {"minLength", "maxLength", "minValue", "maxValue"}
# Functions that only a parameter's default may call, as their value differs from one deployment to the next.
ONLY_DEFAULTS = {"newGuid", "utcNow"}
FUNCTIONS = {"concat", "empty", "environment", "guid", "join", "replace", "resourceGroup", "startsWith", "subscription"}
FUNCTIONS |= {"subscriptionResourceId", "take", "tenant", "union", "uniqueString", *ONLY_DEFAULTS}
ESCAPES = {"\\\\": "\\", "\\'": "'", "\\n": "\n", "\\r": "\r", "\\t": "\t", "\\$": "$"}


class BicepError(Exception):
    """What is wrong, and where: FILE(LINE,COLUMN) : Error: MESSAGE."""


@dataclass
class Resource:
    """A resource of the file: its type, and what makes up its id and its name."""

    symbol: str
    type: str
    api_version: str
    existing: bool
    body: dict[str, Node]
    condition: Node | None
    node: Node
    parent: Resource | None = None
    scope: Resource | None = None


@dataclass
class Bicep:
    """One .bicep file, read. `parameters`, `variables`, `resources` and `outputs` are its declarations by name."""

    file: Path
    source: bytes
    parameters: dict[str, Node] = field(default_factory=dict)
    variables: dict[str, Node] = field(default_factory=dict)
    resources: dict[str, Resource] = field(default_factory=dict)
    outputs: dict[str, Node] = field(default_factory=dict)
    decorators: dict[str, dict[str, Node | None]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, file: Path) -> Bicep:
        """Read a file. Raises BicepError for what is no Bicep, and for what this does not know of it."""
        bicep = cls(file, file.read_bytes())
        root = Parser(Language(tree_sitter_bicep.language())).parse(bicep.source).root_node
        bicep.refuse_errors(root)
        decorators: Node | None = None
        for node in root.named_children:
            if node.type == "decorators":
                decorators = node
                continue
            if node.type != "comment":
                bicep.declare(node, decorators)
                decorators = None
        for resource in bicep.resources.values():
            for key in ("parent", "scope"):
                if key in resource.body:
                    setattr(resource, key, bicep.symbol(resource.body[key]))
        return bicep

    def text(self, node: Node) -> str:
        """Return the source of a node."""
        return self.source[node.start_byte : node.end_byte].decode()

    def error(self, node: Node, message: str) -> BicepError:
        """Return an error that says where it is."""
        row, column = node.start_point
        return BicepError(f"{self.file}({row + 1},{column + 1}) : Error: {message}")

    def refuse_errors(self, node: Node) -> None:
        """Raise BicepError for the first place that cannot be read."""
        if node.is_error or node.is_missing:
            raise self.error(node, f"this is no Bicep: {self.text(node)[:60]!r}")
        for child in node.children if node.has_error else []:
            self.refuse_errors(child)

    def declare(self, node: Node, decorators: Node | None) -> None:
        """Note a declaration."""
        name = self.text(node.named_children[0])
        places: dict[str, dict[str, Any]] = {
            "parameter_declaration": self.parameters,
            "variable_declaration": self.variables,
            "resource_declaration": self.resources,
            "output_declaration": self.outputs,
        }
        if node.type not in places:
            raise self.error(node, f"not known here: {node.type}")
        place = places[node.type]
        known = {**self.parameters, **self.variables, **self.resources}
        if name in place or (place is not self.outputs and name in known):
            raise self.error(node, f'"{name}" is declared twice')
        place[name] = self.resource(name, node) if node.type == "resource_declaration" else node
        self.decorators[name] = {}
        for decorator in decorators.named_children if decorators else []:
            call = decorator.named_children[0]
            arguments = call.child_by_field_name("arguments")
            first = arguments.named_children[0] if arguments and arguments.named_children else None
            self.decorators[name][self.text(call.named_children[0])] = first

    def resource(self, name: str, node: Node) -> Resource:
        """Read the declaration of a resource."""
        kind, _, api_version = self.plain(node.named_children[1]).partition("@")
        last, condition = node.named_children[-1], None
        if last.type == "if_statement":
            condition, last = last.named_children[0], last.named_children[-1]
        if last.type != "object":
            raise self.error(last, f"not known here: {last.type}")
        body = {
            self.text(entry.named_children[0]): entry.named_children[1]
            for entry in last.named_children
            if entry.type == "object_property"
        }
        existing = any(child.type == "existing" for child in node.children)
        return Resource(name, kind, api_version, existing, body, condition, node)

    def symbol(self, node: Node) -> Resource:
        """Return the resource that a node names."""
        self.used.add(self.text(node))
        if self.text(node) not in self.resources:
            raise self.error(node, f'there is no resource "{self.text(node)}"')
        return self.resources[self.text(node)]

    # ---- expressions

    def plain(self, node: Node) -> str:
        """Return the value of a string that has nothing interpolated."""
        if any(child.type == "interpolation" for child in node.named_children):
            raise self.error(node, "only a plain string may stand here")
        return self.unescaped("".join(self.text(child) for child in node.named_children))

    def unescaped(self, text: str) -> str:
        """Return the value of a string's source."""
        return re.sub(r"\\u\{([0-9a-fA-F]+)\}|\\.", lambda m: chr(int(m[1], 16)) if m[1] else ESCAPES[m[0]], text)

    def json(self, node: Node) -> Any:
        """Return an expression as it is in a template: values as JSON, the rest as text in brackets."""
        if node.type == "object":
            entries = [child for child in node.named_children if child.type == "object_property"]
            return {self.key(entry.named_children[0]): self.json(entry.named_children[1]) for entry in entries}
        if node.type == "array":
            return [self.json(child) for child in node.named_children if child.type != "comment"]
        if node.type == "parenthesized_expression":
            return self.json(node.named_children[0])
        if node.type == "number":
            return int(self.text(node))
        if node.type in ("boolean", "null"):
            return json.loads(self.text(node))
        if node.type == "string" and not any(child.type == "interpolation" for child in node.named_children):
            value = self.plain(node)
            return f"[{value}" if value.startswith("[") else value
        return f"[{self.arm(node)}]"

    def key(self, node: Node) -> str:
        """Return the key of an object."""
        if node.type != "string":
            return self.text(node)
        return str(self.json(node))

    def arm(self, node: Node) -> str:
        """Return an expression in the language of ARM templates."""
        children = [child for child in node.named_children if child.type != "comment"]
        if node.type == "string":
            return self.string(children)
        if node.type == "number":
            return self.text(node)
        if node.type in ("boolean", "null"):
            return f"{self.text(node)}()"
        if node.type == "array":
            return f"createArray({', '.join(map(self.arm, children))})"
        if node.type == "object":
            pairs = ((entry.named_children[0], entry.named_children[1]) for entry in children)
            parts = (part for key, value in pairs for part in (self.key_text(key), self.arm(value)))
            return f"createObject({', '.join(parts)})"
        if node.type == "parenthesized_expression":
            return self.arm(children[0])
        if node.type == "ternary_expression":
            return f"if({', '.join(map(self.arm, children))})"
        if node.type == "unary_expression":
            sign = self.text(node.children[0])
            return f"not({self.arm(children[0])})" if sign == "!" else f"{sign}{self.arm(children[0])}"
        if node.type == "binary_expression":
            sign = self.text(node.children[1])
            both = ", ".join(map(self.arm, children))
            return f"not(equals({both}))" if sign == "!=" else f"{OPERATORS[sign]}({both})"
        if node.type == "identifier":
            return self.name(node)
        if node.type == "subscript_expression":
            return f"{self.arm(children[0])}[{self.arm(children[1])}]"
        if node.type == "member_expression":
            return self.member(node)
        if node.type == "call_expression":
            return self.call(node)
        raise self.error(node, f"not known here: {node.type}")

    def string(self, parts: list[Node]) -> str:
        """Return a string, put together by format() where something is interpolated."""
        text, values = "", []
        for part in parts:
            if part.type == "interpolation":
                text += f"{{{len(values)}}}"
                values.append(self.arm(part.named_children[0]))
            else:
                text += self.unescaped(self.text(part)).replace("{", "{{").replace("}", "}}")
        text = text if values else text.replace("{{", "{").replace("}}", "}")
        quoted = "'" + text.replace("'", "''") + "'"
        return f"format({', '.join([quoted, *values])})" if values else quoted

    def key_text(self, node: Node) -> str:
        """Return the key of an object as an expression."""
        return self.arm(node) if node.type == "string" else f"'{self.text(node)}'"

    def name(self, node: Node) -> str:
        """Return a parameter or a variable."""
        name = self.text(node)
        self.used.add(name)
        for kind, declared in (("parameters", self.parameters), ("variables", self.variables)):
            if name in declared:
                return f"{kind}('{name}')"
        raise self.error(node, f'the name "{name}" does not exist')

    def member(self, node: Node) -> str:
        """Return a property: of a resource, of anything else."""
        of, name = node.named_children[0], self.text(node.named_children[1])
        if of.type != "identifier" or self.text(of) not in self.resources:
            return f"{self.arm(of)}.{name}"
        resource = self.symbol(of)
        if name in ("id", "name"):
            return self.id(resource) if name == "id" else self.arm(resource.body["name"])
        if name == "properties":
            api_version = f", '{resource.api_version}'" if resource.existing else ""
            return f"reference({self.id(resource)}{api_version})"
        return f"reference({self.id(resource)}, '{resource.api_version}', 'full').{name}"

    def call(self, node: Node) -> str:
        """Return the call of a function, also one of a resource: account.listKeys()."""
        function, arguments = node.named_children[0], node.named_children[-1]
        values = [self.arm(child) for child in arguments.named_children if child.type != "comment"]
        if function.type == "member_expression":
            resource = self.symbol(function.named_children[0])
            name = self.text(function.named_children[1])
            if name != "listKeys":
                raise self.error(node, f"not known here: {name}() of a resource")
            api_version = f"'{resource.api_version}'"
            return f"{name}({', '.join([self.id(resource), api_version, *values])})"
        if self.text(function) == "loadTextContent":
            text = (self.file.parent / self.plain(arguments.named_children[0])).read_text(encoding="utf-8")
            return "'" + text.replace("'", "''") + "'"
        if self.text(function) not in FUNCTIONS:
            raise self.error(node, f"not known here: {self.text(function)}()")
        return f"{self.text(function)}({', '.join(values)})"

    # ---- resources

    def names(self, resource: Resource) -> list[str]:
        """Return the names that lead to a resource, as expressions, from its outermost parent on."""
        return [*(self.names(resource.parent) if resource.parent else []), self.arm(resource.body["name"])]

    def id(self, resource: Resource) -> str:
        """Return the id of a resource as an expression."""
        named = ", ".join([f"'{resource.type}'", *self.names(resource)])
        if resource.scope:
            return f"extensionResourceId({self.id(resource.scope)}, {named})"
        return f"resourceId({named})"

    def full_name(self, resource: Resource) -> Any:
        """Return the name of a resource as it is in a template."""
        if resource.parent is None:
            return self.json(resource.body["name"])
        names = self.names(resource)
        places = "/".join(f"{{{i}}}" for i in range(len(names)))
        return f"[format('{places}', {', '.join(names)})]"

    def mentioned(self, node: Node, seen: frozenset[str] = frozenset()) -> set[str]:
        """Return the resources that an expression mentions, itself or through variables."""
        if node.type == "identifier":
            name = self.text(node)
            if name in self.resources:
                return {name}
            if name in self.variables and name not in seen:
                return self.mentioned(self.variables[name].named_children[-1], seen | {name})
            return set()
        # The key of an object and the name of a property are no symbols.
        children = (
            node.named_children[1:]
            if node.type == "object_property" and node.named_children[0].type != "string"
            else node.named_children
        )
        return {name for child in children for name in self.mentioned(child, seen)}

    def template_resource(self, resource: Resource) -> dict[str, Any]:
        """Return a resource as it is in a template."""
        found: dict[str, Any] = {}
        if resource.condition is not None:
            found["condition"] = self.json(resource.condition)
        found |= {"type": resource.type, "apiVersion": resource.api_version, "name": self.full_name(resource)}
        if resource.scope:
            found["scope"] = f"[format('{resource.scope.type}/{{0}}', {', '.join(self.names(resource.scope))})]"
        for key, value in resource.body.items():
            if key not in ("name", "parent", "scope", "dependsOn"):
                found[key] = self.json(value)
        needed = {name for value in resource.body.values() for name in self.mentioned(value)}
        if "dependsOn" in resource.body:
            self.used |= self.mentioned(resource.body["dependsOn"])
        ids = [
            f"[{self.id(self.resources[name])}]"
            for name in self.resources
            if name in needed and not self.resources[name].existing
        ]
        return found | ({"dependsOn": ids} if ids else {})

    # ---- the whole

    def template_parameter(self, name: str, node: Node) -> dict[str, Any]:
        """Return a parameter as it is in a template."""
        kind, decorators = self.text(node.named_children[1]), self.decorators[name]
        found: dict[str, Any] = {"type": f"secure{kind}" if "secure" in decorators else kind}
        if len(node.named_children) > 2:
            found["defaultValue"] = self.json(node.named_children[2])
        for decorator, value in decorators.items():
            if decorator in CONSTRAINTS and value is not None:
                found[decorator] = self.json(value)
            elif decorator == "allowed" and value is not None:
                found["allowedValues"] = self.json(value)
            elif decorator == "description" and value is not None:
                found["metadata"] = {"description": self.plain(value)}
            elif decorator != "secure":
                raise self.error(node, f"not known here: @{decorator}()")
        return found

    def template(self) -> dict[str, Any]:
        """Return the ARM template. Raises BicepError."""
        found = {
            "$schema": "https://schema.management.azure.com/schemas/2019-04-01/deploymentTemplate.json#",
            "contentVersion": "1.0.0.0",
            "metadata": {"_generator": {"name": "bicep", "version": "0.39.26", "templateHash": "0"}},
            "parameters": {name: self.template_parameter(name, node) for name, node in self.parameters.items()},
            "variables": {name: self.json(node.named_children[-1]) for name, node in self.variables.items()},
            "resources": [self.template_resource(one) for one in self.resources.values() if not one.existing],
            "outputs": {
                name: {"type": self.text(node.named_children[1]), "value": self.json(node.named_children[2])}
                for name, node in self.outputs.items()
            },
        }
        for kind, part in (
            ("variables", found["variables"]),
            ("resources", found["resources"]),
            ("outputs", found["outputs"]),
        ):
            for function in ONLY_DEFAULTS:
                if f"{function}(" in json.dumps(part):
                    raise BicepError(
                        f"{self.file}(1,1) : Error: {function}() is in {kind}; only a parameter's default may call it"
                    )
        return found

    def warnings(self) -> list[str]:
        """Return what the compiler's linter would say of names that nothing uses; for after template()."""
        declared = [*self.parameters, *self.variables, *(name for name, one in self.resources.items() if one.existing)]
        return [
            f"{self.file}(1,1) : Warning no-unused: {name} is declared but never used"
            for name in declared
            if name not in self.used
        ]


def main(arguments: list[str]) -> int:
    """Do what az asks of `bicep`. Returns the exit status."""
    if "--version" in arguments:
        print(VERSION)
        return 0
    files = [Path(argument) for argument in arguments[1:] if argument.endswith(".bicep")]
    if arguments[:1] not in (["build"], ["lint"]) or len(files) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        bicep = Bicep.read(files[0])
        template = bicep.template()
    except BicepError as error:
        print(error, file=sys.stderr)
        return 1
    for warning in bicep.warnings():
        print(warning, file=sys.stderr)
    if arguments[0] == "build":
        text = json.dumps(template, indent=2)
        if "--stdout" in arguments:
            print(text)
        else:
            files[0].with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
