"""One request and one decode worker that wants all of it, with pages alike on both sides."""

from collections.abc import Sequence

from mooncake_connector.kv_transfer.layout import Group
from mooncake_connector.kv_transfer.push import Clock, Computed, PushProgress, Want, Write
from mooncake_connector.kv_transfer.routes import Route

UNIT_BYTES = 8


class Push:
    """A request that is computed, and what is pushed of it once decode has reserved.

    Args:
        block: tokens of a block, here and there.
        least: as in `PushProgress`.
        gather: as in `PushProgress.next`.
    """

    def __init__(
        self, num_layers: int, *, block: tuple[int, int] = (4, 4), least: int = 0, gather: int = 0
    ) -> None:
        layers = tuple(range(num_layers))
        unit = min(block)
        self.computed = Computed(1)
        self._route = Route(layers, layers, (unit,), ((),) * num_layers, (UNIT_BYTES,) * num_layers)
        self._groups = [Group(block[0], 0, "full")], [Group(block[1], 0, "full")]
        self._least, self._gather = least, gather
        self._progress: PushProgress | None = None

    def reserve(self, num_tokens: int, want: Sequence[Want]) -> None:
        layer_groups = [0] * len(self._route.layers)
        self._progress = PushProgress(
            self._route, self._groups, layer_groups, self.computed, num_tokens, want, self._least
        )

    def chunk(
        self,
        step: int,
        start: int,
        end: int,
        blocks: Sequence[Sequence[int]],
        *,
        replace: bool,
        hits_ready: bool,
    ) -> None:
        self.computed.chunk(step, start, end, blocks, replace=replace, hits_ready=hits_ready)

    def next(self, clock: Clock) -> Write | None:
        return None if self._progress is None else self._progress.next(clock, self._gather)

    def ended(self, op: int) -> None:
        assert self._progress is not None
        self._progress.ended(op)

    def prefilled(self, clock: Clock) -> bool:
        assert self._progress is not None
        return self.computed.has(self._progress.num_tokens, len(self._route.layers) - 1, clock)

    @property
    def complete(self) -> bool:
        return self._progress is not None and self._progress.complete
