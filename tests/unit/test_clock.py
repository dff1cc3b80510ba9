"""What may be pushed, and what the pushes wait for, while the engine's thread is ahead of the GPU."""

import numpy as np

from mooncake_connector.kv_transfer.clock import GpuClock
from mooncake_connector.kv_transfer.push import Want, Write
from tests.unit.pushes import Push


class Gpu:
    """A stream: work is issued, recorded events have happened once the GPU has got there."""

    def __init__(self, num_events: int = 8) -> None:
        self.issued = self.done = 0
        self.events = [RecordedEvent(self) for _ in range(num_events)]

    def clock(self, num_layers: int) -> GpuClock:
        return GpuClock(num_layers, self.events, lambda: 7)


class RecordedEvent:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.at = -1

    @property
    def handle(self) -> int:
        return id(self)

    def record(self, stream: int) -> None:
        assert stream == 7
        self.at = self.gpu.issued

    def query(self) -> bool:
        return self.at <= self.gpu.done

    def synchronize(self) -> None:
        raise AssertionError("the CPU never waits")


def run_layer(gpu: Gpu, clock: GpuClock, layer: int, step: int, *, mark: bool = True) -> None:
    gpu.issued += 1
    clock.layer_written(layer, step)
    if mark:
        clock.mark(step)


def waits_until(gpu: Gpu, clock: GpuClock, mark: int) -> int:
    """How much work must be done before what waits for `mark` goes on."""
    at = [event.at for event in clock.after(mark) if isinstance(event, RecordedEvent)]
    return max(at, default=gpu.done)


def progress(num_layers: int, least: int = 0, gather: int = 0) -> Push:
    pushes = Push(num_layers, least=least, gather=gather)
    index = np.arange(1, dtype=np.int64)
    pushes.reserve(4, [Want(index, 100 + index)])
    return pushes


def writes(pushes: Push, clock: GpuClock) -> list[Write]:
    found = []
    while (write := pushes.next(clock)) is not None:
        found.append(write)
    return found


def test_a_layer_is_written_once_it_is_marked_and_in_memory_once_the_gpu_is_there() -> None:
    gpu = Gpu()
    clock = gpu.clock(2)
    clock.step_begins(1)
    run_layer(gpu, clock, 0, 1, mark=False)
    assert clock.written(0, 1) is None
    clock.mark(1)
    mark = clock.written(0, 1)
    assert mark is not None
    assert mark > clock.passed()
    assert waits_until(gpu, clock, mark) == 1
    gpu.done = 1
    assert mark <= clock.passed()
    assert clock.after(mark) == ()
    assert clock.written(1, 1) is None


def test_a_reservation_that_comes_when_all_is_issued_is_still_pushed_layer_by_layer() -> None:
    gpu = Gpu()
    clock, pushes = gpu.clock(4), progress(4)
    pushes.chunk(1, 0, 5, ([1, 2],), replace=True, hits_ready=True)
    clock.step_begins(1)
    for layer in range(4):
        run_layer(gpu, clock, layer, 1)
    clock.step_ended(1)
    gpu.done = 2  # two layers are computed: they go together, and wait for nothing
    found = writes(pushes, clock)
    assert [[span.layer for span in write.spans] for write in found] == [[0, 1], [2], [3]]
    assert [waits_until(gpu, clock, write.mark) for write in found] == [2, 3, 4]


def test_writes_have_at_least_what_was_asked_for() -> None:
    gpu = Gpu()
    clock, pushes = gpu.clock(5), progress(5, least=16)
    pushes.chunk(1, 0, 5, ([1, 2],), replace=True, hits_ready=True)
    clock.step_begins(1)
    for layer in range(3):
        run_layer(gpu, clock, layer, 1)
    assert [[s.layer for s in w.spans] for w in writes(pushes, clock)] == [[0, 1]]
    for layer in (3, 4):
        run_layer(gpu, clock, layer, 1)
    assert [[s.layer for s in w.spans] for w in writes(pushes, clock)] == [[2, 3], [4]]


