"""By how much predictions are taken to fall short, so that those who are let in get what was promised."""

import math
from bisect import bisect_left, insort
from collections import deque

import msgspec

# Of those let in, this share may find a promise broken; the two promises share it.
BROKEN = 0.04
# No wider than that: beyond, hardly anybody but the idle would be let in.
WIDEST = 8.0
# The larger margin counts, of the last many and of the last few, of which so many times more may be broken:
# the few make it wide soon if very much goes wrong.
MANY, FEW, MORE = 200, 25, 5.0
# What is older says nothing any more, seconds.
LIFE = 300.0


class Margins(msgspec.Struct, frozen=True):
    """Factors on what is predicted of each promise."""

    ttft: float = 1.0
    tbt: float = 1.0


class Recent:
    """The last few of some numbers."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._order: deque[tuple[float, float]] = deque()
        self._sorted: list[float] = []

    def add(self, number: float, now: float) -> None:
        if len(self._order) == self._most:
            self._drop()
        self._order.append((now, number))
        insort(self._sorted, number)

    def forget(self, before: float) -> None:
        """Those that came before some moment."""
        while self._order and self._order[0][0] < before:
            self._drop()

    def exceeded(self, share: float) -> float:
        """What the next one exceeds with no more than this probability, 0 if there are none (conformal)."""
        count = len(self._sorted)
        return self._sorted[min(count, math.ceil((count + 1) * (1 - share))) - 1] if count else 0.0

    def _drop(self) -> None:
        del self._sorted[bisect_left(self._sorted, self._order.popleft()[1])]


class Margin:
    """A factor on what is predicted, from 1 to `WIDEST`, learned from those that were let in with it.

    Of each it is known afterwards which factor would have been just right. All but the allowed share of the
    last ones need no more than this: a conformal quantile (Vovk, Gammerman and Shafer, 2005; for what changes
    in time Gibbs and Candès, arXiv 2106.00170). Where predictions are good it is 1 and costs nothing.

    Attributes:
        broken: share of promises that were broken lately.
    """

    def __init__(self) -> None:
        self.broken = 0.0
        self._many, self._few = Recent(MANY), Recent(FEW)
        self._last = -math.inf
        self._factor = 1.0

    def factor(self, now: float) -> float:
        """Observed over predicted, as all but a few are expected to have it."""
        return self._factor if now <= self._last + LIFE else 1.0

    def add(
        self, predicted: float, observed: float, limit: float, made: float, now: float, allowed: float
    ) -> None:
        """What became of one that was let in.

        Nothing is learned of a promise that by its prediction could not be kept, and of one with plenty of
        room only that it was broken.

        Args:
            made: the factor when it was let in.
            allowed: the share of promises that may be broken.
        """
        if predicted > limit:
            return
        self.broken += ((observed > limit) - self.broken) / MANY
        if observed <= limit and made * predicted < limit / 2:
            return
        needed = min(made * observed / limit, WIDEST)
        for window in (self._many, self._few):
            window.forget(now - LIFE)
            window.add(needed, now)
        self._last = now
        self._factor = max(1.0, self._many.exceeded(allowed), self._few.exceeded(MORE * allowed))


def allowed(other: Margin) -> float:
    """What one margin may let break beside another: all that is left, half of it at least."""
    return BROKEN - min(other.broken, BROKEN / 2)
