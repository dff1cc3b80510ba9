"""The books of requests in flight: what is queued, what decodes, and what that comes to later."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mooncake_connector.scheduler.policy.base import Instance, Placement
from mooncake_connector.scheduler.policy.decode_table import Answer
from mooncake_connector.scheduler.policy.ledger import UNKNOWN_ROOM, Booking, Ledger
from mooncake_connector.scheduler.policy.prefill_meter import TOGETHER, PrefillMeter
from mooncake_connector.scheduler.policy.prefill_queue import OVERDUE, PrefillQueue

PACE = 0.1


class Fixed:
    """An answer of a length that is known; one that outlives it goes on for ever."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def quantiles(self, shares: Sequence[float], generated: int = 0) -> list[int]:
        return [max(self.tokens, generated + 1)] * len(shares)


def booking(
    *,
    prefill: str = "p",
    decode: str = "d",
    prompt: int = 100,
    seconds: float = 1.0,
    joins: float = 1.0,
    output=10,
) -> Booking:
    return Booking(
        placement=Placement(decode=decode, prefill=prefill),
        computes=prefill,
        prompt=prompt,
        seconds=seconds,
        copying=0.0,
        handover=0.0,
        joins=joins,
        answer=Answer.of(Fixed(output)),
        limit=0.1,
    )


def ledger(decodes: Sequence[str] = ("d",), kv_tokens: int = 1000) -> Ledger:
    books = Ledger(lambda name, batch, context: PACE)
    books.join(Instance(name="p", side="prefill"), 0.0)
    for name in decodes:
        books.join(Instance(name=name, side="decode", kv_tokens=kv_tokens), 0.0)
    return books


def test_a_queue_is_what_is_left_of_the_running_prompt_and_all_behind_it() -> None:
    queue = PrefillQueue()
    queue.add("a", 2.0, 20, 0.0, 0.0)
    queue.add("b", 3.0, 30, 0.0, 0.0)
    assert queue.seconds(0.5) == pytest.approx(4.5)
    assert queue.tokens == 50
    assert queue.end("a", 1.5)
    assert queue.seconds(2.5) == pytest.approx(2.0)
    assert queue.end("b", 4.5)
    assert queue.seconds(4.5) == 0.0
    assert not queue.end("b", 5.0)


def test_an_overdue_prompt_keeps_a_remainder() -> None:
    queue = PrefillQueue()
    queue.add("a", 2.0, 20, 0.0, 0.0)
    assert queue.seconds(100.0) == pytest.approx(2.0 * OVERDUE)


def test_a_prompt_that_waits_for_a_copy_does_not_run() -> None:
    queue = PrefillQueue()
    queue.add("a", 2.0, 20, 0.0, 1.0)
    assert queue.seconds(1.0) == pytest.approx(2.0)
    assert list(queue.ends(0.5, 9)) == [("a", 3.0)]


@given(
    jobs=st.lists(st.floats(0.0, 100.0), max_size=20),
    more=st.floats(0.0, 100.0),
    ended=st.integers(0, 20),
    now=st.floats(0.0, 1000.0),
)
def test_one_more_prompt_never_shortens_a_queue(
    jobs: list[float], more: float, ended: int, now: float
) -> None:
    queue = PrefillQueue()
    for number, seconds in enumerate(jobs):
        queue.add(str(number), seconds, 1, 0.0, 0.0)
    for number in range(min(ended, len(jobs))):
        queue.end(str(number), now / 2)
    before = queue.seconds(now)
    assert before >= 0
    queue.add("more", more, 1, now, now)
    assert queue.seconds(now) >= before - 1e-6


def test_prompts_that_share_steps_are_measured_together() -> None:
    meter = PrefillMeter()
    meter.begin(10.0)
    for number in range(TOGETHER - 1):
        assert meter.add(100, 0, 1.0, 11.0 + number, left=3, own=5.0) == []
    found = meter.add(100, 0, 1.0, 10.0 + 2 * TOGETHER, left=3, own=5.0)
    # Each one's own time would have been 5 s, all together took 2 s each.
    assert [one.seconds for one in found] == [pytest.approx(2.0)] * TOGETHER


