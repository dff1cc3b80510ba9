"""What the conductor expects of engines and links: costs learned online."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.scheduler.policy.estimators import (
    PrefillCost,
    PrefillEstimator,
    StepCost,
    StepEstimator,
    TransferCost,
    TransferEstimator,
)
from mooncake_connector.scheduler.policy.estimators import base as costs

TOKENS = st.integers(0, 200_000)
SECONDS = st.floats(1e-6, 1e3)
NAMES = st.sampled_from("abc")
PROMPTS = ((100, 0), (2000, 0), (10_000, 5000), (100_000, 0))


def busy(
    estimator: PrefillEstimator,
    true: Callable[[str], PrefillCost],
    requests: int,
    *,
    noise: float = 0.1,
    stalls: float = 0.0,
    seed: int = 1,
    names: str = "abc",
) -> None:
    """Prompts of all lengths, half of them with a hit, in turns; `stalls`: the share that took 5 s more."""
    rng = random.Random(seed)
    for at in range(requests):
        tokens = int(rng.lognormvariate(8.5, 1.2)) + 1
        cached = rng.choice([0, 0, tokens // 2, tokens - 1])
        stall = 5.0 if rng.random() < stalls else 0.0
        name = names[at % len(names)]
        seconds = true(name).seconds(tokens, cached) * rng.lognormvariate(0, noise) + stall
        estimator.observe(name, tokens, cached, seconds)


def error(estimator: PrefillEstimator, name: str, true: PrefillCost) -> float:
    """The largest relative error over `PROMPTS`."""
    return max(abs(estimator.seconds(name, *prompt) / true.seconds(*prompt) - 1) for prompt in PROMPTS)


def test_before_any_data_the_prior_is_what_is_expected() -> None:
    prior = PrefillCost(0.5, 1e-3, 1e-8)
    assert PrefillEstimator(prior).seconds("a", 1000, 200) == pytest.approx(prior.seconds(1000, 200))
    assert PrefillEstimator(prior).cost("a") == prior
    step = StepCost(0.02, 1e-4, 1e-7)
    assert StepEstimator(step).seconds("a", 8, 9000) == pytest.approx(step.seconds(8, 9000))
    link = TransferCost(0.01, 1e-5, 2e-5)
    assert TransferEstimator(link).seconds("a", "b", 500, 2) == pytest.approx(link.seconds(500, 2))


def test_a_prior_of_no_cost_or_a_negative_one_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        PrefillEstimator(PrefillCost(0.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="positive"):
        StepEstimator(StepCost(0.1, -1e-3, 0.0))


@pytest.mark.parametrize(
    "true",
    [
        PrefillCost(0.005, 5e-5, 2e-9),
        PrefillCost(0.3, 2e-3, 1e-8),
        PrefillCost(1e-3, 1e-6, 1e-11),
        PrefillCost(0.0, 3e-4, 0.0),
    ],
)
def test_prefill_is_learned_under_noise_and_stalls_however_wrong_the_prior_is(true: PrefillCost) -> None:
    estimator = PrefillEstimator()
    busy(estimator, lambda name: true, 1500, stalls=0.02)
    assert error(estimator, "a", true) < 0.1
    cost = estimator.cost("a")
    assert cost.per_token == pytest.approx(true.per_token, rel=0.1)
    assert cost.base == pytest.approx(true.base, rel=0.1, abs=1e-4)


def test_few_observations_bring_a_wrong_prior_to_the_right_size() -> None:
    slow = PrefillCost(0.3, 2e-3, 1e-8)
    estimator = PrefillEstimator()
    busy(estimator, lambda name: slow, 20)
    assert estimator.seconds("a", 5000) == pytest.approx(slow.seconds(5000), rel=0.35)


def test_coefficients_converge_to_the_true_ones_without_noise() -> None:
    true = StepCost(0.03, 4e-4, 5e-8)
    estimator, rng = StepEstimator(), random.Random(3)
    for _ in range(3000):
        batch, context = rng.randrange(1, 64), rng.randrange(1000, 300_000)
        estimator.observe("d", batch, context, true.seconds(batch, context))
    found = estimator.cost("d")
    assert found.base == pytest.approx(true.base, rel=0.02)
    assert found.per_request == pytest.approx(true.per_request, rel=0.02)
    assert found.per_token == pytest.approx(true.per_token, rel=0.02)


def test_one_stall_hardly_moves_what_is_expected() -> None:
    estimator = PrefillEstimator()
    busy(estimator, lambda name: PrefillCost(), 100)
    before = estimator.seconds("a", 1000)
    estimator.observe("a", 1000, 0, 5.0)
    assert estimator.seconds("a", 1000) == pytest.approx(before, rel=0.02)


def test_a_stall_at_the_very_beginning_is_doubted_too() -> None:
    estimator = PrefillEstimator()
    estimator.observe("a", 1000, 0, 5.0)
    assert estimator.seconds("a", 1000) == pytest.approx(PrefillCost().seconds(1000), rel=0.05)


def test_a_time_that_is_far_too_short_is_doubted_too() -> None:
    estimator = PrefillEstimator()
    estimator.observe("a", 1000, 0, 1e-5)
    assert estimator.seconds("a", 1000) == pytest.approx(PrefillCost().seconds(1000), rel=0.05)


@pytest.mark.parametrize("cached", [1000, 1016])
def test_of_a_prompt_that_is_all_there_one_token_is_computed(cached: int) -> None:
    estimator = PrefillEstimator(PrefillCost(0.1, 0.5, 0.0))
    assert estimator.seconds("a", 1000, cached) == pytest.approx(0.6)
    assert PrefillCost(0.1, 0.5, 0.0).seconds(1000, cached) == pytest.approx(0.6)


def test_an_engine_that_has_become_slower_is_believed_after_a_few_requests() -> None:
    estimator = PrefillEstimator()
    busy(estimator, lambda name: PrefillCost(), 300, noise=0.05)
    slower = PrefillCost(0.1, 1e-3, 3.4e-8)
    busy(estimator, lambda name: slower, 12, noise=0.05, names="a")
    assert estimator.seconds("a", 5000) == pytest.approx(slower.seconds(5000), rel=0.3)


def test_each_instance_is_corrected_and_a_new_one_is_like_its_pool() -> None:
    by_name = {"a": PrefillCost(), "b": PrefillCost(0.015, 1.5e-4, 5.1e-9)}
    estimator = PrefillEstimator()
    busy(estimator, by_name.__getitem__, 600, noise=0.05, names="ab")
    for name, true in by_name.items():
        for prompt in PROMPTS[:3]:
            assert estimator.seconds(name, *prompt) == pytest.approx(true.seconds(*prompt), rel=0.1)
    fast, new, slow = (estimator.seconds(name, 4000) for name in ("a", "new", "b"))
    assert fast < new < slow


@pytest.mark.parametrize("times", [4, 8, 20])
def test_one_that_is_many_times_slower_than_its_pool_is_known_for_it(times: int) -> None:
    usual = PrefillCost()
    slow = PrefillCost(usual.base * times, usual.per_token * times, usual.per_pair * times)
    estimator = PrefillEstimator()
    busy(estimator, lambda name: slow if name == "b" else usual, 300, names="abc")
    assert estimator.seconds("a", 4000) == pytest.approx(usual.seconds(4000), rel=0.1)
    assert estimator.seconds("b", 4000) == pytest.approx(slow.seconds(4000), rel=0.1)


def test_an_instance_that_looked_slow_and_is_not_chosen_any_more_comes_back_to_its_pool() -> None:
    estimator = PrefillEstimator()
    busy(estimator, lambda name: PrefillCost(), 100, noise=0.05)
    busy(estimator, lambda name: PrefillCost(0.1, 1e-3, 3.4e-8), 20, noise=0.05, names="c")
    looked = estimator.seconds("c", 4000)
    busy(estimator, lambda name: PrefillCost(), 3000, noise=0.05, names="ab")
    assert looked > 5 * PrefillCost().seconds(4000)
    assert estimator.seconds("c", 4000) == pytest.approx(PrefillCost().seconds(4000), rel=0.1)


def test_a_congested_path_is_learned_and_unknown_paths_are_like_the_mean() -> None:
    true = TransferCost(0.005, 2e-5, 1e-5)
    estimator, rng = TransferEstimator(), random.Random(5)
    for at in range(1500):
        tokens, others = rng.randrange(100, 30_000), rng.randrange(4)
        seconds = true.seconds(tokens, others) * rng.lognormvariate(0, 0.1)
        estimator.observe("pq"[at % 2], "de"[at // 2 % 2], tokens, seconds, others)
    for path in (("p", "d"), ("never", "seen")):
        for others in (0, 3):
            assert estimator.seconds(*path, 8000, others) == pytest.approx(
                true.seconds(8000, others), rel=0.1
            )
    assert estimator.seconds("p", "d", 0) == 0


def test_what_is_no_time_is_not_learned_from() -> None:
    estimator = StepEstimator()
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        estimator.observe("a", 4, 100, seconds)
    assert estimator.cost("a") == StepCost()


def test_engines_that_come_and_go_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "MOST", 8)
    learned = costs.Costs((1.0, 1.0, 1.0))
    for at in range(50):
        learned.observe(f"engine-{at}", (1.0, 2.0, 3.0), 6.0)
    assert len(learned.by_instance) == 8
    assert "engine-49" in learned.by_instance


@given(st.lists(st.tuples(NAMES, TOKENS, TOKENS, SECONDS), max_size=40), TOKENS, TOKENS, TOKENS)
def test_prefill_is_never_negative_and_grows_with_what_is_to_be_computed(
    observed: list[tuple[str, int, int, float]], cached: int, one: int, more: int
) -> None:
    estimator = PrefillEstimator()
    for name, n, hit, seconds in observed:
        estimator.observe(name, n + hit, hit, seconds)
    for name in "abcd":
        short = estimator.seconds(name, cached + one, cached)
        assert 0 <= short < float("inf")
        assert short <= estimator.seconds(name, cached + one + more, cached)
        # Of a prompt of one length, a longer hit never costs more.
        longer_hit = estimator.seconds(name, cached + one + more, cached + more)
        assert longer_hit <= estimator.seconds(name, cached + one + more, cached) * (1 + 1e-9)


@given(
    st.lists(st.tuples(NAMES, st.integers(0, 256), TOKENS, SECONDS), max_size=40),
    st.integers(0, 256),
    TOKENS,
    st.integers(0, 9),
    TOKENS,
)
def test_steps_and_transfers_are_never_negative_and_grow_with_the_load(
    observed: list[tuple[str, int, int, float]], batch: int, context: int, more: int, longer: int
) -> None:
    steps, transfers = StepEstimator(), TransferEstimator()
    for name, size, tokens, seconds in observed:
        steps.observe(name, size, tokens, seconds)
        transfers.observe(name, "d", tokens, seconds, size % 4)
    for name in "abcd":
        step = steps.seconds(name, batch, context)
        assert 0 <= step <= steps.seconds(name, batch + more, context + longer)
        transfer = transfers.seconds(name, "d", context, more)
        assert 0 <= transfer <= transfers.seconds(name, "d", context + longer, more + 1)


@given(st.lists(st.tuples(NAMES, TOKENS, SECONDS), max_size=30))
def test_the_same_observations_give_the_same_costs(observed: list[tuple[str, int, float]]) -> None:
    one, other = PrefillEstimator(), PrefillEstimator()
    for estimator in (one, other):
        for name, tokens, seconds in observed:
            estimator.observe(name, tokens, 0, seconds)
    assert [one.cost(name) for name in "abc"] == [other.cost(name) for name in "abc"]
