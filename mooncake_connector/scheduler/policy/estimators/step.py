"""How long a decode step takes, which is the time between two tokens of each request in its batch."""

import msgspec

from mooncake_connector.scheduler.policy.estimators.base import PRIOR_OBSERVATIONS, Costs


class StepCost(msgspec.Struct, frozen=True):
    """Seconds of a decode step: base + per_request * batch + per_token * context.

    As it comes: a dense model of 8 billion parameters in bfloat16 on one A100 at 1.4 TB/s (base: 16 GB of
    weights are read; a token of context is 128 KiB; 50 us a request for its computing and sampling).

    Attributes:
        base: seconds.
        per_request: seconds a request in the batch.
        per_token: seconds a token of KV that the batch attends to.
    """

    base: float = 0.0115
    per_request: float = 5e-5
    per_token: float = 9.4e-8

    def seconds(self, batch: int, context: int) -> float:
        """What a step of `batch` requests costs that attend to `context` tokens of KV in all."""
        return self.base + self.per_request * batch + self.per_token * context


class StepEstimator:
    """Predicts the time between tokens, by instance, and learns from what was measured.

    Args:
        prior: costs before there are observations.
        observations: how many observations the prior is worth.
    """

    def __init__(self, prior: StepCost | None = None, observations: float = PRIOR_OBSERVATIONS) -> None:
        prior = prior or StepCost()
        self._costs = Costs((prior.base, prior.per_request, prior.per_token), observations)
        self._by_instance = self._costs.by_instance

    def seconds(self, instance: str, batch: int, context: int) -> float:
        """Predicted seconds of a step of `batch` requests that attend to `context` tokens of KV in all."""
        base, per_request, per_token = self._by_instance.get(instance) or self._costs.pool
        return base + per_request * batch + per_token * context

    def observe(self, instance: str, batch: int, context: int, seconds: float) -> None:
        """A step took `seconds`, or steps with such a batch did on average."""
        self._costs.observe(instance, (1.0, batch, context), seconds)

    def cost(self, instance: str) -> StepCost:
        """What is known of an instance; of its pool if it was not observed yet."""
        return StepCost(*(self._by_instance.get(instance) or self._costs.pool))
