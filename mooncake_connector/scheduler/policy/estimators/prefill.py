"""How long an instance computes a prompt."""

import msgspec

from mooncake_connector.scheduler.policy.estimators.base import PRIOR_OBSERVATIONS, Costs


class PrefillCost(msgspec.Struct, frozen=True):
    """Prefill seconds: base + per_token * n + per_pair * n * (cached + n / 2), n tokens being computed.

    The last is attention: each token attends to all before it. As it comes: a dense model of 8 billion
    parameters in bfloat16 on one A100 (16 GFLOP a token, 0.5 MFLOP a pair, half of 312 TFLOP/s; base: the
    weights are read).

    Attributes:
        base: seconds.
        per_token: seconds a computed token.
        per_pair: seconds a pair of a computed token and one that it attends to.
    """

    base: float = 0.01
    per_token: float = 1e-4
    per_pair: float = 3.4e-9

    def seconds(self, tokens: int, cached: int = 0) -> float:
        """What a prompt of `tokens` costs whose first `cached` are there already; at least one is not."""
        n = max(tokens - cached, 1)
        return self.base + self.per_token * n + self.per_pair * n * (cached + 0.5 * n)


class PrefillEstimator:
    """Predicts prefill times, by instance, and learns from those that were measured.

    Args:
        prior: costs before there are observations.
        observations: how many observations the prior is worth.
    """

    def __init__(self, prior: PrefillCost | None = None, observations: float = PRIOR_OBSERVATIONS) -> None:
        prior = prior or PrefillCost()
        self._costs = Costs((prior.base, prior.per_token, prior.per_pair), observations)
        self._by_instance = self._costs.by_instance

    def seconds(self, instance: str, tokens: int, cached: int = 0) -> float:
        """Predicted seconds to compute a prompt of `tokens` whose first `cached` are there."""
        base, per_token, per_pair = self._by_instance.get(instance) or self._costs.pool
        n = tokens - cached
        if n < 1:
            n = 1
        return base + n * (per_token + per_pair * (cached + 0.5 * n))

    def observe(self, instance: str, tokens: int, cached: int, seconds: float) -> None:
        """It took `seconds`, without any wait in the instance's queue."""
        n = max(tokens - cached, 1)
        self._costs.observe(instance, (1.0, n, n * (cached + 0.5 * n)), seconds)

    def cost(self, instance: str) -> PrefillCost:
        """What is known of an instance; of its pool if it was not observed yet."""
        return PrefillCost(*(self._by_instance.get(instance) or self._costs.pool))
