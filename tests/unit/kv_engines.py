"""Engines of any parallelism whose KV is numpy memory, filled with values that tell what they stand for."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mooncake_connector.kv_transfer.layout import Field, Group, KVLayout, Plane, WorkerInfo
from mooncake_connector.kv_transfer.plan import CopyPlan

Bytes = NDArray[np.uint8]
Order = Literal["NHD", "HND", "columns", "packed", "apart"]

UNTOUCHED = 0xEE
ELEMENT = 2
"""Bytes of a number."""


def value(layer: int, token: int, head: int, nbytes: int) -> Bytes:
    """What a token's K and V are, for one of the model's heads; never `UNTOUCHED`."""
    seed = np.arange(nbytes, dtype=np.uint64) + np.uint64(1000 * token + 100_000 * head + 10_000_000 * layer)
    mixed = (seed * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    found: Bytes = (mixed % np.uint64(UNTOUCHED)).astype(np.uint8)
    return found


@dataclass(frozen=True)
class Shape:
    """How an engine keeps its KV.

    Attributes:
        heads: KV heads of the model.
        page_tokens: tokens of a page; a divisor of `block`.
        gap: bytes between pages.
    """

    tp: int
    pp: int
    block: int
    page_tokens: int
    order: Order
    heads: int
    layers: int
    content: int
    gap: int = 0
    blocks: int = 12
    window: int = 0


class Worker:
    """One rank of one stage; its address space begins at `base`."""

    def __init__(self, shape: Shape, rank: int, stage: int, base: int, engine_id: str) -> None:
        self.shape, self.base = shape, base
        own = max(1, shape.heads // shape.tp)
        per_stage = -(-shape.layers // shape.pp)
        self.layers = range(shape.layers)[stage * per_stage : (stage + 1) * per_stage]
        self.head_range = range(own)
        page = own * shape.page_tokens * shape.content
        halves = 2 if shape.order == "apart" else 1
        stride = page // halves + shape.gap
        pages = shape.blocks * (shape.block // shape.page_tokens)
        self.memory = np.full(len(self.layers) * halves * pages * stride, UNTOUCHED, np.uint8)
        self.pages = self.memory.reshape(len(self.layers), halves, pages, stride)[..., : page // halves]
        planes = tuple(
            Plane(
                at,
                0,
                base + (at * halves + half) * pages * stride,
                stride,
                page // halves,
                shape.page_tokens,
                own,
                *self._fields(shape, own),
            )
            for at in range(len(self.layers))
            for half in range(halves)
        )
        self.info = WorkerInfo(
            protocol=3,
            plugin="0",
            engine="none",
            engine_id=engine_id,
            incarnation="1",
            model="m",
            model_hash="h",
            dtype="bfloat16",
            tp_size=shape.tp,
            pp_size=shape.pp,
            rank=rank,
            layout=KVLayout(
                shape.blocks,
                (Group(shape.block, shape.window, "full"),),
                planes,
                (f"bf16 {shape.order if shape.order in ('columns', 'packed', 'apart') else ''}",)
                * len(self.layers),
                tuple(f"model.layers.{layer}.attn" for layer in self.layers),
                (shape.heads,) * len(self.layers),
            ),
            pp_rank=stage,
        )

    @staticmethod
    def _fields(shape: Shape, own: int) -> tuple[int, tuple[Field, ...]]:
        content, tokens = shape.content, shape.page_tokens
        match shape.order:
            case "NHD":
                return content, (Field(0, content, own * content),)
            case "apart":  # each half as NHD
                return content // 2, (Field(0, content // 2, own * content // 2),)
            case "HND":
                return tokens * content, (Field(0, content, content),)
            case "packed":
                return tokens * content, (Field(0, tokens * content, 0),)
            case "columns":
                rows, half = content // 2 // ELEMENT, content // 2
                return tokens * content, (
                    Field(0, ELEMENT, ELEMENT, rows, tokens * ELEMENT),
                    Field(tokens * half, half, half),
                )

    def _at(
        self, layer: int, block: int, token: int, head: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(half, byte in the page) of each of the `content` bytes; the page is the caller's to find."""
        shape, own = self.shape, len(self.head_range)
        content, tokens = shape.content, shape.page_tokens
        byte = np.arange(content)
        zero = np.zeros(content, np.int64)
        head_at = head * tokens * content
        match shape.order:
            case "NHD":
                return zero, (token * own + head) * content + byte
            case "apart":
                half = content // 2
                return byte // half, (token * own + head) * half + byte % half
            case "HND":
                return zero, head_at + token * content + byte
            case "packed":  # some order of its own
                return zero, head_at + (token * content + byte) * 5 % (tokens * content)
            case "columns":
                half = content // 2
                row, inside = np.divmod(byte, ELEMENT)
                k = row * tokens * ELEMENT + token * ELEMENT + inside
                v = tokens * half + token * half + byte - half
                return zero, head_at + np.where(byte < half, k, v)

    def cells(
        self, layer: int, block: int, token: int, head: int
    ) -> tuple[int, NDArray[np.int64], int, NDArray[np.int64]]:
        """Index into `pages` of one token's bytes of one of this rank's heads; `layer` is the model's."""
        page, inside = divmod(token, self.shape.page_tokens)
        half, byte = self._at(layer, block, inside, head)
        pages = self.shape.block // self.shape.page_tokens
        return layer - self.layers.start, half, block * pages + page, byte

    def heads(self) -> range:
        """Which of the model's heads this rank holds, as vLLM assigns them."""
        own = len(self.head_range)
        first = self.info.rank * self.shape.heads // self.shape.tp
        return range(first, first + own)

    def fill(self, table: list[int], tokens: int) -> None:
        """Compute a prompt's KV into the blocks of `table`."""
        for layer in self.layers:
            for token in range(tokens):
                block, inside = divmod(token, self.shape.block)
                for at, head in enumerate(self.heads()):
                    cells = self.cells(layer, table[block], inside, at)
                    self.pages[cells] = value(layer, token, head, self.shape.content)


class Engine:
    """All workers of one engine, stage after stage."""

    def __init__(self, shape: Shape, engine_id: str, base: int) -> None:
        self.shape = shape
        self.workers = [
            Worker(shape, rank, stage, base + ((stage * shape.tp + rank) << 32), engine_id)
            for stage in range(shape.pp)
            for rank in range(shape.tp)
        ]

    @property
    def infos(self) -> list[WorkerInfo]:
        return [worker.info for worker in self.workers]


def copy(plan: CopyPlan, source: Worker, target: Worker, times: NDArray[np.int64]) -> None:
    """Carry a plan out, counting how often each of the target's bytes is written."""
    flat = plan.flat()
    for src, dst, n in zip(flat.src.tolist(), flat.dst.tolist(), flat.length.tolist(), strict=True):
        s, d = src - source.base, dst - target.base
        assert 0 <= s <= s + n <= source.memory.size
        assert 0 <= d <= d + n <= target.memory.size
        target.memory[d : d + n] = source.memory[s : s + n]
        times[d : d + n] += 1
