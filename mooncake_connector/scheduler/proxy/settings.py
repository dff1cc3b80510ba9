"""Every setting of the proxy, its default, and what it may be."""

import re
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from mooncake_connector.errors import ConfigError
from mooncake_connector.scheduler.policy.base import Slo
from mooncake_connector.scheduler.policy.scheduling import Scheduling

PREFIX = "MOONCAKE_PROXY_"
LISTS = ("prefill", "decode", "admin_keys")
# Options that are a shorter way to set something in the section `scheduling`.
SHORT = {
    "routing": ("routing",),
    "admission": ("admission",),
    "min_prefill_tokens": ("min_prefill_tokens",),
    "slo_ttft": ("slo", "ttft"),
    "slo_tbt": ("slo", "tbt"),
}
# A command line is there for everybody on the machine to see.
NO_OPTION = ("engine_api_key",)
SECTIONS = ("scheduling", "classes")
# What a reload can change; the rest is the process's for life.
RELOADABLE = frozenset(
    {
        "prefill",
        "decode",
        "tls_cert",
        "tls_key",
        "require_key",
        "admin_keys",
        "max_body_mib",
        "max_header_kib",
        "max_connections",
        "header_seconds",
        "body_seconds",
        "keepalive_seconds",
        "log_level",
        "log_format",
        "access_log",
        "tenant_header",
        "scheduling",
        "classes",
    }
)
# Noted by who reads the settings, not a setting of its own.
DERIVED = ("fixed_slo",)
_sha256 = re.compile("[0-9a-f]{64}")


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
        tls_cert: file with the certificate chain, PEM; clients then speak HTTPS, the admin API's too.
        tls_key: file with the certificate's private key, PEM.
        require_key: only clients with an API key of some class are served; the others get 401.
        admin_keys: SHA-256 of the keys that open the admin API, in hexadecimal; without one there is none.
        admin_host: address that the admin API listens on.
        admin_port: port that the admin API listens on; 0 takes a free one.
        order: ``concurrent`` sends to prefill and decode at once; ``serial`` hands P's answer to D.
        first_token: ``decode`` sends it, or ``prefill`` where that is exact: earlier by the hand-over.
        max_retries: further attempts of a request while nothing was streamed.
        retry_share: further attempts that all requests together may have beyond a reserve of 500, as a share
            of their number: an outage must not become a storm.
        max_body_mib: largest request body, MiB, once it is decompressed.
        max_header_kib: largest request line and largest header line, KiB; of lines there may be 128.
        max_connections: clients' connections at a time; more are told 503 and closed.
        header_seconds: how long a request's headers, or a TLS handshake, may take to come.
        body_seconds: how long a request's body may take to come.
        keepalive_seconds: how long a connection may be idle between two requests.
        check_seconds: pause between two ``GET /health`` of one engine.
        probe_seconds: pause between two one-token probes of an idle engine.
        probe_timeout: how long a probe may take, seconds.
        connect_timeout: how long a TCP connect to an engine may take, seconds.
        prefill_timeout: how long prefill may take to answer, seconds, beside ten times what was predicted.
        first_byte_timeout: how long decode may take to its first byte once prefill is done, seconds, beside
            ten times what was predicted, and a second for each token of an answer that is not streamed.
        chunk_timeout: how long a decode engine may say nothing in the middle of a stream, seconds.
        client_timeout: how long a client may take nothing of its stream, seconds; then it is cut off.
        down_timeout: how long an engine may fail its health checks, seconds, until what waits for it is
            tried on another one, or ended.
        leave_seconds: how long after SIGTERM all is served as before, while ``/health`` says 503 so that load
            balancers leave; SIGINT does without.
        drain_seconds: how long running answers may take after that.
        engine_api_key: for engines started with ``--api-key``: sent with the proxy's own probes, and with
            `require_key` in place of the client's key.
        log_level: ``debug``, ``info``, ``warning`` or ``error``.
        log_format: ``text``, or ``json``: an object a line.
        access_log: whether each request is a line in the log.
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
    tls_cert: str = ""
    tls_key: str = ""
    require_key: bool = False
    admin_keys: tuple[str, ...] = ()
    admin_host: str = "127.0.0.1"
    admin_port: int = 8001
    order: Literal["concurrent", "serial"] = "concurrent"
    first_token: Literal["decode", "prefill"] = "decode"
    max_retries: int = 2
    retry_share: float = 0.2
    max_body_mib: int = 64
    max_header_kib: int = 16
    max_connections: int = 10000
    header_seconds: float = 20.0
    body_seconds: float = 60.0
    keepalive_seconds: float = 75.0
    check_seconds: float = 2.0
    probe_seconds: float = 30.0
    probe_timeout: float = 30.0
    connect_timeout: float = 5.0
    prefill_timeout: float = 300.0
    first_byte_timeout: float = 300.0
    chunk_timeout: float = 300.0
    client_timeout: float = 120.0
    down_timeout: float = 30.0
    leave_seconds: float = 5.0
    drain_seconds: float = 30.0
    engine_api_key: str = ""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    access_log: bool = True
    tokenizer: str = ""
    tenant_header: str = ""
    scheduling: Scheduling = Scheduling()
    fixed_slo: tuple[Literal["ttft", "tbt"], ...] = ()
    classes: dict[str, ServiceClass] = {}

    def __post_init__(self) -> None:
        _check_pools(self)
        _check_ranges("", self)
        _check_ranges("scheduling.", self.scheduling)
        _check_ranges("scheduling.slo.", self.scheduling.slo)
        for at, rule in enumerate(self.scheduling.slos):
            _check_ranges(f"scheduling.slos[{at}].slo.", rule.slo)
        for name, found in self.classes.items():
            _check_ranges(f"classes.{name}.", found)
        _check_classes(self)
        if bool(self.tls_cert) != bool(self.tls_key):
            missing, given = ("tls_cert", "tls_key") if self.tls_key else ("tls_key", "tls_cert")
            raise ConfigError(f"{spelled(missing)} is missing: {spelled(given)} needs it")


