"""Waiting for a GPU on behalf of hardware that can't: a NIC reads memory whether it is written yet or not."""

import logging
import queue
import threading
from collections.abc import Callable, Sequence

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.plan import Event

log = logging.getLogger(__name__)

Then = Callable[[str | None], None]


def happened(events: Sequence[Event]) -> bool:
    """Whether all of them are known to have happened."""
    try:
        return all(event.query() for event in events)
    except TransportError:
        return False


class Waiter:
    """Calls back once events have happened, in the order of the calls. Its thread starts when needed."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[Sequence[Event], Then]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._started = False

    def call(self, events: Sequence[Event], then: Then) -> None:
        """``then(None)`` once all `events` have happened, ``then(reason)`` if one can't; on the thread."""
        with self._lock:
            if not self._started:
                self._started = True
                threading.Thread(target=self._run, name="mooncake-gpu-wait", daemon=True).start()
            self._waiting.put((events, then))

    def _run(self) -> None:
        while True:
            events, then = self._waiting.get()
            failed = None
            try:
                for event in events:
                    event.synchronize()
            except TransportError as broken:
                failed = str(broken)
            try:
                then(failed)
            except Exception:
                log.exception("a write could not be handed on; others go on")
