"""The answers that decode engines write or are going to write: one table, that tells what they take later.

An engine gives each of its requests one token per step. So a request's place is kept in steps of its
engine, not in seconds: when an engine becomes slower, nothing in the table changes. How long an answer will
be is kept as a few equally likely lengths; a request counts, later, by the share of those not reached yet.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Equally likely lengths kept of every answer: the middles of so many equal parts of the distribution.
SHARES = tuple((k + 0.5) / 8 for k in range(8))
# An answer that outlived all its lengths goes on for at least this share of what it has, plus some tokens.
LONGER, SOME = 0.25, 16


class Lengths(Protocol):
    """Distribution of an answer's length in tokens."""

    def quantile(self, q: float, generated: int = 0) -> int: ...


class Answer(msgspec.Struct, frozen=True):
    """How long an answer is predicted to be.

    Attributes:
        ends: the `SHARES` of its length, in tokens.
        mean: of these.
    """

    lengths: Lengths
    ends: tuple[int, ...]
    mean: float

    @classmethod
    def of(cls, lengths: Lengths) -> Self:
        ends = tuple(lengths.quantile(share) for share in SHARES)
        return cls(lengths, ends, sum(ends) / len(ends))


class Occupancy(msgspec.Struct, frozen=True):
    """What decode engines are expected to hold: by engine at one moment, or of one engine by moments.

    Attributes:
        batch: requests that decode.
        context: tokens of KV that they attend to.
        spread: standard deviation of `batch`.
    """

    batch: Floats
    context: Floats
    spread: Floats


class DecodeSlot:
    """One decode engine: how far its steps are, and what it holds now.

    Attributes:
        capacity: tokens of KV; 0 if not known.
        committed: tokens of all its requests, their whole answers included.
        pace: seconds per step.
        batch: requests that decode now.
    """

    def __init__(self, name: str, capacity: int, now: float, pace: float) -> None:
        self.name = name
        self.capacity = capacity
        self.committed = 0.0
        self.requests = 0
        self.pace = pace
        self.batch = 0
        self._steps = 0.0
        self._base = 0.0
        self._moment = now
        self._batch_area = 0.0
        self._context_area = 0.0

    def steps(self, now: float) -> float:
        """Steps that it is predicted to have run since it came."""
        return self._steps + max(0.0, now - self._moment) / self.pace

    def context(self, now: float) -> float:
        """Tokens of KV that its decoding requests attend to now."""
        return max(0.0, self._base + self.batch * self.steps(now)) if self.batch else 0.0

    def areas(self, now: float) -> tuple[float, float]:
        """Batch and context, each summed over time since it came."""
        self._advance(now)
        return self._batch_area, self._context_area

    def change(self, batch: int, base: float, now: float, pace: Callable[[str, int, int], float]) -> None:
        """Requests begin or stop to decode; `base` is their prompts less the steps at which they began."""
        self._advance(now)
        self.batch += batch
        self._base = self._base + base if self.batch else 0.0
        self.pace = max(1e-6, pace(self.name, max(1, self.batch), int(self.context(now))))

    def _advance(self, now: float) -> None:
        elapsed = now - self._moment
        if elapsed <= 0:
            return
        self._batch_area += self.batch * elapsed
        self._context_area += (self.context(self._moment) + self.context(now)) / 2 * elapsed
        self._steps += elapsed / self.pace
        self._moment = now


