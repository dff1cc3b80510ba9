"""The simulator's engine against one that takes every step by itself, and against sums done by hand."""

import heapq
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_connector.scheduler.simulator.blocks import Blocks
from mooncake_connector.scheduler.simulator.costs import Costs, pairs
from mooncake_connector.scheduler.simulator.engine import Engine
from mooncake_connector.scheduler.simulator.gaps import Gaps
from mooncake_connector.scheduler.simulator.task import Task
from mooncake_connector.scheduler.simulator.trace import Job


def costs(**changed: object) -> Costs:
    plain: dict[str, object] = {
        "source": "test",
        "base": 1.0,
        "per_sequence": 0.25,
        "per_context": 0.001,
        "per_token": 0.01,
        "per_pair": 0.0001,
        "step_tokens": 40,
        "max_batch": 6,
        "kv_tokens": 400,
        "kv_bytes": 1,
        "bandwidth": 1e9,
    }
    return Costs(**(plain | changed))  # type: ignore[arg-type]


class Bench:
    """An engine with events of its own, and what it said."""

    def __init__(self, costs: Costs, *, whole: bool = False, limit: float = 2.0) -> None:
        self.events: list[tuple[float, int, Callable[[float, int], None], int]] = []
        self.count = 0
        self.first: dict[int, float] = {}
        self.last: dict[int, float] = {}
        self.done: dict[int, float] = {}
        self.stored: set[int] = set()
        self.blocks = Blocks(costs.kv_tokens, 0, self.stored.update, self.stored.difference_update)
        self.gaps = Gaps(limit)
        self.engine = Engine("e", costs, self.blocks, self.gaps, self, self.schedule, whole=whole)

    def schedule(self, at: float, call: Callable[[float, int], None], argument: int) -> None:
        self.count += 1
        heapq.heappush(self.events, (at, self.count, call, argument))

    def computed(self, task: Task, now: float) -> None:
        self.done[task.number] = now
        self.engine.release(task, now)

    def first_token(self, task: Task, now: float) -> None:
        assert task.number not in self.first
        self.first[task.number] = now

    def finished(self, task: Task, now: float) -> None:
        assert task.number not in self.last
        assert task.made == task.output
        self.last[task.number] = now

    def reserved(self, task: Task, now: float) -> None:
        pass

    def run(self) -> None:
        while self.events:
            at, _, call, argument = heapq.heappop(self.events)
            call(at, argument)
            assert self.blocks.private >= 0
            assert self.blocks.used <= self.blocks.capacity
            assert self.engine.pending >= 0
            assert self.engine.context >= self.engine.batch >= 0


def task(number: int, prompt: int, output: int, keys: tuple[int, ...] = (), at: float = 0.0) -> Task:
    made = Task(number, Job(at, prompt, output, keys))
    made.seq = number
    return made


def step_by_step(
    costs: Costs, jobs: list[tuple[float, int, int]]
) -> tuple[dict[int, float], dict[int, float]]:
    """First and last tokens of prompts that one engine computes and answers, every step by itself."""
    coming = sorted((at, number) for number, (at, _, _) in enumerate(jobs))
    line: list[int] = []
    todo: dict[int, int] = {}
    prefilling: list[int] = []
    decoding: list[int] = []
    made = dict.fromkeys(range(len(jobs)), 0)
    kv = {number: prompt for number, (_, prompt, _) in enumerate(jobs)}
    first, last, now = {}, {}, 0.0
    while len(last) < len(jobs):
        while coming and coming[0][0] <= now:
            number = coming.pop(0)[1]
            todo[number] = kv[number]
            line.append(number)
        line.sort()
        while decoding and sum(kv[n] for n in prefilling + decoding) + len(decoding) > costs.kv_tokens:
            victim = max(decoding)
            decoding.remove(victim)
            kv[victim] = todo[victim] = jobs[victim][1] + made[victim]
            line = sorted([*line, victim])
        budget, chunks = costs.step_tokens - len(decoding), {}
        for number in prefilling:
            if budget > 0:
                chunks[number] = min(budget, todo[number])
                budget -= chunks[number]
        while line and budget > 0 and len(decoding) + len(prefilling) < costs.max_batch:
            number = line[0]
            if sum(kv[n] for n in prefilling + decoding) + kv[number] + len(decoding) + 1 > costs.kv_tokens:
                break
            prefilling.append(line.pop(0))
            chunks[number] = min(budget, todo[number])
            budget -= chunks[number]
        if not chunks and not decoding:
            now = coming[0][0]
            continue
        paired = sum(pairs(kv[n] - todo[n], chunk) for n, chunk in chunks.items())
        now += costs.step(len(decoding), sum(kv[n] for n in decoding), sum(chunks.values()), paired)
        for number in list(decoding):
            made[number] += 1
            kv[number] += 1
            if made[number] == jobs[number][2]:
                decoding.remove(number)
                last[number] = now
        for number, chunk in chunks.items():
            todo[number] -= chunk
            if todo[number] == 0:
                prefilling.remove(number)
                made[number] += 1
                first.setdefault(number, now)
                if made[number] == jobs[number][2]:
                    last[number] = now
                else:
                    decoding.append(number)
    return first, last


def arriving(jobs: list[tuple[int, int, int]]) -> list[tuple[float, int, int]]:
    """Pauses in ms as times; never at the end of a step, where who is first would be a matter of taste."""
    at, found = 0.00037, []
    for pause, prompt, output in jobs:
        at += pause / 1e3
        found.append((at, prompt, output))
    return found


