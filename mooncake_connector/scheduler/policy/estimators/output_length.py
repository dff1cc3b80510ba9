"""How long an answer will be: a distribution for each request, learned from the answers that ended.

Lengths are counted in bins that grow with the length. Each node of a tree from the general (all requests) to
the special (this conversation) has for each bin the chance that an answer which got there ends there (its
hazard; Kaplan and Meier 1958): one that was cut off by max_tokens says how long it did not end, and nothing
of when it would have. A node's hazards are shrunk towards its parent's, by a strength for each level that is
learned too: a feature that says nothing of the length comes to be ignored.
"""

import math
from bisect import bisect_left
from collections.abc import Hashable

import numpy as np
import numpy.typing as npt

from mooncake_connector.scheduler.policy.base import Arrival

Array = npt.NDArray[np.float64]

LONGEST = 1 << 20
BINS_PER_OCTAVE = 4
MEMORY = 2000.0
"""An answer counts 1/e in a node after that many others there."""
PRIOR_OBSERVATIONS = 5.0
MEDIAN, SHAPE = 200.0, 1.5
"""Before any answer: log-logistic, so that 3% are longer than 10 times the median."""
CONVERSATIONS, NODES = 10_000, 4096
"""What is remembered; those not used for longest are forgotten."""
LEVELS = (
    "all",
    "model and endpoint",
    "max_tokens",
    "prompt length",
    "tenant",
    "last answer",
    "conversation",
)
CONVERSATION = len(LEVELS) - 1
LEARNING_RATE = 0.1
WEAKEST, STRONGEST = math.log(0.1), math.log(1e4)


def _edges() -> list[int]:
    edges = [0]
    while edges[-1] < LONGEST:
        edges.append(max(edges[-1] + 1, round(edges[-1] * 2 ** (1 / BINS_PER_OCTAVE))))
    edges[-1] = LONGEST
    return edges


EDGES = _edges()
"""Bin k holds the lengths above EDGES[k] up to EDGES[k + 1]."""
BINS = len(EDGES) - 1


class Lengths:
    """The length of one answer, in tokens, at least 1 and at most `max_tokens`.

    Args:
        survival: chance that it is longer than each of `EDGES`: from 1 down to 0.
        max_tokens: where it is cut off.
    """

    __slots__ = ("_done", "_max_tokens", "_rest", "_survival")

    def __init__(self, survival: Array, max_tokens: int = LONGEST) -> None:
        self._max_tokens = max_tokens
        self._survival: list[float] = survival.tolist()
        # Increasing, for bisect.
        self._done: list[float] = (1 - survival).tolist()
        self._rest: list[float] | None = None

    def survival(self, tokens: float, generated: int = 0) -> float:
        """The chance that it is longer than `tokens`, given that it is longer than `generated`."""
        if tokens <= generated:
            return 1.0
        if tokens >= self._max_tokens:
            return 0.0
        before = self._longer(generated)
        return self._longer(tokens) / before if before > 0 else 0.0

    def quantile(self, q: float, generated: int = 0) -> int:
        """The least length that it does not exceed with a chance of `q`, given that it exceeds `generated`.

        More than `generated`, except that nothing is more than `max_tokens`.
        """
        longer = (1 - q) * self._longer(generated)
        if longer <= 0:
            return max(self._max_tokens, generated)
        survival = self._survival
        at = bisect_left(self._done, 1 - longer)
        while at < BINS and survival[at] > longer:
            at += 1
        if at == 0:
            length = 1
        else:
            low, high = survival[at - 1], survival[at]
            start = EDGES[at - 1]
            share = (low - longer) / (low - high) if low > high else 1.0
            length = math.ceil(start + share * (EDGES[at] - start) - 1e-9)
        return max(min(max(length, generated + 1), self._max_tokens), generated)

    def mean(self, generated: int = 0) -> float:
        """The expected length, given that it is longer than `generated`."""
        limit = self._max_tokens
        if generated >= limit:
            return float(generated)
        before = self._longer(generated)
        if before <= 0:
            return float(min(generated + 1, limit))
        if self._rest is None:
            self._rest = self._sums()
        at = bisect_left(EDGES, generated + 1)
        end = min(EDGES[at], limit)
        rest = self._sum(generated, end) + (self._rest[at] if EDGES[at] < limit else 0.0)
        return generated + rest / before

    def _longer(self, tokens: float) -> float:
        """Survival without the limit, a straight line within each bin."""
        if tokens <= 0:
            return 1.0
        if tokens >= LONGEST:
            return 0.0
        at = bisect_left(EDGES, tokens)
        start, end = EDGES[at - 1], EDGES[at]
        low = self._survival[at]
        return low + (self._survival[at - 1] - low) * (end - tokens) / (end - start)

    def _sum(self, start: int, end: int) -> float:
        """The sum of survival from `start` up to `end`, exclusive, all of one bin."""
        first, last = self._longer(start), self._longer(end)
        return (end - start) * (first + last) / 2 + (first - last) / 2

    def _sums(self) -> list[float]:
        """For each edge, the sum of survival from there to the limit."""
        limit = self._max_tokens
        sums = [0.0] * (BINS + 1)
        for at in range(BINS - 1, -1, -1):
            if EDGES[at] < limit:
                sums[at] = sums[at + 1] + self._sum(EDGES[at], min(EDGES[at + 1], limit))
        return sums


