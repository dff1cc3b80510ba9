"""Questions that are asked again while it is only the streams that fail."""

import threading
from collections.abc import Callable

from mooncake_connector.kv_transfer.transport.base import Ask, Failure

LONGEST_WAIT_S = 2.0
"""Between two tries; the link's last stream ends them all."""


def insist(
    ask: Ask,
    topic: str,
    body: bytes,
    on_answer: Callable[[bytes | Failure], None],
    closed: Callable[[], bool],
    wait: float = 0.02,
) -> None:
    """Ask until an answer is no failure of the streams, or `closed`; `wait` before the next try [s]."""

    def answered(answer: bytes | Failure) -> None:
        if not isinstance(answer, Failure) or not answer.retry or closed():
            on_answer(answer)
            return
        again = min(2 * wait, LONGEST_WAIT_S)
        later(wait, lambda: insist(ask, topic, body, on_answer, closed, again))

    ask(topic, body, answered)


def later(seconds: float, call: Callable[[], None]) -> None:
    """Call after so many seconds, on a thread of its own; at once for 0."""
    if not seconds:
        call()
        return
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
