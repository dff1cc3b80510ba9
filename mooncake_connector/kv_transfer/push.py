"""Which KV of a request may be pushed, and which has landed: prefill's bookkeeping of one transfer.

Sans-IO. A unit (a block, if both sides' are alike; see `routes`) is pushed once it is complete (or the prompt
is), per layer, so that the first layers of a chunk travel while the last ones are computed. A preempted
request's blocks belong to others at once: writes that were in flight then may have carried another request's
bytes, so they count as *void* and their units are pushed again, after the void writes have ended (bytes of
two writes to one block must not cross on the way).
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np

from mooncake_connector.kv_transfer.layout import BlockIds, Group, KVLayout
from mooncake_connector.kv_transfer.plan import Event
from mooncake_connector.kv_transfer.routes import Route, units_of


class Clock(Protocol):
    """How far the engine's forward passes are (see `clock`)."""

    def written(self, layer: int, step: int) -> int | None:
        """The mark after which the KV that `layer` writes in `step` is in memory; None: not written yet."""

    def began(self, step: int) -> int:
        """The mark after which all KV of earlier steps is in memory."""

    def passed(self) -> int:
        """The newest mark that was passed."""

    def after(self, mark: int) -> tuple[Event, ...]:
        """What has yet to happen before `mark` is passed."""


class Want(msgspec.Struct, frozen=True, eq=False):
    """What decode wants of one group.

    Attributes:
        index: int64 [n], positions of the blocks in the request's block table, ascending.
        block: int64 [n], decode's block ids for them.
    """

    index: BlockIds
    block: BlockIds


def check_want(want: Sequence[Want], target: KVLayout) -> None:
    """Whether decode's wants make sense for its layout.

    Raises:
        ValueError: another number of groups, positions that do not ascend, ids outside decode's pool.
    """
    if len(want) != len(target.groups):
        raise ValueError(f"{len(want)} groups, the layout has {len(target.groups)}")
    for w in want:
        low = min(w.index.min(initial=0), w.block.min(initial=0))
        if low < 0 or w.block.max(initial=0) >= target.num_blocks:
            raise ValueError(f"a block id outside 0..{target.num_blocks - 1}")
        if (w.index[1:] <= w.index[:-1]).any():
            raise ValueError("block positions do not ascend")


class Chunk(msgspec.Struct, frozen=True):
    """One request's share of a scheduler step.

    Attributes:
        start: tokens computed before this step.
        end: tokens computed after it.
        blocks: per group, block ids to append to the request's table (all of them if `replace`).
        hits_ready: tokens before `start` are in memory already.
    """

    request_id: str
    transfer_id: str
    prompt_hash: bytes
    start: int
    end: int
    blocks: tuple[list[int], ...]
    replace: bool
    hits_ready: bool


class Computed:
    """How much of a request's KV exists on this worker, and where.

    Attributes:
        table: per group, the ids of the request's blocks.
        ready: tokens that are in memory when `step` begins.
        step: the last step that computes some of it; -1: none has, or what it computed is lost.
        step_ready: tokens that are in memory when that step has ended.
        preemptions: how often its blocks were taken away.
    """

    def __init__(self, num_groups: int) -> None:
        self.table: list[list[int]] = [[] for _ in range(num_groups)]
        self.ready = 0
        self.step = -1
        self.step_ready = 0
        self.preemptions = 0

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
        """Step number `step` computes tokens ``[start, end)``.

        Args:
            blocks: per group, block ids to append to the request's table, or all of them if `replace`.
            hits_ready: whether tokens before `start` are in memory already (a prefix hit may be another
                request's chunk of this very step).
        """
        self.ready = max(self.ready, self.step_ready)
        if replace:
            self.table = [list(ids) for ids in blocks]
        else:
            for table, ids in zip(self.table, blocks, strict=True):
                table.extend(ids)
        if hits_ready:
            self.ready = max(self.ready, start)
        self.step, self.step_ready = step, end

    def preempted(self) -> None:
        """The request's blocks were freed; what is in flight may carry other requests' bytes."""
        self.ready = self.step_ready = 0
        self.step = -1
        self.table = [[] for _ in self.table]
        self.preemptions += 1

    def has(self, num_tokens: int, last_layer: int, clock: Clock) -> bool:
        """Whether the KV of the first `num_tokens` tokens is in memory, in all layers."""
        if self.step < 0:
            return False
        if self.ready >= num_tokens:
            return clock.began(self.step) <= clock.passed()
        mark = clock.written(last_layer, self.step)
        return self.step_ready >= num_tokens and mark is not None and mark <= clock.passed()


class Span(msgspec.Struct, frozen=True):
    """Entries ``[begin, end)`` of what is wanted of the layer's group."""

    layer: int
    begin: int
    end: int


