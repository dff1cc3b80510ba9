"""Writes docs/proxy-settings.md from the structs that hold the proxy's settings. With --print: to stdout."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mooncake_connector.scheduler.proxy.schema import settings_schema
from mooncake_connector.scheduler.proxy.settings import NO_OPTION, PREFIX, RELOADABLE, SECTIONS, SHORT

DOCUMENT = Path(__file__).parent.parent / "docs" / "proxy-settings.md"
NO_OPTIONS = ", ".join(f"`{name}`" for name in NO_OPTION)
HEAD = f"""# Settings of the proxy

Made from the code by `scripts/proxy_settings.py`; docs/proxy.md tells how they work together.

A setting `name` is an option `--name` (with `-` for `_`), a variable `{PREFIX}NAME` (lists
comma-separated), and a key of the YAML file that `--config` or `{PREFIX}CONFIG` names; the first of
these counts. No option: {NO_OPTIONS}.
`mooncake-connector proxy --schema` prints the file's JSON schema. An editor that knows YAML's language
server checks the file with `# yaml-language-server: $schema=FILE` in its first line.

"Reload" says whether the proxy takes a new value while it runs (docs/proxy.md).
"""


def main() -> None:
    """Write the document, or print it."""
    text = document()
    if "--print" in sys.argv[1:]:
        sys.stdout.write(text)
    else:
        DOCUMENT.write_text(text)


def document() -> str:
    """The whole document, Markdown."""
    schema = settings_schema()
    lines = [HEAD]
    lines += ["## At the top", "", *_table(schema["properties"], _reload)]
    defs = schema["$defs"]
    sections = [
        ("scheduling", "Scheduling"),
        ("scheduling.slo", "Slo"),
        ("scheduling.slos[]", "SloRule"),
        ("classes.NAME", "ServiceClass"),
    ]
    for where, name in sections:
        lines += ["", f"## `{where}`", "", defs[name]["description"], "", *_table(defs[name]["properties"])]
    return "\n".join(lines) + "\n"


def _table(properties: dict[str, Any], reload: Callable[[str], str] | None = None) -> list[str]:
    columns = ["key", "type", "default", "what", *(["reload"] if reload else [])]
    rows = [columns, ["---"] * len(columns)]
    for name, value in properties.items():
        row = [f"`{name}`", _kind(value), _default(name, value), value["description"].rstrip(".")]
        rows.append([*row, reload(name)] if reload else row)
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def _reload(name: str) -> str:
    return "yes" if name in RELOADABLE or name in SHORT else "no"


def _kind(value: dict[str, Any]) -> str:
    if "$ref" in value or "allOf" in value:
        return "section"
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_kind(each) for each in value["anyOf"] if each["type"] != "null"))
    if "enum" in value:
        return ", ".join(f"`{each}`" for each in value["enum"])
    if value["type"] == "array":
        items = value["items"]
        return "list of " + (
            "sections" if "$ref" in items else "SHA-256" if "pattern" in items else "strings"
        )
    if value["type"] == "object":
        return "sections by name"
    return value["type"] + _span(value)


def _span(value: dict[str, Any]) -> str:
    if "minimum" not in value:
        return ""
    low, high = f"{value['minimum']:g}", value.get("maximum")
    return f", {low} to {high:g}" if high is not None else f", at least {low}"


def _default(name: str, value: dict[str, Any]) -> str:
    if name in SECTIONS or "$ref" in value:
        return "below"
    if value.get("default") in (None, (), [], ""):
        return ""
    return f"`{json.dumps(value['default'])}`"


if __name__ == "__main__":
    main()
