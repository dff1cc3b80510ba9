"""How long clients wait between two tokens: every single gap, in bins of one percent."""

import math

_BIN = math.log(1.01)


class Gaps:
    """A histogram of gaps.

    Args:
        limit: longer ones are slow, seconds.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._bins: dict[int, int] = {}

    def add(self, seconds: float, count: int) -> None:
        """`count` gaps of that length more; fewer if it is negative."""
        if count and seconds > 0:
            at = math.floor(math.log(seconds) / _BIN)
            self._bins[at] = self._bins.get(at, 0) + count

    def quantile(self, q: float) -> float:
        """The gap that the part `q` of all gaps does not exceed, within a percent; 0 without any."""
        rank = q * sum(self._bins.values())
        for at in sorted(self._bins):
            rank -= self._bins[at]
            if rank <= 0:
                return math.exp((at + 0.5) * _BIN)
        return 0.0

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(self._bins.values())
