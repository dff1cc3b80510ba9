"""When a request came by: moments in monotonic seconds, which all processes of one host share."""

import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from mooncake_connector.kv_transfer.messages import LoadReport

Moments = dict[str, float]
KEPT = 1024


def mark(moments: Moments, name: str) -> None:
    """Note the first time that something happened."""
    moments.setdefault(name, round(time.monotonic(), 6))


def add_load(moments: Moments, reports: Iterable[LoadReport]) -> None:
    """Note what the workers saw of a load: of all ranks' moments the last, but the first write."""
    reports = list(reports)
    for name in ("reserve_sent", "landed", "done"):
        if latest := max(getattr(report, name) for report in reports):
            moments[name] = round(latest, 6)
    if begun := [report.first_write for report in reports if report.first_write]:
        moments["first_write"] = round(min(begun), 6)


def summary(reports: Sequence[LoadReport], moments: Moments) -> dict[str, Any]:
    """How a load went, for the request's answer; adds what the workers saw to `moments`."""
    add_load(moments, reports)
    return {
        "outcome": reports[0].outcome.value,
        "reason": reports[0].reason,
        "path": reports[0].path,
        "bytes": sum(r.nbytes for r in reports),
        "early_bytes": sum(r.early_bytes for r in reports),
        "wait_ms": round(1e3 * max(r.wait_s for r in reports), 3),
        "push_ms": round(1e3 * max(r.push_s for r in reports), 3),
        "timeline": moments,
    }


class Timelines:
    """Those of the last requests, for who asks later: answers that are streamed can't carry them."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[Moments, int]] = OrderedDict()

    def keep(self, transfer_id: str, moments: Moments, first_token: int = -1) -> None:
        self._kept[transfer_id] = (moments, first_token)
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def get(self, transfer_id: str) -> dict[str, Any]:
        """Parameters for an answer; nothing in them if it is not known (any more)."""
        moments, first_token = self._kept.get(transfer_id, ({}, -1))
        return {"timeline": moments, "first_token": first_token}
