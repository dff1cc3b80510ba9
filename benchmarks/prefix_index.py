"""The prefix index at the size of a large pool: memory, lookups, and KV events applied, on one core.

64 instances hold 15,625 blocks of 16 tokens each. Memory is what the process grows by while it learns them
from events as engines send them. Lookups are of 100,000 tokens, hashing included, among all that.
"""

import argparse
import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import report

from mooncake_connector.scheduler.policy.engine_blocks import EngineBlocks, decode
from mooncake_connector.scheduler.policy.prefix_index import PrefixIndex

NAME = "prefix_index"
INSTANCES, BLOCKS, BLOCK = 64, 1_000_000, 16
PROMPT = 100_000
REPEATS = 30
VOCABULARY = 150_000
EACH = BLOCKS // INSTANCES
PER_PROMPT = 125
PACKAGES = ("msgspec", "numpy", "mooncake-connector")


def stored(rng: np.random.Generator, hashes: list[int], parent: int | None) -> dict[str, object]:
    """As vLLM publishes it."""
    count = len(hashes)
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": rng.integers(0, VOCABULARY, count * BLOCK).tolist(),
        "block_size": BLOCK,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * count,
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }


def removed(hash: int) -> dict[str, object]:
    """As vLLM publishes it: one event for each block."""
    return {"type": "BlockRemoved", "block_hashes": [hash], "medium": "GPU", "group_idx": 0}


def batch(events: list[dict[str, object]]) -> bytes:
    return msgspec.msgpack.encode([time.time(), events, 0])


def hashes_of(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(0, 2**64, count, dtype=np.uint64).tolist()


def filling(rng: np.random.Generator) -> Iterator[bytes]:
    """One instance's cache, a prompt for each batch."""
    for _ in range(EACH // PER_PROMPT):
        yield batch([stored(rng, hashes_of(rng, PER_PROMPT), None)])


def steady(rng: np.random.Generator, steps: int, running: int) -> list[bytes]:
    """A full engine that decodes `running` requests: each batch fills a block of each, and evicts one."""
    last: list[int | None] = [None] * running
    old: list[int] = []
    payloads = []
    for _ in range(steps):
        new = hashes_of(rng, running)
        events = [removed(hash) for hash in old]
        events += [stored(rng, [hash], parent) for hash, parent in zip(new, last, strict=True)]
        payloads.append(batch(events))
        last, old = list(new), new
    return payloads


def prefills(rng: np.random.Generator, prompts: int, blocks: int) -> list[bytes]:
    """A full engine that computes prompts: each evicts as many blocks as it stores."""
    old: list[int] = []
    payloads = []
    for _ in range(prompts):
        new = hashes_of(rng, blocks)
        payloads.append(batch([*(removed(hash) for hash in old), stored(rng, new, None)]))
        old = new
    return payloads


def resident_mb() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def seconds(call: object) -> float:
    started = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - started


def filled(rng: np.random.Generator) -> tuple[PrefixIndex, list[EngineBlocks], float]:
    """The index at its full size, and by how many MB the process grew for it."""
    list(filling(rng))  # what making events takes is not the index's
    before = resident_mb()
    index = PrefixIndex(BLOCK)
    engines = [EngineBlocks(index, f"http://10.0.0.{i}:8000") for i in range(INSTANCES)]
    for engine in engines:
        for payload in filling(rng):
            engine.apply(decode(payload)[1])
    assert len(index) == INSTANCES * (EACH // PER_PROMPT) * PER_PROMPT, "blocks are missing"
    return index, engines, resident_mb() - before


def lookups(rng: np.random.Generator, index: PrefixIndex) -> list[report.Row]:
    """A prompt that one instance holds and others in parts, as an array and as a list; and an unknown one."""
    prompt = rng.integers(0, VOCABULARY, PROMPT).astype(np.uint32)
    keys = index.keys(prompt)
    for i in range(INSTANCES):
        index.store(f"http://10.0.0.{i}:8000", keys[: len(keys) * (i + 1) // INSTANCES])
    unknown = rng.integers(0, VOCABULARY, PROMPT).astype(np.uint32)
    cases = {
        "array, all 64 hold parts": prompt,
        "list, all 64 hold parts": prompt.tolist(),
        "array, nobody holds it": unknown,
    }
    rows = []
    for case, tokens in cases.items():
        samples = [seconds(lambda t=tokens: index.match(index.keys(t))) * 1e3 for _ in range(REPEATS)]
        rows.append(report.row(NAME, "ours", {"tokens": case}, "lookup_ms", samples, "ms"))
    assert max(index.match(keys).values()) == PROMPT // BLOCK
    for i in range(INSTANCES):
        index.remove(f"http://10.0.0.{i}:8000", keys)
    return rows


def events(rng: np.random.Generator, engine: EngineBlocks) -> list[report.Row]:
    """Decoding and applying; every event of vLLM's is one, however many blocks it names."""
    cases = {
        "decode steps: one block stored, one removed for each request": steady(rng, 100, 256),
        "prompts of 125 blocks: one stored, 125 removed": prefills(rng, 200, PER_PROMPT),
    }
    rows = []
    for case, payloads in cases.items():
        named = [decode(payload)[1] for payload in payloads]
        count = sum(map(len, named))
        blocks = sum(len(event.block_hashes) for batch in named for event in batch)  # type: ignore[union-attr]

        def apply(payloads: list[bytes] = payloads) -> None:
            for payload in payloads:
                engine.apply(decode(payload)[1])

        took = [seconds(apply) for _ in range(7)]
        for metric, total in (("events_per_s", count), ("blocks_per_s", blocks)):
            rows.append(
                report.row(
                    NAME, "ours", {"events": case}, metric, [total / t for t in took], f"{metric[:-6]}/s"
                )
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    busy = [report.settle(20)]
    rng = np.random.default_rng(1)
    index, engines, grown = filled(rng)
    case: dict[str, object] = {"blocks": len(index), "instances": INSTANCES}
    rows = [report.row(NAME, "ours", case, "memory_mb", [grown], "MB")]
    rows += lookups(rng, index)
    rows += events(rng, engines[0])
    report.publish(rows, arguments.json, PACKAGES, busy=busy, facts={"cores_used": 1})


if __name__ == "__main__":
    main()
