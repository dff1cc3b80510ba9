"""What a chat template (Jinja) asks for, found in its syntax tree as vLLM does (vllm/renderers/hf.py)."""

import functools
from collections.abc import Iterator
from typing import Any, Literal

Format = Literal["string", "openai"]


@functools.lru_cache(8)
def _parsed(template: str) -> Any:
    from transformers.utils import chat_template_utils

    return chat_template_utils._compile_jinja_template(template).environment.parse(template)


@functools.lru_cache(8)
def variables(template: str) -> frozenset[str]:
    """The names that a template takes from outside."""
    from jinja2 import meta

    return frozenset(meta.find_undeclared_variables(_parsed(template)))


@functools.lru_cache(8)
def content_format(template: str) -> Format:
    """Whether templates get contents as lists of parts (``openai``): those that go through them in a loop."""
    from jinja2 import nodes

    root = _parsed(template)
    messages = {"messages", *_aliases(root, "messages")}
    single = {
        loop.target.name
        for loop in root.find_all(nodes.For)
        if isinstance(loop.target, nodes.Name) and any(_reads(loop.iter, name) for name in messages)
    }
    passed: dict[int, set[str]] = {}
    for macro in root.find_all(nodes.Macro):
        names = _content_parameters(root, macro, single)
        passed |= {id(loop): names for loop in macro.find_all(nodes.For)}
    for loop in root.find_all(nodes.For):
        names = passed.get(id(loop), {"content"})
        if any(_reads(loop.iter, name, "content") for name in single) or (
            isinstance(loop.iter, nodes.Name) and loop.iter.name in names
        ):
            return "openai"
    return "string"


def _aliases(root: Any, name: str) -> Iterator[str]:
    from jinja2 import nodes

    seen, todo = {name}, [name]
    while todo:
        known = todo.pop()
        for assign in root.find_all(nodes.Assign):
            if (
                isinstance(assign.target, nodes.Name)
                and assign.target.name not in seen
                and _reads(assign.node, known)
            ):
                seen.add(assign.target.name)
                todo.append(assign.target.name)
                yield assign.target.name


def _content_parameters(root: Any, macro: Any, single: set[str]) -> set[str]:
    """The macro's parameters that are given a message's content somewhere."""
    from jinja2 import nodes

    found: set[str] = set()
    for call in root.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == macro.name:
            given = [(parameter.name, value) for parameter, value in zip(macro.args, call.args, strict=False)]
            given += [(keyword.key, keyword.value) for keyword in call.kwargs]
            found |= {name for name, value in given if any(_reads(value, one, "content") for one in single)}
    return found


def _reads(node: Any, name: str, key: str = "") -> bool:
    """Whether an expression is that variable, or its `key`, or a filter, a test or a slice of it."""
    from jinja2 import nodes

    if isinstance(node, nodes.Filter | nodes.Test):
        return node.node is not None and _reads(node.node, name, key)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _reads(node.node, name, key)
    if not key:
        return isinstance(node, nodes.Name) and node.name == name and node.ctx == "load"
    if isinstance(node, nodes.Getitem):
        return _reads(node.node, name) and isinstance(node.arg, nodes.Const) and node.arg.value == key
    return isinstance(node, nodes.Getattr) and node.attr == key and _reads(node.node, name)
