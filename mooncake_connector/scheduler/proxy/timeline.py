"""Where a request's time goes, told to clients that ask by the header ``x-mooncake-timeline: 1``.

Moments are `time.monotonic` seconds, which all processes of one host share.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec

from mooncake_connector.scheduler.proxy.metrics import STEPS, ProxyMetrics
from mooncake_connector.scheduler.proxy.openai import UNREADABLE
from mooncake_connector.scheduler.proxy.sse import DONE, END, Events

HEADER = "x-mooncake-timeline"


class Timeline:
    """The proxy's moments of one request; of several attempts the last one's.

    Attributes:
        asked: whether the client wants to know.
        moments: seconds by name.
    """

    def __init__(self, asked: bool = False) -> None:
        self.asked = asked
        self.moments: dict[str, float] = {}
        self.mark("received")

    def mark(self, name: str) -> None:
        self.moments[name] = time.monotonic()

    def seconds(self, begin: str, end: str) -> float | None:
        """From one moment to another; None if one of them did not come."""
        if begin in self.moments and end in self.moments:
            return max(0.0, self.moments[end] - self.moments[begin])
        return None

    def observe(self, metrics: ProxyMetrics) -> None:
        """Put the steps that the request went through into the histograms."""
        for name, (begin, end) in STEPS.items():
            if (passed := self.seconds(begin, end)) is not None:
                metrics.step_seconds[name].observe(passed)


async def with_timeline(
    chunks: AsyncIterator[bytes], tell: Callable[[], Awaitable[dict[str, Any]]]
) -> AsyncIterator[bytes]:
    """The stream with the timeline as a comment, which clients skip, before its end."""
    events = Events()
    async for chunk in chunks:
        for event in events.feed(chunk):
            if event.startswith(DONE):
                yield b": timeline " + msgspec.json.encode(await tell()) + END
            yield event
    yield events.rest()


def into_answer(body: bytes, timeline: dict[str, Any]) -> bytes:
    """A whole answer with the timeline in its ``kv_transfer_params``; as it was if it is no JSON object."""
    try:
        answer = msgspec.json.decode(body)
    except UNREADABLE:
        return body
    if not isinstance(answer, dict):
        return body
    params = answer.get("kv_transfer_params")
    answer["kv_transfer_params"] = (params if isinstance(params, dict) else {}) | {"timeline": timeline}
    return msgspec.json.encode(answer)