class InForce:
    """The settings that count now: a reload puts others in their place."""

    def __init__(self, settings: ProxySettings) -> None:
        self.settings = settings


Range = tuple[float, float | None]
RANGES: Mapping[type[msgspec.Struct], Mapping[str, Range]] = {
    ProxySettings: {
        "port": (0, 65535),
        "admin_port": (0, 65535),
        "max_retries": (0, 10),
        "retry_share": (0, 10),
        "max_body_mib": (1, 4096),
        "max_header_kib": (1, 1024),
        "max_connections": (1, None),
        "header_seconds": (0.01, None),
        "body_seconds": (0.01, None),
        "keepalive_seconds": (0.01, None),
        "check_seconds": (0.01, None),
        "probe_seconds": (0.01, None),
        "probe_timeout": (0.01, None),
        "connect_timeout": (0.01, None),
        "prefill_timeout": (0.01, None),
        "first_byte_timeout": (0.01, None),
        "chunk_timeout": (0.01, None),
        "client_timeout": (0.01, None),
        "down_timeout": (0.01, None),
        "leave_seconds": (0, None),
        "drain_seconds": (0, None),
    },
    Scheduling: {
        "min_prefill_tokens": (0, None),
        "replication_threshold": (1, None),
        "emergency_seconds": (0.01, None),
        "emergency_kv": (0.01, None),
        "reserve": (0, 1),
        "caution": (0, None),
        "favour_cheap": (0, 1),
    },
    Slo: {"ttft": (0.001, None), "ttft_per_1k_tokens": (0, None), "tbt": (0.0001, None)},
    ServiceClass: {"priority": (-1000, 1000), "max_priority": (-1000, 1000)},
}


def spelled(name: str) -> str:
    """A setting as the user can give it: by option and variable, or in the file alone."""
    for short, path in SHORT.items():
        if name == ".".join(("scheduling", *path)):
            name = short
    if "." in name or name in SECTIONS:
        return f"{name} in --config"
    variable = PREFIX + name.upper()
    return variable if name in NO_OPTION else f"--{name.replace('_', '-')} ({variable})"


def _check_pools(settings: ProxySettings) -> None:
    for name in ("prefill", "decode"):
        urls: tuple[str, ...] = getattr(settings, name)
        if not urls:
            raise ConfigError(
                f"{spelled(name)} is missing: name at least one {name} engine, "
                f"such as --{name} http://127.0.0.1:8100"
            )
        for url in urls:
            check_url(spelled(name), url)
        twice = sorted({url for url in urls if urls.count(url) > 1})
        if twice:
            raise ConfigError(
                f"{spelled(name)} names {', '.join(twice)} more than once: name each engine once"
            )
    both = sorted(set(settings.prefill) & set(settings.decode))
    if both:
        raise ConfigError(
            f"{', '.join(both)} is both --prefill and --decode: an engine can't push to itself; "
            "put it in one pool"
        )


def check_url(name: str, url: str) -> None:
    """Whether an engine can be at `url`.

    Raises:
        ConfigError: no; `name` is who said so.
    """
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
    if fine and ("@" in parts.netloc or parts.query or parts.fragment):
        # They may hold a key: they are not repeated.
        raise ConfigError(
            f"{name}: leave user, password, query and fragment out of the engine's URL, http://HOST:PORT; "
            f"a key for the engines goes into {PREFIX}ENGINE_API_KEY"
        )
    if not fine or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"{name}: {url!r} is no engine URL; write it as http://HOST:PORT")
    if parts.path.rstrip("/").endswith("/v1"):
        raise ConfigError(f"{name}: leave /v1 out of {url!r}; the proxy adds the path itself")


def _check_ranges(where: str, found: msgspec.Struct) -> None:
    for name, (low, high) in RANGES[type(found)].items():
        value: Any = getattr(found, name)
        if value is None or (value >= low and (high is None or value <= high)):
            continue
        span = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{spelled(where + name)} is {value}: it must be {span}")


def _check_classes(settings: ProxySettings) -> None:
    # What is no hash may be the key itself: it is not repeated.
    mend = "give the key's SHA-256 in lower-case hexadecimal, printf %s KEY | sha256sum"
    for at, key in enumerate(settings.admin_keys):
        if not _sha256.fullmatch(key):
            raise ConfigError(f"{spelled('admin_keys')}: number {at + 1} is no SHA-256: {mend}")
    owner: dict[str, str] = {}
    for name, found in settings.classes.items():
        for at, key in enumerate(found.api_keys):
            if not _sha256.fullmatch(key):
                raise ConfigError(f"classes.{name}.api_keys[{at}] in --config is no SHA-256: {mend}")
            if owner.setdefault(key, name) != name:
                raise ConfigError(
                    f"classes.{name}.api_keys[{at}] in --config is in classes.{owner[key]}, too: "
                    "a key has one class"
                )
    if settings.require_key and not owner:
        raise ConfigError(
            f"{spelled('require_key')} is on, but no class has a key: put api_keys under classes in --config"
        )
    for at, rule in enumerate(settings.scheduling.slos):
        if rule.service_class and rule.service_class not in settings.classes:
            raise ConfigError(
                f"scheduling.slos[{at}].service_class in --config names {rule.service_class!r}: "
                "define it under classes, with the api_keys that belong to it"
            )