def test_what_is_yet_to_be_computed_is_gathered_up_to_the_last_of_the_step() -> None:
    gpu = Gpu(16)
    clock, pushes = gpu.clock(8), progress(8, least=16, gather=64)
    pushes.chunk(1, 0, 5, ([1, 2],), replace=True, hits_ready=True)
    clock.step_begins(1)
    found = []
    for layer in range(8):
        run_layer(gpu, clock, layer, 1)
        found += writes(pushes, clock)
    assert [[s.layer for s in w.spans] for w in found] == [[0, 1, 2, 3, 4, 5], [6, 7]]
    assert [waits_until(gpu, clock, w.mark) for w in found] == [6, 8]


def test_what_is_computed_waits_for_no_more_than_the_least() -> None:
    gpu = Gpu(16)
    clock, pushes = gpu.clock(8), progress(8, least=16, gather=64)
    pushes.chunk(1, 0, 5, ([1, 2],), replace=True, hits_ready=True)
    clock.step_begins(1)
    for layer in range(8):
        run_layer(gpu, clock, layer, 1)
    gpu.done = 3
    assert [[s.layer for s in w.spans] for w in writes(pushes, clock)] == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_a_long_step_is_pushed_in_several_writes_all_the_same() -> None:
    gpu = Gpu(16)
    clock, pushes = gpu.clock(10), progress(10, least=8, gather=24)
    pushes.chunk(1, 0, 5, ([1, 2],), replace=True, hits_ready=True)
    clock.step_begins(1)
    found = []
    for layer in range(10):
        run_layer(gpu, clock, layer, 1)
        found += writes(pushes, clock)
    assert [[s.layer for s in w.spans] for w in found] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_a_step_whose_layers_say_nothing_is_written_when_it_is_issued() -> None:
    gpu = Gpu()
    clock, pushes = gpu.clock(2), progress(2)
    pushes.chunk(1, 0, 5, ([1, 2],), replace=True, hits_ready=True)
    clock.step_begins(1)
    gpu.issued = 10  # one full CUDA graph
    assert writes(pushes, clock) == []
    clock.step_ended(1)
    (write,) = writes(pushes, clock)
    assert waits_until(gpu, clock, write.mark) == 10
    assert not pushes.prefilled(clock)
    gpu.done = 10
    assert pushes.prefilled(clock)


def test_nobody_waits_for_what_follows_the_last_layer() -> None:
    gpu = Gpu()
    clock = gpu.clock(1)
    clock.step_begins(1)
    run_layer(gpu, clock, 0, 1)
    gpu.issued = 50  # sampling
    clock.step_ended(1)
    mark = clock.written(0, 1)
    assert mark is not None
    assert waits_until(gpu, clock, mark) == 1


def test_what_earlier_steps_wrote_waits_for_these_alone() -> None:
    """Prefix hits, and the chunk before this one, of which the GPU has done nothing yet."""
    gpu = Gpu()
    clock, pushes = gpu.clock(1), progress(1)
    gpu.issued = 5  # other requests' steps, of which nobody told the clock
    pushes.chunk(1, 4, 6, ([1, 2],), replace=True, hits_ready=True)
    clock.step_begins(1)
    gpu.issued = 9
    (write,) = writes(pushes, clock)
    assert waits_until(gpu, clock, write.mark) == 5
    assert not pushes.prefilled(clock)
    gpu.done = 5
    assert pushes.prefilled(clock)


def test_a_late_reservation_does_not_wait_for_steps_of_others() -> None:
    gpu = Gpu(num_events=64)
    clock, pushes = gpu.clock(2), progress(2)
    pushes.chunk(1, 0, 5, ([1, 2],), replace=True, hits_ready=True)
    for step in range(1, 9):
        clock.step_begins(step)
        for layer in range(2):
            run_layer(gpu, clock, layer, step)
        clock.step_ended(step)
    gpu.done = 3
    (write,) = writes(pushes, clock)
    assert clock.after(write.mark) == ()


def test_an_event_that_was_recorded_anew_is_late_but_never_early() -> None:
    gpu = Gpu(num_events=4)
    clock = gpu.clock(1)
    truth = {}
    for step in range(1, 200):
        clock.step_begins(step)
        run_layer(gpu, clock, 0, step)
        clock.step_ended(step)
        truth[step] = gpu.issued
        gpu.done = max(gpu.done, gpu.issued - step % 30)
        for old in range(max(1, step - 70), step + 1):
            mark = clock.written(0, old)
            assert mark is not None
            assert waits_until(gpu, clock, mark) >= min(truth[old], gpu.issued)
            assert mark > clock.passed() or gpu.done >= truth[old]
