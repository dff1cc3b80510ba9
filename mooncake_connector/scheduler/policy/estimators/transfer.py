"""How long KV is on its way from one instance to another."""

import msgspec

from mooncake_connector.scheduler.policy.estimators.base import PRIOR_OBSERVATIONS, Costs


class TransferCost(msgspec.Struct, frozen=True):
    """Seconds of a transfer: latency + tokens * (per_token + per_other * others).

    As it comes: KV of 128 KiB a token (8 billion parameters, 8 KV heads) at 20 GB/s, shared evenly.

    Attributes:
        latency: seconds.
        per_token: seconds a token when nothing else is under way: the inverse of the bandwidth.
        per_other: seconds more a token for each other transfer under way on the same path; `per_token` if
            they share the bandwidth evenly, 0 if they don't disturb each other.
    """

    latency: float = 0.002
    per_token: float = 6.6e-6
    per_other: float = 6.6e-6

    def seconds(self, tokens: int, others: int = 0) -> float:
        """What the KV of `tokens` costs while `others` are under way too."""
        return self.latency + tokens * (self.per_token + self.per_other * others)


class TransferEstimator:
    """Predicts transfer times, by source and target, and learns from those that were measured.

    Args:
        prior: costs before there are observations.
        observations: how many observations the prior is worth.
    """

    def __init__(self, prior: TransferCost | None = None, observations: float = PRIOR_OBSERVATIONS) -> None:
        prior = prior or TransferCost()
        self._costs = Costs((prior.latency, prior.per_token, prior.per_other), observations)
        self._by_path = self._costs.by_instance

    def seconds(self, source: str, target: str, tokens: int, others: int = 0) -> float:
        """Predicted seconds for the KV of `tokens` while `others` are under way too; 0 for no tokens."""
        if tokens <= 0:
            return 0.0
        latency, per_token, per_other = self._by_path.get((source, target)) or self._costs.pool
        return latency + tokens * (per_token + per_other * others)

    def observe(self, source: str, target: str, tokens: int, seconds: float, others: int = 0) -> None:
        """It took `seconds`; nothing is learned from a transfer of no tokens."""
        if tokens > 0:
            self._costs.observe((source, target), (1.0, tokens, tokens * others), seconds)

    def cost(self, source: str, target: str) -> TransferCost:
        """What is known of a path; of all if it was not observed yet."""
        return TransferCost(*(self._by_path.get((source, target)) or self._costs.pool))
