"""What the policy sees of a request and of the pools, and what it answers. Nothing in here has a clock.

Times are seconds of one clock of the caller's choice: the proxy's event loop, or the simulator's own.
Mooncake (FAST'25) section 4, Algorithm 1; arXiv 2407.00079v3 section 7 for early rejection.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

Side = Literal["prefill", "decode", "coupled"]
Target = Literal["ttft", "tbt"]


class Slo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request is promised.

    Attributes:
        ttft: seconds to the first token, whatever the prompt.
        ttft_per_1k_tokens: seconds more for each 1,000 prompt tokens.
        tbt: seconds between two tokens, on average over the answer.
    """

    ttft: float = 30.0
    ttft_per_1k_tokens: float = 0.0
    tbt: float = 0.1

    def ttft_of(self, prompt_tokens: int) -> float:
        """The limit for a prompt of this length, seconds."""
        return self.ttft + self.ttft_per_1k_tokens * prompt_tokens / 1000


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """One request as the policy sees it.

    Attributes:
        id: names it in every later call.
        tokens: length of the prompt.
        keys: chained keys of the prompt's whole blocks, one after the other; `PrefixIndex` knows their size.
        max_tokens: the answer's limit, 0 if the client set none.
        model: what it asks for.
        endpoint: path of the API it came by.
        tenant: who asks; turns are fair between tenants.
        conversation: equal for turns of one conversation; empty if not known.
        priority: more is more urgent.
        slo: what it is promised.
        alone: why no prefill engine can serve it; empty if one can.
        avoid: instances that failed it already.
    """

    id: str
    tokens: int
    keys: Sequence[int] = ()
    max_tokens: int = 0
    model: str = ""
    endpoint: str = ""
    tenant: str = ""
    conversation: str = ""
    priority: int = 0
    slo: Slo = Slo()
    alone: str = ""
    avoid: frozenset[str] = frozenset()


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """One engine.

    Attributes:
        name: its base URL, or any other name.
        side: ``coupled`` does both phases itself (the simulator's rival).
        group: equal for two engines exactly if they can exchange KV.
        kv_tokens: tokens of KV it can hold; 0 if not known.
        receives: whether a prefix can be copied to it.
    """

    name: str
    side: Side
    group: str = ""
    kv_tokens: int = 0
    receives: bool = True


class PrefillView(msgspec.Struct, frozen=True):
    """A prefill instance, for one request at one moment.

    Attributes:
        queue: predicted seconds until it could begin with this request.
        cached: tokens of the prompt's prefix that it will hold when it begins: those before it leave theirs.
        held: of these, those that it holds now, and others can be given.
        requests: in flight there.
        tokens: prompt tokens in flight there.
        receives: whether a prefix can be copied to it.
    """

    name: str
    group: str
    queue: float
    cached: int
    held: int
    requests: int = 0
    tokens: int = 0
    receives: bool = True


class DecodeView(msgspec.Struct, frozen=True):
    """A decode instance as predicted for the moment when a prefill ends.

    Attributes:
        batch: requests decoding.
        context: tokens of KV that they attend to, in all.
        free: tokens of KV that are not taken; as many as it has if that is not known.
        cached: tokens of the prompt's prefix that it holds.
        requests: in flight there now, those whose prefill has not ended included.
    """

    name: str
    group: str
    batch: int
    context: int
    free: int
    cached: int = 0
    requests: int = 0


class Copy(msgspec.Struct, frozen=True):
    """A prefix to be copied before prefill begins (Algorithm 1, line 27): hot blocks replicate by it.

    Attributes:
        source: the instance that holds most of it.
        tokens: length of the prefix; `missing` of them the prefill instance does not hold.
    """

    source: str
    tokens: int
    missing: int


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Who serves a request.

    Attributes:
        prefill: None if decode serves it alone; `reason` says why.
        copy: what is to be copied to `prefill` first.
        cached: tokens of the prompt that prefill will not have to compute, the copy's included.
        ttft, tbt: predicted, seconds.
    """

    decode: str
    prefill: str | None = None
    reason: str = ""
    copy: Copy | None = None
    cached: int = 0
    ttft: float = 0.0
    tbt: float = 0.0


class Rejected(msgspec.Struct, frozen=True, kw_only=True):
    """Nobody is to serve it now.

    Attributes:
        target: which promise would be broken; ``overload``: the emergency threshold.
        predicted: seconds; of `overload`, the load.
        limit: what was promised, or the threshold.
        retry_after: seconds after which it is predicted to be admitted.
        waited: seconds for which room was hoped for.
    """

    target: Literal["ttft", "tbt", "overload"]
    predicted: float
    limit: float
    retry_after: float
    waited: float = 0.0


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """It is kept: a slot is predicted to come free in time.

    Attributes:
        until: by then it has been admitted or rejected, whatever happens.
    """

    until: float


class Unserved(msgspec.Struct, frozen=True):
    """No decode engine is up: nobody can serve it."""


Verdict = Placement | Rejected | Waiting | Unserved
