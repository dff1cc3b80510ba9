"""A whole link: its streams, and the one-sided rails that are set up over them."""

from collections.abc import Callable, Sequence
from typing import Protocol

from mooncake_connector.kv_transfer.transport.base import (
    Ask,
    Endpoint,
    Failure,
    Link,
    LinkEvents,
    Mark,
    Rail,
)
from mooncake_connector.kv_transfer.transport.link import StreamLink
from mooncake_connector.kv_transfer.transport.staging import Staging
from mooncake_connector.kv_transfer.transport.stream import PATHS as STREAM_PATHS


class OneSided(Protocol):
    """Rails beside the streams; `transport.rdma.RdmaRails` documents each."""

    def open(self) -> None: ...

    def owns(self, rail: str) -> bool: ...

    def restore(self, rail: str) -> None: ...

    def abandon(self, rail: str, reason: str) -> None: ...

    def marks(self) -> tuple[Mark, ...]: ...

    def close(self) -> None: ...


MakeRails = Callable[[str, bytes, Ask, LinkEvents], OneSided]
"""Makes rails, given the link's name, its token, `Link.ask` and the events."""


class WholeLink:
    """A `Link` of streams and one-sided rails. The streams carry the questions; their end is the link's."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        name: str,
        paths: tuple[str, ...],
        connections: int,
        checksum: bool,
        events: LinkEvents,
        one_sided: Sequence[MakeRails],
        staging: Staging | None = None,
    ) -> None:
        self._events = events
        self._rails = [make(name, endpoint.token, self.ask, events) for make in one_sided]
        self._streams = StreamLink(
            endpoint,
            name=name,
            connections=connections,
            paths=paths,
            events=self,
            checksum=checksum,
            staging=staging,
        )
        for rails in self._rails:
            rails.open()

    def restore(self, rail: str) -> None:
        self._owner(rail).restore(rail)

    def abandon(self, rail: str, reason: str) -> None:
        self._owner(rail).abandon(rail, reason)

    def marks(self) -> tuple[Mark, ...]:
        return tuple(mark for rails in self._rails for mark in rails.marks())

    def ask(self, topic: str, body: bytes, on_answer: Callable[[bytes | Failure], None]) -> None:
        self._streams.ask(topic, body, on_answer)

    def close(self) -> None:
        for rails in self._rails:
            rails.close()
        self._streams.close()

    def rail_up(self, rail: Rail) -> None:
        self._events.rail_up(rail)

    def rail_down(self, name: str, reason: str) -> None:
        self._events.rail_down(name, reason)

    def rail_fenced(self, name: str) -> None:
        self._events.rail_fenced(name)

    def link_down(self, reason: str) -> None:
        for rails in self._rails:
            rails.close()
        self._events.link_down(reason)

    def _owner(self, rail: str) -> OneSided | StreamLink:
        return next((rails for rails in self._rails if rails.owns(rail)), self._streams)


def open_link(
    endpoint: Endpoint,
    *,
    name: str,
    paths: Sequence[str],
    connections: int,
    checksum: bool,
    events: LinkEvents,
    one_sided: Sequence[MakeRails] = (),
    staging: Staging | None = None,
) -> Link:
    """Open a link to a target: returns at once, connects in the background.

    Args:
        endpoint: from the target's `admit`; good for one link.
        name: names the link in threads and logs.
        paths: transports whose rails are wanted.
        connections: TCP connections, each served by a thread at the target.
        checksum: have the target verify what comes by streams.
        events: told what becomes of the rails.
        one_sided: make further rails.
        staging: knows the memory of GPUs; None: there is none.
    """
    streams = tuple(path for path in STREAM_PATHS if path in paths)
    if not one_sided:
        return StreamLink(
            endpoint,
            name=name,
            connections=connections,
            paths=streams,
            events=events,
            checksum=checksum,
            staging=staging,
        )
    return WholeLink(
        endpoint,
        name=name,
        paths=streams,
        connections=connections,
        checksum=checksum,
        events=events,
        one_sided=one_sided,
        staging=staging,
    )
