"""How long an answer will be: a distribution for each request, learned from the answers that ended.

Lengths are counted in bins that grow with the length. Each node of a tree from the general (all requests) to
the special (this conversation) has for each bin the chance that an answer which got there ends there (its
hazard; Kaplan and Meier 1958): one that was cut off by max_tokens says how long it did not end, and nothing
of when it would have. A node's hazards are shrunk towards its parent's, by a strength for each level that is
learned too: a feature that says nothing of the length comes to be ignored.
"""

import math
from bisect import bisect_left
from collections.abc import Hashable, Sequence
from operator import neg

import msgspec
import numpy as np
import numpy.typing as npt

from mooncake_connector.scheduler.policy.base import Arrival

Array = npt.NDArray[np.float64]

LONGEST = 1 << 20
BINS_PER_OCTAVE = 4
MEMORY = 2000.0
"""An answer counts 1/e in a node after that many others there."""
KEEP = 1 - 1 / MEMORY
HEAVIEST = 1e9
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

    __slots__ = ("_max_tokens", "_rest", "_survival")

    def __init__(self, survival: Array, max_tokens: int = LONGEST) -> None:
        self._max_tokens = max_tokens
        self._survival: list[float] = survival.tolist()
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
        return self.quantiles((q,), generated)[0]

    def quantiles(self, shares: Sequence[float], generated: int = 0) -> list[int]:
        """`quantile` of each of `shares`, which ascend."""
        survival, before, most = self._survival, self._longer(generated), self._max_tokens
        found, at = [], 0
        for share in shares:
            longer = (1 - share) * before
            length = most
            if longer > 0:
                at = bisect_left(survival, -longer, at, key=neg)
                if at:
                    low, high, start = survival[at - 1], survival[at], EDGES[at - 1]
                    part = (low - longer) / (low - high) if low > high else 1.0
                    length = math.ceil(start + part * (EDGES[at] - start) - 1e-9)
                else:
                    length = 1
                if length <= generated:
                    length = generated + 1
                if length > most:
                    length = most
            found.append(length if length > generated else generated)
        return found

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
        # Of the last path, by level: hazards, the prior's first; how many ended and got there; pulls.
        levels = len(LEVELS)
        self._hazards, self._counts = np.ones((levels + 1, 2, BINS)), np.empty((levels, 2, BINS))
        self._pulls = np.empty((levels, 1))
        self._hazards[0, 0] = _PRIOR
        # A view costs as much as what is done with it.
        self._views = [
            (self._hazards[level], *self._counts[level], self._counts[level], self._hazards[level + 1, 0])
            for level in range(levels)
        ]

    def predict(self, arrival: Arrival) -> Lengths:
        """The length of the answer to a request that has just arrived."""
        keys = self._keys(arrival)
        conversation = self._conversations.get(keys.pop())
        path = [*map(self._nodes.get, keys), conversation]
        known = [(level, node) for level, node in enumerate(path) if node is not None and node.answers]
        self._shrink(known)
        survival = np.ones(BINS + 1)
        np.multiply.accumulate(1 - self._hazards[len(known), 0], out=survival[1:])
        limit = arrival.max_tokens if 0 < arrival.max_tokens < LONGEST else LONGEST
        return Lengths(survival, limit)

    def observe(self, arrival: Arrival, output_tokens: int) -> None:
        """Its answer ended after so many tokens; one of no tokens says nothing."""
        if output_tokens < 1:
            return
        at = min(bisect_left(EDGES, output_tokens), BINS) - 1
        cut = 0 < arrival.max_tokens <= output_tokens
        path = [
            (level, self._touch(level, key))
            for level, key in enumerate(self._keys(arrival))
            if key is not None
        ]
        known = [(level, node) for level, node in path if node.answers]
        self._shrink(known)
        for (level, _), slope in zip(known, self._slopes(len(known), at, cut), strict=True):
            if level:
                moved = self._strengths[level] + LEARNING_RATE * max(-1.0, min(1.0, slope))
                self._strengths[level] = max(WEAKEST, min(STRONGEST, moved))
        for level, node in path:
            node.add(at, cut, spread=level == CONVERSATION)

    def strengths(self) -> dict[str, float]:
        """How many answers of its own a node of each level needs to count as much as its parent does."""
        return {level: math.exp(value) for level, value in zip(LEVELS, self._strengths, strict=True)}

    def _shrink(self, path: Sequence[tuple[int, "_Node"]]) -> None:
        """Find the hazards of each node of a path, shrunk towards those of the one before it."""
        for at, (level, node) in enumerate(path):
            parent, ended, got_there, counts, hazards = self._views[at]
            # What the parent weighs, in the units of the node.
            pull = self._pulls[at, 0] = math.exp(self._strengths[level]) * node.weight
            np.multiply(parent, pull, counts)
            np.add(counts, node.counts, counts)
            np.divide(ended, got_there, hazards)

    def _slopes(self, count: int, at: int, cut: bool) -> list[float]:
        """By how much an answer's log-likelihood grows with the logarithm of each strength of a path.

        `_shrink` was told the path, of `count` nodes; the answer ended in bin `at`, or was cut off there.
        """
        bins = at + 1
        parents, shrunk = self._hazards[:count, 0, :bins], self._hazards[1 : count + 1, 0, :bins]
        change = (parents - shrunk) * self._pulls[:count] / self._counts[:count, 1, :bins]
        slopes = -np.add.reduce(change[:, :at] / (1 - shrunk[:, :at]), 1)
        if not cut:
            slopes += change[:, at] / shrunk[:, at]
        found: list[float] = slopes.tolist()
        return found

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


# There are many, and nothing in them refers to anything: the garbage collector has no business here.
class _Node(msgspec.Struct, gc=False):
    """What came of the answers of one kind: by bin how many ended there, and how many got there.

    Attributes:
        answers: how many there were, the old ones counting less.
        last: the bin of the last one.
        weight: of the last one: it is the new ones that weigh more.
        counts: how many ended, and how many got there, [2, bins].
    """

    answers: float = 0.0
    last: int = 0
    weight: float = 1.0
    counts: Array = msgspec.field(default_factory=lambda: np.zeros((2, BINS)))

    def add(self, at: int, cut: bool, *, spread: bool) -> None:
        """One answer ended in bin `at`, or was cut off there; `spread`: bins around count, too."""
        self.answers = self.answers * KEEP + 1
        self.last = at
        weight = self.weight = self.weight / KEEP
        if cut:
            self.counts[1, :at] += weight
        elif spread:
            self.counts += weight * _SPREAD[at]
        else:
            self.counts[0, at] += weight
            self.counts[1, : at + 1] += weight
        if weight > HEAVIEST:
            self.counts /= weight
            self.weight = 1.0


def _kernel(width: int) -> Array:
    """By its bin, how an answer counts for those up to `width` off: so that few say something."""
    ended = np.zeros((BINS, BINS))
    for at in range(BINS):
        for other in range(max(0, at - width), min(BINS, at + width + 1)):
            ended[at, other] = width + 1 - abs(at - other)
    ended /= ended.sum(axis=1, keepdims=True)
    return np.stack((ended, ended[:, ::-1].cumsum(axis=1)[:, ::-1]), axis=1)


_SPREAD = _kernel(2)


def _prior() -> Array:
    starts, ends = np.array(EDGES[:-1], float), np.array(EDGES[1:], float)
    hazards = 1 - (1 + (starts / MEDIAN) ** SHAPE) / (1 + (ends / MEDIAN) ** SHAPE)
    hazards[-1] = 1.0
    return hazards


_PRIOR = _prior()
