"""A stream as those see it who write over it."""

import threading
from typing import TYPE_CHECKING

from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport.base import Failure
from mooncake_connector.kv_transfer.transport.outgoing import OnDone

if TYPE_CHECKING:
    from mooncake_connector.kv_transfer.transport.stream import Stream


class StreamRail:
    """A `Rail` over one stream: the target reads the bytes from it, or from the initiator's memory.

    Attributes:
        down: why it can't be used.
        fenced: nothing that was written before it went down lands any more, or it isn't down.
    """

    speed = 0.0
    penalty = 1.0
    steady = False

    def __init__(self, stream: "Stream", path: str) -> None:
        self.name, self.path = f"{path}-{stream.index}", path
        self.down: str | None = "not connected yet"
        self.fenced = threading.Event()
        self.fenced.set()
        self._stream = stream

    def write(self, key: int, plan: CopyPlan, on_done: OnDone) -> None:
        """See `Rail.write`."""
        self._stream.write(self, key, plan.flat(), on_done)

    def write_sync(self, key: int, plan: CopyPlan, timeout: float = 3.0) -> Failure | None:
        """`write`, and wait: None once every byte has landed; a small write takes few wake-ups, or none.

        A failure is returned once nothing of the write can land any more, so that it may be tried elsewhere.
        The link's events must not wait for the caller, as it may wait for them.

        Args:
            timeout: seconds without an answer after which the stream is given up.
        """
        return self._stream.sync.write(self, key, plan.flat(), timeout)
