"""Who a request is in logs: its id, and the trace that it is part of. Nothing here does I/O."""

import os
import re
from contextvars import ContextVar

import msgspec

REQUEST_ID = "X-Request-Id"
TRACE_PARENT = "traceparent"
# Longer ones are no ids; they come back in answers, and go into the logs of three processes.
MOST_CHARACTERS = 128
_request_id = re.compile(rf"[!-~]{{1,{MOST_CHARACTERS}}}")
# https://www.w3.org/TR/trace-context/#traceparent-header: later versions may say more after the flags.
_trace_parent = re.compile(
    "(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)


class Identity(msgspec.Struct, frozen=True):
    """One request's names.

    Attributes:
        request_id: the client's, if it is one (visible ASCII characters, at most 128), else one made here.
        trace_id: 32 hexadecimal digits of its W3C trace context; empty if it has none that is valid.
    """

    request_id: str
    trace_id: str = ""

    @classmethod
    def of(cls, named: object, trace_parent: str | None = None) -> "Identity":
        """From what the client says."""
        trace_id = _trace_id(trace_parent) if trace_parent else ""
        if isinstance(named, str) and _request_id.fullmatch(named):
            return cls(named, trace_id)
        return cls(os.urandom(16).hex(), trace_id)


# Of the request that the running task serves; the tasks that it starts have it, too.
current: ContextVar[Identity | None] = ContextVar("current", default=None)


def _trace_id(trace_parent: str) -> str:
    found = _trace_parent.fullmatch(trace_parent.strip())
    if found is None or (found[1] == "00" and found[3]):
        return ""
    return found[2]