class DecodeTable:
    """Rows of all answers in flight; removal moves the last row into the gap.

    Args:
        pace: seconds of one step of an engine, by its name, batch and context.
    """

    def __init__(self, pace: Callable[[str, int, int], float]) -> None:
        self._pace = pace
        self._slots: list[DecodeSlot] = []
        self._number: dict[str, int] = {}
        self._rows: dict[str, int] = {}
        self._ids: list[str] = []
        self._lengths: list[Lengths] = []
        self._grow(256)

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, id: str) -> bool:
        return id in self._rows

    @property
    def names(self) -> Sequence[str]:
        """Engines, in the order of `at`."""
        return [slot.name for slot in self._slots]

    def slot(self, name: str) -> DecodeSlot:
        return self._slots[self._number[name]]

    def join(self, name: str, capacity: int, now: float) -> None:
        """A decode engine with no requests."""
        self._number[name] = len(self._slots)
        self._slots.append(DecodeSlot(name, capacity, now, max(1e-6, self._pace(name, 1, 0))))

    def leave(self, name: str, now: float) -> None:
        """It goes, and its answers with it."""
        number = self._number.pop(name)
        for id in [id for id, row in self._rows.items() if self._engine[row] == number]:
            self.remove(id, now)
        last = self._slots.pop()
        if number < len(self._slots):
            self._slots[number] = last
            self._number[last.name] = number
            self._engine[: len(self)][self._engine[: len(self)] == len(self._slots)] = number

    def add(
        self, id: str, name: str, prompt: int, joins: float, answer: Answer, limit: float, sure: bool
    ) -> None:
        """An answer that begins at `joins`, at a promised pace of `limit`; `sure`: even if nobody says so."""
        row = len(self)
        if row == len(self._engine):
            self._grow(2 * row)
        self._rows[id] = row
        self._ids.append(id)
        self._lengths.append(answer.lengths)
        self._engine[row] = number = self._number[name]
        self._prompt[row], self._joins[row], self._limit[row] = prompt, joins, limit
        self._floor[row] = -np.inf if sure else 0.0
        self._start[row] = np.nan
        self._ends[:, row] = answer.ends
        self._whole[row] = prompt + answer.mean
        self._slots[number].requests += 1
        self._slots[number].committed += prompt + answer.mean

    def joins(self, id: str, moment: float) -> None:
        """Another prediction of when it begins; of no account once it has begun."""
        self._joins[self._rows[id]] = moment

    def place(self, id: str, tokens: float, now: float) -> None:
        """It has so many tokens: the first such call begins it. Less than none: it begins later."""
        row = self._rows[id]
        slot = self._slots[self._engine[row]]
        before = float(self._start[row])
        begins = math.isnan(before)
        start = slot.steps(now) - tokens
        self._start[row] = start
        if begins:
            slot.change(1, float(self._prompt[row]) - start, now, self._pace)
        else:
            slot.change(0, before - start, now, self._pace)

    def remove(self, id: str, now: float) -> None:
        """It is over."""
        row, last = self._rows.pop(id), len(self) - 1
        slot = self._slots[self._engine[row]]
        slot.requests -= 1
        slot.committed = max(0.0, slot.committed - float(self._whole[row])) if slot.requests else 0.0
        if not np.isnan(self._start[row]):
            slot.change(-1, float(self._start[row] - self._prompt[row]), now, self._pace)
        if row != last:
            for column in (self._engine, self._prompt, self._joins, self._floor, self._start):
                column[row] = column[last]
            self._limit[row], self._whole[row] = self._limit[last], self._whole[last]
            self._ends[:, row] = self._ends[:, last]
            self._ids[row], self._lengths[row] = self._ids[last], self._lengths[last]
            self._rows[self._ids[row]] = row
        self._ids.pop()
        self._lengths.pop()

    def begun(self, id: str) -> bool:
        """Whether it decodes."""
        return not np.isnan(self._start[self._rows[id]])

    def at(self, moment: float, now: float) -> Occupancy:
        """Every engine at `moment`, in the order of `names`."""
        number, count = self._engine[: len(self)], len(self._slots)
        share, tokens = self._present(slice(0, len(self)), np.array([moment]), now)
        share, tokens = share[0], tokens[0]
        return Occupancy(
            np.bincount(number, share, count).astype(float),
            np.bincount(number, share * tokens, count).astype(float),
            np.sqrt(np.bincount(number, share * (1 - share), count)),
        )

    def over(self, name: str, moments: Floats, now: float) -> Occupancy:
        """One engine at several moments."""
        rows = np.flatnonzero(self._engine[: len(self)] == self._number[name])
        share, tokens = self._present(rows, moments, now)
        return Occupancy(share.sum(1), (share * tokens).sum(1), np.sqrt((share * (1 - share)).sum(1)))

    def strictest(self, name: str) -> float:
        """The least seconds per token promised to a request of this engine; infinite if it has none."""
        limits = self._limit[: len(self)][self._engine[: len(self)] == self._number[name]]
        return float(limits.min(initial=np.inf))

    def lasting(self, moment: float, seconds: float, now: float) -> Occupancy:
        """Every engine at `moment` if each answer took `seconds`; those that begin until then, spread evenly.

        This is the prediction of arXiv 2407.00079v3, section 7.4: it knows no answer's length.
        """
        rows, count = slice(0, len(self)), len(self._slots)
        number = self._engine[rows]
        steps, pace = self._clocks(now)
        tokens = steps[number] - self._start[rows]
        begun = ~np.isnan(tokens)
        joins = np.maximum(self._joins[rows], now)
        began = np.where(begun, now - np.maximum(tokens, 0.0) * pace[number], joins)
        there = ((began <= moment) & (began + seconds > moment)).astype(float)
        context = there * (self._prompt[rows] + np.maximum(moment - began, 0.0) / pace[number])
        new = ~begun

        def spread(of: Floats) -> Floats:
            even = float(of[new].sum()) / max(1, count)
            return np.bincount(number, of * begun, count).astype(float) + even

        return Occupancy(spread(there), spread(context), np.zeros(count))

    def _present(self, rows: Any, moments: Floats, now: float) -> tuple[Floats, Floats]:
        """By moment and row: probability that it decodes then, and its tokens of KV if so."""
        number = self._engine[rows]
        steps, pace = self._clocks(now)
        steps, pace = steps[number], pace[number]
        start = self._start[rows]
        later = steps + np.maximum(self._joins[rows] - now, self._floor[rows]) / pace
        start = np.where(np.isnan(start), later, start)
        done = np.maximum(steps - start, 0.0)
        ends = self._ends[:, rows]
        left = (ends > done).sum(0)
        if not left.all():
            self._prolong(np.arange(len(self))[rows][left == 0], done[left == 0])
            ends = self._ends[:, rows]
            left = (ends > done).sum(0)
        tokens = (steps - start) + (moments[:, None] - now) / pace
        share = (ends[:, None, :] > tokens).sum(0) / left
        share[tokens < 0] = 0.0
        return np.minimum(share, 1.0), self._prompt[rows] + np.maximum(tokens, 0.0)

    def _prolong(self, rows: NDArray[np.intp], done: Floats) -> None:
        for row, tokens in zip(rows.tolist(), done.tolist(), strict=True):
            ends = [self._lengths[row].quantile(share, int(tokens)) for share in SHARES]
            ends[-1] = max(ends[-1], int(tokens * (1 + LONGER)) + SOME)
            self._ends[:, row] = ends

    def _clocks(self, now: float) -> tuple[Floats, Floats]:
        steps = np.array([slot.steps(now) for slot in self._slots])
        return steps, np.array([slot.pace for slot in self._slots])

    def _grow(self, rows: int) -> None:
        def longer(name: str, kind: Any) -> Any:
            column = np.zeros(rows, kind)
            if hasattr(self, name):
                column[: len(self)] = getattr(self, name)[: len(self)]
            return column

        self._engine: NDArray[np.intp] = longer("_engine", np.intp)
        self._prompt: Floats = longer("_prompt", float)
        self._joins: Floats = longer("_joins", float)
        self._floor: Floats = longer("_floor", float)
        self._start: Floats = longer("_start", float)
        self._limit: Floats = longer("_limit", float)
        self._whole: Floats = longer("_whole", float)
        ends = np.zeros((len(SHARES), rows))
        if hasattr(self, "_ends"):
            ends[:, : len(self)] = self._ends[:, : len(self)]
        self._ends: Floats = ends
