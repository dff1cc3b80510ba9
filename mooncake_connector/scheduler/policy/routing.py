"""Which engines serve a request: Algorithm 1 of Mooncake (FAST'25, section 4), and its rivals."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import msgspec

from mooncake_connector.scheduler.policy.base import Arrival, Copy, DecodeView, Instance, PrefillView
from mooncake_connector.scheduler.policy.estimators import Estimators

Routing = Literal["conductor", "local_cache", "least_loaded", "round_robin", "random"]
T = TypeVar("T")


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """A choice, and what is predicted of it.

    Attributes:
        computes: the engine that computes the prompt: a prefill engine, or `decode` itself.
        decode: the engine that writes the answer.
        reason: why decode computes the prompt; empty if it does not.
        copy: what is to be copied to `computes` first.
        cached: tokens of the prompt that need not be computed.
        copying: seconds that the copy takes.
        queue: seconds until `computes` could begin.
        seconds: of computing.
        handover: seconds until decode has the KV.
        tbt: seconds per token with this request.
    """

    computes: str
    decode: str
    reason: str = ""
    copy: Copy | None = None
    cached: int = 0
    copying: float = 0.0
    queue: float = 0.0
    seconds: float = 0.0
    handover: float = 0.0
    tbt: float = 0.0

    @property
    def ttft(self) -> float:
        """Predicted seconds to the first token."""
        return self.copying + self.queue + self.seconds + self.handover


class Start(msgspec.Struct, frozen=True):
    """What one engine would make of a prompt (Algorithm 1, lines 8 to 22).

    Attributes:
        copying, queue, seconds: as in `Route`.
    """

    view: PrefillView
    cached: int
    copying: float
    seconds: float
    copy: Copy | None = None

    @property
    def ttft(self) -> float:
        return self.copying + self.view.queue + self.seconds


class Router:
    """Takes views of the pools and gives a route; keeps nothing but whose turn it is among equals.

    Args:
        routing: ``conductor`` minimises the predicted TTFT, copies of prefixes included; ``local_cache`` the
            same without copies; ``least_loaded`` takes the fewest prompt tokens in flight, then the fewest
            requests; ``round_robin`` and ``random`` look at nothing.
        threshold: a copy is considered if the best holder has more than so many times the own prefix.
        min_prefill_tokens: shorter prompts are computed by decode; 0 sends none that way.
    """

    def __init__(
        self,
        routing: Routing,
        threshold: float,
        min_prefill_tokens: int,
        estimators: Estimators,
        seed: int,
    ) -> None:
        self._routing = routing
        self._threshold = threshold
        self._min_prefill_tokens = min_prefill_tokens
        self._estimators = estimators
        self._random = random.Random(seed)
        self._turns = {"prefill": itertools.count(), "decode": itertools.count()}

    def route(
        self,
        arrival: Arrival,
        computers: Sequence[Instance],
        writers: Sequence[Instance],
        prefills: Callable[[Sequence[Instance]], Sequence[PrefillView]],
        decodes: Callable[[float], Sequence[DecodeView]],
        output: float,
    ) -> Route | None:
        """Engines for one request.

        Args:
            computers: engines that compute prompts for others.
            writers: those that decode: they can compute prompts, too.
            prefills: some of both as engines that compute prompts.
            decodes: `writers` as predicted for so many seconds from now.
            output: expected tokens of the answer.

        Returns:
            None if no engine decodes.
        """
        # A decode engine that failed once still beats no answer at all.
        fresh = [writer for writer in writers if writer.name not in arrival.avoid] or writers
        if not fresh:
            return None
        groups = {writer.group for writer in fresh if writer.side == "decode"}
        paired = [one for one in computers if one.group in groups and one.name not in arrival.avoid]
        reason = arrival.alone
        if not reason and arrival.tokens < self._min_prefill_tokens:
            reason = "short_prompt"
        if not reason and not paired:
            reason = "coupled" if any(writer.side == "coupled" for writer in fresh) else "no_prefill"
        if reason:
            starts = [self._start(view, arrival, None) for view in prefills(fresh)]
            return self._alone(arrival, starts, decodes(0.0), reason, output)
        views = prefills(paired)
        best = max(views, key=_held)
        start = self._first([self._start(view, arrival, best) for view in views])
        group = start.view.group
        allowed = {writer.name for writer in fresh if writer.side == "decode" and writer.group == group}
        later = [view for view in decodes(start.ttft) if view.name in allowed]
        decode = self._decode(arrival, later, output)
        return Route(
            computes=start.view.name,
            decode=decode.name,
            copy=start.copy,
            cached=start.cached,
            copying=start.copying,
            queue=start.view.queue,
            seconds=start.seconds,
            handover=self._estimators.handover.seconds(start.view.name, decode.name, arrival.tokens),
            tbt=self.tbt(arrival, decode),
        )

    def redecode(self, route: Route, arrival: Arrival, decode: DecodeView) -> Route:
        """The same prefill with another decode engine."""
        handover = self._estimators.handover.seconds(route.computes, decode.name, arrival.tokens)
        return msgspec.structs.replace(
            route, decode=decode.name, handover=handover, tbt=self.tbt(arrival, decode)
        )

    def tbt(self, arrival: Arrival, view: DecodeView) -> float:
        """Predicted seconds per token of an engine that takes this request in addition."""
        return self._estimators.step.seconds(view.name, view.batch + 1, view.context + arrival.tokens)

    def _start(self, view: PrefillView, arrival: Arrival, best: PrefillView | None) -> Start:
        tokens, seconds = arrival.tokens, self._estimators.prefill.seconds
        own = Start(view, view.cached, 0.0, seconds(view.name, tokens, view.cached))
        if self._routing != "conductor" or best is None or best.group != view.group:
            return own
        if not view.receives or best.held <= view.cached * self._threshold:
            return own
        missing = best.held - view.cached
        copying = self._estimators.transfer.seconds(best.name, view.name, missing)
        with_copy = seconds(view.name, tokens, best.held)
        if copying + with_copy >= own.seconds:
            return own
        return Start(view, best.held, copying, with_copy, Copy(best.name, best.held, missing))

    def _first(self, starts: list[Start]) -> Start:
        if self._routing == "random":
            return self._random.choice(starts)
        if self._routing == "round_robin":
            return starts[next(self._turns["prefill"]) % len(starts)]
        if self._routing == "least_loaded":
            return _least(starts, _prompt_tokens, self._turns["prefill"])
        return _least(starts, _ttft, self._turns["prefill"])

    def _decode(self, arrival: Arrival, views: Sequence[DecodeView], output: float) -> DecodeView:
        if self._routing == "random":
            return self._random.choice(views)
        if self._routing == "round_robin":
            return views[next(self._turns["decode"]) % len(views)]
        if self._routing == "least_loaded":
            return _least(views, _requests, self._turns["decode"])
        need = arrival.tokens + output
        roomy = [view for view in views if view.free >= need]
        if not roomy:
            return _least(views, _taken, self._turns["decode"])
        return _least(roomy, lambda view: self.tbt(arrival, view), self._turns["decode"])

    def _alone(
        self,
        arrival: Arrival,
        starts: list[Start],
        views: Sequence[DecodeView],
        reason: str,
        output: float,
    ) -> Route:
        by_name = {view.name: view for view in views}
        if self._routing in ("random", "round_robin"):
            start = self._first(starts)
        elif self._routing == "least_loaded":
            load = _prompt_tokens if reason == "coupled" else _requests_of(by_name)
            start = _least(starts, load, self._turns["decode"])
        else:
            # Whoever computes it writes the answer as well: the end counts, not the first token alone.
            need = arrival.tokens + output
            roomy = [start for start in starts if by_name[start.view.name].free >= need] or starts
            start = _least(
                roomy,
                lambda start: start.ttft + output * self.tbt(arrival, by_name[start.view.name]),
                self._turns["decode"],
            )
        decode = by_name[start.view.name]
        return Route(
            computes=decode.name,
            decode=decode.name,
            reason=reason,
            cached=start.cached,
            queue=start.view.queue,
            seconds=start.seconds,
            tbt=self.tbt(arrival, decode),
        )


def _held(view: PrefillView) -> int:
    return view.held


def _ttft(start: Start) -> float:
    return start.ttft


def _prompt_tokens(start: Start) -> float:
    return start.view.tokens


def _requests(view: DecodeView) -> float:
    return view.requests


def _taken(view: DecodeView) -> float:
    return -view.free


def _requests_of(views: dict[str, DecodeView]) -> Callable[[Start], float]:
    return lambda start: views[start.view.name].requests


def _least(choices: Sequence[T], load: Callable[[T], float], turn: Iterator[int]) -> T:
    loads = [load(choice) for choice in choices]
    low = min(loads)
    if loads.count(low) == 1:
        next(turn)
        return choices[loads.index(low)]
    ties = [choice for choice, own in zip(choices, loads, strict=True) if own == low]
    return ties[next(turn) % len(ties)]