JOBS = st.lists(
    st.tuples(st.integers(1, 9000), st.integers(1, 150), st.integers(1, 60)), min_size=1, max_size=12
).map(arriving)


@given(jobs=JOBS, kv=st.integers(215, 600), budget=st.integers(8, 200))
@settings(max_examples=150, deadline=None)
def test_jumps_end_where_single_steps_do(jobs: list[tuple[float, int, int]], kv: int, budget: int) -> None:
    model = costs(kv_tokens=kv, step_tokens=budget)
    bench = Bench(model)
    tasks = [task(number, prompt, output, at=at) for number, (at, prompt, output) in enumerate(jobs)]
    for each in tasks:
        bench.schedule(each.at, lambda now, number: bench.engine.submit(tasks[number], now), each.number)
    bench.run()
    first, last = step_by_step(model, jobs)
    assert bench.first == pytest.approx(first)
    assert bench.last == pytest.approx(last)
    assert bench.gaps.count == sum(output - 1 for _, _, output in jobs)
    assert bench.blocks.used == 0


@given(
    batch=st.integers(1, 300),
    context=st.integers(0, 10**6),
    steps=st.integers(1, 3000),
    part=st.floats(0.001, 1.0),
)
def test_closed_forms_are_the_sums(batch: int, context: int, steps: int, part: float) -> None:
    model = costs(per_context=1e-7)
    single = [model.step(batch, context + batch * at) for at in range(steps)]
    assert model.decode_steps(batch, context, steps) == pytest.approx(sum(single))
    seconds = part * model.decode_steps(batch, context, steps)
    found = model.steps_until(batch, context, seconds)
    assert model.decode_steps(batch, context, found) >= seconds
    assert found == 1 or model.decode_steps(batch, context, found - 1) < seconds
    limit = model.step(batch, context) + part * model.per_context * batch * steps
    assert abs(model.slow_steps(batch, context, steps, limit) - sum(one > limit for one in single)) <= 1


def test_a_mixed_step_holds_a_chunk_and_the_batch() -> None:
    bench = Bench(costs(per_pair=0.0, per_context=0.0))
    bench.engine.submit(task(0, 10, 3), 0.0)
    bench.engine.submit(task(1, 60, 1), 0.0)
    bench.run()
    # 1 + 0.1; then 39 tokens beside one sequence: 1 + 0.25 + 0.39; then the other 21 beside it.
    assert bench.first == pytest.approx({0: 1.1, 1: 1.1 + 1.64 + 1.46})
    assert bench.last == pytest.approx({0: 1.1 + 1.64 + 1.46, 1: 1.1 + 1.64 + 1.46})


def test_a_whole_prompt_lets_the_batch_stand_still() -> None:
    bench = Bench(costs(per_pair=0.0, per_context=0.0), whole=True)
    older = task(0, 10, 3)
    bench.engine.submit(older, 0.0)
    bench.schedule(1.0, lambda now, _: bench.engine.submit(task(1, 60, 2), now), 0)
    bench.run()
    # 1.1 for the first prompt; 1.6 for the second one; then both decode: 1.5, and the first one alone 1.25.
    assert bench.first == pytest.approx({0: 1.1, 1: 2.7})
    assert bench.last == pytest.approx({0: 2.7 + 1.5 + 1.25, 1: 2.7 + 1.5})
    assert older.slow_gaps == 1  # 3.1 seconds; of the other one 1.5 only
    assert bench.gaps.count == 3
    assert bench.gaps.quantile(1.0) == pytest.approx(3.1, rel=0.01)


def test_cached_blocks_are_not_computed_again_and_leave_when_room_is_short() -> None:
    bench = Bench(costs(kv_tokens=2048, step_tokens=4096))
    one, two = task(0, 1024, 1, (1, 2)), task(1, 1100, 1, (1, 2))
    bench.engine.submit(one, 0.0)
    bench.run()
    assert bench.stored == {1, 2}
    bench.engine.submit(two, 100.0)
    bench.run()
    assert (one.hit, two.hit) == (0, 1024)
    bench.engine.submit(task(2, 1536, 1, (7, 8, 9)), 200.0)
    bench.run()
    assert bench.stored == {7, 8, 9, 1}  # of a prompt the last blocks go first


def test_loads_from_prefill_join_at_the_next_step_and_make_their_first_token_there() -> None:
    bench = Bench(costs(per_context=0.0))
    first, second = task(0, 10, 10), task(1, 10, 2)
    for each in (first, second):
        bench.engine.reserve(each, 0.0)
    bench.engine.join(first, 0.0)
    bench.schedule(3.0, lambda now, _: bench.engine.join(second, now), 0)
    bench.run()
    # Steps of 1.25 seconds; the second comes in the middle of the third, which ends at 3.75.
    assert bench.first == pytest.approx({0: 1.25, 1: 3.75 + 1.5})
    assert bench.last == pytest.approx({0: 3.75 + 3.0 + 5 * 1.25, 1: 3.75 + 3.0})


def test_room_that_is_asked_for_is_given_in_turn() -> None:
    bench = Bench(costs(kv_tokens=100))
    said: list[int] = []
    bench.reserved = lambda task, now: said.append(task.number)  # type: ignore[method-assign]
    tasks = [task(0, 60, 2), task(1, 60, 2), task(2, 10, 2)]
    for each in tasks:
        bench.engine.reserve(each, 0.0)
    assert said == [0]
    bench.engine.release(tasks[1], 0.0)  # it was dropped before it had any
    assert said == [0, 2]
    bench.engine.release(tasks[0], 0.0)
    assert bench.blocks.used == 10
