"""How far the engine's forward passes are. Written by the engine's thread, read by the I/O thread, no lock.

Layers are *written* when the engine's thread has issued all that writes their KV, which a GPU may do much
later. So positions of the GPU's work are numbered: a *mark* is passed once the GPU has got there, and says
which KV is in memory then. Whoever pushes tells its stream to wait for the mark; no thread does.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from mooncake_connector.kv_transfer.plan import Event

NUM_EVENTS = 128
_KEPT_STEPS = 64


class Recordable(Event, Protocol):
    """An `Event` that can be recorded, again and again."""

    def record(self, stream: int) -> None: ...


class LayerClock:
    """KV in host memory: what has been written is there; there is but mark 0, which is passed."""

    def __init__(self, num_layers: int) -> None:
        self._layers = [-1] * num_layers
        self._ended = -1

    # ------------------------------------------------------------------ the engine's thread

    def step_begins(self, step: int) -> None:
        """Nothing of `step` has been written yet."""

    def layer_written(self, layer: int, step: int) -> None:
        self._layers[layer] = step

    def mark(self, step: int) -> None:
        """Let what was written until now be pushed as soon as it is in memory."""

    def step_ended(self, step: int) -> None:
        """All layers have been written, those that did not say so included."""
        self._ended = step

    # ------------------------------------------------------------------ the I/O thread

    def written(self, layer: int, step: int) -> int | None:
        """The mark after which the KV that `layer` writes in `step` is in memory; None: not written yet."""
        return 0 if self._ended >= step or self._layers[layer] >= step else None

    def began(self, step: int) -> int:
        """The mark after which all KV of earlier steps is in memory."""
        return 0

    def passed(self) -> int:
        """The newest mark that was passed."""
        return 0

    def after(self, mark: int) -> tuple[Event, ...]:
        """What has yet to happen before `mark` is passed."""
        return ()


class GpuClock(LayerClock):
    """KV in GPU memory: marks are events in the engine's stream.

    Events are used in turn. One that has been recorded anew stands for a later mark: who waits for it, or
    asks whether it has happened, gets a late answer and never an early one.

    Args:
        events: all of one device.
        stream: the handle of the stream that the calling thread issues work to.
    """

    def __init__(self, num_layers: int, events: Sequence[Recordable], stream: Callable[[], int]) -> None:
        super().__init__(num_layers)
        self._events, self._stream = events, stream
        self._newest = self._passed = 0
        self._unmarked: list[int] = []
        self._marks = [(-1, 0)] * num_layers  # (step, mark) of each layer
        self._begins = [(-1, 0)] * _KEPT_STEPS  # (step, mark) at step % _KEPT_STEPS
        self._ends = [(-1, 0)] * _KEPT_STEPS

    def step_begins(self, step: int) -> None:
        self._unmarked.clear()
        self.mark(step)
        self._begins[step % _KEPT_STEPS] = (step, self._newest)

    def layer_written(self, layer: int, step: int) -> None:
        self._unmarked.append(layer)

    def mark(self, step: int) -> None:
        mark = self._newest + 1
        self._events[mark % len(self._events)].record(self._stream())
        self._newest = mark
        for layer in self._unmarked:
            self._marks[layer] = (step, mark)
        self._unmarked.clear()

    def step_ended(self, step: int) -> None:
        # After a last layer that was marked, the engine has issued more that nobody must wait for (sampling).
        # In a full CUDA graph no layer says that it is written.
        if self._unmarked or any(marked != step for marked, _ in self._marks):
            self.mark(step)
        self._ends[step % _KEPT_STEPS] = (step, self._newest)

    def written(self, layer: int, step: int) -> int | None:
        marked, mark = self._marks[layer]
        if marked == step:
            return mark
        ended, mark = self._ends[step % _KEPT_STEPS]
        return mark if ended >= step else None

    def began(self, step: int) -> int:
        began, mark = self._begins[step % _KEPT_STEPS]
        return mark if began >= step else self._newest

    def passed(self) -> int:
        newest, passed = self._newest, self._passed
        mark = max(passed + 1, newest - len(self._events) + 1)
        while mark <= newest and self._events[mark % len(self._events)].query():
            passed, mark = mark, mark + 1
        self._passed = passed
        return passed

    def after(self, mark: int) -> tuple[Event, ...]:
        return () if mark <= self.passed() else (self._events[mark % len(self._events)],)
