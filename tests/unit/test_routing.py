"""Algorithm 1 (FAST'25, section 4), by hand and against a naive one; the modes that it is compared with."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.scheduler.policy.base import Arrival, Copy, DecodeView, Instance, PrefillView, Side
from mooncake_connector.scheduler.policy.estimators import (
    Estimators,
    PrefillCost,
    PrefillEstimator,
    StepCost,
    StepEstimator,
    TransferCost,
    TransferEstimator,
)
from mooncake_connector.scheduler.policy.routing import Route, Router, Routing

ROOM = 10**6


def estimators(copy: float = 1e-4) -> Estimators:
    """1 ms a computed token, `copy` seconds a copied one; a step takes 10 ms and 1 ms a request."""
    return Estimators(
        prefill=PrefillEstimator(PrefillCost(base=0.0, per_token=1e-3, per_pair=0.0)),
        step=StepEstimator(StepCost(base=0.01, per_request=1e-3, per_token=0.0)),
        transfer=TransferEstimator(TransferCost(latency=0.0, per_token=copy, per_other=0.0)),
        handover=TransferEstimator(TransferCost(latency=0.5, per_token=0.0, per_other=0.0)),
    )


def router(
    routing: Routing = "conductor",
    *,
    copy: float = 1e-4,
    threshold: float = 1.0,
    shortest: int = 0,
    seed: int = 0,
) -> Router:
    return Router(routing, threshold, shortest, estimators(copy), seed)


def prefill(name: str, queue: float = 0.0, cached: int = 0, tokens: int = 0, group: str = "") -> PrefillView:
    return PrefillView(name, group, queue, cached, cached, 0, tokens)


def decode(name: str, batch: int = 0, free: int = ROOM, requests: int = 0, group: str = "") -> DecodeView:
    return DecodeView(name, group, batch, 0, free, 0, requests)


def route(
    own: Router,
    prefills: Sequence[PrefillView],
    decodes: Sequence[DecodeView],
    *,
    side: Side = "decode",
    **fields: Any,
) -> Route | None:
    arrival = Arrival(**({"id": "a", "tokens": 1000} | fields))
    writers = [Instance(name=view.name, side=side, group=view.group) for view in decodes]
    computers = [Instance(name=view.name, side="prefill", group=view.group) for view in prefills]
    views = {
        view.name: view for view in (*(prefill(view.name, group=view.group) for view in decodes), *prefills)
    }
    return own.route(
        arrival,
        computers,
        writers,
        lambda some: [views[one.name] for one in some],
        lambda later: decodes,
        100.0,
    )


def test_the_own_prefix_is_weighed_against_the_queue() -> None:
    # p: 0.5 s queue + 0.4 s to compute 400 of 1000; q: nothing queued, 1.0 s to compute all.
    found = route(router("local_cache"), [prefill("p", 0.5, 600), prefill("q")], [decode("d")])
    assert found
    assert (found.computes, found.cached, found.copy) == ("p", 600, None)
    assert (found.queue, found.seconds, found.handover) == pytest.approx((0.5, 0.4, 0.5))
    assert found.ttft == pytest.approx(1.4)
    found = route(router("local_cache"), [prefill("p", 0.7, 600), prefill("q")], [decode("d")])
    assert found
    assert found.computes == "q"


def test_a_prefix_is_copied_to_where_less_is_queued() -> None:
    # q copies 600 in 0.06 s and computes 400 in 0.4 s: better than waiting 0.3 s at p.
    found = route(router(), [prefill("p", 0.3, 600), prefill("q")], [decode("d")])
    assert found
    assert (found.computes, found.copy, found.cached) == ("q", Copy("p", 600, 600), 600)
    assert (found.copying, found.seconds) == pytest.approx((0.06, 0.4))


def test_only_what_is_missing_is_copied() -> None:
    found = route(router(), [prefill("p", 9.0, 600), prefill("q", 0.0, 200)], [decode("d")])
    assert found
    assert found.copy == Copy("p", 600, 400)


def test_nothing_is_copied_that_is_computed_as_fast() -> None:
    found = route(router(copy=1.1e-3), [prefill("p", 9.0, 600), prefill("q")], [decode("d")])
    assert found
    assert (found.computes, found.copy, found.cached) == ("q", None, 0)


def test_nothing_is_copied_below_the_threshold() -> None:
    pools = [prefill("p", 9.0, 600), prefill("q", 0.0, 400)], [decode("d")]
    below, above = route(router(threshold=1.5), *pools), route(router(threshold=1.4), *pools)
    assert below
    assert above
    assert below.copy is None
    assert above.copy == Copy("p", 600, 200)


def test_nothing_is_copied_between_groups() -> None:
    found = route(
        router(),
        [prefill("p", 9.0, 600, group="one"), prefill("q", group="two")],
        [decode("d", group="one"), decode("e", group="two")],
    )
    assert found
    assert (found.computes, found.decode, found.copy) == ("q", "e", None)


views = st.lists(
    st.tuples(st.floats(0.0, 5.0), st.integers(0, 999), st.sampled_from(["one", "two"])),
    min_size=1,
    max_size=8,
)


@given(views, st.floats(0.0, 4.0), st.floats(1e-5, 2e-3), st.integers(1, 20_000))
def test_the_choice_is_the_least_predicted_ttft(
    pools: list[tuple[float, int, str]], threshold: float, copy: float, tokens: int
) -> None:
    tokens += 1000
    prefills = [prefill(str(n), queue, cached, 0, group) for n, (queue, cached, group) in enumerate(pools)]
    decodes = [decode("d", group="one"), decode("e", group="two")]
    found = route(router(threshold=threshold, copy=copy), prefills, decodes, tokens=tokens)
    assert found
    best = max(prefills, key=lambda view: view.cached)
    naive = {}
    for view in prefills:
        ttft = view.queue + 1e-3 * (tokens - view.cached)
        if view.group == best.group and best.cached > threshold * view.cached:
            moved = view.queue + copy * (best.cached - view.cached) + 1e-3 * (tokens - best.cached)
            ttft = min(ttft, moved)
        naive[view.name] = ttft
    assert found.ttft - found.handover == pytest.approx(min(naive.values()))
    assert naive[found.computes] == pytest.approx(min(naive.values()))
    if found.copy:
        own = next(view for view in prefills if view.name == found.computes)
        assert found.copying + found.seconds < 1e-3 * (tokens - own.cached)


def test_decode_is_the_least_predicted_tbt_among_those_with_room() -> None:
    found = route(
        router(), [prefill("p")], [decode("d", 1, free=1000), decode("e", 5, free=1100), decode("f", 6)]
    )
    assert found
    assert found.decode == "e"
    assert found.tbt == pytest.approx(0.01 + 6e-3)


def test_without_room_anywhere_it_is_the_one_with_most() -> None:
    found = route(router(), [prefill("p")], [decode("d", 1, free=10), decode("e", 5, free=20)])
    assert found
    assert found.decode == "e"


def test_decode_is_looked_at_when_the_prompt_will_be_computed() -> None:
    seen = []

    def later(seconds: float) -> Sequence[DecodeView]:
        seen.append(seconds)
        return [decode("d")]

    computers, writers = [Instance(name="p", side="prefill")], [Instance(name="d", side="decode")]
    views = [prefill("p", 2.0)]
    router().route(Arrival(id="a", tokens=1000), computers, writers, lambda some: views, later, 10.0)
    assert seen == [pytest.approx(3.0)]


@pytest.mark.parametrize("routing", ["conductor", "local_cache", "least_loaded", "round_robin"])
def test_equals_take_turns(routing: Routing) -> None:
    own, seen = router(routing), set()
    for _ in range(2):
        found = route(own, [prefill("p"), prefill("q")], [decode("d"), decode("e")])
        assert found
        seen |= {found.computes, found.decode}
    assert seen == {"p", "q", "d", "e"}


def test_least_loaded_counts_tokens_and_requests_and_nothing_else() -> None:
    found = route(
        router("least_loaded"),
        [prefill("p", 0.0, 900, tokens=10), prefill("q", 9.0, tokens=9)],
        [decode("d", 0, requests=2), decode("e", 9, requests=1)],
    )
    assert found
    assert (found.computes, found.decode) == ("q", "e")


def test_random_is_the_same_for_the_same_seed() -> None:
    pools = [prefill(str(n)) for n in range(9)], [decode(str(n)) for n in range(10, 19)]

    def choices(seed: int) -> list[tuple[str, str]]:
        own = router("random", seed=seed)
        return [(found.computes, found.decode) for _ in range(20) if (found := route(own, *pools))]

    assert choices(1) == choices(1)
    assert choices(1) != choices(2)
    assert len(set(choices(1))) > 5


@pytest.mark.parametrize(
    ("fields", "prefills", "reason"),
    [
        ({"alone": "logprobs"}, [prefill("p")], "logprobs"),
        ({"tokens": 9}, [prefill("p")], "short_prompt"),
        ({}, [], "no_prefill"),
        ({}, [prefill("p", group="other")], "no_prefill"),
        ({"avoid": frozenset({"p"})}, [prefill("p")], "no_prefill"),
    ],
)
@pytest.mark.parametrize("routing", ["conductor", "least_loaded", "random"])
def test_decode_computes_what_no_prefill_engine_can(
    routing: Routing, fields: dict[str, Any], prefills: list[PrefillView], reason: str
) -> None:
    found = route(router(routing, shortest=10), prefills, [decode("d")], **fields)
    assert found
    assert (found.computes, found.decode, found.reason, found.handover) == ("d", "d", reason, 0.0)


def test_a_decode_engine_that_failed_is_avoided_unless_there_is_no_other() -> None:
    avoid = frozenset({"d"})
    found = route(router(), [prefill("p")], [decode("d"), decode("e", 99)], avoid=avoid)
    assert found
    assert found.decode == "e"
    found = route(router(), [prefill("p")], [decode("d")], avoid=avoid)
    assert found
    assert found.decode == "d"


def test_without_a_decode_engine_there_is_no_route() -> None:
    assert route(router(), [prefill("p")], []) is None


@pytest.mark.parametrize("routing", ["conductor", "local_cache", "least_loaded", "round_robin", "random"])
def test_a_coupled_engine_does_both(routing: Routing) -> None:
    found = route(router(routing), [], [decode("c"), decode("e")], side="coupled")
    assert found
    assert found.computes == found.decode
    assert found.reason == "coupled"
