"""What may be pushed when, and what a preemption undoes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.kv_transfer.clock import LayerClock
from mooncake_connector.kv_transfer.push import Want, Write
from tests.unit.pushes import Push

BLOCK = 4


def want(first: int, end: int) -> Want:
    index = np.arange(first, end, dtype=np.int64)
    return Want(index, 100 + index)


def pushed_blocks(write: Write | None) -> dict[int, list[tuple[int, int]]]:
    """layer -> (source, target) pairs."""
    if write is None:
        return {}
    return {
        layer: list(zip(write.source[layer].tolist(), write.target[layer].tolist(), strict=True))
        for layer in write.source
    }


def test_layers_go_as_they_are_written_and_blocks_when_they_are_full() -> None:
    clock, progress = LayerClock(2), Push(2)
    progress.reserve(10, [want(0, 3)])
    progress.chunk(1, 0, 6, ([7, 8],), replace=True, hits_ready=True)
    assert progress.next(clock) is None
    clock.layer_written(0, 1)
    assert pushed_blocks(progress.next(clock)) == {0: [(7, 100)]}  # block 8 has 2 tokens of 4
    clock.layer_written(1, 1)
    assert pushed_blocks(progress.next(clock)) == {1: [(7, 100)]}
    progress.chunk(2, 6, 11, ([9],), replace=False, hits_ready=False)
    clock.step_ended(2)
    # All that decode wants is there, so the last block goes although it isn't full.
    assert pushed_blocks(progress.next(clock)) == {0: [(8, 101), (9, 102)], 1: [(8, 101), (9, 102)]}
    for op in range(3):
        assert not progress.complete
        progress.ended(op)
    assert progress.complete


def test_prefix_hits_wait_for_the_step_that_may_be_computing_them() -> None:
    clock, progress = LayerClock(1), Push(1)
    progress.reserve(9, [want(0, 3)])
    progress.chunk(1, 8, 10, ([1, 2, 3],), replace=True, hits_ready=False)
    assert progress.next(clock) is None
    clock.layer_written(0, 1)
    assert pushed_blocks(progress.next(clock)) == {0: [(1, 100), (2, 101), (3, 102)]}


def test_prefix_hits_go_at_once_when_they_are_ready() -> None:
    clock, progress = LayerClock(1), Push(1)
    progress.chunk(1, 8, 10, ([1, 2, 3],), replace=True, hits_ready=True)
    progress.reserve(9, [want(1, 3)])  # decode has block 0 itself
    assert pushed_blocks(progress.next(clock)) == {0: [(2, 101)]}


def test_small_pieces_wait_for_the_last_layer_of_their_step() -> None:
    clock = LayerClock(3)
    progress = Push(3, least=16)
    progress.reserve(4, [want(0, 1)])
    progress.chunk(1, 0, 5, ([7, 8],), replace=True, hits_ready=True)
    clock.layer_written(0, 1)
    assert progress.next(clock) is None
    clock.layer_written(1, 1)
    assert pushed_blocks(progress.next(clock)) == {0: [(7, 100)], 1: [(7, 100)]}
    clock.layer_written(2, 1)
    assert pushed_blocks(progress.next(clock)) == {2: [(7, 100)]}


def test_a_preempted_requests_writes_are_void() -> None:
    """They may have carried another request's bytes: the blocks go again, from where they are recomputed."""
    clock, progress = LayerClock(1), Push(1)
    progress.reserve(8, [want(0, 2)])
    progress.chunk(1, 0, 4, ([1],), replace=True, hits_ready=True)
    clock.step_ended(1)
    first = progress.next(clock)
    assert pushed_blocks(first) == {0: [(1, 100)]}
    progress.computed.preempted()
    progress.chunk(2, 0, 9, ([5, 6, 7],), replace=True, hits_ready=True)
    clock.step_ended(2)
    # Two writes to one block must not be under way at once: the second could land first.
    assert progress.next(clock) is None
    progress.ended(0)
    assert not progress.complete
    assert pushed_blocks(progress.next(clock)) == {0: [(5, 100), (6, 101)]}
    progress.ended(1)
    assert progress.complete


