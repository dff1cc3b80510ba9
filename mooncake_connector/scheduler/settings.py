"""Every setting of the proxy: command line first, then MOONCAKE_PROXY_* environment, then the default."""

from collections.abc import Mapping
from typing import Any, Literal, Self, get_args
from urllib.parse import urlsplit

import msgspec

from mooncake_connector.errors import ConfigError

PREFIX = "MOONCAKE_PROXY_"
LISTS = ("prefill", "decode")


class ProxySettings(msgspec.Struct, frozen=True, kw_only=True):
    """What `mooncake-connector proxy` runs with.

    Attributes:
        prefill: base URLs of the prefill engines, without ``/v1``.
        decode: base URLs of the decode engines.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        order: ``concurrent`` sends to prefill and decode at once; ``serial`` hands P's answer to D.
        first_token: ``decode`` sends it, or ``prefill`` where that is exact: earlier by the hand-over.
        min_prefill_tokens: prompts estimated shorter than this go to decode alone; 0 sends none that way.
        max_retries: further decode attempts while nothing was streamed.
        max_body_mib: largest request body, MiB.
        check_seconds: pause between two ``GET /health`` of one engine.
        probe_seconds: pause between two one-token probes of an idle engine.
        probe_timeout: how long a probe may take, seconds.
        connect_timeout: how long a TCP connect to an engine may take, seconds.
        drain_seconds: how long running answers may take after SIGTERM.
        engine_api_key: sent with the proxy's own probes, for engines started with ``--api-key``.
        log_level: ``debug``, ``info``, ``warning`` or ``error``.
    """

    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    order: Literal["concurrent", "serial"] = "concurrent"
    first_token: Literal["decode", "prefill"] = "decode"
    min_prefill_tokens: int = 0
    max_retries: int = 2
    max_body_mib: int = 64
    check_seconds: float = 2.0
    probe_seconds: float = 30.0
    probe_timeout: float = 30.0
    connect_timeout: float = 5.0
    drain_seconds: float = 30.0
    engine_api_key: str = ""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

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
        _check_range("min_prefill_tokens", self.min_prefill_tokens, 0, None)
        _check_range("max_retries", self.max_retries, 0, 10)
        _check_range("max_body_mib", self.max_body_mib, 1, 4096)
        for name in ("check_seconds", "probe_seconds", "probe_timeout", "connect_timeout"):
            _check_range(name, getattr(self, name), 0.01, None)
        _check_range("drain_seconds", self.drain_seconds, 0, None)

    @classmethod
    def load(cls, options: Mapping[str, Any], environ: Mapping[str, str]) -> Self:
        """Settings from parsed options (None: not given) over the environment.

        Raises:
            ConfigError: a value is missing, unknown or out of range.
        """
        values: dict[str, Any] = dict.fromkeys(LISTS, ())
        for name in cls.__struct_fields__:
            spelled = environ.get(PREFIX + name.upper())
            if spelled is not None:
                values[name] = [item for item in spelled.split(",") if item] if name in LISTS else spelled
        values |= {name: value for name, value in options.items() if value is not None}
        for name in LISTS:
            values[name] = [str(url).strip().rstrip("/") for url in values[name]]
        for name in values:
            if name not in cls.__struct_fields__:
                raise ConfigError(f"unknown proxy setting {name!r}")
        for name, value in values.items():
            try:
                values[name] = msgspec.convert(value, _types()[name], strict=False)
            except msgspec.ValidationError as error:
                choices = [choice for choice in get_args(_types()[name]) if isinstance(choice, str)]
                mend = f"choose {' or '.join(choices)}" if choices else error
                raise ConfigError(f"{_spelled(name)} can't be {value!r}: {mend}") from None
        return cls(**values)


def _types() -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(ProxySettings)}


def _spelled(name: str) -> str:
    return f"--{name.replace('_', '-')} ({PREFIX}{name.upper()})"


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
