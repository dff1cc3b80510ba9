"""Any prefill parallelism, block size and order to any decode's: every byte where it belongs, just once."""

import random
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_connector.errors import IncompatibleError
from mooncake_connector.kv_transfer.clock import LayerClock
from mooncake_connector.kv_transfer.layout import check_compatible, fingerprint
from mooncake_connector.kv_transfer.push import Computed, PushProgress, Want
from mooncake_connector.kv_transfer.routes import Route, routes
from tests.unit.kv_engines import UNTOUCHED, Engine, Order, Shape, copy, value

Sizes = st.sampled_from([1, 2, 4])


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Shape, Shape]:
    """Two ways to keep one model's KV."""
    heads, layers = draw(st.sampled_from([1, 2, 4])), draw(st.integers(2, 5))
    order: Order = draw(st.sampled_from(get_args(Order)))
    fixed = draw(st.sampled_from([2, 4]))

    def shape() -> Shape:
        mine: Order = draw(st.sampled_from(["NHD", "HND"])) if order in ("NHD", "HND") else order
        page = fixed if order == "packed" else draw(st.sampled_from([2, 4, 6, 8]))
        return Shape(
            tp=draw(Sizes),
            pp=draw(st.sampled_from([1, 2])),
            block=page * draw(st.sampled_from([1, 2])),
            page_tokens=page,
            order=mine,
            heads=heads,
            layers=layers,
            content=8,
            gap=draw(st.sampled_from([0, 6])),
        )

    return shape(), shape()


