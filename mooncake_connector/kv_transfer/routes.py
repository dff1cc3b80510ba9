"""Who sends what to whom, and how: any prefill parallelism and block size to any decode parallelism.

Pure. Both ends compute the same from what all workers of the prefill engine say of themselves, and one worker
of decode's. Everything that a decode worker needs has exactly one source; what several prefill ranks hold
alike (a latent, KV heads that are fewer than ranks) is shared out over them.

Block tables differ in their block sizes, so positions and places are counted in *units*: as many tokens as
divide both sides' pages. With equal pages a unit is a page.
"""

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Self

import msgspec
import numpy as np

from mooncake_connector.errors import IncompatibleError
from mooncake_connector.kv_transfer.layout import BlockIds, KVLayout, Plane, WorkerInfo
from mooncake_connector.kv_transfer.memory import U64Array
from mooncake_connector.kv_transfer.plan import CopyPlan, Event, Tile


class WorkerAt(msgspec.Struct, frozen=True):
    """A worker, and the address of its side channel."""

    address: str
    info: WorkerInfo


class Place(msgspec.Struct, frozen=True):
    """Where units begin: page `i` at ``base + i * stride``, and in it unit `j` at ``j * step``.

    Attributes:
        units: per page.
    """

    base: int
    stride: int
    units: int
    step: int

    def at(self, unit: BlockIds) -> U64Array:
        """Addresses of units (int64 [n], counted from page 0)."""
        if self.units == 1:
            at: BlockIds = self.base + unit * self.stride
        else:
            page, inside = np.divmod(unit, self.units)
            at = self.base + page * self.stride + inside * self.step
        return at.view(np.uint64)


class Strip(msgspec.Struct, frozen=True):
    """What one copy per unit moves: the same heads, rows and bytes of one layer.

    Attributes:
        layer: index on prefill's side.
        tile: of one unit.
    """

    layer: int
    source: Place
    target: Place
    tile: Tile


class Route(msgspec.Struct, frozen=True):
    """All that one prefill worker sends to one decode worker.

    Attributes:
        layers: of prefill's layers, those it sends; ascending.
        target_layers: of decode's layers, those it sends.
        unit: tokens of a unit, per group.
        strips: per layer of `layers`.
        unit_bytes: bytes of a unit, per layer of `layers`.
    """

    layers: tuple[int, ...]
    target_layers: tuple[int, ...]
    unit: tuple[int, ...]
    strips: tuple[tuple[Strip, ...], ...]
    unit_bytes: tuple[int, ...]

    @classmethod
    def of(cls, prefill: Sequence[WorkerInfo], index: int, decode: WorkerInfo) -> Self:
        """What worker `index` of the engine sends to `decode`; may be nothing.

        Raises:
            IncompatibleError: The pages can't be re-cut; `check_compatible` says why beforehand.
        """
        me = prefill[index]
        mine, theirs = me.layout.layers, decode.layout.layers
        stages = [[w for w in prefill if w.pp_rank == stage] for stage in range(prefill[0].pp_size)]
        unit = tuple(_unit(me.layout, decode.layout, g) for g in range(len(me.layout.groups)))
        strips: dict[int, list[Strip]] = {}
        targets = []
        for number, (name, theirs_at) in enumerate(theirs.items()):
            layer = mine.get(name)
            if layer is None or me.pp_rank != _stage_of(stages, name):
                continue
            pages = [p for p in me.layout.planes if p.layer == layer]
            places = [p for p in decode.layout.planes if p.layer == theirs_at]
            for p, d in zip(pages, places, strict=True):
                if made := _strips(me, p, decode, d, unit[p.group], number):
                    strips.setdefault(layer, []).extend(made)
                    if theirs_at not in targets:
                        targets.append(theirs_at)
        layers = tuple(sorted(strips))
        per_layer = tuple(tuple(strips[layer]) for layer in layers)
        nbytes = tuple(sum(strip.tile.nbytes for strip in group) for group in per_layer)
        return cls(layers, tuple(targets), unit, per_layer, nbytes)

    def plan(
        self, source: Mapping[int, BlockIds], target: Mapping[int, BlockIds], after: Sequence[Event] = ()
    ) -> CopyPlan:
        """Copy units ``source[layer]`` of prefill to units ``target[layer]`` of decode (int64, equal sizes).

        Args:
            after: what must have happened before the source may be read.
        """
        parts: dict[Tile, tuple[list[U64Array], list[U64Array]]] = {}
        for layer, strips in zip(self.layers, self.strips, strict=True):
            if layer not in source:
                continue
            for strip in strips:
                src, dst = parts.setdefault(strip.tile, ([], []))
                src.append(strip.source.at(source[layer]))
                dst.append(strip.target.at(target[layer]))
        plans = [
            CopyPlan.tiled(np.concatenate(src), np.concatenate(dst), tile, after)
            for tile, (src, dst) in parts.items()
        ]
        if len(plans) == 1:
            return plans[0]
        # A plan has tiles of one shape; different ones are the exception.
        flat = [plan.flat() for plan in plans]
        nothing = [np.empty(0, np.uint64)]
        return CopyPlan.of(
            np.concatenate([p.src for p in flat] or nothing),
            np.concatenate([p.dst for p in flat] or nothing),
            np.concatenate([p.length for p in flat] or nothing),
            after,
        )


