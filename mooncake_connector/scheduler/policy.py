"""Which prefill and which decode engine serve a request: pure, a snapshot of the pools in, a choice out."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import msgspec


class InstanceView(msgspec.Struct, frozen=True):
    """One engine at one moment.

    Attributes:
        url: its base URL, its name in every choice.
        usable: up, probed, and fit for its pool.
        group: equal for two engines exactly if they can exchange KV.
        requests: requests in flight.
        tokens: estimated prompt tokens of those requests.
    """

    url: str
    usable: bool
    group: str = ""
    requests: int = 0
    tokens: int = 0


class Snapshot(msgspec.Struct, frozen=True):
    """Both pools at one moment."""

    prefill: tuple[InstanceView, ...]
    decode: tuple[InstanceView, ...]


class Demand(msgspec.Struct, frozen=True):
    """What one request asks for.

    Attributes:
        prompt_tokens: estimated length of its prompts.
        alone: why it can't use a prefill engine; empty if it can.
        avoid: engines that failed it already.
    """

    prompt_tokens: int
    alone: str = ""
    avoid: frozenset[str] = frozenset()


class Choice(msgspec.Struct, frozen=True):
    """Who serves it: `prefill` None means decode alone, `reason` says why."""

    prefill: str | None
    decode: str
    reason: str = ""


class Policy(Protocol):
    """The choice; the conductor replaces `LeastLoaded` behind it."""

    def choose(self, snapshot: Snapshot, demand: Demand) -> Choice | None:
        """Engines for one request; None if no decode engine is usable."""


class LeastLoaded:
    """Fewest prompt tokens in flight on prefill, fewest requests in flight on decode; ties take turns."""

    def __init__(self, min_prefill_tokens: int = 0) -> None:
        self._min_prefill_tokens = min_prefill_tokens
        self._prefill_turn = itertools.count()
        self._decode_turn = itertools.count()

    def choose(self, snapshot: Snapshot, demand: Demand) -> Choice | None:
        usable = [view for view in snapshot.decode if view.usable]
        # A decode engine that failed once still beats no answer at all.
        decodes = [view for view in usable if view.url not in demand.avoid] or usable
        if not decodes:
            return None
        groups = {view.group for view in decodes}
        prefills = [
            view
            for view in snapshot.prefill
            if view.usable and view.group in groups and view.url not in demand.avoid
        ]
        reason = demand.alone
        if not reason and demand.prompt_tokens < self._min_prefill_tokens:
            reason = "short_prompt"
        if not reason and not prefills:
            reason = "no_prefill"
        if reason:
            return Choice(None, _least(decodes, _requests, self._decode_turn).url, reason)
        prefill = _least(prefills, _tokens, self._prefill_turn)
        paired = [view for view in decodes if view.group == prefill.group]
        return Choice(prefill.url, _least(paired, _requests, self._decode_turn).url)


def _requests(view: InstanceView) -> int:
    return view.requests


def _tokens(view: InstanceView) -> int:
    return view.tokens


def _least(
    views: Sequence[InstanceView], load: Callable[[InstanceView], int], turn: Iterator[int]
) -> InstanceView:
    low = min(map(load, views))
    ties = [view for view in views if load(view) == low]
    return ties[next(turn) % len(ties)]
