"""The circuit breaker and the retry budget: what they let through, whatever happens in whatever order."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mooncake_connector.scheduler.engines.base import EngineInfo
from mooncake_connector.scheduler.engines.breaker import FAILURES, LONGEST, PAUSE, WINDOW, Breaker
from mooncake_connector.scheduler.engines.pool import Pool, Side
from mooncake_connector.scheduler.proxy.retry_budget import RetryBudget


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(FAILURES):
        assert breaker.allows(now)
        breaker.begin(now)
        breaker.failed(now, now)
    assert breaker.state(now) == "open"
    return breaker


def test_it_opens_when_half_of_what_ended_failed() -> None:
    breaker = Breaker()
    for _ in range(FAILURES):
        breaker.succeeded(0.0, 0.0)
    for _ in range(FAILURES - 1):
        breaker.failed(0.0, 0.0)
    assert breaker.state(0.0) == "closed"
    breaker.failed(0.0, 0.0)
    assert (breaker.state(0.0), breaker.opened) == ("open", 1)


def test_failures_far_apart_do_not_add_up() -> None:
    breaker = Breaker()
    for at in range(10 * FAILURES):
        breaker.failed(at * WINDOW / 2, at * WINDOW / 2)
    assert breaker.opened == 0


def test_one_trial_a_pause_and_its_success_closes() -> None:
    breaker = opened()
    assert not breaker.allows(0.99 * PAUSE)
    assert breaker.allows(PAUSE)
    assert breaker.state(PAUSE) == "half_open"
    breaker.begin(PAUSE)
    assert not breaker.allows(1.5 * PAUSE)
    breaker.succeeded(PAUSE, 1.6 * PAUSE)
    assert breaker.state(1.6 * PAUSE) == "closed"
    assert breaker.opened == 1


def test_a_trial_that_is_never_heard_of_holds_up_nobody() -> None:
    breaker = opened()
    breaker.begin(PAUSE)
    assert breaker.allows(2 * PAUSE)


def test_trials_that_fail_come_ever_rarer() -> None:
    breaker, now, pauses = opened(), 0.0, []
    for _ in range(8):
        began = now
        while not breaker.allows(now):
            now += 0.25
        pauses.append(now - began)
        breaker.begin(now)
        breaker.failed(now, now)
    assert pauses == [PAUSE, 2.0, 4.0, 8.0, 16.0, LONGEST, LONGEST, LONGEST]


def test_what_was_under_way_when_it_opened_is_no_trial() -> None:
    breaker = opened(5.0)
    breaker.succeeded(4.9, 5.1)
    assert not breaker.allows(5.1)
    for _ in range(50):
        breaker.failed(4.9, 5.2)
    assert breaker.allows(5.0 + PAUSE)


class BreakerMachine(RuleBasedStateMachine):
    """Requests begin and end as they like; time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker()
        self.now = 0.0
        self.running: list[float] = []
        self.through: list[float] = []  # requests let through since it opened
        self.bad_news = 0.0

    @rule(seconds=st.floats(0, 50))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.breaker.allows(self.now))
    @rule()
    def begin(self) -> None:
        if self.breaker.state(self.now) != "closed":
            self.through.append(self.now)
        self.breaker.begin(self.now)
        self.running.append(self.now)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), well=st.booleans())
    def end(self, data: st.DataObject, well: bool) -> None:
        began = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        before = self.breaker.state(self.now)
        (self.breaker.succeeded if well else self.breaker.failed)(began, self.now)
        if self.breaker.state(self.now) == "closed":
            self.through.clear()
        elif not well:
            self.bad_news = self.now
        if before == "closed" and well:
            assert self.breaker.state(self.now) == "closed"

    @invariant()
    def trials_are_a_pause_apart(self) -> None:
        gaps = [later - earlier for earlier, later in zip(self.through, self.through[1:], strict=False)]
        assert all(gap >= PAUSE for gap in gaps)

    @invariant()
    def nobody_is_left_out_for_ever(self) -> None:
        assert self.breaker.allows(max(self.bad_news, *self.through, self.now) + LONGEST)


TestBreaker = BreakerMachine.TestCase


engines = st.tuples(
    st.sampled_from(["prefill", "decode"]), st.sampled_from("ab"), st.booleans(), st.booleans(), st.booleans()
)


@given(st.lists(engines, max_size=12))
def test_the_last_engine_that_could_serve_is_never_left_out(
    found: list[tuple[Side, str, bool, bool, bool]],
) -> None:
    pool, groups = Pool((), ()), {}
    for number, (side, group, up, draining, opens) in enumerate(found):
        instance = pool.add(f"http://e:{number}", side)
        instance.clock = lambda: 0.0
        instance.info = EngineInfo(f"{number}", 1, "h", 1, 16, 1024, group, "m", "f", "kv_both", "1", 1)
        instance.up = up
        instance.drain(draining)
        if opens:
            instance.breaker = opened()
        if instance.usable:
            groups.setdefault((side, instance.group), []).append(instance)
    shunned = pool.shunned()
    for alike in groups.values():
        left = [instance for instance in alike if instance.url not in shunned]
        assert left
        well = [instance for instance in alike if instance.breaker.state(0.0) == "closed"]
        assert left == (well or alike)
    assert shunned <= {instance.url for alike in groups.values() for instance in alike}


@given(st.lists(st.booleans(), max_size=300), st.floats(0, 1), st.integers(0, 20))
def test_further_attempts_are_at_most_a_share_of_the_requests(
    spends: list[bool], share: float, reserve: int
) -> None:
    budget, requests, retries = RetryBudget(share, reserve), 0, 0
    for spend in spends:
        if spend:
            retries += budget.spend()
        else:
            budget.earn()
            requests += 1
        assert retries <= reserve + share * requests + 1e-6
        assert 0 <= budget.left <= reserve + 1e-6


def test_the_reserve_comes_back_by_requests() -> None:
    budget = RetryBudget(0.2, 2)
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    for _ in range(5):
        budget.earn()
    assert [budget.spend() for _ in range(2)] == [True, False]
