"""Which KV of a request may be pushed, and which has landed: prefill's bookkeeping of one transfer.

Sans-IO. A block is pushed once it is complete (or the prompt is), per layer, so that the first layers of a
chunk travel while the last ones are computed. A preempted request's blocks belong to others at once: writes
that were in flight then may have carried another request's bytes, so they count as *void* and their blocks
are pushed again, after the void writes have ended (bytes of two writes to one block must not cross on the
way).
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np

from mooncake_connector.kv_transfer.layout import BlockIds, Group, KVLayout
from mooncake_connector.kv_transfer.plan import Event


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


class Span(msgspec.Struct, frozen=True):
    """Entries ``[begin, end)`` of the layer's group's `Want`."""

    layer: int
    begin: int
    end: int


class Write(msgspec.Struct, frozen=True, eq=False):
    """One submission: per layer the source blocks and the target blocks (int64, equal lengths).

    Attributes:
        mark: of the clock, after which the source is in memory.
    """

    op: int
    mark: int
    spans: tuple[Span, ...]
    source: dict[int, BlockIds]
    target: dict[int, BlockIds]


class PushProgress:
    """Progress of one request's push.

    Args:
        groups: KV cache groups of the layout.
        layer_groups: group of each layer.
        block_bytes: bytes of one block, of each layer.
        least: bytes that a write must have while the step that it overlaps with runs on.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        layer_groups: Sequence[int],
        block_bytes: Sequence[int],
        least: int = 0,
    ) -> None:
        self._groups = groups
        self._layer_groups = layer_groups
        self._block_bytes = block_bytes
        self._least = least
        self._num_tokens = 0
        self._want: Sequence[Want] | None = None
        self._table: list[list[int]] = [[] for _ in groups]
        self._pushed = [0] * len(layer_groups)
        self._ready = 0
        self._step = -1
        self._step_ready = 0
        self._in_flight: dict[int, tuple[Span, ...]] = {}
        self._void: set[int] = set()
        self._next_op = 0

    def reserve(self, num_tokens: int, want: Sequence[Want]) -> None:
        """Decode wants these blocks, which hold the KV of the prompt's first `num_tokens` tokens."""
        self._num_tokens, self._want = num_tokens, want

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
        self._ready = max(self._ready, self._step_ready)
        if replace:
            self._table = [list(ids) for ids in blocks]
        else:
            for table, ids in zip(self._table, blocks, strict=True):
                table.extend(ids)
        if hits_ready:
            self._ready = max(self._ready, start)
        self._step, self._step_ready = step, end

    def preempted(self) -> None:
        """The request's blocks were freed; what is in flight may carry other requests' bytes."""
        self._ready = self._step_ready = 0
        self._step = -1
        self._table = [[] for _ in self._groups]
        self._void |= set(self._in_flight)

    def next(self, clock: Clock) -> Write | None:
        """The next write, with everything that has become ready, or None."""
        if self._want is None or self._void:
            return None
        began = clock.began(self._step) if self._step >= 0 else 0
        before = [self._complete_blocks(g, self._ready) for g in range(len(self._groups))]
        within = [
            self._complete_blocks(g, max(self._ready, self._step_ready)) for g in range(len(self._groups))
        ]
        ready: list[tuple[int, Span]] = []
        running = False
        for layer, group in enumerate(self._layer_groups):
            pushed, end, mark = self._pushed[layer], before[group], began
            written = clock.written(layer, self._step) if self._step >= 0 else None
            if written is None:
                running |= self._step >= 0
            elif within[group] > max(end, pushed):
                end, mark = within[group], written
            if end > pushed:
                ready.append((mark, Span(layer, pushed, end)))
        if not ready:
            return None
        # A GPU may be far behind what was issued: what it has computed must not wait for what it has not.
        ready.sort(key=lambda entry: entry[0])
        spans: list[Span] = []
        nbytes, last = 0, clock.passed()
        for mark, span in ready:
            if mark > last and nbytes >= max(self._least, 1):
                break
            last = max(last, mark)
            spans.append(span)
            nbytes += (span.end - span.begin) * self._block_bytes[span.layer]
        if running and nbytes < self._least:
            return None
        source, target = {}, {}
        tables = [np.asarray(t, np.int64) for t in self._table]
        for span in spans:
            want = self._want[self._layer_groups[span.layer]]
            source[span.layer] = tables[self._layer_groups[span.layer]][want.index[span.begin : span.end]]
            target[span.layer] = want.block[span.begin : span.end]
            self._pushed[span.layer] = span.end
        write = Write(self._next_op, last, tuple(spans), source, target)
        self._in_flight[write.op] = write.spans
        self._next_op += 1
        return write

    def ended(self, op: int) -> None:
        """The write landed; if a preemption made it void, its blocks are due again."""
        for span in self._in_flight.pop(op):
            if op in self._void:
                self._pushed[span.layer] = min(self._pushed[span.layer], span.begin)
        self._void.discard(op)

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def prefilled(self, clock: Clock) -> bool:
        """Whether all the KV that decode wants is in memory."""
        if self._step < 0:
            return False
        if self._ready >= self._num_tokens:
            return clock.began(self._step) <= clock.passed()
        mark = clock.written(len(self._layer_groups) - 1, self._step)
        return self._step_ready >= self._num_tokens and mark is not None and mark <= clock.passed()

    @property
    def complete(self) -> bool:
        """Whether every wanted block of every layer has landed."""
        return (
            self._want is not None
            and not self._in_flight
            and all(
                pushed == self._want[group].index.size
                for pushed, group in zip(self._pushed, self._layer_groups, strict=True)
            )
        )

    def _complete_blocks(self, group: int, tokens: int) -> int:
        """How many entries of the group's want are complete once `tokens` tokens are computed."""
        assert self._want is not None
        want = self._want[group]
        if tokens >= self._num_tokens:
            return int(want.index.size)
        return int(np.searchsorted(want.index, tokens // self._groups[group].block_size))