def test_a_prompt_that_had_the_engine_to_itself_is_taken_as_measured() -> None:
    meter = PrefillMeter()
    meter.begin(10.0)
    assert [one.seconds for one in meter.add(100, 0, 1.0, 12.0, left=0, own=1.5)] == [1.5]
    meter.begin(20.0)
    assert [one.seconds for one in meter.add(100, 0, 1.0, 22.0, left=0, own=None)] == [2.0]


def test_decode_at_a_moment_takes_off_who_ended_and_adds_whose_prefill_ended() -> None:
    books = ledger()
    books.open("a", booking(prompt=100, output=10), 0.0)
    books.prefilled("a", 0.0)
    books.open("b", booking(prompt=200, joins=3.0, output=10), 0.0)
    (soon,) = books.decode_at(0.5, 0.0)
    assert (soon.batch, soon.context, soon.free) == (1, 105, 895)
    (between,) = books.decode_at(2.0, 0.0)
    assert (between.batch, between.context) == (0, 0)
    (late,) = books.decode_at(3.5, 0.0)
    assert (late.batch, late.context, late.requests) == (1, 205, 2)


def test_an_answer_counts_by_the_share_of_its_lengths_that_are_not_reached() -> None:
    class Spread:
        def quantiles(self, shares: Sequence[float], generated: int = 0) -> list[int]:
            return [10 if share < 0.5 else 30 for share in shares]

    books = ledger()
    own = booking(prompt=100)
    books.open(
        "a",
        Booking(**{**{f: getattr(own, f) for f in own.__struct_fields__}, "answer": Answer.of(Spread())}),
        0.0,
    )
    books.prefilled("a", 0.0)
    assert books.all_at(2.0, 0.0).batch.tolist() == [0.5]
    # It has 15 tokens and goes on: the short lengths are out.
    books.progressed("a", 15, 1.5)
    assert books.all_at(2.0, 1.5).batch.tolist() == [1.0]


def test_an_answer_that_outlived_its_prediction_does_not_vanish() -> None:
    books = ledger()
    books.open("a", booking(output=10), 0.0)
    books.prefilled("a", 0.0)
    assert books.all_at(50.0, 50.0).batch.tolist() == [1.0]


def test_a_late_prompt_delays_those_behind_it() -> None:
    books = ledger()
    books.open("a", booking(seconds=1.0, joins=1.0), 0.0)
    books.open("b", booking(seconds=1.0, joins=2.0), 0.0)
    assert books.all_at(2.5, 0.0).batch.tolist() == [1.0]
    books.prefilled("a", 4.0)
    # b begins at 5 now, not at 2.
    assert books.all_at(4.5, 4.0).batch.tolist() == [1.0]
    assert books.all_at(5.1, 4.0).batch.tolist() == [1.0]
    assert books.all_at(4.9, 4.0).context[0] == pytest.approx(109, abs=1)
    assert books.all_at(5.1, 4.0).context[0] == pytest.approx(101, abs=1)


def test_room_that_is_not_known_is_plenty() -> None:
    books = ledger(kv_tokens=0)
    assert books.decode_at(0.0, 0.0)[0].free == UNKNOWN_ROOM


def test_system_level_prediction_spreads_newcomers_and_ends_everybody_after_the_same_time() -> None:
    books = ledger(("d", "e"))
    books.open("a", booking(output=1000), 0.0)
    books.prefilled("a", 0.0)
    books.open("b", booking(joins=2.0, output=1000), 0.0)
    assert books.lasting(1.0, 5.0, 0.0).batch.tolist() == [1.0, 0.0]
    assert books.lasting(2.5, 5.0, 0.0).batch.tolist() == [1.5, 0.5]
    assert books.lasting(6.0, 5.0, 0.0).batch.tolist() == [0.5, 0.5]


