"""The books: what every engine was given and has not finished, and what that comes to at a later moment."""

from collections.abc import Callable, Iterable, Sequence

import msgspec

from mooncake_connector.scheduler.policy.base import DecodeView, Instance, Placement, Side
from mooncake_connector.scheduler.policy.decode_table import (
    Answer,
    DecodeSlot,
    DecodeTable,
    Forecast,
    Occupancy,
)
from mooncake_connector.scheduler.policy.prefill_queue import PrefillQueue

# Room of an engine that did not say how much KV it holds.
UNKNOWN_ROOM = 1 << 40
# So many prompts of a queue learn at once that the one before them took longer or shorter; the rest, when
# they are nearer to the front.
NEAR = 64


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's load.

    Attributes:
        queue: predicted seconds until it could begin with another prompt.
        prompts: waiting or being computed there; `tokens` in all.
        answers: in flight there, those whose prompt is not computed yet included.
        batch: of these, those that decode.
        context: tokens of KV that the batch attends to.
        committed: tokens of KV of `answers` with their predicted lengths.
        kv_tokens: tokens of KV it can hold; 0 if not known.
        tbt: predicted seconds per token now; 0 without a batch.
    """

    name: str
    side: str
    queue: float
    prompts: int
    tokens: int
    answers: int = 0
    batch: int = 0
    context: int = 0
    committed: int = 0
    kv_tokens: int = 0
    tbt: float = 0.0


class Booking(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a request when it gets its engines.

    Attributes:
        computes: the engine that computes the prompt.
        prompt: its tokens.
        seconds: predicted for computing it.
        copying: predicted seconds before it can be computed, while its prefix is copied.
        handover: predicted seconds from then until decode begins.
        joins: moment at which decode is predicted to begin.
        answer: how long it is predicted to be.
        limit: seconds per token that it is promised.
    """

    placement: Placement
    computes: str
    prompt: int
    seconds: float
    copying: float
    handover: float
    joins: float
    answer: Answer
    limit: float


