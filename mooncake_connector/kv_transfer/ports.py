"""What the two ends of transfers do to the world: `agent` implements it on sockets, the tests on a model."""

from collections.abc import Callable, Sequence
from typing import Protocol

from mooncake_connector.kv_transfer.memory import Ranges
from mooncake_connector.kv_transfer.messages import LoadReport, Message, OpenLink
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport.base import Endpoint, Mark, SourceIdentity


class PrefillPorts(Protocol):
    """The effects of `PrefillEnd`. None may block."""

    def send(self, peer: bytes, message: Message) -> None: ...

    def open_link(self, peer: bytes, name: str, offer: OpenLink) -> None:
        """Open the data link; answered by `PrefillEnd.link_up` or `link_down`."""

    def write(self, peer: bytes, key: int, op: int, plan: CopyPlan) -> None:
        """Push over the peer's link; answered by `PrefillEnd.write_ended`."""

    def cancel(self, key: int) -> None:
        """Give up what has not been sent of a reservation's writes; each still ends by `write_ended`."""

    def marks(self, peer: bytes) -> tuple[Mark, ...]:
        """What the peer must have seen land before it uses what was written to it until now."""

    def allow_reader(self, pid: int) -> None:
        """Let that process of this host read our memory."""

    def close_link(self, peer: bytes) -> None:
        """Close the peer's link; its writes end."""

    def sent(self, request_id: str) -> None:
        """The finished request's blocks may be freed."""


class DecodePorts(Protocol):
    """The effects of `DecodeEnd`. None may block for longer than one bounded copy."""

    def dial(self, address: str) -> int:
        """Connect a control channel; messages and failures come back through `DecodeEnd`."""

    def send(self, peer: int, message: Message) -> None: ...

    def hang_up(self, peer: int, name: str) -> None:
        """Close the control channel and the data link named `name`."""

    def choose_paths(self, source: SourceIdentity, theirs: Sequence[str]) -> tuple[tuple[str, ...], str]:
        """(transports, the preferred first; why) for reaching us from that process by ways it has."""

    def admit(self, name: str, paths: Sequence[str]) -> Endpoint: ...

    def grant(self, key: int, name: str, ranges: Ranges) -> None: ...

    def fence(self, key: int) -> None:
        """Make late writes under `key` impossible; answered by `DecodeEnd.fenced`."""

    def ungrant(self, key: int) -> None: ...

    def await_marks(self, name: str, marks: Sequence[Mark], then: Callable[[float], None]) -> None:
        """Call ``then(now)`` once all that these count is in place."""

    def report(self, report: LoadReport) -> None: ...
