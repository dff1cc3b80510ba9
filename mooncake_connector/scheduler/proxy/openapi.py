"""An HTTP API and its OpenAPI description, both from the same table."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from mooncake_connector.scheduler.proxy.errors import Handler
from mooncake_connector.scheduler.proxy.schema import components

REFERENCE = "#/components/schemas/{name}"


class Answer(msgspec.Struct, frozen=True):
    """One kind of answer: when it comes, and what its JSON body is (None: any object)."""

    when: str
    body: type[msgspec.Struct] | None = None


class Operation(msgspec.Struct, frozen=True):
    """One method of one path.

    Attributes:
        name: its ``operationId``.
        summary: what it does, in a sentence.
        body: what its JSON body is; None: it has none.
        answers: by status.
    """

    method: str
    path: str
    name: str
    summary: str
    handler: Handler
    answers: Mapping[int, Answer]
    body: type[msgspec.Struct] | None = None


def describe(title: str, version: str, about: str, operations: Sequence[Operation]) -> dict[str, Any]:
    """An OpenAPI 3.1 document of operations that all need a key, given as ``Authorization: Bearer KEY``."""
    structs: list[type[msgspec.Struct]] = []
    paths: dict[str, dict[str, Any]] = {}
    for each in operations:
        held = [each.body, *(answer.body for answer in each.answers.values())]
        structs += [struct for struct in held if struct and struct not in structs]
        found: dict[str, Any] = {
            "operationId": each.name,
            "summary": each.summary,
            "responses": {str(status): _answer(answer) for status, answer in each.answers.items()},
        }
        if each.body:
            found["requestBody"] = {"required": True, "content": _content(each.body)}
        paths.setdefault(each.path, {})[each.method.lower()] = found
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "description": about},
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": components(structs, REFERENCE),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _answer(answer: Answer) -> dict[str, Any]:
    return {"description": answer.when, "content": _content(answer.body)}


def _content(struct: type[msgspec.Struct] | None) -> dict[str, Any]:
    schema = {"$ref": REFERENCE.format(name=struct.__name__)} if struct else {"type": "object"}
    return {"application/json": {"schema": schema}}