class Ledger:
    """Requests in flight by engine and phase.

    Args:
        pace: seconds of one decode step of an engine, by its name, batch and context.
    """

    def __init__(self, pace: Callable[[str, int, int], float]) -> None:
        self.instances: dict[str, Instance] = {}
        self._paused: set[str] = set()
        self._queues: dict[str, PrefillQueue] = {}
        self._answers = DecodeTable(pace)
        self._bookings: dict[str, Booking] = {}
        self._sort()

    def __len__(self) -> int:
        return len(self._bookings)

    def __contains__(self, id: str) -> bool:
        return id in self._bookings

    def join(self, instance: Instance, now: float) -> None:
        """An engine comes up, with nothing in flight. If it was here: it came anew."""
        if instance.name in self.instances:
            self.leave(instance.name, now)
        self.instances[instance.name] = instance
        self._queues[instance.name] = PrefillQueue()
        if instance.side != "prefill":
            self._answers.join(instance.name, instance.kv_tokens, now)
        self._sort()

    def leave(self, name: str, now: float) -> None:
        """An engine goes; requests that it had stay open until they are closed."""
        instance = self.instances.pop(name, None)
        if instance is None:
            return
        self._paused.discard(name)
        del self._queues[name]
        if instance.side != "prefill":
            self._answers.leave(name, now)
        self._sort()

    def pause(self, name: str) -> None:
        """An engine gets nothing more; what it has stays in the books."""
        if name in self.instances:
            self._paused.add(name)
            self._sort()

    def resume(self, name: str) -> None:
        """It gets requests again."""
        self._paused.discard(name)
        self._sort()

    def open(self, id: str, booking: Booking, now: float) -> None:
        """A request got its engines."""
        self._bookings[id] = booking
        decode = booking.placement.decode
        sure = booking.computes == decode
        self._queues[booking.computes].add(id, booking.seconds, booking.prompt, now, now + booking.copying)
        self._answers.add(id, decode, booking.prompt, booking.joins, booking.answer, booking.limit, sure)

    def prefilled(self, id: str, now: float) -> bool:
        """Its prompt is computed, its KV is about to arrive; whether the books had it as waiting for that."""
        booking = self._bookings[id]
        waited = self._dequeue(booking.computes, id, now)
        if id in self._answers and not self._answers.begun(id):
            self._answers.place(id, -booking.handover / self.decode(booking.placement.decode).pace, now)
        return waited

    def progressed(self, id: str, tokens: int, now: float) -> None:
        """Its answer has so many tokens."""
        self._dequeue(self._bookings[id].computes, id, now)
        if id in self._answers:
            self._answers.place(id, tokens, now)

    def close(self, id: str, now: float) -> Booking | None:
        """It is over, however it ended; None if it was not open."""
        booking = self._bookings.pop(id, None)
        if booking is None:
            return None
        if self._dequeue(booking.computes, id, now):
            self._queues[booking.computes].meter.begin(now)
        if id in self._answers:
            self._answers.remove(id, now)
        return booking

    def prompts(self, name: str) -> PrefillQueue:
        return self._queues[name]

    def decode(self, name: str) -> DecodeSlot:
        return self._answers.slot(name)

    def decode_at(self, moment: float, now: float) -> list[DecodeView]:
        """Every one of `writers`, as predicted for `moment`: now or later."""
        found = self._answers.at(max(moment, now), now)
        views = []
        for slot, batch, context in zip(
            self._answers.slots, found.batch.tolist(), found.context.tolist(), strict=True
        ):
            if slot.name in self._paused:
                continue
            group = self.instances[slot.name].group
            room = max(0, int(slot.capacity - context)) if slot.capacity else UNKNOWN_ROOM
            views.append(DecodeView(slot.name, group, round(batch), int(context), room, 0, slot.requests))
        return views

    def all_at(self, moment: float, now: float) -> Occupancy:
        """Every one of `writers` at `moment`, in their order."""
        return self._taking(self._answers.at(moment, now))

    def decode_over(self, name: str, moments: Sequence[float], now: float) -> Forecast:
        """One engine at several moments, none before now."""
        return self._answers.over(name, moments, now)

    def lasting(self, moment: float, seconds: float, now: float) -> Occupancy:
        """Every one of `writers` at `moment` if each answer took `seconds`, in their order."""
        return self._taking(self._answers.lasting(moment, seconds, now))

    def writers(self) -> Sequence[Instance]:
        """Engines that decode and may get requests."""
        return self._writers

    def computers(self, side: Side) -> Sequence[Instance]:
        """Engines of one kind that may get prompts: all but those that are paused."""
        return self._computers.get(side, ())

    def strictest(self, name: str) -> float:
        """The least seconds per token promised to one of its requests; infinite if it has none."""
        return self._answers.strictest(name)

    def accounts(self, now: float) -> Iterable[Account]:
        """Every engine's load now."""
        for name, instance in self.instances.items():
            queue = self._queues[name]
            account = Account(
                name=name,
                side=instance.side,
                queue=queue.seconds(now),
                prompts=len(queue),
                tokens=queue.tokens,
                kv_tokens=instance.kv_tokens,
            )
            if instance.side != "prefill":
                slot = self._answers.slot(name)
                account = msgspec.structs.replace(
                    account,
                    answers=slot.requests,
                    batch=slot.batch,
                    context=int(slot.context(now)),
                    committed=int(slot.committed),
                    tbt=slot.pace if slot.batch else 0.0,
                )
            yield account

    def _sort(self) -> None:
        """Note who may get what: it is asked far more often than it changes."""
        known, paused = self.instances, self._paused
        self._writers = [known[slot.name] for slot in self._answers.slots if slot.name not in paused]
        self._computers: dict[Side, list[Instance]] = {}
        for name, instance in known.items():
            if name not in paused:
                self._computers.setdefault(instance.side, []).append(instance)

    def _taking(self, found: Occupancy) -> Occupancy:
        if not self._paused:
            return found
        at = [number for number, slot in enumerate(self._answers.slots) if slot.name not in self._paused]
        return msgspec.structs.replace(found, batch=found.batch[at], context=found.context[at])

    def _dequeue(self, name: str, id: str, now: float) -> bool:
        queue = self._queues.get(name)
        if queue is None or not queue.end(id, now):
            return False
        for other, moment in queue.ends(now, NEAR):
            booking = self._bookings[other]
            if other in self._answers and not self._answers.begun(other):
                self._answers.joins(other, moment + booking.handover)
        return True
