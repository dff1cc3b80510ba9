"""The thread that sleeps until some event channel of RDMA has news: ``mooncake-rdma``."""

import logging
import os
import select
import threading
from collections.abc import Callable

BLIND_POLL_S = 0.0005
"""How often channels are looked at whose descriptor could not be found."""

log = logging.getLogger(__name__)


class Poller:
    """Calls back when descriptors become readable. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._seeing: dict[int, Callable[[], None]] = {}
        self._blind: list[Callable[[], None]] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="mooncake-rdma", daemon=True)
        self._thread.start()

    def add(self, fd: int | None, on_ready: Callable[[], None]) -> None:
        """Call `on_ready` whenever `fd` is readable, or every `BLIND_POLL_S` without one.

        It may be called once more, and in vain, after its removal.
        """
        with self._lock:
            if fd is None:
                self._blind.append(on_ready)
            else:
                self._seeing[fd] = on_ready
                self._epoll.register(fd, select.EPOLLIN)
        os.eventfd_write(self._wake, 1)

    def remove(self, fd: int | None, on_ready: Callable[[], None]) -> None:
        """Stop calling; to be done before `fd` is closed."""
        with self._lock:
            if self._closed:
                return
            if fd is None:
                self._blind.remove(on_ready)
            elif self._seeing.pop(fd, None) is not None:
                self._epoll.unregister(fd)

    def close(self) -> None:
        """End the thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        os.eventfd_write(self._wake, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            ready = self._epoll.poll(BLIND_POLL_S if self._blind else None)
            with self._lock:
                calls = [call for fd, _ in ready if (call := self._seeing.get(fd)) is not None] + self._blind
            for call in calls:
                try:
                    call()
                except Exception:
                    log.exception("rdma: a completion could not be handled; the thread goes on")
            if any(fd == self._wake for fd, _ in ready):
                os.eventfd_read(self._wake)
        self._epoll.close()
        os.close(self._wake)