class Books(RuleBasedStateMachine):
    """Whatever comes in whatever order: sums agree with what is counted anew, and nothing is left over."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.count = 0
        self.open: dict[str, tuple[str, str, int]] = {}
        self.waiting: set[str] = set()
        self.begun: set[str] = set()
        self.names = ["d0", "d1", "d2"]
        self.gone: set[str] = set()
        self.paused: set[str] = set()
        self.books = ledger(self.names, kv_tokens=500)

    @rule(seconds=st.floats(0.0, 5.0))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(
        which=st.integers(0, 2),
        alone=st.booleans(),
        prompt=st.integers(1, 400),
        seconds=st.floats(0.0, 3.0),
        output=st.integers(1, 50),
    )
    def place(self, which: int, alone: bool, prompt: int, seconds: float, output: int) -> None:
        decode = self.names[which]
        if decode in self.gone or decode in self.paused:
            return
        id, computes = str(self.count), decode if alone else "p"
        self.count += 1
        own = booking(
            prefill=computes,
            decode=decode,
            prompt=prompt,
            seconds=seconds,
            joins=self.now + seconds,
            output=output,
        )
        self.books.open(id, own, self.now)
        self.open[id] = (computes, decode, prompt)
        self.waiting.add(id)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), tokens=st.integers(0, 60))
    def move(self, data: st.DataObject, tokens: int) -> None:
        id = data.draw(st.sampled_from(sorted(self.open)))
        if tokens:
            self.books.progressed(id, tokens, self.now)
        else:
            self.books.prefilled(id, self.now)
        self.waiting.discard(id)
        self.begun.add(id)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.open)))
        assert self.books.close(id, self.now)
        assert self.books.close(id, self.now) is None
        del self.open[id]
        self.waiting.discard(id)
        self.begun.discard(id)

    @rule(which=st.integers(0, 2))
    def pause_or_resume(self, which: int) -> None:
        name = self.names[which]
        if name in self.paused:
            self.paused.discard(name)
            self.books.resume(name)
        elif name not in self.gone:
            self.paused.add(name)
            self.books.pause(name)

    @rule(which=st.integers(0, 2))
    def go_or_come(self, which: int) -> None:
        name = self.names[which]
        if name in self.gone:
            self.gone.discard(name)
            self.books.join(Instance(name=name, side="decode", kv_tokens=500), self.now)
        else:
            self.gone.add(name)
            self.paused.discard(name)
            self.books.leave(name, self.now)
            lost = {id for id, (_, decode, _) in self.open.items() if decode == name}
            for id in lost:
                # Its prompt may still be computed, its answer is lost.
                computes, _, prompt = self.open[id]
                self.open[id] = (computes, "", prompt)
                self.begun.discard(id)
                if computes == name:
                    self.waiting.discard(id)

    @invariant()
    def agrees(self) -> None:
        queued = [id for id in self.waiting if self.open[id][0] == "p"]
        assert len(self.books.prompts("p")) == len(queued)
        assert self.books.prompts("p").tokens == sum(self.open[id][2] for id in queued)
        assert len(self.books) == len(self.open)
        taking = {name for name in self.names if name not in self.gone | self.paused}
        assert {writer.name for writer in self.books.writers()} == taking
        assert {view.name for view in self.books.decode_at(self.now, self.now)} == taking
        assert {computer.name for computer in self.books.computers("decode")} == taking
        assert {computer.name for computer in self.books.computers("prefill")} == {"p"}
        found = self.books.all_at(self.now + 1.0, self.now)
        assert len(found.batch) == len(found.context) == len(taking)
        assert np.all(found.batch >= 0)
        assert np.all(found.context >= 0)
        for view in self.books.decode_at(self.now + 1.0, self.now):
            assert 0 <= view.free <= 500
        for account in self.books.accounts(self.now):
            assert account.queue >= 0
            answers = [id for id, (_, decode, _) in self.open.items() if decode == account.name]
            if account.side == "decode":
                assert account.answers == len(answers)
                assert account.batch == len([id for id in answers if id in self.begun])
                assert account.committed >= sum(self.open[id][2] for id in answers)

    def teardown(self) -> None:
        for id in list(self.open):
            self.books.close(id, self.now)
        assert len(self.books) == 0
        for account in self.books.accounts(self.now):
            assert (account.queue, account.prompts, account.tokens) == (0.0, 0, 0)
            assert (account.answers, account.batch, account.context, account.committed) == (0, 0, 0, 0)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
