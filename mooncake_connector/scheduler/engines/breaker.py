"""Leaves out an engine whose requests fail though its health checks do not. Pure: calls say when it is."""

from typing import Literal

State = Literal["closed", "open", "half_open"]

# It opens when so many requests failed within a window, and they were this share of those that ended.
FAILURES, SHARE, WINDOW = 5, 0.5, 10.0
# Seconds until one request is let through; doubled each time that one fails.
PAUSE, LONGEST = 1.0, 30.0


class Breaker:
    """One engine's circuit breaker.

    Closed, it counts. Open, it asks for the engine to be left out for a pause. After that it is half open:
    one request per pause is let through as a trial; one that succeeds closes it, one that fails opens it
    again, for longer. What was under way when it opened says nothing about the engine since.

    Nobody is stopped here: where all engines of a pool are left out, requests go to them all the same, and
    are as good as trials.

    Attributes:
        opened: how often it opened after being closed.
    """

    def __init__(self) -> None:
        self.opened = 0
        self._closed = True
        self._window = float("-inf")
        self._succeeded = self._failed = 0
        self._pause = PAUSE
        self._since = self._until = 0.0

    def state(self, now: float) -> State:
        """What it is by now."""
        return "closed" if self._closed else "open" if now < self._until else "half_open"

    def allows(self, now: float) -> bool:
        """Whether a request may go to the engine, if there is another one."""
        return self._closed or now >= self._until

    def begin(self, now: float) -> None:
        """A request goes to the engine: the next trial is a pause away."""
        if not self._closed and now >= self._until:
            self._until = now + self._pause

    def succeeded(self, began: float, now: float) -> None:
        """A request that went there at `began` got its answer, be it a refusal."""
        if self._closed:
            self._renew(now)
            self._succeeded += 1
        elif began >= self._since:
            self.reset()

    def failed(self, began: float, now: float) -> None:
        """A request that went there at `began` failed: no connection, a reset, silence, a 5xx."""
        if not self._closed:
            if began >= self._since:
                self._open(min(2 * self._pause, LONGEST), now)
            return
        self._renew(now)
        self._failed += 1
        if self._failed >= FAILURES and self._failed >= SHARE * (self._failed + self._succeeded):
            self.opened += 1
            self._open(PAUSE, now)

    def reset(self) -> None:
        """The engine works, or was started anew."""
        self._closed = True
        self._window = float("-inf")

    def _open(self, pause: float, now: float) -> None:
        self._closed = False
        self._pause = pause
        self._since, self._until = now, now + pause

    def _renew(self, now: float) -> None:
        if now - self._window > WINDOW:
            self._window = now
            self._succeeded = self._failed = 0