def load(
    p: Shape, d: Shape, tokens: int, cached: int, seed: int
) -> tuple[Engine, Engine, dict[tuple[int, int], int]]:
    """Push a prompt from one engine to all workers of another; returns both and the bytes of each pair."""
    rng = random.Random(seed)
    prefill, decode = Engine(p, "p", 0), Engine(d, "d", 1 << 50)
    there = rng.sample(range(1, p.blocks), -(-tokens // p.block))
    here = rng.sample(range(1, d.blocks), -(-tokens // d.block))
    first = min(cached, len(here) - 1)
    want = [Want(np.arange(first, len(here)), np.array(here[first:]))]
    for worker in prefill.workers:
        worker.fill(there, tokens)
    moved = {}
    counts = [np.zeros(worker.memory.size, np.int64) for worker in decode.workers]
    for (i, j), layers in routes(prefill.infos, decode.infos).items():
        source, target = prefill.workers[i], decode.workers[j]
        check_compatible(source.info, target.info)
        route = Route.of(prefill.infos, i, target.info)
        assert route.target_layers == layers
        computed, clock = Computed(1), LayerClock(source.info.layout.num_layers)
        groups = (source.info.layout.groups, target.info.layout.groups)
        progress = PushProgress(route, groups, [0] * source.info.layout.num_layers, computed, tokens, want)
        granted = target.info.layout.ranges([want[0].block], layers)
        moved[i, j] = 0
        at = step = 0
        while at < tokens or not step:
            step += 1
            end = min(at + rng.randint(1, 9), tokens)
            blocks = there[-(-at // p.block) : -(-end // p.block)]
            computed.chunk(step, at, end, [blocks], replace=step == 1, hits_ready=True)
            clock.step_ended(step)
            while (write := progress.next(clock)) is not None:
                plan = route.plan(write.source, write.target)
                assert granted.cover(*plan.writes())
                copy(plan, source, target, counts[j])
                moved[i, j] += plan.nbytes
                progress.ended(write.op)
            at = end
        assert progress.complete
    for target, times in zip(decode.workers, counts, strict=True):
        assert times.max() == 1, "bytes that several sources wrote"
        wanted = np.zeros(target.pages.shape, bool)
        for layer in target.layers:
            for token in range(first * d.block, tokens):
                block, inside = divmod(token, d.block)
                for at, head in enumerate(target.heads()):
                    cells = target.cells(layer, here[block], inside, at)
                    assert (target.pages[cells] == value(layer, token, head, d.content)).all()
            pages = d.block // d.page_tokens
            for block in here[first:]:
                wanted[layer - target.layers.start, :, block * pages : (block + 1) * pages] = True
        assert (target.pages[~wanted] == UNTOUCHED).all(), "bytes outside of the reserved blocks"
    return prefill, decode, moved


@settings(max_examples=150)
@given(pairs(), st.integers(1, 20), st.integers(0, 2), st.integers(0, 99))
def test_every_byte_gets_where_it_belongs(
    pair: tuple[Shape, Shape], tokens: int, cached: int, seed: int
) -> None:
    load(*pair, tokens, cached, seed)


LLAMA = Shape(tp=1, pp=1, block=4, page_tokens=4, order="NHD", heads=4, layers=4, content=8)


def varied(**changes: object) -> Shape:
    from dataclasses import replace

    return replace(LLAMA, **changes)  # type: ignore[arg-type]


def test_equal_engines_exchange_whole_pages() -> None:
    for order in get_args(Order):
        both = varied(order=order, tp=2)
        prefill, decode = Engine(both, "p", 0), Engine(both, "d", 1 << 50)
        assert set(routes(prefill.infos, decode.infos)) == {(0, 0), (1, 1)}
        route = Route.of(prefill.infos, 0, decode.infos[0])
        at = np.array([3, 4, 7])
        plan = route.plan({0: at}, {0: at})
        halves = 2 if order == "apart" else 1
        page = 2 * 4 * 8 // halves
        assert plan.tile is None
        assert plan.length.tolist() == [2 * page, page] * halves


def test_order_is_changed_by_tiles() -> None:
    """One entry per page and rank, however many runs that are."""
    prefill, decode = Engine(varied(), "p", 0), Engine(varied(order="HND", tp=2), "d", 1 << 50)
    route = Route.of(prefill.infos, 0, decode.infos[1])
    at = np.array([3, 4, 7])
    plan = route.plan(dict.fromkeys(range(4), at), dict.fromkeys(range(4), at))
    assert plan.tile is not None
    assert plan.src.size == 4 * 3
    assert (plan.tile.run, plan.tile.n1 * plan.tile.n2) == (8, 2 * 4)


@pytest.mark.parametrize(
    ("p", "d", "senders"),
    [
        ({"tp": 4}, {"tp": 1}, {0: 4}),
        ({"tp": 1}, {"tp": 4}, {0: 1, 1: 1, 2: 1, 3: 1}),
        # What several ranks hold alike is shared out over them: a latent, or heads fewer than ranks.
        ({"tp": 4, "heads": 1}, {"tp": 1, "heads": 1}, {0: 4}),
        ({"tp": 4, "heads": 1}, {"tp": 4, "heads": 1}, {0: 1, 1: 1, 2: 1, 3: 1}),
        ({"tp": 2, "heads": 1}, {"tp": 4, "heads": 1}, {0: 1, 1: 1, 2: 1, 3: 1}),
        ({"tp": 4, "heads": 2}, {"tp": 2, "heads": 2}, {0: 2, 1: 2}),
        ({"pp": 2}, {"pp": 1}, {0: 2}),
        ({"pp": 1}, {"pp": 2}, {0: 1, 1: 1}),
    ],
)
def test_who_sends(p: dict[str, int], d: dict[str, int], senders: dict[int, int]) -> None:
    _, _, moved = load(varied(**p), varied(**d), 16, 0, 1)
    assert {j: sum(at == j for _, at in moved) for _, j in moved} == senders
    per_sender = {i: sum(n for (at, _), n in moved.items() if at == i) for i, _ in moved}
    assert len(set(per_sender.values())) == 1, "some rank sends more than others"


def test_workers_that_nobody_needs_are_reserved_still() -> None:
    prefill = Engine(varied(tp=4, heads=1, layers=2), "p", 0)
    decode = Engine(varied(heads=1, layers=2), "d", 1 << 50)
    found = routes(prefill.infos, decode.infos)
    assert {pair: len(layers) for pair, layers in found.items()} == {
        (0, 0): 1,
        (1, 0): 1,
        (2, 0): 0,
        (3, 0): 0,
    }
    load(prefill.shape, decode.shape, 9, 0, 1)


@pytest.mark.parametrize(
    ("p", "d", "says"),
    [
        ({"heads": 4}, {"heads": 2}, "heads"),
        ({"content": 8}, {"content": 16}, "bytes per token and head .* --dtype"),
        ({"order": "columns"}, {"order": "NHD"}, "engine version"),
        ({"order": "packed"}, {"order": "packed", "block": 8, "page_tokens": 8}, "same --block-size"),
        ({"window": 8}, {"window": 8, "block": 8, "page_tokens": 8}, "divides prefill's"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(p: dict[str, object], d: dict[str, object], says: str) -> None:
    prefill, decode = Engine(varied(**p), "p", 0), Engine(varied(**d), "d", 1 << 50)
    with pytest.raises(IncompatibleError, match=says):
        check_compatible(prefill.infos[0], decode.infos[0])


def test_a_layer_that_nobody_has_is_named() -> None:
    prefill, decode = Engine(varied(layers=2), "p", 0), Engine(varied(layers=3), "d", 1 << 50)
    with pytest.raises(IncompatibleError, match=r"has layer model\.layers\.2"):
        routes(prefill.infos, decode.infos)


def test_a_fingerprint_is_the_models_not_the_ranks() -> None:
    one = fingerprint(Engine(varied(), "p", 0).infos)
    assert one == fingerprint(Engine(varied(tp=2, pp=2, block=8, order="HND"), "d", 1 << 50).infos)
    assert one != fingerprint(Engine(varied(heads=2), "p", 0).infos)
    assert one != fingerprint(Engine(varied(order="columns"), "p", 0).infos)
