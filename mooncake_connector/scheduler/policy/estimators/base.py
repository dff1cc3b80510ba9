"""Costs that are linear in three features, learned while they are used: by instance, shrunk towards the pool.

Bayesian linear regression with forgetting. It is weighted by the cost itself, so that an error of 10% counts
the same for a prompt of 100 tokens and of 100,000. Coefficients are never negative, hence neither is a cost,
and a cost never falls when a feature grows.
"""

from collections import deque
from collections.abc import Hashable

Features = tuple[float, float, float]
Coefficients = tuple[float, float, float]

PRIOR_OBSERVATIONS = 5.0
"""How many observations the prior is worth."""
POOL_OBSERVATIONS = 4.0
"""How many observations of its own an instance needs to count as much as its pool does."""
MEMORY = 300.0
"""An observation counts 1/e after that many others."""
KEEP = 1 - 1 / MEMORY
OFF = 2.0
"""A cost that differs from what was expected by more than this factor is doubted until others confirm it."""
RECENT = 7
"""So many costs decide by their median whether a strange one is an outlier or the engine has changed."""
KEPT = 0.5
"""What is kept of the past when it has changed."""
FADING = 0.97
"""The power to which an instance's distance from its pool is raised again and again while it is idle."""
MOST = 4096
"""Instances, or pairs of them, that are remembered."""
SMALL = 1e-9


class Costs:
    """Coefficients by instance; the pool's for those that have not been observed.

    Args:
        prior: coefficients before there are observations. One that is 0 stays 0: its feature plays no part.
        observations: how many observations the prior is worth.

    Raises:
        ValueError: No coefficient is positive, or one is negative.
    """

    def __init__(self, prior: Coefficients, observations: float = PRIOR_OBSERVATIONS) -> None:
        if min(prior) < 0 or max(prior) <= 0:
            raise ValueError(f"costs must be positive: {prior}")
        self._pool = _Fit(prior, (1.0, 1.0, 1.0), observations)
        self._fits: dict[Hashable, _Fit] = {}
        self.pool: Coefficients = prior
        self.by_instance: dict[Hashable, Coefficients] = {}

    def observe(self, instance: Hashable, features: Features, seconds: float) -> None:
        """An instance took so long; what is not a positive time is ignored."""
        if not 0 < seconds < float("inf"):
            return
        pool, fits = self._pool, self._fits
        pool.learn(features, seconds)
        pool.solve()
        self.pool = pool.coefficients
        fit = fits.pop(instance, None)
        if fit is None:
            fit = _Fit(pool.scale, pool.factors, 0.0)
            if len(fits) >= MOST:
                oldest = next(iter(fits))
                del fits[oldest], self.by_instance[oldest]
        elif fits:
            # Without this, one that once was slow and is never chosen for it would look slow for ever.
            idle = next(iter(fits))
            other = fits[idle] = fits.pop(idle)
            other.fade(pool.factors)
            self.by_instance[idle] = other.coefficients
        fits[instance] = fit
        fit.learn(features, seconds)
        fit.solve(pool.factors, fit.distance(pool.factors))
        self.by_instance[instance] = fit.coefficients