def test_what_landed_before_a_preemption_stays_landed() -> None:
    clock, progress = LayerClock(1), Push(1)
    progress.reserve(8, [want(0, 2)])
    progress.chunk(1, 0, 4, ([1],), replace=True, hits_ready=True)
    clock.step_ended(1)
    assert progress.next(clock) is not None
    progress.ended(0)
    progress.computed.preempted()
    progress.chunk(2, 0, 9, ([5, 6, 7],), replace=True, hits_ready=True)
    clock.step_ended(2)
    assert pushed_blocks(progress.next(clock)) == {0: [(6, 101)]}


@given(
    tokens=st.integers(1, 60),
    cached=st.integers(0, 10),
    chunks=st.lists(st.integers(1, 20), min_size=1),
    layers=st.integers(1, 3),
    data=st.data(),
)
def test_every_wanted_block_is_pushed_once(
    tokens: int, cached: int, chunks: list[int], layers: int, data: st.DataObject
) -> None:
    total = -(-tokens // BLOCK)
    first = min(cached, total)
    least, gather = data.draw(st.sampled_from([(0, 0), (40, 0), (8, 40), (0, 100)]))
    clock, progress = LayerClock(layers), Push(layers, least=least, gather=gather)
    seen: dict[int, list[int]] = {layer: [] for layer in range(layers)}
    reserved = False

    def push() -> None:
        nonlocal reserved
        if not reserved and data.draw(st.booleans()):
            progress.reserve(tokens, [want(first, total)])
            reserved = True
        while (write := progress.next(clock)) is not None:
            for layer, pairs in pushed_blocks(write).items():
                for source, target in pairs:
                    assert source == target - 100
                    seen[layer].append(target - 100)
            progress.ended(write.op)

    start = step = blocks = 0
    while start < tokens + 1:  # the prompt has one token more than decode wants
        step += 1
        end = min(start + chunks[step % len(chunks)], tokens + 1)
        new = list(range(blocks, -(-end // BLOCK)))
        progress.chunk(step, start, end, (new,), replace=step == 1, hits_ready=False)
        blocks, start = blocks + len(new), end
        for layer in range(layers):
            clock.layer_written(layer, step)
            push()
        clock.step_ended(step)
        push()
    if not reserved:
        progress.reserve(tokens, [want(first, total)])
        reserved = True
    push()
    assert progress.complete
    assert all(blocks_seen == list(range(first, total)) for blocks_seen in seen.values())


def test_blocks_that_differ_go_in_units() -> None:
    """Large blocks of decode in the pieces that prefill has; small ones as soon as they are complete."""
    clock, progress = LayerClock(1), Push(1, block=(4, 8))
    progress.reserve(13, [Want(np.array([0, 1]), np.array([50, 60]))])
    progress.chunk(1, 0, 6, ([7, 9],), replace=True, hits_ready=True)
    clock.step_ended(1)
    assert pushed_blocks(progress.next(clock)) == {0: [(7, 100)]}
    progress.chunk(2, 6, 14, ([5, 8],), replace=False, hits_ready=True)
    clock.step_ended(2)
    assert pushed_blocks(progress.next(clock)) == {0: [(9, 101), (5, 120), (8, 121)]}

    clock, progress = LayerClock(1), Push(1, block=(8, 4))
    progress.reserve(9, [Want(np.array([1, 2]), np.array([50, 60]))])  # decode has block 0
    progress.chunk(1, 0, 7, ([7],), replace=True, hits_ready=True)
    clock.step_ended(1)
    assert progress.next(clock) is None
    progress.chunk(2, 7, 10, ([9],), replace=False, hits_ready=True)
    clock.step_ended(2)
    # Of the last block only what holds wanted tokens.
    assert pushed_blocks(progress.next(clock)) == {0: [(15, 50), (18, 60)]}
    progress.ended(0)
    assert progress.complete
