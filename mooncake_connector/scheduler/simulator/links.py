"""KV on its way between engines."""

from mooncake_connector.scheduler.simulator.costs import Costs


class Links:
    """What leaves an engine goes one after the other over its one link, at full bandwidth."""

    def __init__(self, costs: Costs) -> None:
        self._seconds_per_token = costs.kv_bytes / costs.bandwidth
        self._free: dict[str, float] = {}

    def send(self, source: str, tokens: int, start: float) -> float:
        """When KV of so many tokens has left that can begin to at `start`."""
        free = max(start, self._free.get(source, 0.0)) + tokens * self._seconds_per_token
        self._free[source] = free
        return free
