"""What the conductor expects, learned while it works. Pure: no clock, no randomness."""

from dataclasses import dataclass, field

from mooncake_connector.scheduler.policy.estimators.calibration import Calibration
from mooncake_connector.scheduler.policy.estimators.output_length import Lengths, OutputLengths
from mooncake_connector.scheduler.policy.estimators.prefill import PrefillCost, PrefillEstimator
from mooncake_connector.scheduler.policy.estimators.step import StepCost, StepEstimator
from mooncake_connector.scheduler.policy.estimators.transfer import TransferCost, TransferEstimator

__all__ = [
    "Calibration",
    "Estimators",
    "Lengths",
    "OutputLengths",
    "PrefillCost",
    "PrefillEstimator",
    "StepCost",
    "StepEstimator",
    "TransferCost",
    "TransferEstimator",
]


@dataclass(frozen=True, slots=True)
class Estimators:
    """All that is learned, and how good it was.

    `transfer` is of copied prefixes; `handover` of what is left of a prompt's KV to send when it is computed.
    """

    prefill: PrefillEstimator = field(default_factory=PrefillEstimator)
    step: StepEstimator = field(default_factory=StepEstimator)
    transfer: TransferEstimator = field(default_factory=TransferEstimator)
    handover: TransferEstimator = field(default_factory=TransferEstimator)
    lengths: OutputLengths = field(default_factory=OutputLengths)
    calibration: Calibration = field(default_factory=Calibration)
