"""The choice of engines, on hand-made and random pools."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.scheduler.policy import Choice, Demand, InstanceView, LeastLoaded, Snapshot


def view(
    url: str, *, usable: bool = True, group: str = "g", requests: int = 0, tokens: int = 0
) -> InstanceView:
    return InstanceView(url, usable, group, requests, tokens)


def test_prefill_by_tokens_and_decode_by_requests():
    pools = Snapshot(
        (view("p1", requests=1, tokens=9000), view("p2", requests=5, tokens=100)),
        (view("d1", requests=3, tokens=10), view("d2", requests=2, tokens=9000)),
    )
    assert LeastLoaded().choose(pools, Demand(50)) == Choice("p2", "d2")


def test_ties_take_turns_in_both_pools():
    pools = Snapshot((view("p1"), view("p2")), (view("d1"), view("d2"), view("d3")))
    policy = LeastLoaded()
    chosen = [policy.choose(pools, Demand(50)) for _ in range(12)]
    assert Counter(choice.prefill for choice in chosen) == {"p1": 6, "p2": 6}
    assert Counter(choice.decode for choice in chosen) == {"d1": 4, "d2": 4, "d3": 4}


def test_only_pairs_that_can_exchange_kv():
    pools = Snapshot(
        (view("p1", group="a"), view("p2", group="b", tokens=999), view("p3", group="c")),
        (view("d1", group="b", requests=7), view("d2", group="x")),
    )
    assert LeastLoaded().choose(pools, Demand(50)) == Choice("p2", "d1")


def test_decode_alone_says_why():
    live = Snapshot((view("p"),), (view("d"),))
    dead = Snapshot((view("p", usable=False),), (view("d"),))
    assert LeastLoaded(10).choose(live, Demand(9)) == Choice(None, "d", "short_prompt")
    assert LeastLoaded(10).choose(live, Demand(10)) == Choice("p", "d")
    assert LeastLoaded().choose(live, Demand(9, alone="beam_search")) == Choice(None, "d", "beam_search")
    assert LeastLoaded().choose(dead, Demand(9)) == Choice(None, "d", "no_prefill")


def test_no_usable_decode_is_no_choice():
    assert LeastLoaded().choose(Snapshot((view("p"),), (view("d", usable=False),)), Demand(9)) is None


def test_an_avoided_decode_is_the_last_resort():
    pools = Snapshot((view("p"),), (view("d1"), view("d2", requests=9)))
    assert LeastLoaded().choose(pools, Demand(9, avoid=frozenset({"d1"}))) == Choice("p", "d2")
    assert LeastLoaded().choose(pools, Demand(9, avoid=frozenset({"d1", "d2"}))) == Choice("p", "d1")
    assert LeastLoaded().choose(pools, Demand(9, avoid=frozenset({"p"}))) == Choice(None, "d1", "no_prefill")


def _views(side: str) -> st.SearchStrategy[tuple[InstanceView, ...]]:
    one = st.tuples(st.booleans(), st.sampled_from("ab"), st.integers(0, 3), st.integers(0, 3))
    return st.lists(one, max_size=5).map(
        lambda found: tuple(InstanceView(f"{side}{at}", *fields) for at, fields in enumerate(found))
    )


@given(_views("p"), _views("d"), st.integers(0, 20), st.sets(st.sampled_from(["p0", "p1", "d0", "d1"])))
def test_every_choice_is_usable_paired_and_least(
    prefill: tuple[InstanceView, ...], decode: tuple[InstanceView, ...], tokens: int, avoid: set[str]
):
    choice = LeastLoaded(5).choose(Snapshot(prefill, decode), Demand(tokens, avoid=frozenset(avoid)))
    by_url = {each.url: each for each in (*prefill, *decode)}
    if choice is None:
        assert not any(each.usable for each in decode)
        return
    chosen = by_url[choice.decode]
    assert chosen.usable
    rivals = [each for each in decode if each.usable and each.url not in avoid]
    assert choice.decode not in avoid or not rivals
    if choice.prefill is None:
        assert choice.reason
        return
    source = by_url[choice.prefill]
    assert source.usable
    assert source.url not in avoid
    assert source.group == chosen.group
    assert tokens >= 5
    assert all(chosen.requests <= each.requests for each in rivals if each.group == chosen.group)