class _Fit:
    """One regression. It finds the factors by which the true coefficients differ from the prior's.

    Attributes:
        scale: the prior's coefficients.
        factors: what was found.
        coefficients: `scale` times `factors`.
    """

    __slots__ = ("_a", "_apart", "_features", "_recent", "_v", "coefficients", "factors", "scale")

    def __init__(self, scale: Coefficients, factors: Features, observations: float) -> None:
        self.scale, self.factors = scale, factors
        self.coefficients = _times(scale, factors)
        w = observations
        # The information matrix (its upper half) and vector of the normal equations.
        self._a = (w, 0.0, 0.0, w, 0.0, w)
        self._v = (w * factors[0], w * factors[1], w * factors[2])
        self._recent = deque([1.0] * RECENT, RECENT)
        self._features, self._apart = scale, False

    def learn(self, features: Features, seconds: float) -> None:
        """Take one observation in; `solve` draws the conclusion."""
        self._features = features
        x, y, z = features[0] * self.scale[0], features[1] * self.scale[1], features[2] * self.scale[2]
        f, g, h = self.factors
        expected = x * f + y * g + z * h
        if expected < SMALL:
            expected = SMALL
        ratio = seconds / expected
        recent = self._recent
        recent.append(ratio)
        median = sorted(recent)[RECENT // 2]
        if not 1 / OFF < median < OFF:
            self._rescale(median)
            expected *= median
            ratio /= median
        weight = 1.0
        if ratio > OFF:
            weight, ratio = OFF / ratio, OFF
        elif ratio * OFF < 1:
            weight, ratio = ratio * OFF, 1 / OFF
        x, y, z = x / expected, y / expected, z / expected
        wx, wy, wz = weight * x, weight * y, weight * z
        a, b, c, d, e, i = self._a
        self._a = (
            a * KEEP + wx * x,
            b * KEEP + wx * y,
            c * KEEP + wx * z,
            d * KEEP + wy * y,
            e * KEEP + wy * z,
            i * KEEP + wz * z,
        )
        p, q, r = self._v
        self._v = (p * KEEP + wx * ratio, q * KEEP + wy * ratio, r * KEEP + wz * ratio)

    def _rescale(self, by: float) -> None:
        """The engine has changed or the prior was wrong: the proportions stay, and half of what was known."""
        self._apart = True
        f, g, h = self.factors
        self.factors = (f * by, g * by, h * by)
        a, b, c, d, e, i = self._a
        k = KEPT / (by * by)
        self._a = (a * k, b * k, c * k, d * k, e * k, i * k)
        p, q, r = self._v
        k = KEPT / by
        self._v = (p * k, q * k, r * k)
        self._recent = deque([ratio / by for ratio in self._recent], RECENT)

    def distance(self, pool: Features) -> float:
        """How many times slower than its pool it was last; 1 if they are of one kind.

        Of one of another kind only the pool's proportions say something. Its own observations have to
        have said that it is: when the pool has changed, those with few of them are to follow.
        """
        if not self._apart:
            return 1.0
        x, y, z = _times(self._features, self.scale)
        own = x * self.factors[0] + y * self.factors[1] + z * self.factors[2]
        distance = (own + SMALL) / (x * pool[0] + y * pool[1] + z * pool[2] + SMALL)
        self._apart = not 1 / OFF < distance < OFF
        return distance if self._apart else 1.0

    def fade(self, pool: Features) -> None:
        """It was not observed for a while: it comes nearer to its pool."""
        a, b, c, d, e, i = self._a
        self._a = (a * KEEP, b * KEEP, c * KEEP, d * KEEP, e * KEEP, i * KEEP)
        p, q, r = self._v
        self._v = (p * KEEP, q * KEEP, r * KEEP)
        self.solve(pool, self.distance(pool) ** FADING)

    def solve(self, pool: Features | None = None, distance: float = 1.0) -> None:
        """Find the factors; the prior is `pool` times `distance`, or else what they were."""
        a, b, c, d, e, i = self._a
        p, q, r = self._v
        if pool is None:
            f, g, h = self.factors
            k = m = n = 1e-5 * (a + d + i) + 1e-12
        else:
            f, g, h = pool[0] * distance, pool[1] * distance, pool[2] * distance
            # In the scale of whichever is slower, or a slow instance would need many more observations.
            u, v, w = self.factors
            u, v, w = u if u > f else f, v if v > g else g, w if w > h else h
            least = 0.1 * max(u, v, w) + SMALL
            k = POOL_OBSERVATIONS / (u if u > least else least) ** 2
            m = POOL_OBSERVATIONS / (v if v > least else least) ** 2
            n = POOL_OBSERVATIONS / (w if w > least else least) ** 2
        found = _nonnegative((a + k, b, c, d + m, e, i + n), (p + k * f, q + m * g, r + n * h))
        # All 0 would stay so for ever; only rounding makes them that.
        if any(found):
            self.factors = found
        self.coefficients = _times(self.scale, self.factors)


def _times(left: Features, right: Features) -> Features:
    return left[0] * right[0], left[1] * right[1], left[2] * right[2]


def _nonnegative(a: tuple[float, float, float, float, float, float], v: Features) -> Features:
    """What is nearest to solving the symmetric positive system ``a x = v`` (upper half) with no x below 0."""
    a00, a01, a02, a11, a12, a22 = a
    v0, v1, v2 = v
    c00, c01, c02 = a11 * a22 - a12 * a12, a02 * a12 - a01 * a22, a01 * a12 - a02 * a11
    c11, c12, c22 = a00 * a22 - a02 * a02, a01 * a02 - a00 * a12, a00 * a11 - a01 * a01
    determinant = a00 * c00 + a01 * c01 + a02 * c02
    if determinant > 0:
        x = (c00 * v0 + c01 * v1 + c02 * v2) / determinant
        y = (c01 * v0 + c11 * v1 + c12 * v2) / determinant
        z = (c02 * v0 + c12 * v1 + c22 * v2) / determinant
        if x >= 0 and y >= 0 and z >= 0:
            return x, y, z
    # The best point lies on a face where some are 0, and is that face's own solution: few enough to try all.
    best, found = 0.0, (0.0, 0.0, 0.0)
    for first, second, minor, one, mixed, other in (
        (0, 1, c22, a00, a01, a11),
        (0, 2, c11, a00, a02, a22),
        (1, 2, c00, a11, a12, a22),
    ):
        p, q = v[first], v[second]
        if minor > 0:
            left, right = (other * p - mixed * q) / minor, (one * q - mixed * p) / minor
            gain = left * p + right * q
            if left >= 0 and right >= 0 and gain > best:
                values = [0.0, 0.0, 0.0]
                values[first], values[second] = left, right
                best, found = gain, (values[0], values[1], values[2])
    for at, one in ((0, a00), (1, a11), (2, a22)):
        if one > 0 and v[at] > 0 and v[at] * v[at] / one > best:
            values = [0.0, 0.0, 0.0]
            values[at] = v[at] / one
            best, found = v[at] * v[at] / one, (values[0], values[1], values[2])
    return found
