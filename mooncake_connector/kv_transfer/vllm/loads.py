"""Which loads are over, as early as vLLM's scheduler can be told.

vLLM asks a worker when it has issued a step, and its scheduler hears the answer when that step's output
comes: with asynchronous scheduling, two steps later. So workers also tell our scheduler side directly, which
acts at the very next output, whichever step's that is: a busy engine starts requests two steps earlier.
Only complete loads take that way. vLLM learns of failures from the step outputs, with the blocks concerned.
"""

from collections.abc import Collection
from dataclasses import dataclass

from mooncake_connector.kv_transfer.messages import LoadReport
from mooncake_connector.kv_transfer.session import Outcome


@dataclass
class _Load:
    missing: int  # ranks that have not reported it
    token_only: bool
    complete: bool = True  # in all ranks that have
    told: bool = False  # vLLM knows, and will hear it from the step outputs once more


class Loads:
    """The loads that are under way. An id appears once at a time."""

    def __init__(self) -> None:
        self._loads: dict[str, _Load] = {}

    def __bool__(self) -> bool:
        """Whether reports may come."""
        return bool(self._loads)

    def begin(self, request_id: str, ranks: int, *, token_only: bool) -> None:
        """`token_only`: vLLM knows of no load."""
        self._loads[request_id] = _Load(ranks, token_only)

    def reported(self, report: LoadReport) -> bool:
        """A rank says that the load ended. Returns whether that makes it over, as far as we may act now."""
        load = self._loads.get(report.request_id)
        if load is None or load.told:
            return False
        load.missing -= 1
        load.complete &= report.outcome is Outcome.LOADED
        if load.missing:
            return False
        if load.token_only:
            del self._loads[report.request_id]
            return True
        load.told = load.complete
        return load.told

    def in_outputs(self, request_ids: Collection[str]) -> set[str]:
        """The step outputs of all ranks say that these are over. Returns what vLLM does not know yet."""
        fresh = set()
        for request_id in request_ids:
            load = self._loads.pop(request_id, None)
            if load is None or not load.told:
                fresh.add(request_id)
        return fresh
