"""One submitted copy, as its submitter sees it."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Generator
from enum import StrEnum, auto
from typing import Any, Self

from mooncake_connector.errors import TransferError

logger = logging.getLogger(__name__)


class Status(StrEnum):
    RUNNING = auto()
    LANDED = auto()
    FAILED = auto()


class Transfer:
    """Bytes on their way: poll `status`, `wait`, ``await``, or have a callback called.

    Attributes:
        nbytes: bytes to move.
        error: why it failed, once it did.
    """

    __slots__ = ("_callbacks", "_cancel", "_ended", "_progress", "error", "nbytes")

    _lock = threading.Lock()  # of all transfers; held for a few instructions

    def __init__(
        self, nbytes: int, progress: Callable[["Transfer"], int], cancel: Callable[["Transfer", str], None]
    ) -> None:
        self.nbytes = nbytes
        self.error: str | None = None
        self._progress, self._cancel = progress, cancel
        self._callbacks: list[Callable[[Transfer], None]] = []
        self._ended = False

    @property
    def status(self) -> Status:
        if not self._ended:
            return Status.RUNNING
        return Status.LANDED if self.error is None else Status.FAILED

    @property
    def done(self) -> bool:
        """Whether it has ended: nothing of it is under way, the source's memory may be reused."""
        return self._ended

    @property
    def bytes_done(self) -> int:
        """Bytes that have landed so far, in whole slices."""
        if self._ended and self.error is None:
            return self.nbytes
        return self._progress(self)

    def cancel(self, reason: str = "cancelled") -> None:
        """Give up what has not been sent; it ends, failed, once nothing of it is under way."""
        self._cancel(self, reason)

    def add_done_callback(self, callback: Callable[["Transfer"], None]) -> None:
        """Call ``callback(transfer)`` when it ends, from a transport thread; at once if it has."""
        with self._lock:
            if not self._ended:
                self._callbacks.append(callback)
                return
        callback(self)

    def keep(self, memory: Any) -> Self:
        """Keep an object alive until the end."""
        self.add_done_callback(lambda _, memory=memory: None)  # type: ignore[misc]
        return self

    def wait(self, timeout: float | None = None) -> None:
        """Block until every byte has landed.

        Args:
            timeout: seconds; None waits for ever, which a submitted `deadline` bounds.

        Raises:
            TransferError: It failed; the message says why.
            TimeoutError: It is still running.
        """
        if not self._ended:
            ended = threading.Lock()
            ended.acquire()
            self.add_done_callback(lambda _: ended.release())
            if not ended.acquire(timeout=-1 if timeout is None else timeout):
                raise TimeoutError(f"{self.bytes_done} of {self.nbytes} bytes had landed after {timeout} s")
        self._check()

    def __await__(self) -> Generator[Any, None, None]:
        if not self._ended:
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()

            def settle() -> None:
                if not future.done():
                    future.set_result(None)

            def told(_: Transfer) -> None:
                with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                    loop.call_soon_threadsafe(settle)

            self.add_done_callback(told)
            try:
                yield from future.__await__()
            except asyncio.CancelledError:
                self.cancel()
                raise
        self._check()

    def end(self, error: str | None) -> None:
        """For the engine: it is over."""
        with self._lock:
            self.error = error  # before _ended, which is read without the lock
            self._ended = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback(self)
            except Exception:
                logger.exception("a transfer's callback failed; the engine goes on")

    def _check(self) -> None:
        if self.error is not None:
            raise TransferError(self.error)
