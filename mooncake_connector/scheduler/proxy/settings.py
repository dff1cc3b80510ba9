"""Every setting of the proxy: command line, MOONCAKE_PROXY_* environment, file, default; the first counts."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args
from urllib.parse import urlsplit

import msgspec

from mooncake_connector.errors import ConfigError
from mooncake_connector.scheduler.policy.scheduling import Scheduling

PREFIX = "MOONCAKE_PROXY_"
_sha256 = re.compile("[0-9a-f]{64}")
LISTS = ("prefill", "decode")
# Options that are a shorter way to set something in the section `scheduling`.
SHORT = {
    "routing": ("routing",),
    "admission": ("admission",),
    "min_prefill_tokens": ("min_prefill_tokens",),
    "slo_ttft": ("slo", "ttft"),
    "slo_tbt": ("slo", "tbt"),
}


class ServiceClass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Clients that are treated alike; `Scheduling.slos` may promise them something of their own.

    Attributes:
        api_keys: SHA-256 of their API keys, in hexadecimal (``printf %s KEY | sha256sum``).
        priority: of their requests that do not say ``x-priority``.
        max_priority: the most that their ``x-priority`` may be; none: whatever they say.
    """

    api_keys: tuple[str, ...] = ()
    priority: int = 0
    max_priority: int | None = None


class ProxySettings(msgspec.Struct, frozen=True, kw_only=True):
    """What `mooncake-connector proxy` runs with.

    Attributes:
        prefill: base URLs of the prefill engines, without ``/v1``.
        decode: base URLs of the decode engines.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        order: ``concurrent`` sends to prefill and decode at once; ``serial`` hands P's answer to D.
        first_token: ``decode`` sends it, or ``prefill`` where that is exact: earlier by the hand-over.
        max_retries: further decode attempts while nothing was streamed.
        max_body_mib: largest request body, MiB.
        check_seconds: pause between two ``GET /health`` of one engine.
        probe_seconds: pause between two one-token probes of an idle engine.
        probe_timeout: how long a probe may take, seconds.
        connect_timeout: how long a TCP connect to an engine may take, seconds.
        drain_seconds: how long running answers may take after SIGTERM.
        engine_api_key: sent with the proxy's own probes, for engines started with ``--api-key``.
        log_level: ``debug``, ``info``, ``warning`` or ``error``.
        tokenizer: folder of the model's tokenizer; empty: the engines' model, if it is a folder here.
        tenant_header: whose value names the tenant; empty: the API key does. Only for a gateway in front
            that sets it: clients could claim to be anybody.
        scheduling: who serves a request, and who is let in.
        fixed_slo: which of ``ttft`` and ``tbt`` in `scheduling.slo` are promised as they are; the others are
            the least that is promised, on slow engines it is more.
        classes: service classes by name; what no API key tells is of none.
    """

    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    order: Literal["concurrent", "serial"] = "concurrent"
    first_token: Literal["decode", "prefill"] = "decode"
    max_retries: int = 2
    max_body_mib: int = 64
    check_seconds: float = 2.0
    probe_seconds: float = 30.0
    probe_timeout: float = 30.0
    connect_timeout: float = 5.0
    drain_seconds: float = 30.0
    engine_api_key: str = ""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    tokenizer: str = ""
    tenant_header: str = ""
    scheduling: Scheduling = Scheduling()
    fixed_slo: tuple[Literal["ttft", "tbt"], ...] = ()
    classes: dict[str, ServiceClass] = {}

    def __post_init__(self) -> None:
        for name in LISTS:
            urls: tuple[str, ...] = getattr(self, name)
            if not urls:
                raise ConfigError(
                    f"{_spelled(name)} is missing: name at least one {name} engine, "
                    f"such as --{name} http://127.0.0.1:8100"
                )
            for url in urls:
                _check_url(name, url)
            twice = sorted({url for url in urls if urls.count(url) > 1})
            if twice:
                raise ConfigError(
                    f"{_spelled(name)} names {', '.join(twice)} more than once: name each engine once"
                )
        both = sorted(set(self.prefill) & set(self.decode))
        if both:
            raise ConfigError(
                f"{', '.join(both)} is both --prefill and --decode: an engine can't push to itself; "
                "put it in one pool"
            )
        _check_range("port", self.port, 0, 65535)
        _check_range("max_retries", self.max_retries, 0, 10)
        _check_range("max_body_mib", self.max_body_mib, 1, 4096)
        for name in ("check_seconds", "probe_seconds", "probe_timeout", "connect_timeout"):
            _check_range(name, getattr(self, name), 0.01, None)
        _check_range("drain_seconds", self.drain_seconds, 0, None)
        _check_scheduling(self.scheduling, self.classes)

    @classmethod
    def load(cls, options: Mapping[str, Any], environ: Mapping[str, str]) -> Self:
        """Settings from parsed options (None: not given) over the environment over a file.

        The file is the option ``config`` or ``MOONCAKE_PROXY_CONFIG``: YAML, this struct's fields at its top.

        Raises:
            ConfigError: a value is missing, unknown or out of range, or the file can't be read.
        """
        given = {name: value for name, value in options.items() if value is not None}
        path = given.pop("config", None) or environ.get(f"{PREFIX}CONFIG", "")
        values = _read(str(path)) if path else {}
        for name in (*cls.__struct_fields__, *SHORT):
            spelled = environ.get(PREFIX + name.upper())
            if spelled is not None:
                values[name] = [item for item in spelled.split(",") if item] if name in LISTS else spelled
        values |= given
        for name in LISTS:
            urls = values.get(name, ())
            values[name] = [
                str(url).strip().rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)
            ]
        _unfold(values)
        for name in values:
            if name not in cls.__struct_fields__:
                near = difflib.get_close_matches(name, [*cls.__struct_fields__, *SHORT], 1)
                mend = f": did you mean {near[0]}?" if near else ""
                raise ConfigError(f"unknown proxy setting {name!r}{mend}")
        for name, value in values.items():
            try:
                values[name] = msgspec.convert(value, _types()[name], strict=False)
            except msgspec.ValidationError as error:
                raise ConfigError(_explained(name, value, str(error))) from None
        return cls(**values)


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


