"""KVLayout: where a worker keeps the KV of block b, and whether two workers can exchange theirs."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import zip_longest

import msgspec
import numpy as np
from numpy.typing import NDArray

from mooncake_connector.errors import IncompatibleError
from mooncake_connector.kv_transfer.memory import Ranges, Region

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


class Field(msgspec.Struct, frozen=True):
    """What one KV head keeps in a page: for each of `rows` and each token, `width` bytes.

    K and V side by side in a token's bytes are one field. A transposed K (one row per number, the tokens side
    by side in it) has as many rows as the head has numbers.

    Attributes:
        offset: of the head's first byte of this field, from the page's first byte of that head.
        width: bytes that are contiguous for one row and token; of all tokens if `token_stride` is 0.
        token_stride: bytes from token to token; 0 if the backend packs tokens in an order of its own.
        rows, row_stride: how many rows, and bytes from row to row.
    """

    offset: int
    width: int
    token_stride: int
    rows: int = 1
    row_stride: int = 0

    def nbytes(self, tokens: int) -> int:
        """Bytes of one head in a page of so many tokens."""
        return self.width * self.rows * (tokens if self.token_stride else 1)


class Plane(msgspec.Struct, frozen=True):
    """One array of pages: the K and V of one layer, or one of the two where the engine keeps them apart.

    Attributes:
        layer: index into this worker's layers.
        group: index into `KVLayout.groups`.
        base: address of page 0.
        stride: bytes from one page to the next.
        nbytes: bytes from a page's first to one past its last.
        tokens: per page; 0: as many as in a block. Several pages in a row may make up a block.
        heads: KV heads in a page.
        head_stride: bytes from head to head.
        fields: what a page holds of each head; none: only pages that are alike in all the rest fit.
    """

    layer: int
    group: int
    base: int
    stride: int
    nbytes: int
    tokens: int = 0
    heads: int = 1
    head_stride: int = 0
    fields: tuple[Field, ...] = ()

    @property
    def head_bytes(self) -> int:
        """Bytes that a page holds of each head."""
        if not self.fields:
            return self.nbytes // self.heads
        return sum(field.nbytes(self.tokens) for field in self.fields)

    @property
    def dense(self) -> bool:
        """Whether a page has no gaps."""
        return self.head_bytes * self.heads == self.nbytes

    @property
    def head_major(self) -> bool:
        """Whether what a page holds of a head is in one piece."""
        spans = [
            f.offset + (f.rows - 1) * f.row_stride + (self.tokens - 1) * f.token_stride + f.width
            for f in self.fields
        ]
        return max(spans, default=self.head_bytes) == self.head_bytes


class KVLayout(msgspec.Struct, frozen=True):
    """The KV geometry of one worker (one tensor-parallel rank of one pipeline stage).

    Attributes:
        num_blocks: blocks in the pool; block ids are below it.
        groups: KV cache groups, in the engine's order.
        planes: every page array of this worker.
        form: per layer, what its bytes mean (types, packing): must be equal for an exchange.
        names: of the layers, the same in all engines of a model; none: their numbers.
        heads: per layer, KV heads of all ranks together; none: no rank holds what another one holds.
        location: of the memory, ``cpu:0`` or ``cuda:1``.
    """

    num_blocks: int
    groups: tuple[Group, ...]
    planes: tuple[Plane, ...]
    form: tuple[str, ...]
    names: tuple[str, ...] = ()
    heads: tuple[int, ...] = ()
    location: str = "cpu:0"

    @property
    def num_layers(self) -> int:
        return len(self.form)

    @property
    def layers(self) -> dict[str, int]:
        """Index of each layer by its name."""
        return {name: i for i, name in enumerate(self.names or map(str, range(self.num_layers)))}

    def page_tokens(self, plane: Plane) -> int:
        return plane.tokens or self.groups[plane.group].block_size

    def regions(self) -> tuple[Region, ...]:
        """The memory of all planes, overlapping and adjacent ones as one."""
        start, extent = [], []
        for plane in self.planes:
            pages = self.num_blocks * self._pages(plane)
            start.append(plane.base)
            extent.append(plane.stride * (pages - 1) + plane.nbytes)
        spans = Ranges.of(np.array(start, np.uint64), np.array(extent, np.uint64))
        return tuple(
            Region(start, end - start, self.location)
            for start, end in zip(spans.start.tolist(), spans.end.tolist(), strict=True)
        )

    def ranges(self, blocks: Sequence[BlockIds], layers: Collection[int] | None = None) -> Ranges:
        """The memory of ``blocks[g]`` (ids, int64) in every plane of each group g, of `layers` or of all."""
        address, length = [], []
        for plane in self.planes:
            if layers is not None and plane.layer not in layers:
                continue
            ids, pages = blocks[plane.group], self._pages(plane)
            address.append(plane.base + ids * (pages * plane.stride))
            length.append(np.full(ids.size, (pages - 1) * plane.stride + plane.nbytes, np.uint64))
        if not address:
            return Ranges.of(np.empty(0, np.uint64), np.empty(0, np.uint64))
        return Ranges.of(np.concatenate(address).astype(np.uint64), np.concatenate(length))

    def _pages(self, plane: Plane) -> int:
        """Pages of a block."""
        return self.groups[plane.group].block_size // self.page_tokens(plane)


class WorkerInfo(msgspec.Struct, frozen=True):
    """What the two ends of a handshake tell each other.

    Attributes:
        protocol: version of the push protocol.
        plugin: version of this package.
        engine: name and version of the serving engine.
        engine_id: the engine's id; `incarnation` changes at every start, also where the id is pinned.
        model: name, for people; `model_hash` decides.
        rank: tensor-parallel rank of this worker.
        pp_rank: its pipeline stage.
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
    pp_rank: int = 0

    @property
    def name(self) -> str:
        stage = f".{self.pp_rank}" if self.pp_size > 1 else ""
        return f"{self.engine_id}/{self.incarnation}#{self.rank}{stage}"

    @property
    def index(self) -> int:
        """Of this worker among all of its engine, stage after stage."""
        return self.pp_rank * self.tp_size + self.rank

    def total_heads(self, plane: Plane) -> int:
        """KV heads of the plane's layer, of all ranks together."""
        heads = self.layout.heads
        return (heads[plane.layer] if heads else 0) or plane.heads * self.tp_size

    def replicas(self, plane: Plane) -> int:
        """How many ranks hold the same heads of this plane."""
        return max(1, self.tp_size // self.total_heads(plane))

    def heads_of(self, plane: Plane) -> range:
        """Which of the layer's KV heads this rank holds."""
        first = self.rank // self.replicas(plane) * plane.heads
        return range(first, first + plane.heads)


def fingerprint(workers: Sequence[WorkerInfo]) -> str:
    """Equal for two engines exactly if the same bytes stand for the same tokens in their KV.

    How many ranks they have, and where on these the bytes are, does not matter.
    """
    kinds = [(g.kind, g.window) for g in workers[0].layout.groups]
    layers = {
        (name, w.layout.form[i], w.layout.heads[i] if w.layout.heads else 0)
        for w in workers
        for name, i in w.layout.layers.items()
    }
    return hashlib.sha256(msgspec.msgpack.encode([kinds, sorted(layers)])).hexdigest()[:16]


def check_compatible(prefill: WorkerInfo, decode: WorkerInfo) -> None:
    """Refuse a pair of workers that keep other bytes for the same tokens, or in a way that can't be re-cut.

    Raises:
        IncompatibleError: names every difference with both sides' values.
    """
    differences: list[str] = []

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
    p, d = prefill.layout, decode.layout
    compare("KV groups", _kinds(p), _kinds(d), "give both the same cache settings")
    if not differences:
        for i, (a, b) in enumerate(zip(p.groups, d.groups, strict=True)):
            if a.window and a.block_size % b.block_size:
                # Decode's first block would reach back to tokens that prefill's window has left behind.
                mend = "give decode a --block-size that divides prefill's"
                compare(f"block size of sliding KV group {i}", a.block_size, b.block_size, mend)
        _compare_layers(prefill, decode, compare)
    if differences:
        raise IncompatibleError("prefill and decode can't exchange KV: " + "; ".join(differences))


def _compare_layers(
    prefill: WorkerInfo, decode: WorkerInfo, compare: Callable[[str, object, object, str], None]
) -> None:
    """Compare the first layer on which they differ."""
    p, d = prefill.layout, decode.layout
    there, here = p.layers, d.layers
    for name in [name for name in here if name in there]:
        i, j = there[name], here[name]
        pages = [a for a in p.planes if a.layer == i], [b for b in d.planes if b.layer == j]
        what = f"KV of layer {name}"
        found = [
            (what, p.form[i], d.form[j], "give both the same engine version and --kv-cache-dtype"),
            (what, len(pages[0]), len(pages[1]), "give both the same attention backend"),
            (f"group of layer {name}", pages[0][0].group, pages[1][0].group, "give both the same settings"),
        ]
        for a, b in zip(*pages, strict=False):
            found += _compare_planes(what, prefill, a, decode, b)
        for said, theirs, ours, mend in found:
            if theirs != ours:
                compare(said, theirs, ours, mend)
                return


def _compare_planes(
    what: str, prefill: WorkerInfo, p: Plane, decode: WorkerInfo, d: Plane
) -> Iterator[tuple[str, object, object, str]]:
    tokens = prefill.layout.page_tokens(p), decode.layout.page_tokens(d)
    if not (p.fields and d.fields):
        yield "tensor-parallel size", prefill.tp_size, decode.tp_size, "give both the same -tp"
        mend = "give both the same --block-size and attention backend"
        yield f"page of the {what}", (tokens[0], p.nbytes), (tokens[1], d.nbytes), mend
        return
    mend = "serve the same model on both"
    yield f"heads in the {what}", prefill.total_heads(p), decode.total_heads(d), mend
    for a, b in zip_longest(p.fields, d.fields):
        if a is None or b is None or (a.rows, bool(a.token_stride)) != (b.rows, bool(b.token_stride)):
            yield f"packing of the {what}", a, b, "give both the same attention backend"
        elif not a.token_stride:
            mend = "this attention backend packs blocks in its own way: give both the same --block-size"
            yield f"tokens in a page of the {what}", *tokens, mend
        yield (
            f"bytes per token and head in the {what}",
            a and a.width,
            b and b.width,
            "give both the same --dtype",
        )


def _kinds(layout: KVLayout) -> str:
    return ", ".join(f"{g.kind}{f' window {g.window}' if g.window else ''}" for g in layout.groups)
