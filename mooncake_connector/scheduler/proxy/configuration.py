"""Where settings come from: command line, MOONCAKE_PROXY_* environment, file, default; the first counts."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import msgspec

from mooncake_connector.errors import ConfigError
from mooncake_connector.scheduler.proxy.settings import (
    DERIVED,
    LISTS,
    PREFIX,
    SHORT,
    ProxySettings,
    spelled,
)

NAMES = tuple(name for name in ProxySettings.__struct_fields__ if name not in DERIVED)
# What is wrong with them is said without saying what they are.
SECRET = ("classes", "engine_api_key", "admin_keys")


def load(options: Mapping[str, Any], environ: Mapping[str, str]) -> ProxySettings:
    """Settings from parsed options (None: not given) over the environment over a file.

    The file is the option ``config`` or ``MOONCAKE_PROXY_CONFIG``: YAML, `ProxySettings`'s fields at its top.

    Raises:
        ConfigError: a value is missing, unknown or out of range, or the file can't be read.
    """
    given = {name: value for name, value in options.items() if value is not None}
    path = given.pop("config", None) or environ.get(f"{PREFIX}CONFIG", "")
    values = _read(str(path)) if path else {}
    for name in (*NAMES, *SHORT):
        found = environ.get(PREFIX + name.upper())
        if found is not None:
            values[name] = [item for item in found.split(",") if item] if name in LISTS else found
    values |= given
    for name in ("prefill", "decode"):
        urls = values.get(name, ())
        values[name] = [str(url).strip().rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]
    for name in values:
        if name not in NAMES and name not in SHORT:
            near = difflib.get_close_matches(str(name), [*NAMES, *SHORT], 1)
            mend = f": did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown proxy setting {name!r}{mend}")
    _unfold(values)
    for name, value in values.items():
        try:
            values[name] = msgspec.convert(value, _types()[name], strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(_explained(name, value, str(error))) from None
    return ProxySettings(**values)


def _read(path: str) -> dict[str, Any]:
    try:
        found = msgspec.yaml.decode(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"--config ({PREFIX}CONFIG): can't read {path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"--config ({PREFIX}CONFIG): {path} is no YAML: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(
            f"--config ({PREFIX}CONFIG): {path} must be a mapping: one setting a line, `port: 8000`"
        )
    return found


def _unfold(values: dict[str, Any]) -> None:
    """Move what has a short option to its place in `scheduling`, and note which SLOs were given."""
    scheduling = values["scheduling"] = values.get("scheduling") or {}
    if not isinstance(scheduling, dict):
        raise ConfigError(
            f"scheduling can't be {scheduling!r}: give it settings of its own, `routing: conductor`"
        )
    for name, (key, *rest) in SHORT.items():
        if name not in values:
            continue
        value = values.pop(name)
        if not rest:
            scheduling[key] = value
            continue
        inner = scheduling[key] = scheduling.get(key) or {}
        if isinstance(inner, dict):
            inner[rest[0]] = value
    slo = scheduling.get("slo")
    values["fixed_slo"] = [name for name in ("ttft", "tbt") if isinstance(slo, dict) and name in slo]


def _types() -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(ProxySettings)}


def _explained(name: str, value: Any, error: str) -> str:
    """What msgspec says of a value, with the whole way to it, and with the choices if there are some."""
    said, _, at = error.partition(" - at `$")
    # It does not name the keys of a mapping.
    keys = [key for key in at.rstrip("`").replace("[...]", ".*").split(".") if key]
    kind: Any = _types()[name]
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
        fields = (
            {field.name: field.type for field in msgspec.structs.fields(kind)} if _is_struct(kind) else {}
        )
        kind = fields.get(key)
    choices = [choice for choice in get_args(kind) if isinstance(choice, str)]
    mend = f"choose {' or '.join(choices)}" if choices else said
    wrong = "is wrong" if value is None or name in SECRET else f"can't be {value!r}"
    return f"{spelled('.'.join((name, *keys)))} {wrong}: {mend}"


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)
