"""What the conductor keeps of a request that it placed."""

import msgspec

from mooncake_connector.scheduler.policy.base import Arrival
from mooncake_connector.scheduler.policy.decode_table import Answer
from mooncake_connector.scheduler.policy.margin import Margins
from mooncake_connector.scheduler.policy.routing import Route


class Flight(msgspec.Struct):
    """A placed request.

    Attributes:
        margins: with which it was let in.
        came: when it arrived.
        began: when it was placed.
        prefilled: when its prompt was computed; 0 before.
        first: when its first token came; 0 before, and for an answer in one piece.
        since: when `areas` were noted: at its first token, or when its prompt was computed.
        areas: batch and context of decode, summed over time.
        underway: its prompt is not computed yet.
    """

    arrival: Arrival
    route: Route
    answer: Answer
    margins: Margins
    came: float
    began: float
    prefilled: float = 0.0
    first: float = 0.0
    since: float = 0.0
    areas: tuple[float, float] = (0.0, 0.0)
    underway: bool = True