def _spelled(name: str) -> str:
    """A setting as the user can give it: by option and variable, or in the file alone."""
    for short, path in SHORT.items():
        if name == ".".join(("scheduling", *path)):
            name = short
    if "." in name or name in ("scheduling", "classes"):
        return f"{name} in --config"
    return f"--{name.replace('_', '-')} ({PREFIX}{name.upper()})"


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
    wrong = "is wrong" if value is None else f"can't be {value!r}"
    return f"{_spelled('.'.join((name, *keys)))} {wrong}: {mend}"


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _check_scheduling(settings: Scheduling, classes: Mapping[str, ServiceClass]) -> None:
    _check_range("scheduling.min_prefill_tokens", settings.min_prefill_tokens, 0, None)
    _check_range("scheduling.replication_threshold", settings.replication_threshold, 1, None)
    for name in ("emergency_seconds", "emergency_kv"):
        _check_range(f"scheduling.{name}", getattr(settings, name), 0.01, None)
    promised = {"slo": settings.slo} | {f"slos[{at}].slo": rule.slo for at, rule in enumerate(settings.slos)}
    for where, slo in promised.items():
        _check_range(f"scheduling.{where}.ttft", slo.ttft, 0.001, None)
        _check_range(f"scheduling.{where}.ttft_per_1k_tokens", slo.ttft_per_1k_tokens, 0, None)
        _check_range(f"scheduling.{where}.tbt", slo.tbt, 0.0001, None)
    for at, rule in enumerate(settings.slos):
        if rule.service_class and rule.service_class not in classes:
            raise ConfigError(
                f"scheduling.slos[{at}].service_class in --config names {rule.service_class!r}: "
                "define it under classes, with the api_keys that belong to it"
            )
    for name, found in classes.items():
        for key in found.api_keys:
            if not _sha256.fullmatch(key):
                raise ConfigError(
                    f"classes.{name}.api_keys in --config has {key!r}: give the key's SHA-256 in lower-case "
                    "hexadecimal, printf %s KEY | sha256sum"
                )


def _check_range(name: str, value: float, low: float, high: float | None) -> None:
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{_spelled(name)} is {value}: it must be {span}")


def _check_url(name: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
    if not fine or parts.query or parts.fragment:
        raise ConfigError(f"{_spelled(name)}: {url!r} is no engine URL; write it as http://HOST:PORT")
    if parts.path.rstrip("/").endswith("/v1"):
        raise ConfigError(f"{_spelled(name)}: leave /v1 out of {url!r}; the proxy adds the path itself")
