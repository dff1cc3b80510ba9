"""A whole link: its streams, and what one-sided rails are set up over them."""

from collections.abc import Sequence

from mooncake_connector.kv_transfer.transport.base import Endpoint, Link, LinkEvents
from mooncake_connector.kv_transfer.transport.link import StreamLink
from mooncake_connector.kv_transfer.transport.stream import PATHS as STREAM_PATHS


def open_link(
    endpoint: Endpoint,
    *,
    name: str,
    paths: Sequence[str],
    connections: int,
    checksum: bool,
    events: LinkEvents,
) -> Link:
    """Open a link to a target: returns at once, connects in the background.

    Args:
        endpoint: from the target's `admit`; good for one link.
        name: names the link in threads and logs.
        paths: transports whose rails are wanted.
        connections: TCP connections, each served by a thread at the target.
        checksum: have the target verify what comes by streams.
        events: told what becomes of the rails.
    """
    streams = tuple(path for path in STREAM_PATHS if path in paths)
    return StreamLink(
        endpoint, name=name, connections=connections, paths=streams, events=events, checksum=checksum
    )
