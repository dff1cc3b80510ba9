"""What is simulated: which engines, what they cost, and the conductor's settings."""

import re
from typing import Literal

import msgspec

from mooncake_connector.errors import ConfigError
from mooncake_connector.scheduler.policy.estimators import (
    Estimators,
    PrefillCost,
    PrefillEstimator,
    StepCost,
    StepEstimator,
    TransferCost,
    TransferEstimator,
)
from mooncake_connector.scheduler.policy.scheduling import Scheduling
from mooncake_connector.scheduler.simulator.costs import Costs

Coupled = Literal["chunked", "whole"]
Prior = Literal["generic", "calibrated"]


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """One simulation but its requests.

    Attributes:
        prefill, decode: how many of these engines.
        coupled: how many engines that do both; with them there are no others.
        whole: coupled engines compute each prompt in a step of its own while everything that decodes stands
            still, as vLLM did before chunked prefill.
        order: ``concurrent``: decode sets KV aside when prefill is asked, and KV travels while it is
            computed; ``serial``: both once prefill is done.
        first_token: which engine's first token the client gets.
        prior: what the conductor believes before it has seen anything: the ``generic`` priors that the proxy
            begins with, or the engines' true costs (``calibrated``).
        prefix_caching: engines keep the KV of former prompts.
        progress: the conductor learns this often how far answers are, seconds.
    """

    costs: Costs
    prefill: int = 0
    decode: int = 0
    coupled: int = 0
    whole: bool = False
    order: Literal["concurrent", "serial"] = "concurrent"
    first_token: Literal["decode", "prefill"] = "decode"
    scheduling: Scheduling = Scheduling()
    prior: Prior = "generic"
    prefix_caching: bool = True
    progress: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.coupled:
            if self.prefill or self.decode:
                raise ConfigError("coupled engines are simulated by themselves, without prefill and decode")
        elif self.prefill < 1 or self.decode < 1:
            raise ConfigError("at least one prefill and one decode engine are needed")

    @property
    def name(self) -> str:
        """As in tables."""
        if self.coupled:
            return f"{self.coupled} coupled ({'whole prompts' if self.whole else 'chunked'})"
        return f"{self.prefill}P{self.decode}D"

    def estimators(self) -> Estimators:
        """What the conductor begins with."""
        if self.prior == "generic":
            return Estimators()
        costs = self.costs
        first = costs.handoff + costs.base
        return Estimators(
            prefill=PrefillEstimator(PrefillCost(costs.base, costs.per_token, costs.per_pair)),
            step=StepEstimator(StepCost(costs.base, costs.per_sequence, costs.per_context)),
            transfer=TransferEstimator(TransferCost(first, costs.kv_bytes / costs.bandwidth, 0.0)),
        )


def parse_pools(text: str) -> dict[str, int]:
    """``2P3D`` or ``20C`` as numbers of engines.

    Raises:
        ConfigError: It is neither.
    """
    text = text.strip().upper()
    if both := re.fullmatch(r"([1-9]\d*)P([1-9]\d*)D", text):
        return {"prefill": int(both[1]), "decode": int(both[2])}
    if coupled := re.fullmatch(r"([1-9]\d*)C", text):
        return {"coupled": int(coupled[1])}
    raise ConfigError(f"--xpyd {text}: write how many of each, such as 2P2D, or 4C for coupled engines")
