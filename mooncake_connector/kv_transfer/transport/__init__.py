"""Transports: how bytes get from an initiator's memory into a target's. `base` has the contract."""

from collections.abc import Callable

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.transport.base import Endpoint, Landed, Link, SourceIdentity, Target
from mooncake_connector.kv_transfer.transport.link import StreamLink
from mooncake_connector.kv_transfer.transport.process_vm import allow_reader, identity, readable
from mooncake_connector.kv_transfer.transport.receiver import Receiver

PATHS = ("process_vm", "tcp")
"""Names of all paths, the preferred first."""

__all__ = [
    "PATHS",
    "Endpoint",
    "Landed",
    "Link",
    "Receiver",
    "SourceIdentity",
    "Target",
    "allow_reader",
    "identity",
    "open_link",
    "readable",
]


def open_link(
    path: str, endpoint: Endpoint, *, name: str, connections: int = 2, on_down: Callable[[str], None]
) -> Link:
    """Open a link to a target: returns at once, connects in the background, takes writes right away.

    Args:
        path: one of `PATHS`.
        endpoint: from the target's `admit`; good for one link.
        name: names the link in threads and logs.
        connections: TCP connections to share the writes, each served by a thread at the target.
        on_down: called once with the reason, from a transport thread, when the link could not be made, the
            target refused it, died or hung up. Not called for the link's own `close`.

    Raises:
        TransportError: The path is unknown, or `connections` out of range.
    """
    if path not in PATHS:
        raise TransportError(f"path {path!r} is unknown: take one of {', '.join(PATHS)}")
    source = identity() if path == "process_vm" else None
    return StreamLink(path, endpoint, name=name, connections=connections, on_down=on_down, source=source)
