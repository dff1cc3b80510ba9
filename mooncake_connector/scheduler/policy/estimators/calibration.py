"""How good the predictions were: predicted against observed, by quantity, over the recent past."""

import math

import msgspec

MEMORY = 1000.0
"""An observation counts 1/e after that many others of its quantity."""
STEP = math.log(1.05)
"""Quantiles are exact to 2.5%: this is the width of a bin, as a logarithm."""
SMALLEST, BINS = 1e-7, 800
"""The first bin holds all that is less, the last one all that is more than 8e9."""
KEEP = 1 - 1 / MEMORY
HEAVIEST = 1e12
_LEAST = math.log(SMALLEST)


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Predictions of one quantity.

    Attributes:
        observations: how many there were, ever.
        ratio: observed over predicted: its 10%, 50% and 90% quantiles. 1 is perfect, above 1 was
            predicted too low.
        error: of ``abs(observed - predicted)``, in the quantity's unit: its 50% and 90% quantiles.
        covered: share of observations that were not above the prediction, 0 to 1; 0.9 is right if a 90%
            quantile was predicted.
    """

    observations: int
    ratio: tuple[float, float, float]
    error: tuple[float, float]
    covered: float


class Calibration:
    """Predicted against observed. Memory is bounded by the number of quantities, time by a constant."""

    def __init__(self) -> None:
        self._quantities: dict[str, _Quantity] = {}

    def observe(self, quantity: str, predicted: float, observed: float) -> None:
        """One prediction came true, more or less. Both are times or counts, hence not negative."""
        known = self._quantities.get(quantity)
        if known is None:
            known = self._quantities[quantity] = _Quantity()
        known.observe(max(predicted, 0.0), max(observed, 0.0))

    def quantities(self) -> list[str]:
        """Those that were observed, in the order of their first observation."""
        return list(self._quantities)

    def ratio(self, quantity: str, q: float) -> float:
        """Quantile of observed over predicted; NaN without observations."""
        known = self._quantities.get(quantity)
        return known.ratios.quantile(q) if known else math.nan

    def error(self, quantity: str, q: float) -> float:
        """Quantile of ``abs(observed - predicted)``; NaN without observations."""
        known = self._quantities.get(quantity)
        return known.errors.quantile(q) if known else math.nan

    def summary(self, quantity: str) -> Summary | None:
        """All of one quantity; None without observations."""
        known = self._quantities.get(quantity)
        if known is None:
            return None
        ratio, error = known.ratios.quantile, known.errors.quantile
        return Summary(
            observations=known.observations,
            ratio=(ratio(0.1), ratio(0.5), ratio(0.9)),
            error=(error(0.5), error(0.9)),
            covered=known.covered,
        )


class _Quantity:
    """One quantity's observations."""

    def __init__(self) -> None:
        self.observations = 0
        self.ratios, self.errors = _Histogram(), _Histogram()
        self._covered = self._weight = 0.0

    def observe(self, predicted: float, observed: float) -> None:
        self.observations += 1
        self.ratios.add(max(observed, SMALLEST) / max(predicted, SMALLEST))
        self.errors.add(abs(observed - predicted))
        self._covered = self._covered * KEEP + (observed <= predicted)
        self._weight = self._weight * KEEP + 1

    @property
    def covered(self) -> float:
        return self._covered / self._weight


class _Histogram:
    """Positive numbers, of which the old ones count less: it is the weight of the new ones that grows."""

    def __init__(self) -> None:
        self._weights = [0.0] * BINS
        self._weight, self._total = 1.0, 0.0

    def add(self, value: float) -> None:
        at = int((math.log(value) - _LEAST) / STEP) if value > SMALLEST else 0
        self._weights[at if at < BINS else -1] += self._weight
        self._total += self._weight
        self._weight /= KEEP
        if self._weight > HEAVIEST:
            self._weights = [weight / self._weight for weight in self._weights]
            self._total, self._weight = sum(self._weights), 1.0

    def quantile(self, q: float) -> float:
        """The middle of the bin in which it lies."""
        left, at = q * self._total, 0
        for at in (at for at, weight in enumerate(self._weights) if weight):
            left -= self._weights[at]
            if left <= 0:
                break
        return 0.0 if at == 0 else SMALLEST * math.exp((at + 0.5) * STEP)
