"""What engines' answers tell of a request's progress, read without decoding more than it takes."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from mooncake_connector.scheduler.proxy.openai import UNREADABLE
from mooncake_connector.scheduler.proxy.sse import END

# Chats and completions say the one, responses and messages the other.
_usage = re.compile(rb'"(?:completion|output)_tokens":\s*(\d{1,9})\b')

# More than any engine's; larger numbers are no counts.
MOST_TOKENS = 1 << 31
# Seconds: nothing that is told of here takes a week.
LONGEST = 7 * 24 * 3600.0
Count = Annotated[int, msgspec.Meta(ge=0, le=MOST_TOKENS)]


class PrefillTimes(msgspec.Struct, frozen=True):
    """How a prefill engine spent its time on a prompt; None where it did not say.

    Attributes:
        queued: seconds until it was first scheduled.
        computed: seconds from then until it was computed.
        cached: tokens that it had in its prefix cache.
    """

    queued: float | None = None
    computed: float | None = None
    cached: int | None = None

    @classmethod
    def of(cls, params: Mapping[str, Any] | None) -> "PrefillTimes":
        """From the ``kv_transfer_params`` of its answer."""
        found = params or {}
        moments = found.get("timeline")
        cached = found.get("cached_tokens")
        received, scheduled, prefilled = (
            moments.get(name) if isinstance(moments, dict) else None
            for name in ("received", "scheduled", "prefilled")
        )
        return cls(
            _passed(received, scheduled),
            _passed(scheduled, prefilled),
            cached if type(cached) is int and 0 <= cached <= MOST_TOKENS else None,
        )


class StreamCount:
    """Counts the tokens of a stream: its events, or what its usage says if it has one.

    An event is a token, except for the role that a chat begins with, the end mark, and what a hurried engine
    puts together: an estimate, good enough for a pace.
    """

    def __init__(self) -> None:
        self._events = 0
        self._said = 0

    def feed(self, chunk: bytes) -> None:
        self._events += chunk.count(END)
        if b'_tokens"' in chunk and (found := _usage.findall(chunk)):
            self._said = int(found[-1])

    @property
    def tokens(self) -> int:
        return self._said or self._events


class _Usage(msgspec.Struct):
    completion_tokens: Count = 0
    output_tokens: Count = 0


class _Transfer(msgspec.Struct):
    timeline: dict[str, float] = {}


class _Params(msgspec.Struct):
    transfer: _Transfer | None = None


class WholeAnswer(msgspec.Struct):
    """The parts of an answer in one piece that tell how it went."""

    usage: _Usage | None = None
    kv_transfer_params: _Params | None = None

    @property
    def tokens(self) -> int | None:
        return (self.usage.completion_tokens or self.usage.output_tokens) if self.usage else None

    @property
    def decoding(self) -> float | None:
        """Seconds from the first token to the last, if the connector there noted them."""
        transfer = self.kv_transfer_params.transfer if self.kv_transfer_params else None
        moments = transfer.timeline if transfer else {}
        return _passed(moments.get("first_token"), moments.get("finished"))


_whole = msgspec.json.Decoder(WholeAnswer)


def read_whole(body: bytes) -> WholeAnswer:
    """Nothing in it if it is no such answer."""
    try:
        return _whole.decode(body)
    except UNREADABLE:
        return WholeAnswer()


def _passed(begin: Any, end: Any) -> float | None:
    if not (isinstance(begin, int | float) and isinstance(end, int | float)):
        return None
    passed = float(end) - float(begin)
    return passed if 0 <= passed <= LONGEST else None
