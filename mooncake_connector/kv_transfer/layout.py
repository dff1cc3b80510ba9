"""KVLayout: where an engine keeps the KV of block b, and whether two engines keep the same bytes there."""

import hashlib
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from mooncake_connector.errors import IncompatibleError
from mooncake_connector.kv_transfer.memory import Ranges, Region
from mooncake_connector.kv_transfer.plan import CopyPlan

BlockIds = NDArray[np.int64]


class Group(msgspec.Struct, frozen=True):
    """Layers that share one block table (a vLLM KV cache group).

    Attributes:
        block_size: tokens per block.
        window: sliding window in tokens; 0 for full attention.
        kind: ``full``, ``sliding`` or ``mla``, for messages to people.
    """

    block_size: int
    window: int
    kind: str

    def first_needed(self, num_tokens: int) -> int:
        """Index of the first block that a query at position ``num_tokens`` still attends to."""
        if not self.window:
            return 0
        return max(0, num_tokens - self.window + 1) // self.block_size


class Plane(msgspec.Struct, frozen=True):
    """One array of pages: the K and V of one layer, or one of the two where the engine keeps them apart.

    Attributes:
        layer: index in the order of the engine's KV caches.
        group: index into `KVLayout.groups`.
        base: address of block 0.
        stride: bytes from one block to the next.
        nbytes: bytes of one block.
    """

    layer: int
    group: int
    base: int
    stride: int
    nbytes: int


class KVLayout(msgspec.Struct, frozen=True):
    """The KV geometry of one worker (one tensor-parallel rank).

    Attributes:
        num_blocks: blocks in the pool; block ids are below it.
        groups: KV cache groups, in the engine's order.
        planes: every page array of this rank.
        form: what one page holds, per layer (shape, strides, dtype, attention backend): two layouts may
            exchange
            pages only if these are equal.
    """

    num_blocks: int
    groups: tuple[Group, ...]
    planes: tuple[Plane, ...]
    form: tuple[str, ...]

    @property
    def num_layers(self) -> int:
        return max((p.layer for p in self.planes), default=-1) + 1

    def fingerprint(self) -> str:
        """Equal for two layouts exactly if their pages hold the same bytes for the same tokens."""
        shape = [(p.layer, p.group, p.nbytes) for p in self.planes]
        return hashlib.sha256(msgspec.msgpack.encode([self.groups, shape, self.form])).hexdigest()[:16]

    def regions(self) -> tuple[Region, ...]:
        """The memory of all planes, overlapping and adjacent ones as one."""
        extent = [plane.stride * (self.num_blocks - 1) + plane.nbytes for plane in self.planes]
        spans = Ranges.of(
            np.array([plane.base for plane in self.planes], np.uint64), np.array(extent, np.uint64)
        )
        return tuple(
            Region(start, end - start)
            for start, end in zip(spans.start.tolist(), spans.end.tolist(), strict=True)
        )

    def ranges(self, blocks: Sequence[BlockIds]) -> Ranges:
        """The memory of ``blocks[g]`` (ids, int64) in every plane of each group g."""
        address, length = [], []
        for plane in self.planes:
            ids = blocks[plane.group]
            address.append(plane.base + ids * plane.stride)
            length.append(np.full(ids.size, plane.nbytes, np.uint64))
        if not address:
            return Ranges.of(np.empty(0, np.uint64), np.empty(0, np.uint64))
        return Ranges.of(np.concatenate(address).astype(np.uint64), np.concatenate(length))


def copy_plan(
    source: KVLayout, target: KVLayout, pairs: Sequence[tuple[int, BlockIds, BlockIds]]
) -> CopyPlan:
    """Plan copying blocks between two layouts with equal fingerprints.

    Args:
        source: layout to read from.
        target: layout to write to.
        pairs: (plane index, source block ids, target block ids), ids int64 of equal length.
    """
    src, dst, length = [], [], []
    for index, from_blocks, to_blocks in pairs:
        a, b = source.planes[index], target.planes[index]
        src.append(a.base + from_blocks * a.stride)
        dst.append(b.base + to_blocks * b.stride)
        length.append(np.full(from_blocks.size, a.nbytes, np.uint64))
    if not src:
        empty = np.empty(0, np.uint64)
        return CopyPlan.of(empty, empty, empty)
    return CopyPlan.of(
        np.concatenate(src).astype(np.uint64), np.concatenate(dst).astype(np.uint64), np.concatenate(length)
    )


class WorkerInfo(msgspec.Struct, frozen=True):
    """What the two ends of a handshake tell each other.

    Attributes:
        protocol: version of the push protocol.
        plugin: version of this package.
        engine: name and version of the serving engine.
        engine_id: the engine's id; `incarnation` changes at every start, also where the id is pinned.
        model: name, for people; `model_hash` decides.
        rank: tensor-parallel rank of this worker.
    """

    protocol: int
    plugin: str
    engine: str
    engine_id: str
    incarnation: str
    model: str
    model_hash: str
    dtype: str
    tp_size: int
    pp_size: int
    rank: int
    layout: KVLayout

    @property
    def name(self) -> str:
        return f"{self.engine_id}/{self.incarnation}#{self.rank}"


def check_compatible(prefill: WorkerInfo, decode: WorkerInfo) -> None:
    """Refuse a pair whose KV pages differ.

    Raises:
        IncompatibleError: names every difference with both sides' values.
    """
    differences = []

    def compare(what: str, p: object, d: object, mend: str) -> None:
        if p != d:
            differences.append(f"{what}: prefill has {p}, decode has {d} ({mend})")

    compare("protocol", prefill.protocol, decode.protocol, "install the same mooncake_connector on both")
    same_model = prefill.model_hash == decode.model_hash
    if not same_model:
        compare("model", prefill.model, decode.model, "serve the same model on both")
        if prefill.model == decode.model:
            compare("model configuration", prefill.model_hash, decode.model_hash, "compare both config.json")
    compare("dtype", prefill.dtype, decode.dtype, "give both the same --dtype")
    compare("tensor-parallel size", prefill.tp_size, decode.tp_size, "give both the same -tp")
    compare("pipeline-parallel size", prefill.pp_size, decode.pp_size, "give both the same -pp")
    p, d = prefill.layout, decode.layout
    compare("KV groups", _groups(p), _groups(d), "give both the same --block-size and cache settings")
    if not differences and same_model:
        compare("KV layers", p.num_layers, d.num_layers, "serve the same model on both")
        for i, (a, b) in enumerate(zip(p.form, d.form, strict=False)):
            if a != b:
                compare(f"KV page of layer {i}", a, b, "give both the same engine version and cache settings")
                break
    if not differences and p.fingerprint() != d.fingerprint():
        differences.append(f"KV layout: prefill has {p.fingerprint()}, decode has {d.fingerprint()}")
    if differences:
        raise IncompatibleError("prefill and decode can't exchange KV: " + "; ".join(differences))


def _groups(layout: KVLayout) -> str:
    return ", ".join(
        f"{g.kind}{f' window {g.window}' if g.window else ''} block size {g.block_size}"
        for g in layout.groups
    )
