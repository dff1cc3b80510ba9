"""The answers that decode engines write or are going to write: one table, that tells what they take later.

An engine gives each of its requests one token per step. So a request's place is kept in steps of its
engine, not in seconds: when an engine becomes slower, nothing in the table changes. How long an answer will
be is kept as a few equally likely lengths; a request counts, later, by the share of those not reached yet.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol, Self

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

    def quantiles(self, shares: Sequence[float], generated: int = 0) -> list[int]: ...


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
        ends = lengths.quantiles(SHARES)
        return cls(lengths, tuple(ends), sum(ends) / len(ends))


class Occupancy(msgspec.Struct, frozen=True):
    """What decode engines are expected to hold: by engine at one moment, or of one engine by moments.

    Attributes:
        batch: requests that decode.
        context: tokens of KV that they attend to.
    """

    batch: Floats
    context: Floats


class Forecast(Occupancy, frozen=True):
    """How sure that is, too.

    Attributes:
        spread: standard deviation of `batch`.
    """

    spread: Floats


class Progress(msgspec.Struct, frozen=True):
    """How far all answers are at one moment, by row.

    Attributes:
        pace: seconds per step of its engine.
        tokens: written; less than none: steps until it begins.
        left: of its lengths, how many are not reached.
    """

    now: float
    pace: Floats
    tokens: Floats
    left: NDArray[np.intp]


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
        elapsed = now - self._moment
        return self._steps + elapsed / self.pace if elapsed > 0 else self._steps

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
        self.pace = max(1e-6, pace(self.name, self.batch or 1, int(self._attended())))

    def _attended(self) -> float:
        """Tokens of context at the moment that it was advanced to."""
        return max(0.0, self._base + self.batch * self._steps) if self.batch else 0.0

    def _advance(self, now: float) -> None:
        elapsed = now - self._moment
        if elapsed <= 0:
            return
        before = self._attended()
        self._steps += elapsed / self.pace
        self._batch_area += self.batch * elapsed
        self._context_area += (before + self._attended()) / 2 * elapsed
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
        # What is asked more than once of the same answers at the same moment.
        self._progress: Progress | None = None
        self._members: dict[str, NDArray[np.intp]] = {}
        self._lay(np.zeros(256, np.intp), np.zeros((6 + len(SHARES), 256)))

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, id: str) -> bool:
        return id in self._rows

    @property
    def slots(self) -> Sequence[DecodeSlot]:
        """Engines, in the order of `at`."""
        return self._slots

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
        self._progress = None
        self._members.clear()

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
        whole = prompt + answer.mean
        ahead = math.inf if sure else 0.0
        self._cells[:, row] = (prompt, joins, ahead, math.nan, limit, whole, *answer.ends)
        self._slots[number].requests += 1
        self._slots[number].committed += whole
        self._progress = None
        self._members.pop(name, None)

    def joins(self, id: str, moment: float) -> None:
        """Another prediction of when it begins; of no account once it has begun."""
        row = self._rows[id]
        if math.isnan(self._start.item(row)):
            self._joins[row] = moment
            self._progress = None

    def place(self, id: str, tokens: float, now: float) -> None:
        """It has so many tokens: the first such call begins it. Less than none: it begins later."""
        row = self._rows[id]
        slot = self._slots[self._engine[row]]
        before = self._start.item(row)
        start = slot.steps(now) - tokens
        self._start[row] = start
        if math.isnan(before):
            self._joins[row] = math.inf
            slot.change(1, self._prompt.item(row) - start, now, self._pace)
        else:
            slot.change(0, before - start, now, self._pace)
        self._progress = None

    def remove(self, id: str, now: float) -> None:
        """It is over."""
        row, last = self._rows.pop(id), len(self) - 1
        slot = self._slots[self._engine[row]]
        slot.requests -= 1
        slot.committed = max(0.0, slot.committed - self._whole.item(row)) if slot.requests else 0.0
        start = self._start.item(row)
        if not math.isnan(start):
            slot.change(-1, start - self._prompt.item(row), now, self._pace)
        self._progress = None
        self._members.pop(slot.name, None)
        if row != last:
            self._members.pop(self._slots[self._engine[last]].name, None)
            self._engine[row] = self._engine[last]
            self._cells[:, row] = self._cells[:, last]
            self._ids[row], self._lengths[row] = self._ids[last], self._lengths[last]
            self._rows[self._ids[row]] = row
        self._ids.pop()
        self._lengths.pop()

    def begun(self, id: str) -> bool:
        """Whether it decodes."""
        return not math.isnan(self._start.item(self._rows[id]))

    def at(self, moment: float, now: float) -> Occupancy:
        """Every engine at `moment`, not before now, in the order of `slots`."""
        found, rows, count = self._written(now), len(self), len(self._slots)
        tokens = found.tokens + (moment - now) / found.pace
        share = np.add.reduce(self._ends[:, :rows] > tokens, 0) / found.left
        share *= tokens >= 0
        number = self._engine[:rows]
        return Occupancy(
            np.bincount(number, share, count).astype(float, copy=False),
            np.bincount(number, share * (self._prompt[:rows] + tokens), count).astype(float, copy=False),
        )

    def over(self, name: str, moments: Sequence[float], now: float) -> Forecast:
        """One engine at several moments, none before now."""
        found, rows = self._written(now), self._of(name)
        steps = (np.array(moments) - now) / self.slot(name).pace
        tokens = found.tokens.take(rows) + steps[:, None]
        share = np.add.reduce(self._ends.take(rows, 1)[:, None] > tokens, 0) / found.left.take(rows)
        share *= tokens >= 0
        tokens += self._prompt.take(rows)
        return Forecast(
            np.add.reduce(share, 1),
            np.add.reduce(share * tokens, 1),
            np.sqrt(np.add.reduce(share * (1 - share), 1)),
        )

    def strictest(self, name: str) -> float:
        """The least seconds per token promised to a request of this engine; infinite if it has none."""
        return float(np.minimum.reduce(self._limit.take(self._of(name)), initial=math.inf))

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

        return Occupancy(spread(there), spread(context))

    def _of(self, name: str) -> NDArray[np.intp]:
        """An engine's rows."""
        rows = self._members.get(name)
        if rows is None:
            rows = self._members[name] = (self._engine[: len(self)] == self._number[name]).nonzero()[0]
        return rows

    def _written(self, now: float) -> Progress:
        """How far all answers are; those that outlived all their lengths are given longer ones."""
        if self._progress is not None and self._progress.now == now:
            return self._progress
        rows = len(self)
        steps, pace = self._clocks(now).take(self._engine[:rows], 1)
        # Of those that have begun the one is infinitely little, of the others the other one is not a number.
        predicted = np.minimum(now - self._joins[:rows], self._ahead[:rows]) / pace
        tokens = np.fmax(predicted, steps - self._start[:rows])
        done = np.maximum(tokens, 0.0)
        left = np.add.reduce(self._ends[:, :rows] > done, 0)
        if np.count_nonzero(left) < rows:
            self._prolong((left == 0).nonzero()[0], done)
            left = np.add.reduce(self._ends[:, :rows] > done, 0)
        self._progress = Progress(now, pace, tokens, left)
        return self._progress

    def _prolong(self, rows: NDArray[np.intp], done: Floats) -> None:
        for row in rows.tolist():
            tokens = done.item(row)
            ends = self._lengths[row].quantiles(SHARES, int(tokens))
            ends[-1] = max(ends[-1], int(tokens * (1 + LONGER)) + SOME)
            self._ends[:, row] = ends

    def _clocks(self, now: float) -> Floats:
        """Steps up to now and seconds per step, by engine."""
        slots = self._slots
        return np.array([[slot.steps(now) for slot in slots], [slot.pace for slot in slots]])

    def _grow(self, rows: int) -> None:
        engine, cells = np.zeros(rows, np.intp), np.zeros((6 + len(SHARES), rows))
        engine[: len(self)], cells[:, : len(self)] = self._engine, self._cells
        self._lay(engine, cells)

    def _lay(self, engine: NDArray[np.intp], cells: Floats) -> None:
        self._engine, self._cells = engine, cells
        self._prompt, self._joins, self._ahead, self._start, self._limit, self._whole = cells[:6]
        self._ends = cells[6:]