class OutputLengths:
    """Predicts the lengths of answers and learns from those that ended.

    Memory is bounded: a node takes about 1.5 kB, and those not used for longest are forgotten.
    """

    def __init__(self) -> None:
        self._nodes: dict[Hashable, _Node] = {}
        self._conversations: dict[Hashable, _Node] = {}
        self._strengths = [math.log(16.0)] * len(LEVELS)
        self._strengths[0] = math.log(PRIOR_OBSERVATIONS)

    def predict(self, arrival: Arrival) -> Lengths:
        """The length of the answer to a request that has just arrived."""
        hazards = _PRIOR
        for level, node in enumerate(self._path(arrival)):
            if node is not None and node.answers:
                hazards = node.hazards(hazards, math.exp(self._strengths[level]))
        limit = arrival.max_tokens if 0 < arrival.max_tokens < LONGEST else LONGEST
        return Lengths(np.concatenate(([1.0], np.cumprod(1 - hazards))), limit)

    def observe(self, arrival: Arrival, output_tokens: int) -> None:
        """Its answer ended after so many tokens; one of no tokens says nothing."""
        if output_tokens < 1:
            return
        at = min(bisect_left(EDGES, output_tokens), BINS) - 1
        cut = 0 < arrival.max_tokens <= output_tokens
        hazards = _PRIOR
        for level, key in enumerate(self._keys(arrival)):
            if key is None:
                continue
            node = self._touch(level, key)
            if node.answers:
                strength = self._strengths[level]
                shrunk = node.hazards(hazards, math.exp(strength))
                if level:
                    slope = node.slope(hazards, shrunk, math.exp(strength), at, cut)
                    moved = strength + LEARNING_RATE * max(-1.0, min(1.0, slope))
                    self._strengths[level] = max(WEAKEST, min(STRONGEST, moved))
                hazards = shrunk
            node.add(at, cut, _SPREAD if level == CONVERSATION else _EXACT)
            node.last = at

    def strengths(self) -> dict[str, float]:
        """How many answers of its own a node of each level needs to count as much as its parent does."""
        return {level: math.exp(value) for level, value in zip(LEVELS, self._strengths, strict=True)}

    def _path(self, arrival: Arrival) -> list["_Node | None"]:
        return [
            (self._conversations if level == CONVERSATION else self._nodes).get(key)
            if key is not None
            else None
            for level, key in enumerate(self._keys(arrival))
        ]

    def _keys(self, arrival: Arrival) -> list[Hashable | None]:
        """The nodes of one request, one for each of `LEVELS`; None: it does not say."""
        kind = (arrival.model, arrival.endpoint)
        limit = arrival.max_tokens.bit_length()
        conversation = (arrival.tenant, arrival.conversation) if arrival.conversation else None
        known = self._conversations.get(conversation)
        return [
            "all",
            ("kind", kind),
            ("limit", kind, limit),
            ("prompt", kind, limit, arrival.tokens.bit_length()),
            ("tenant", kind, arrival.tenant) if arrival.tenant else None,
            ("last", kind, known.last // 2) if known else None,
            conversation,
        ]

    def _touch(self, level: int, key: Hashable) -> "_Node":
        nodes, most = self._nodes, NODES
        if level == CONVERSATION:
            nodes, most = self._conversations, CONVERSATIONS
        node = nodes.pop(key, None)
        if node is None:
            node = _Node()
            if len(nodes) >= most:
                del nodes[next(iter(nodes))]
        nodes[key] = node
        return node


class _Node:
    """What came of the answers of one kind: by bin how many ended there, and how many got there.

    Attributes:
        answers: how many there were, the old ones counting less.
        last: the bin of the last one.
    """

    __slots__ = ("_ended", "_got_there", "answers", "last")

    def __init__(self) -> None:
        self.answers, self.last = 0.0, 0
        self._ended, self._got_there = np.zeros(BINS), np.zeros(BINS)

    def hazards(self, parent: Array, strength: float) -> Array:
        """The chance to end in each bin, given that it is reached."""
        return (self._ended + strength * parent) / (self._got_there + strength)

    def add(self, at: int, cut: bool, kernel: tuple[Array, Array]) -> None:
        """One answer ended in bin `at`, or was cut off there; `kernel`: how it counts for other bins."""
        keep = 1 - 1 / MEMORY
        self.answers = self.answers * keep + 1
        self._ended *= keep
        self._got_there *= keep
        if cut:
            self._got_there[:at] += 1
        else:
            ended, got_there = kernel
            self._ended += ended[at]
            self._got_there += got_there[at]

    def slope(self, parent: Array, shrunk: Array, strength: float, at: int, cut: bool) -> float:
        """By how much the log-likelihood of an answer grows with the logarithm of `strength`."""
        change = strength * (parent - shrunk) / (self._got_there + strength)
        slope = -float((change[:at] / (1 - shrunk[:at])).sum())
        return slope if cut else slope + float(change[at] / shrunk[at])


def _kernel(width: int) -> tuple[Array, Array]:
    """For each bin, how an answer there counts for the bins up to `width` off: so that few say something."""
    ended = np.zeros((BINS, BINS))
    for at in range(BINS):
        for other in range(max(0, at - width), min(BINS, at + width + 1)):
            ended[at, other] = width + 1 - abs(at - other)
    ended /= ended.sum(axis=1, keepdims=True)
    got_there = ended[:, ::-1].cumsum(axis=1)[:, ::-1]
    return ended, got_there


_EXACT, _SPREAD = _kernel(0), _kernel(2)


def _prior() -> Array:
    starts, ends = np.array(EDGES[:-1], float), np.array(EDGES[1:], float)
    hazards = 1 - (1 + (starts / MEDIAN) ** SHAPE) / (1 + (ends / MEDIAN) ** SHAPE)
    hazards[-1] = 1.0
    return hazards


_PRIOR = _prior()
