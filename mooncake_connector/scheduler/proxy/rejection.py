"""What a client is told whose request the conductor rejects."""

import math

import msgspec

from mooncake_connector.scheduler.policy.base import Rejected

STATUS = 429
_WHAT = {
    "ttft": "the first token would come after {predicted:.3g} s, more than {limit:.3g} s",
    "tbt": "tokens would come {predicted:.3g} s apart, more than {limit:.3g} s",
    "overload": "the load is {predicted:.3g}, from {limit:.3g} on nobody is let in",
}


def explain(rejected: Rejected) -> str:
    """One sentence: which promise, what is predicted, and when to come again."""
    why = _WHAT[rejected.target].format(predicted=rejected.predicted, limit=rejected.limit)
    return f"the engines are overloaded ({rejected.target}): {why}; try again in {retry_seconds(rejected)} s"


def retry_seconds(rejected: Rejected) -> int:
    """For the header ``Retry-After``: whole seconds, 1 at least."""
    return max(1, math.ceil(rejected.retry_after))


def body(rejected: Rejected) -> bytes:
    """An error in OpenAI's form; `slo`, `predicted`, `limit`, `retry_after` and `waited` are for programs."""
    error = {
        "message": explain(rejected),
        "type": "RateLimitError",
        "param": None,
        "code": STATUS,
        "slo": rejected.target,
        "predicted": round(rejected.predicted, 6),
        "limit": round(rejected.limit, 6),
        "retry_after": retry_seconds(rejected),
        "waited": round(rejected.waited, 6),
    }
    return msgspec.json.encode({"error": error})
