"""An engine's answer while it comes: read in pieces, read whole, or poured into whoever takes it."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from multidict import CIMultiDict

from mooncake_connector.errors import MooncakeError

# An answer of which nobody takes more is not read on once so many bytes of it wait here.
WAITING_BYTES = 64 << 10
# No answer in one piece is larger: an engine that never ends one must not fill the memory.
MOST_BYTES = 256 << 20

# Takes bytes at once; whether it takes more.
Sink = Callable[[bytes], bool]


class Broken(MooncakeError):
    """An engine hung up, or what it sent is no HTTP. The message repeats nothing of an answer."""


class Unreachable(Broken):
    """There is no connection to an engine."""


class Line(Protocol):
    """What an answer needs of the connection that it comes over."""

    def pause(self) -> None:
        """Read no more for now."""

    def resume(self) -> None:
        """Read on."""

    def abort(self) -> None:
        """Hang up, whereupon the engine gives up the request."""


class Response:
    """An answer from the moment when its headers are there. Whoever has it closes it, or reads it to its end.

    One reader at a time.

    Attributes:
        status: HTTP's.
        headers: as they came.
    """

    __slots__ = (
        "_broken",
        "_ended",
        "_line",
        "_paused",
        "_pieces",
        "_sink",
        "_size",
        "_waiter",
        "headers",
        "status",
    )

    def __init__(self, line: Line, status: int, headers: CIMultiDict[str]) -> None:
        self.status = status
        self.headers = headers
        self._line: Line | None = line
        self._pieces: list[bytes] = []
        self._size = 0
        self._ended = self._paused = False
        self._broken = ""
        self._sink: Sink | None = None
        self._waiter: asyncio.Future[bool] | None = None

    @property
    def content_type(self) -> str:
        """Lower-case, without parameters."""
        return self.headers.get("Content-Type", "").partition(";")[0].strip().lower()

    async def readany(self) -> bytes:
        """What is there, or the next bytes that come; none at the end.

        Raises:
            Broken: it ended too soon.
        """
        while not self._pieces:
            if self._ended:
                return b""
            await self._wait()
        return self._take()

    async def read(self) -> bytes:
        """All of it that was not read yet.

        Raises:
            Broken: it ended too soon, or is larger than `MOST_BYTES`.
        """
        found: list[bytes] = []
        size = 0
        while piece := await self.readany():
            found.append(piece)
            size += len(piece)
            if size > MOST_BYTES:
                self.close()
                raise Broken(f"its answer is larger than {MOST_BYTES >> 20} MiB")
        return found[0] if len(found) == 1 else b"".join(found)

    async def pour(self, sink: Sink) -> bool:
        """Have `sink` called with all bytes, as they come, without a task that is woken for each.

        Returns:
            Whether that was all of it. If not, `sink` takes no more: pour again when it does.

        Raises:
            Broken: it ended too soon.
            Exception: what `sink` raised.
        """
        while self._pieces:
            if not sink(self._take()):
                return False
        if self._ended:
            return True
        self._sink = sink
        try:
            return await self._wait()
        finally:
            self._sink = None

    def close(self) -> None:
        """Let go of it: if it has not ended, the engine learns that nobody wants the rest."""
        line, self._line = self._line, None
        if line and not self._ended:
            line.abort()

    def feed(self, piece: bytes) -> None:
        """The line has more of it."""
        if sink := self._sink:
            try:
                more = sink(piece)
            except Exception as error:
                self._sink = None
                self._wake(error)
                return
            if not more:
                self._sink = None
                self._pause()
                self._wake(False)
            return
        self._pieces.append(piece)
        self._size += len(piece)
        if self._size > WAITING_BYTES:
            self._pause()
        self._wake(False)

    def end(self, broken: str = "") -> None:
        """The line has no more of it; `broken`: why, though there should be more."""
        self._line = None
        if broken:
            self._broken = broken
            self._wake(Broken(broken))
        else:
            self._ended = True
            self._wake(True)

    async def _wait(self) -> bool:
        """Until something has come; whether it was the end."""
        if self._broken:
            raise Broken(self._broken)
        if self._paused and self._line:
            self._paused = False
            self._line.resume()
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiter = waiter
        try:
            return await waiter
        finally:
            self._waiter = None

    def _wake(self, result: bool | Exception) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if isinstance(result, Exception):
            waiter.set_exception(result)
        else:
            waiter.set_result(result)

    def _take(self) -> bytes:
        pieces = self._pieces
        found = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._pieces = []
        self._size = 0
        return found

    def _pause(self) -> None:
        if not self._paused and self._line:
            self._paused = True
            self._line.pause()
