"""Margins: promises are kept under bad predictions, nothing is paid for good ones, the past is forgotten."""

import math
import random
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_connector.scheduler.policy.margin import (
    BROKEN,
    LIFE,
    MANY,
    WIDEST,
    Margin,
    Recent,
    allowed,
)

errors = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=60)


def fed(found: Sequence[float], margin: Margin | None = None) -> Margin:
    """A margin after requests that filled what they were given and took so many times what was predicted."""
    margin = margin or Margin()
    for number, error in enumerate(found):
        now = float(number)
        made = margin.factor(now)
        margin.add(1 / made, error / made, 1.0, made, now, BROKEN)
    return margin


@given(errors)
def test_it_is_bounded(found: Sequence[float]) -> None:
    assert 1.0 <= fed(found).factor(len(found)) <= WIDEST


@given(errors, st.integers(0, 59), st.floats(1.0, 10.0))
def test_a_larger_error_never_makes_it_narrower(found: Sequence[float], which: int, more: float) -> None:
    def factor(last: float) -> float:
        margin = Margin()
        for number, error in enumerate(found):
            error *= last if number == which else 1.0
            margin.add(1.0, error, 1.0, 1.0, float(number), BROKEN)
        return margin.factor(float(len(found)))

    assert factor(more) >= factor(1.0)


@given(st.lists(st.floats(0.01, 1.0), max_size=300))
def test_good_predictions_cost_nothing(found: Sequence[float]) -> None:
    assert fed(found).factor(0.0) == 1.0


@given(errors)
def test_it_recovers_when_predictions_are_good_again(found: Sequence[float]) -> None:
    assert fed([*found, *[1.0] * MANY]).factor(0.0) == 1.0


@given(errors)
def test_it_forgets_what_is_old(found: Sequence[float]) -> None:
    margin = fed(found)
    assert margin.factor(len(found) + LIFE) == 1.0
    late = len(found) + LIFE + 1.0
    margin.add(1.0, 1.5, 1.0, 1.0, late, BROKEN)
    assert margin.factor(late) == 1.5


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 2.0), st.floats(0.1, 0.7))
def test_promises_are_kept_whatever_the_errors(seed: int, bias: float, spread: float) -> None:
    # Answers come some time after they were let in, and half way engines become twice as slow.
    chance, margin = random.Random(seed), Margin()
    under_way: list[tuple[float, float, float]] = []
    broken = 0
    for number in range(4000):
        now = number / 10
        made = margin.factor(now)
        if made < WIDEST:
            error = bias * chance.lognormvariate(0, spread) * (2 if number > 2000 else 1)
            under_way.append((1 / made, error / made, made))
        if len(under_way) > 10:
            predicted, observed, before = under_way.pop(0)
            broken += observed > 1.0
            margin.add(predicted, observed, 1.0, before, now, BROKEN)
    assert broken <= 0.06 * 4000


def test_it_widens_within_a_few_requests_and_narrows_after_many() -> None:
    margin = fed([1.0] * MANY)
    factors = []
    for number in range(10):
        margin.add(1.0, 2.0, 1.0, 1.0, float(number), BROKEN)
        factors.append(margin.factor(0.0))
    # The fifth of the last few is one of five.
    assert factors == [1.0] * 4 + [2.0] * 6
    assert fed([1.0] * (MANY // 2), margin).factor(0.0) == 2.0
    assert fed([1.0] * MANY, margin).factor(0.0) == 1.0


def test_what_could_not_be_kept_teaches_nothing_and_plenty_of_room_little() -> None:
    margin = Margin()
    margin.add(2.0, 9.0, 1.0, 1.0, 0.0, BROKEN)
    assert (margin.factor(0.0), margin.broken) == (1.0, 0.0)
    margin.add(0.9, 1.5, 1.0, 1.0, 0.0, BROKEN)
    for _ in range(1000):
        margin.add(0.1, 0.1, 1.0, 1.0, 0.0, BROKEN)
    assert margin.factor(0.0) == 1.5
    assert 0 < margin.broken < 0.01


def test_one_promise_may_use_what_the_other_leaves() -> None:
    good, bad = Margin(), Margin()
    for _ in range(1000):
        bad.add(0.9, 1.5, 1.0, 1.0, 0.0, BROKEN)
    assert allowed(good) == BROKEN
    assert allowed(bad) == BROKEN / 2


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=80), st.floats(0.01, 0.5))
def test_a_quantile_is_that_of_the_last_ones(numbers: Sequence[float], share: float) -> None:
    recent = Recent(50)
    for moment, number in enumerate(numbers):
        recent.add(number, float(moment))
    last = numbers[-50:]
    found = recent.exceeded(share)
    assert sum(number > found for number in last) <= share * len(last)
    recent.forget(math.inf)
    assert recent.exceeded(share) == 0.0
