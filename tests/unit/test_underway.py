"""Prefixes of prompts in flight count for those behind them on the same engine, and only there."""

from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.scheduler.policy import block_keys
from mooncake_connector.scheduler.policy.base import Arrival, Instance, Placement
from mooncake_connector.scheduler.policy.conductor import Conductor
from mooncake_connector.scheduler.policy.estimators import Estimators
from mooncake_connector.scheduler.policy.prefix_index import PrefixIndex
from mooncake_connector.scheduler.policy.scheduling import Scheduling
from mooncake_connector.scheduler.policy.underway import Underway

# Short ones over few tokens have much in common.
PROMPTS = st.lists(st.integers(0, 2), max_size=6).map(lambda tokens: block_keys.keys(tokens, 1))
STEPS = st.lists(st.tuples(st.sampled_from("ab"), PROMPTS, st.booleans()), max_size=20)


@given(STEPS, PROMPTS, st.integers(0, 6))
def test_it_counts_what_is_open(steps: list[tuple[str, list[int], bool]], keys: list[int], held: int) -> None:
    underway = Underway()
    open_: dict[str, set[int]] = {"a": set(), "b": set()}
    for number, (name, prompt, _) in enumerate(steps):
        underway.begin(name, str(number), prompt)
    for number, (name, prompt, ends) in enumerate(steps):
        if ends:
            underway.end(name, str(number), prompt)
        else:
            open_[name].update(prompt)
    held = min(held, len(keys))
    for name, blocks in open_.items():
        reach = underway.reach(name, keys, held)
        assert held <= reach <= len(keys)
        assert all(key in blocks for key in keys[held:reach])
        assert reach == len(keys) or keys[reach] not in blocks


def test_an_engine_that_went_has_nothing_underway() -> None:
    underway = Underway()
    underway.begin("a", "one", [1, 2])
    underway.leave("a")
    assert underway.reach("a", [1, 2], 0) == 0
    underway.end("a", "one", [1, 2])


def conductor() -> Conductor:
    index = PrefixIndex(512)
    found = Conductor(Scheduling(admission="none"), index, Estimators())
    for name, side in (("p0", "prefill"), ("p1", "prefill"), ("d", "decode")):
        index.join(name)
        found.join(Instance(name=name, side=side), 0.0)  # type: ignore[arg-type]
    return found


def place(by: Conductor, id: str, keys: list[int]) -> Placement:
    verdict = by.arrive(Arrival(id=id, tokens=512 * len(keys) + 10, keys=keys), 0.0)
    assert isinstance(verdict, Placement)
    return verdict


def test_turns_that_share_a_prefix_meet_on_one_engine() -> None:
    by = conductor()
    shared = list(range(1, 41))
    first = place(by, "first", shared)
    other = place(by, "other", [200 + key for key in shared])
    assert other.prefill != first.prefill
    second = place(by, "second", [*shared, 100])
    assert (first.cached, second.cached) == (0, 512 * 40)
    assert second.prefill == first.prefill
    # It is nobody's to copy yet.
    assert second.copy is None


def test_nothing_is_underway_when_it_ended() -> None:
    for end in ("prefilled", "first_token", "ended"):
        by = conductor()
        place(by, "first", [1, 2, 3])
        getattr(by, end)("first", 1.0)
        by.ended("first", 2.0)
        assert place(by, "second", [1, 2, 3]).cached == 0
