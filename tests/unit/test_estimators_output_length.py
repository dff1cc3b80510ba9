"""How long answers will be: distributions, learned by feature and by conversation."""

import random

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mooncake_connector.scheduler.policy.base import Arrival
from mooncake_connector.scheduler.policy.estimators import Lengths, OutputLengths, output_length
from mooncake_connector.scheduler.policy.estimators.output_length import BINS, EDGES, LONGEST

LENGTHS = st.integers(1, 20_000)


def request(
    *, tokens: int = 1000, max_tokens: int = 0, tenant: str = "", conversation: str = "", model: str = "m"
) -> Arrival:
    return Arrival(
        id="r",
        tokens=tokens,
        max_tokens=max_tokens,
        model=model,
        endpoint="/v1/chat/completions",
        tenant=tenant,
        conversation=conversation,
    )


@st.composite
def lengths(draw: st.DrawFn) -> Lengths:
    """Any distribution, cut off anywhere or nowhere."""
    hazards = draw(st.lists(st.floats(0, 0.9), min_size=BINS - 1, max_size=BINS - 1))
    limit = draw(st.one_of(st.just(LONGEST), LENGTHS))
    survival = np.concatenate(([1.0], np.cumprod(1 - np.array([*hazards, 1.0]))))
    return Lengths(survival, limit)


