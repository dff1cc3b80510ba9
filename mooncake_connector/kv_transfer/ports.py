"""What the two ends of transfers do to the world: `agent` implements it on sockets, the tests on a model."""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from mooncake_connector.kv_transfer.memory import Ranges
from mooncake_connector.kv_transfer.messages import Message, OpenLink
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.session import Outcome
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


class LoadReport(msgspec.Struct, frozen=True):
    """How one load went, for the request's answer, logs and metrics.

    Attributes:
        path: transport that carried it; empty if none was reached.
        wait_s: from the reservation to the end.
        early_bytes: of `nbytes`, landed before the prefill's last chunk ended.
        failed_blocks: ids of the reserved blocks of the first group, if the load failed.
        first_token: what prefill sampled, if it was asked for; else -1.
        token_only: nothing but that was asked for; vLLM knows of no load.
        reserve_sent, first_write, landed, done, taken: moments, monotonic seconds (`first_write` and
            `landed` of prefill's host); 0 if it never came to that.
    """

    request_id: str
    outcome: Outcome
    reason: str
    path: str
    nbytes: int
    early_bytes: int
    wait_s: float
    push_s: float
    failed_blocks: tuple[int, ...] = ()
    first_token: int = -1
    token_only: bool = False
    reserve_sent: float = 0.0
    first_write: float = 0.0
    landed: float = 0.0
    done: float = 0.0
    taken: float = 0.0


class DecodePorts(Protocol):
    """The effects of `DecodeEnd`. None may block for longer than one bounded copy."""

    def dial(self, address: str) -> int:
        """Connect a control channel; messages and failures come back through `DecodeEnd`."""

    def send(self, peer: int, message: Message) -> None: ...

    def hang_up(self, peer: int, name: str) -> None:
        """Close the control channel and the data link named `name`."""

    def choose_paths(self, identity: SourceIdentity, theirs: Sequence[str]) -> tuple[tuple[str, ...], str]:
        """(transports, the preferred first; why) for reaching us from that process by ways it has."""

    def admit(self, name: str, paths: Sequence[str]) -> Endpoint: ...

    def grant(self, key: int, name: str, ranges: Ranges) -> None: ...

    def fence(self, key: int) -> None:
        """Make late writes under `key` impossible; answered by `DecodeEnd.fenced`."""

    def ungrant(self, key: int) -> None: ...

    def await_marks(self, name: str, marks: Sequence[Mark], then: Callable[[float], None]) -> None:
        """Call ``then(now)`` once all that these count is in place."""

    def report(self, report: LoadReport) -> None: ...