class Write(msgspec.Struct, frozen=True, eq=False):
    """One submission: per layer the source units and the target units (int64, equal lengths).

    Attributes:
        mark: of the clock, after which the source is in memory.
        preemptions: of the request, when it was submitted.
    """

    op: int
    mark: int
    preemptions: int
    spans: tuple[Span, ...]
    source: dict[int, BlockIds]
    target: dict[int, BlockIds]


class PushProgress:
    """Progress of one request's push to one decode worker.

    Args:
        groups: KV cache groups here and there.
        layer_groups: group of each layer of this worker.
        least: bytes that a write must have while the step that it overlaps with runs on.
        num_tokens: tokens of the prompt whose KV is wanted.
        want: decode's blocks for it.
    """

    def __init__(
        self,
        route: Route,
        groups: tuple[Sequence[Group], Sequence[Group]],
        layer_groups: Sequence[int],
        computed: Computed,
        num_tokens: int,
        want: Sequence[Want],
        least: int = 0,
    ) -> None:
        self._route, self._computed = route, computed
        self._num_tokens, self._least = num_tokens, least
        self._layer_groups = layer_groups
        self._per_block = [g.block_size // u for g, u in zip(groups[0], route.unit, strict=True)]
        self._index: list[BlockIds] = []
        self._target: list[BlockIds] = []
        for w, g, unit in zip(want, groups[1], route.unit, strict=True):
            index = units_of(w.index, g.block_size // unit)
            real = index * unit < num_tokens
            self._index.append(index[real])
            self._target.append(units_of(w.block, g.block_size // unit)[real])
        self._pushed = dict.fromkeys(route.layers, 0)
        self._in_flight: dict[int, Write] = {}
        self._next_op = 0

    def next(self, clock: Clock, gather: int = 0) -> Write | None:
        """The next write, with everything that has become ready, or None.

        Args:
            gather: bytes that a write of what has yet to be computed must have, more than `least`, unless
                no more than `least` is left of the step behind it: then that is all that its end waits for.

        Raises:
            IndexError: Decode wants blocks that the request does not have.
        """
        computed, step = self._computed, self._computed.step
        if any(write.preemptions != computed.preemptions for write in self._in_flight.values()):
            return None
        began = clock.began(step) if step >= 0 else 0
        before = [self._complete_units(g, computed.ready) for g in range(len(self._index))]
        until = max(computed.ready, computed.step_ready)
        within = [self._complete_units(g, until) for g in range(len(self._index))]
        ready: list[tuple[int, int, Span]] = []
        running, left = False, 0
        for layer, nbytes in zip(self._route.layers, self._route.unit_bytes, strict=True):
            group = self._layer_groups[layer]
            pushed, end, mark = self._pushed[layer], before[group], began
            written = clock.written(layer, step) if step >= 0 else None
            if written is None and step >= 0:
                running = True
                left += nbytes * max(0, within[group] - max(end, pushed))
            elif written is not None and within[group] > max(end, pushed):
                end, mark = within[group], written
            if end > pushed:
                ready.append((mark, nbytes * (end - pushed), Span(layer, pushed, end)))
        if not ready:
            return None
        # A GPU may be far behind what was issued: what it has computed must not wait for what it has not.
        ready.sort(key=lambda entry: entry[0])
        spans: list[Span] = []
        total, last = 0, (passed := clock.passed())
        left += sum(nbytes for _, nbytes, _ in ready)

        def enough() -> bool:
            least = self._least if last <= passed or left <= self._least else max(gather, self._least)
            return total >= least

        for mark, nbytes, span in ready:
            if mark > last and total and enough():
                break
            last = max(last, mark)
            spans.append(span)
            total += nbytes
            left -= nbytes
        if running and not enough():
            return None
        source, target = {}, {}
        tables = [np.asarray(t, np.int64) for t in computed.table]
        for span in spans:
            group = self._layer_groups[span.layer]
            block, inside = np.divmod(self._index[group][span.begin : span.end], self._per_block[group])
            source[span.layer] = tables[group][block] * self._per_block[group] + inside
            target[span.layer] = self._target[group][span.begin : span.end]
            self._pushed[span.layer] = span.end
        write = Write(self._next_op, last, computed.preemptions, tuple(spans), source, target)
        self._in_flight[write.op] = write
        self._next_op += 1
        return write

    def ended(self, op: int) -> None:
        """The write landed; if a preemption made it void, its units are due again."""
        write = self._in_flight.pop(op)
        if write.preemptions != self._computed.preemptions:
            for span in write.spans:
                self._pushed[span.layer] = min(self._pushed[span.layer], span.begin)

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    @property
    def complete(self) -> bool:
        """Whether every wanted unit of every layer has landed."""
        return not self._in_flight and all(
            pushed == self._index[self._layer_groups[layer]].size for layer, pushed in self._pushed.items()
        )

    def _complete_units(self, group: int, tokens: int) -> int:
        """How many of the group's wanted units are complete once `tokens` tokens are computed."""
        index = self._index[group]
        if tokens >= self._num_tokens:
            return int(index.size)
        return int(np.searchsorted(index, tokens // self._route.unit[group]))
