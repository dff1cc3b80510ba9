"""When a request came by: moments in monotonic seconds, which all processes of one host share."""

import time
from collections import OrderedDict
from collections.abc import Iterable

from mooncake_connector.kv_transfer.ports import LoadReport

Moments = dict[str, float]
KEPT = 1024


def mark(moments: Moments, name: str) -> None:
    """Note the first time that something happened."""
    moments.setdefault(name, round(time.monotonic(), 6))


def add_load(moments: Moments, reports: Iterable[LoadReport]) -> None:
    """Note what the workers saw of a load: of all ranks' moments the last, but the first write."""
    reports = list(reports)
    for name in ("reserve_sent", "landed", "done", "taken"):
        if latest := max(getattr(report, name) for report in reports):
            moments[name] = round(latest, 6)
    if begun := [report.first_write for report in reports if report.first_write]:
        moments["first_write"] = round(min(begun), 6)


class Timelines:
    """Those of the last requests, for who asks later: answers that are streamed can't carry them."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Moments] = OrderedDict()

    def keep(self, transfer_id: str, moments: Moments) -> None:
        self._kept[transfer_id] = moments
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def get(self, transfer_id: str) -> Moments:
        """Empty if it is not known (any more)."""
        return self._kept.get(transfer_id, {})
