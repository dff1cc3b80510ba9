"""Settings of transfer engine and connector, from ``kv_connector_extra_config`` and ``MOONCAKE_*`` variables.

The environment overrides the configuration, so that one container can be pinned without editing a shared
manifest.
"""

import os
from collections.abc import Mapping
from typing import Any, get_type_hints

import msgspec

from mooncake_connector.errors import ConfigError

ENV_PREFIX = "MOONCAKE_"

PATHS = ("cuda_ipc", "process_vm", "rdma", "tcp")
"""Ways for the bytes, the preferred first."""


CUDA_COPIES = ("auto", "kernel", "copy_engine")


class TransferConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of one transfer engine.

    Attributes:
        path: ``auto`` takes every way that both sides have, the preferred first: on one host cuda_ipc for
            GPU memory and process_vm for the host's, rdma where both have a NIC, tcp always. A name, or
            several with commas, in order of preference, takes only these.
        connections: TCP connections per peer; writes are striped over them.
        checksum: verify every slice that comes by tcp or process_vm at the target.
        rdma_devices: names or patterns of the NICs to use, with commas (``mlx5_*``); empty: all.
        rdma_gid_index: of the GID table; -1 chooses (RoCE v2 over IPv4 preferred).
        rdma_qps: queue pairs per pair of NICs.
        cuda_sms: multiprocessors that cuda_ipc takes from the model while it copies scattered pages.
        cuda_copy: ``auto`` leaves long ranges to copy engines; ``kernel`` and ``copy_engine`` force one.
        topology: JSON file of preferred and secondary NICs per memory location; empty: by distance.
    """

    path: str = "auto"
    connections: int = 2
    checksum: bool = False
    rdma_devices: str = ""
    rdma_gid_index: int = -1
    rdma_qps: int = 2
    cuda_sms: int = 12
    cuda_copy: str = "auto"
    topology: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.connections <= 16:
            raise ConfigError(f"connections must be 1 to 16, got {self.connections}")
        if not 1 <= self.rdma_qps <= 16:
            raise ConfigError(f"rdma_qps must be 1 to 16, got {self.rdma_qps}")
        if not 1 <= self.cuda_sms <= 64:
            raise ConfigError(f"cuda_sms must be 1 to 64, got {self.cuda_sms}")
        if self.cuda_copy not in CUDA_COPIES:
            raise ConfigError(f"cuda_copy={self.cuda_copy!r}: choose one of {', '.join(CUDA_COPIES)}")
        unknown = [name for name in self.paths if name not in PATHS]
        if unknown or not self.paths or len(set(self.paths)) < len(self.paths):
            raise ConfigError(
                f"path={self.path!r}: choose auto, or some of {', '.join(PATHS)} with commas between them"
            )

    @property
    def paths(self) -> tuple[str, ...]:
        """The ways to take, the preferred first."""
        return PATHS if self.path == "auto" else tuple(name.strip() for name in self.path.split(","))


class ConnectorConfig(TransferConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of one engine's connector, those of its transfer engine included.

    Attributes:
        side_channel_host: address the control and data sockets bind to and are announced with. The default
            serves engines of one host; across hosts give an address that the peers can reach.
        side_channel_port: 0 binds ephemeral ports, which the probe announces. Otherwise rank r's control
            socket binds ``port + 2r`` and its data socket ``port + 2r + 1``.
        lease_s: how long prefill keeps a finished request's KV for a decode side it does not hear from [s].
        heartbeat_s: how often decode renews the leases it lives on [s].
        peer_timeout_s: a peer that owes an answer and stays silent this long is given up [s].
        load_timeout_s: decode's deadline for a whole load; then it recomputes [s].
        match_timeout_s: how long prefill keeps a reservation for a request it never received [s].
        handshake_timeout_s: deadline for reaching a prefill engine and agreeing with it [s].
        push_bytes: while a step runs, push as soon as this much of a request's KV is ready; what is left goes
            with the step's last layer. Small pieces cost the forward pass more than they save. 0 chooses by
            the memory: 1 MiB in host memory, 64 MiB on GPUs; 1 pushes every layer by itself.
    """

    side_channel_host: str = "127.0.0.1"
    side_channel_port: int = 0
    lease_s: float = 30.0
    heartbeat_s: float = 5.0
    peer_timeout_s: float = 12.0
    load_timeout_s: float = 120.0
    match_timeout_s: float = 5.0
    handshake_timeout_s: float = 3.0
    push_bytes: int = 0

    def __post_init__(self) -> None:
        TransferConfig.__post_init__(self)
        if self.side_channel_host in ("", "*", "0.0.0.0", "::"):
            raise ConfigError(
                f"side_channel_host={self.side_channel_host!r} is no address that peers could connect to: "
                "give this host's own address"
            )
        if not 0 <= self.side_channel_port <= 65000:
            raise ConfigError(
                f"side_channel_port must be 0 (ephemeral) to 65000, got {self.side_channel_port}"
            )
        if self.push_bytes < 0:
            raise ConfigError(f"push_bytes must be 0 (automatic) or more, got {self.push_bytes}")
        for name in ("lease_s", "heartbeat_s", "peer_timeout_s", "load_timeout_s", "match_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.handshake_timeout_s <= 0:
            raise ConfigError(f"handshake_timeout_s must be positive, got {self.handshake_timeout_s}")
        if self.lease_s < 2 * self.heartbeat_s:
            raise ConfigError(
                f"lease_s ({self.lease_s}) must be at least twice heartbeat_s ({self.heartbeat_s}): one lost "
                "heartbeat would drop live KV; raise lease_s or lower heartbeat_s"
            )


def load_connector_config(
    extra: Mapping[str, Any] | None, environ: Mapping[str, str] | None = None
) -> ConnectorConfig:
    """Merge ``kv_connector_extra_config`` with ``MOONCAKE_*`` variables (which win).

    Raises:
        ConfigError: an unknown key, a wrong type or a value out of range.
    """
    environ = os.environ if environ is None else environ
    values = dict(extra or {})
    hints = get_type_hints(ConnectorConfig)
    for name in ConnectorConfig.__struct_fields__:
        if (raw := environ.get(ENV_PREFIX + name.upper())) is not None:
            values[name] = _parse(name, raw, hints[name])
    unknown = sorted(set(values) - set(ConnectorConfig.__struct_fields__))
    if unknown:
        raise ConfigError(
            f"unknown setting {unknown[0]!r} in kv_connector_extra_config; "
            f"known: {', '.join(ConnectorConfig.__struct_fields__)}"
        )
    try:
        return msgspec.convert(values, ConnectorConfig)
    except msgspec.ValidationError as e:
        raise ConfigError(f"kv_connector_extra_config: {e}") from e


def _parse(name: str, raw: str, hint: Any) -> Any:
    if hint is str:
        return raw
    if hint is bool:
        if raw.lower() not in ("0", "1", "false", "true"):
            raise ConfigError(f"{ENV_PREFIX}{name.upper()}={raw!r}: choose true or false")
        return raw.lower() in ("1", "true")
    try:
        return hint(raw)
    except ValueError:
        raise ConfigError(f"{ENV_PREFIX}{name.upper()}={raw!r} is not a number") from None
