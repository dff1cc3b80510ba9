"""JSON schema of structs, each property described as in its struct's docstring; that of the settings file."""

import inspect
import re
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import msgspec

from mooncake_connector.scheduler.proxy.settings import DERIVED, RANGES, SHORT, ProxySettings, ServiceClass

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_attribute = re.compile(r"    ([a-z][a-z_0-9, ]*): (.*)")


def components(structs: Iterable[type[msgspec.Struct]], template: str) -> dict[str, dict[str, Any]]:
    """Schemas of the structs and of those that they hold, by name.

    Args:
        template: of a reference, such as ``#/$defs/{name}``.
    """
    structs = list(structs)
    _, found = msgspec.json.schema_components(structs, ref_template=template)
    for struct in _reached(structs):
        schema = found[struct.__name__]
        text = attributes(struct)
        schema["description"] = _plain(inspect.getdoc(struct) or "").split("\n\n")[0].replace("\n", " ")
        for name, value in schema.get("properties", {}).items():
            if name in text:
                value["description"] = text[name]
            if name in RANGES.get(struct, {}):
                low, high = RANGES[struct][name]
                number = next(each for each in value.get("anyOf", [value]) if each["type"] != "null")
                number["minimum"] = low
                if high is not None:
                    number["maximum"] = high
    return found


def attributes(struct: type[msgspec.Struct]) -> dict[str, str]:
    """What the docstring's section ``Attributes`` says of each field."""
    found: dict[str, str] = {}
    names: list[str] = []
    _, _, section = (inspect.getdoc(struct) or "").partition("Attributes:\n")
    for line in section.splitlines():
        if match := _attribute.fullmatch(line):
            names = [name.strip() for name in match[1].split(",")]
            found |= dict.fromkeys(names, _plain(match[2]))
        elif line.startswith("     "):
            found |= {name: f"{found[name]} {_plain(line.strip())}" for name in names}
        else:
            break
    return found


def settings_schema() -> dict[str, Any]:
    """JSON schema of the file that ``--config`` names. Nothing is required: options can say the rest."""
    defs = components([ProxySettings], "#/$defs/{name}")
    top = defs.pop("ProxySettings")
    properties = top["properties"]
    for name in DERIVED:
        del properties[name]
    for name in ("prefill", "decode"):
        text = properties[name].pop("description")
        properties[name] = {"description": text, "anyOf": [{"type": "string"}, properties[name]]}
    properties["admin_keys"]["items"] = SHA256
    defs[ServiceClass.__name__]["properties"]["api_keys"]["items"] = SHA256
    for name, path in SHORT.items():
        properties[name] = _at(defs, "Scheduling", path)
    del top["required"]
    return {"$schema": DIALECT, **top, "additionalProperties": False, "$defs": defs}


def _at(defs: dict[str, dict[str, Any]], name: str, path: tuple[str, ...]) -> dict[str, Any]:
    """A copy of the property at `path`, which says where else it is."""
    found: dict[str, Any] = defs[name]["properties"][path[0]]
    for key in path[1:]:
        found = defs[found["$ref"].rpartition("/")[2]]["properties"][key]
    return deepcopy(found) | {"description": f"short for scheduling.{'.'.join(path)}"}


def _reached(structs: Iterable[type[msgspec.Struct]]) -> list[type[msgspec.Struct]]:
    """The structs and those in their fields, whatever these are wrapped in."""
    found: list[type[msgspec.Struct]] = []

    def visit(kind: Any) -> None:
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            if kind not in found:
                found.append(kind)
                for field in msgspec.structs.fields(kind):
                    visit(field.type)
            return
        for inner in getattr(kind, "__args__", ()):
            visit(inner)

    for struct in structs:
        visit(struct)
    return found


def _plain(text: str) -> str:
    return text.replace("``", "`")