def quantiles(outputs: list[int]) -> tuple[float, float]:
    ordered = sorted(outputs)
    return ordered[len(ordered) // 2], ordered[int(0.9 * len(ordered))]


@given(lengths(), st.integers(0, 25_000), st.lists(LENGTHS, min_size=2, max_size=5))
def test_survival_falls_from_one(found: Lengths, generated: int, at: list[int]) -> None:
    points = [found.survival(tokens, generated) for tokens in sorted(at)]
    assert points == sorted(points, reverse=True)
    assert all(0 <= point <= 1 for point in points)
    assert found.survival(0) == 1
    assert found.survival(generated, generated) == 1


@given(lengths(), st.integers(0, 25_000), st.lists(st.floats(0, 1), min_size=2, max_size=5))
def test_quantiles_grow_and_are_more_than_what_was_generated(
    found: Lengths, generated: int, shares: list[float]
) -> None:
    limit = found.quantile(1.0)
    points = [found.quantile(q, generated) for q in sorted(shares)]
    assert points == sorted(points)
    assert all(min(generated + 1, limit) <= point <= max(limit, generated) for point in points)


@given(lengths(), st.integers(0, 5000), st.floats(0.01, 0.99))
def test_a_quantile_is_the_least_length_that_is_not_exceeded_so_often(
    found: Lengths, generated: int, q: float
) -> None:
    assume(found.quantile(1.0) > generated and found.survival(generated + 1, 0) > 1e-9)
    length = found.quantile(q, generated)
    assert found.survival(length, generated) <= 1 - q + 1e-6
    if length > generated + 1:
        assert found.survival(length - 1, generated) >= 1 - q - 1e-6


@given(lengths(), st.integers(0, 300), st.integers(1, 400))
def test_the_mean_is_the_sum_of_survival(found: Lengths, generated: int, limit: int) -> None:
    cut = Lengths(np.array([found.survival(edge) if edge < LONGEST else 0.0 for edge in EDGES]), limit)
    assume(generated < limit and found.survival(generated) > 1e-9)
    summed = sum(cut.survival(tokens, generated) for tokens in range(generated, limit))
    assert cut.mean(generated) == pytest.approx(generated + summed)
    assert cut.mean(limit) == limit


def test_before_any_answer_there_is_a_sane_expectation() -> None:
    found = OutputLengths().predict(request())
    assert 150 <= found.quantile(0.5) <= 250
    assert 800 <= found.quantile(0.9) <= 2000
    assert OutputLengths().predict(request(max_tokens=64)).quantile(0.9) == 64
    assert OutputLengths().predict(request(max_tokens=1)).mean() == 1


def test_quantiles_come_to_be_those_of_the_answers() -> None:
    predictor, rng = OutputLengths(), random.Random(4)
    outputs = [1 + int(rng.lognormvariate(5, 1)) for _ in range(1500)]
    for output in outputs:
        predictor.observe(request(), output)
    found = predictor.predict(request())
    median, high = quantiles(outputs)
    assert found.quantile(0.5) == pytest.approx(median, rel=0.1)
    assert found.quantile(0.9) == pytest.approx(high, rel=0.1)
    left = [output for output in outputs if output > 200]
    assert found.quantile(0.5, 200) == pytest.approx(quantiles(left)[0], rel=0.1)
    assert found.mean(200) == pytest.approx(sum(left) / len(left), rel=0.1)


def test_answers_that_always_reach_their_limit_are_expected_to() -> None:
    predictor, rng = OutputLengths(), random.Random(4)
    for _ in range(400):
        limit = rng.choice([16, 64, 256, 1024])
        predictor.observe(request(max_tokens=limit), limit)
    for limit in (16, 64, 256, 500):
        assert predictor.predict(request(max_tokens=limit)).quantile(0.05) == limit


def test_answers_that_were_cut_off_do_not_make_longer_ones_look_short() -> None:
    predictor, rng = OutputLengths(), random.Random(6)
    natural = [1 + int(rng.lognormvariate(5.5, 0.7)) for _ in range(2000)]
    for at, output in enumerate(natural):
        limit = 200 if at % 2 else 0
        predictor.observe(request(max_tokens=limit), min(output, limit) if limit else output)
    median, high = quantiles(natural)
    found = predictor.predict(request(max_tokens=4000))
    assert found.quantile(0.5) == pytest.approx(median, rel=0.15)
    assert found.quantile(0.9) == pytest.approx(high, rel=0.15)
    short = predictor.predict(request(max_tokens=200))
    reached = sum(output > 199 for output in natural) / len(natural)
    assert short.survival(199) == pytest.approx(reached, abs=0.05)


def test_a_conversation_is_expected_to_go_on_as_it_went_and_others_are_not() -> None:
    predictor, rng = OutputLengths(), random.Random(8)
    for turn in range(6):
        for at in range(200):
            output = 1 + int((20 if at % 2 else 800) * rng.lognormvariate(0, 0.2))
            predictor.observe(request(conversation=str(at), tokens=500 * (turn + 1)), output)
    short, long, new = (
        predictor.predict(request(conversation=name, tokens=3500)) for name in ("7", "8", "new")
    )
    assert short.quantile(0.9) < 60
    assert long.quantile(0.1) > 400
    assert new.quantile(0.25) < 60 < 400 < new.quantile(0.75)
    learned = predictor.strengths()
    assert learned["conversation"] < learned["prompt length"]


def test_what_says_nothing_comes_to_be_ignored() -> None:
    predictor, rng = OutputLengths(), random.Random(9)
    for at in range(3000):
        tenant = f"t{at % 100}"
        predictor.observe(request(tenant=tenant), 1 + int(rng.lognormvariate(5, 1)))
    assert predictor.strengths()["tenant"] > 100


def test_a_tenant_of_its_own_kind_is_told_from_the_others() -> None:
    predictor, rng = OutputLengths(), random.Random(10)
    for _ in range(400):
        predictor.observe(request(tenant="classifier"), rng.randrange(1, 4))
        predictor.observe(request(tenant="writer"), rng.randrange(900, 1200))
    assert predictor.predict(request(tenant="classifier")).quantile(0.9) <= 5
    assert predictor.predict(request(tenant="writer")).quantile(0.1) >= 800


def test_an_answer_of_nothing_says_nothing_and_one_too_long_is_taken() -> None:
    predictor = OutputLengths()
    predictor.observe(request(), 0)
    untouched = OutputLengths().predict(request())
    assert predictor.predict(request()).quantile(0.5) == untouched.quantile(0.5)
    predictor.observe(request(), LONGEST + 5)
    assert predictor.predict(request()).quantile(0.5) > untouched.quantile(0.5)


def test_the_conversations_that_are_remembered_are_the_last_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_length, "CONVERSATIONS", 10)
    predictor = OutputLengths()
    for at in range(30):
        for _ in range(20):
            predictor.observe(request(conversation=str(at)), 5 if at != 29 else 3000)
    assert len(predictor._conversations) == 10
    assert predictor.predict(request(conversation="29")).quantile(0.5) > 1000


@given(st.lists(st.tuples(LENGTHS, st.sampled_from([0, 64, 1000]), st.sampled_from("abc")), max_size=30))
def test_any_history_gives_a_distribution_and_the_same_one_twice(
    history: list[tuple[int, int, str]],
) -> None:
    one, other = OutputLengths(), OutputLengths()
    for predictor in (one, other):
        for output, limit, name in history:
            arrival = request(max_tokens=limit, conversation=name)
            predictor.observe(arrival, min(output, limit or output))
    for name in "abcd":
        found = one.predict(request(conversation=name))
        assert 0 < found.survival(1) < 1
        assert found.quantile(0.1) <= found.quantile(0.9) < LONGEST
        assert found.mean() == other.predict(request(conversation=name)).mean()
