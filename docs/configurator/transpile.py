"""Turn the Jinja templates of copier.yml into JavaScript, so that the configurator evaluates the real conditions.

Only what copier.yml uses is known. Anything else stops the build, with the name of the question and of the construct.
What the calls of `$` do is in configurator.js.
"""

from __future__ import annotations

import json
from typing import Any

from jinja2 import Environment, nodes

# Each filter with the number of its arguments and the names of its keywords.
FILTERS = {
    *(("default", 1), ("first", 0), ("format", 1), ("from_yaml", 0), ("int", 0), ("length", 0), ("list", 0)),
    *(("lower", 0), ("map", 0, "attribute"), ("min", 0), ("regex_replace", 2), ("regex_search", 1), ("rejectattr", 1)),
    *(("replace", 2), ("round", 1), ("selectattr", 1), ("selectattr", 3), ("to_json", 0)),
}
COMPARISONS = ("eq", "ne", "lt", "lteq", "gt", "gteq", "in", "notin")
ARITHMETIC = {nodes.Div: "/", nodes.Pow: "**", nodes.Mul: "*"}
METHODS = ("strip",)
ENVIRONMENT = Environment(keep_trailing_newline=True)  # as Copier sets it


class UnknownError(Exception):
    """A construct that has no JavaScript here."""


def function(template: str) -> str:
    """Return a template as a JavaScript function from a context to text; plain text as a JSON string."""
    parsed = ENVIRONMENT.parse(template)
    if not parsed.body:
        return '""'
    if all(isinstance(node, nodes.Output) and is_text(node) for node in parsed.body):
        return quoted(template)
    if all(isinstance(node, nodes.Output) for node in parsed.body):
        return f"c => {' + '.join(text(part) for node in parsed.body for part in node.nodes)}"
    return f"outer => {{ const c = $.scope(outer); let o = ''; {statements(parsed.body)} return o; }}"


def used_names(templates: list[str]) -> set[str]:
    """Return the names of attributes that templates read: what the browser needs of the catalogue."""
    names: set[str] = set()
    for template in templates:
        parsed = ENVIRONMENT.parse(template)
        names |= {node.attr for node in parsed.find_all(nodes.Getattr)}
        names |= {node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, str)}
    return names


def is_text(output: nodes.Output) -> bool:
    """Whether an output is text alone."""
    return all(isinstance(node, nodes.TemplateData) for node in output.nodes)


def text(part: Any) -> str:
    """Return a part of an output as JavaScript that is a string."""
    return quoted(part.data) if isinstance(part, nodes.TemplateData) else f"$.str({expr(part)})"


def quoted(text: str) -> str:
    """Return text as JavaScript, also where it stands in a page."""
    return json.dumps(text).replace("</", "<\\/")


def statements(body: list[Any]) -> str:
    """Return what stands between blocks; the text goes into `o`, the names into `c`."""
    return " ".join(map(statement, body))


def statement(node: Any) -> str:
    """Return one statement."""
    match node:
        case nodes.Output():
            return f"o += {' + '.join(map(text, node.nodes))};"
        case nodes.If():
            branches = [(node.test, node.body), *((branch.test, branch.body) for branch in node.elif_)]
            chain = " else ".join(f"if ($.truth({expr(test)})) {{ {statements(body)} }}" for test, body in branches)
            return f"{chain} else {{ {statements(node.else_)} }}" if node.else_ else chain
        case nodes.Assign(target=nodes.Name()):
            return f"c.{node.target.name} = {expr(node.node)};"
        case nodes.AssignBlock(target=nodes.Name(), filter=None):
            inner = f"(outer => {{ const c = $.scope(outer); let o = ''; {statements(node.body)} return o; }})(c)"
            return f"c.{node.target.name} = {inner};"
        case nodes.For(target=nodes.Name(), test=None, recursive=False):
            loop = f"const c = $.scope(outer); c.{node.target.name} = item; {statements(node.body)}"
            whole = f"for (const item of items) {{ {loop} }}"
            if node.else_:
                whole += f" if (!items.length) {{ const c = outer; {statements(node.else_)} }}"
            return f"{{ const outer = c, items = {expr(node.iter)}; {whole} }}"
        case nodes.Include(template=nodes.Const(), ignore_missing=False):
            return f"o += $.included({quoted(node.template.value)});"
    raise UnknownError(described(node))


def expr(node: Any) -> str:
    """Return one expression."""
    match node:
        case nodes.Const():
            return quoted(node.value) if isinstance(node.value, str) else json.dumps(node.value)
        case nodes.Name():
            return f"c.{node.name}"
        case nodes.List():
            return f"[{', '.join(map(expr, node.items))}]"
        case nodes.Dict():
            return f"{{ {', '.join(f'[{expr(pair.key)}]: {expr(pair.value)}' for pair in node.items)} }}"
        case nodes.CondExpr():
            otherwise = expr(node.expr2) if node.expr2 else "undefined"
            return f"($.truth({expr(node.test)}) ? {expr(node.expr1)} : {otherwise})"
        case nodes.And():
            return f"$.and({expr(node.left)}, () => {expr(node.right)})"
        case nodes.Or():
            return f"$.or({expr(node.left)}, () => {expr(node.right)})"
        case nodes.Not():
            return f"!$.truth({expr(node.node)})"
        case nodes.Compare():
            operands = [node.expr, *(operand.expr for operand in node.ops)]
            pairs = zip(node.ops, operands, operands[1:], strict=False)
            return f"({' && '.join(comparison(operand.op, left, right) for operand, left, right in pairs)})"
        case nodes.Concat():
            return " + ".join(f"$.str({expr(part)})" for part in node.nodes)
        case nodes.Add():
            return f"$.add({expr(node.left)}, {expr(node.right)})"
        case nodes.Div() | nodes.Pow() | nodes.Mul():
            return f"($.number({expr(node.left)}) {ARITHMETIC[type(node)]} $.number({expr(node.right)}))"
        case nodes.Getattr():
            return f"$.get({expr(node.node)}, {quoted(node.attr)})"
        case nodes.Getitem(arg=nodes.Const()):
            return f"$.get({expr(node.node)}, {expr(node.arg)})"
        case nodes.Getitem(arg=nodes.Slice(start=None, step=None)):
            return f"$.head({expr(node.node)}, {expr(node.arg.stop)})"
        case nodes.Call(node=nodes.Getattr(), args=[], kwargs=[], dyn_args=None, dyn_kwargs=None):
            if node.node.attr in METHODS:
                return f"$.{node.node.attr}({expr(node.node.node)})"
        case nodes.Test(name="defined", args=[], node=nodes.Name()):
            return f"(c.{node.node.name} !== undefined)"
        case nodes.Filter(dyn_args=None, dyn_kwargs=None):
            keywords = [pair.key for pair in node.kwargs]
            if node.node and (node.name, len(node.args), *keywords) in FILTERS:
                given = [node.node, *node.args, *(pair.value for pair in node.kwargs)]
                return f"$.{node.name}({', '.join(map(expr, given))})"
    raise UnknownError(described(node))


def comparison(operator: str, left: Any, right: Any) -> str:
    """Return the comparison of two operands; a chain of them is their conjunction, as nothing here has side effects."""
    if operator not in COMPARISONS:
        raise UnknownError(operator)
    return f"$.{operator}({expr(left)}, {expr(right)})"


def described(node: Any) -> str:
    """Name a construct as the author of copier.yml wrote it, as far as it has a name."""
    name = getattr(node, "name", None) or getattr(node, "attr", None)
    return f"{type(node).__name__}{f' {name}' if isinstance(name, str) else ''} in line {node.lineno} of the template"