def routes(
    prefill: Sequence[WorkerInfo], decode: Sequence[WorkerInfo]
) -> dict[tuple[int, int], tuple[int, ...]]:
    """Which prefill workers send to which decode workers, and which layers.

    Prefill workers that nobody needs are in it as well, with no layers: they hold a request's KV until every
    worker that is to reserve it has done so.

    Returns:
        (index into `prefill`, index into `decode`) -> target layers.

    Raises:
        IncompatibleError: Some layer of `decode` is on no prefill worker.
    """
    found = {
        (i, j): route.target_layers
        for j, d in enumerate(decode)
        for i in range(len(prefill))
        if (route := Route.of(prefill, i, d)).layers
    }
    for j, d in enumerate(decode):
        held = {name for w in prefill for name in w.layout.layers}
        if missing := [name for name in d.layout.layers if name not in held]:
            raise IncompatibleError(
                f"prefill and decode can't exchange KV: no prefill worker has layer {missing[0]}, "
                f"which decode worker {d.name} has (serve the same model on both)"
            )
        if not any(at == j for _, at in found):
            raise IncompatibleError(f"no prefill worker has anything for decode worker {d.name}")
    for i in range(len(prefill)):
        if not any(at == i for at, _ in found):
            found[i, i % len(decode)] = ()
    return found


def units_of(blocks: BlockIds, per_block: int) -> BlockIds:
    """The units of blocks: ids or positions (int64 [n]) become int64 [n * per_block]."""
    if per_block == 1:
        return blocks
    units: BlockIds = (blocks[:, None] * per_block + np.arange(per_block)).ravel()
    return units


def _unit(prefill: KVLayout, decode: KVLayout, group: int) -> int:
    """Tokens that divide both sides' pages of a group."""
    tokens = [prefill.groups[group].block_size, decode.groups[group].block_size]
    for layout in (prefill, decode):
        tokens += [layout.page_tokens(p) for p in layout.planes if p.group == group]
    return gcd(*tokens)


def _stage_of(stages: Sequence[Sequence[WorkerInfo]], name: str) -> int:
    """The first pipeline stage that has the layer."""
    return next(i for i, stage in enumerate(stages) if any(name in w.layout.layers for w in stage))


def _strips(
    prefill: WorkerInfo, p: Plane, decode: WorkerInfo, d: Plane, unit: int, number: int
) -> list[Strip]:
    """What one rank's plane gives to another's; nothing if another rank that holds the same gives it."""
    here, there = prefill.heads_of(p), decode.heads_of(d)
    first, last = max(here.start, there.start), min(here.stop, there.stop)
    if first >= last or not _chosen(prefill, p, decode, d, number):
        return []
    n = last - first
    source, target = prefill.layout.page_tokens(p), decode.layout.page_tokens(d)
    at = (p.base + (first - here.start) * p.head_stride, d.base + (first - there.start) * d.head_stride)

    def strip(
        run: int,
        dims: list[tuple[int, int, int]],
        inside: int = 0,
        there: int = 0,
        steps: tuple[int, int] = (0, 0),
    ) -> Strip:
        return Strip(
            p.layer,
            Place(at[0] + inside, p.stride, source // unit, steps[0] * unit),
            Place(at[1] + there, d.stride, target // unit, steps[1] * unit),
            Tile.of(run, dims),
        )

    alike = source == target == unit and p.fields == d.fields
    if alike and n == p.heads == d.heads and p.head_stride == d.head_stride and p.dense and d.dense:
        return [strip(p.nbytes, [])]
    if not (p.fields and d.fields):
        raise IncompatibleError(
            "KV pages of unknown contents differ: give both the same -tp and --block-size"
        )
    if alike and p.head_major and d.head_major:
        return [strip(p.head_bytes, [(n, p.head_stride, d.head_stride)])]
    made = []
    for a, b in zip(p.fields, d.fields, strict=True):
        dims = [(n, p.head_stride, d.head_stride), (a.rows, a.row_stride, b.row_stride)]
        if a.token_stride:
            dims.append((unit, a.token_stride, b.token_stride))
        elif not source == target == unit:
            raise IncompatibleError("packed KV pages can't be cut: give both the same --block-size")
        made.append(strip(a.width, dims, a.offset, b.offset, (a.token_stride, b.token_stride)))
    return made


def _chosen(prefill: WorkerInfo, p: Plane, decode: WorkerInfo, d: Plane, number: int) -> bool:
    """Whether this rank is the one, of those that hold the same heads, to send layer `number` to `decode`."""
    have, need = prefill.replicas(p), decode.replicas(d)
    mine, theirs = prefill.rank % have, decode.rank % need
    if need >= have:
        return mine == theirs * have // need
    # Fewer ranks want it than have it: each takes its layers from several in turn.
    low, high = theirs * have // need, (theirs + 1) * have // need
    return mine == low + number % (high - low)
