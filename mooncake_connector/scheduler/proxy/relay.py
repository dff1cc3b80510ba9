"""An engine's stream on its way to the client: as bytes, never decoded."""

import asyncio
import contextlib
import fcntl
import logging
import struct
import termios
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web
from aiohttp.http import StreamWriter

from mooncake_connector.scheduler.engines.response import Sink
from mooncake_connector.scheduler.proxy.answer import StreamBroken
from mooncake_connector.scheduler.proxy.deadlines import Stall
from mooncake_connector.scheduler.proxy.openai import broken_event
from mooncake_connector.scheduler.proxy.timeline import Timeline

log = logging.getLogger(__name__)

# Seconds that a client may take nothing of its stream.
PATIENCE = web.AppKey("PATIENCE", float)
# Set on a request whose client was cut off for that.
SLOW = web.RequestKey("SLOW", bool)


# Has a stream's bytes taken as they come; returns whether that was all, or no more are taken for now.
Pour = Callable[[Sink], Awaitable[bool]]


def pouring(chunks: AsyncIterator[bytes]) -> Pour:
    """Where something is done with a stream on its way."""

    async def pour(sink: Sink) -> bool:
        async for chunk in chunks:
            if not sink(chunk):
                return False
        return True

    return pour


async def relay(
    http: web.Request, response: web.StreamResponse, pour: Pour, timeline: Timeline | None = None
) -> str:
    """Send what `pour` gives as it comes, no faster than the client takes it; returns the outcome.

    A client that takes nothing for `PATIENCE` is cut off, and the handler cancelled as for one that leaves.
    Until then no more is kept for it than fits into the buffers of both connections, less than 1 MiB.

    The outcome is ``stream_broken`` if the stream breaks off (`StreamBroken`), of which an error event tells;
    ``cancelled`` if the client is gone; else ``ok``.
    """
    outcome = "ok"
    transport, protocol, writer = http.transport, http.protocol, http.writer
    if transport is None:
        return "cancelled"
    assert isinstance(writer, StreamWriter)

    def cut() -> None:
        http[SLOW] = True
        log.warning("%s took nothing of its stream for too long: it is cut off", http.remote)
        transport.abort()

    def take(chunk: bytes) -> bool:
        # `response.write` does the same in a coroutine, which would need a task for each chunk.
        if not chunk:
            return True
        if transport.is_closing():
            raise ConnectionResetError
        transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if writer.chunked else chunk)
        if timeline and "first_byte" not in timeline.moments:
            timeline.mark("first_byte")
        return not protocol.writing_paused

    client = Stall(http.app[PATIENCE], cut, lambda: _left(transport))
    client.start()
    try:
        await response.prepare(http)
        writer.send_headers()
        try:
            while not await pour(take):
                client.waiting = True
                await writer.drain()
                client.waiting = False
                client.turns += 1
        except StreamBroken as error:
            log.warning("%s", error)
            outcome = "stream_broken"
            client.waiting = True
            # The blank line ends an event that was cut in two; no [DONE] follows, for it is not done.
            await response.write(b"\n\n" + broken_event(http.path, str(error)))
        except ConnectionResetError:
            raise
        except Exception:
            # What has begun can't become a 500: another head in the middle of a stream would be none.
            log.exception("%s %s failed", http.method, http.rel_url.raw_path)
            outcome = "proxy_error"
            client.waiting = True
            said = "the proxy failed; its log has the cause"
            await response.write(b"\n\n" + broken_event(http.path, said))
        client.waiting = True
        await response.write_eof()
    except ConnectionResetError:
        return "cancelled"
    finally:
        client.stop()
    return outcome


def _left(transport: asyncio.Transport) -> int:
    """Bytes that the client has not taken, the kernel's too: it tells late of room."""
    queued = struct.pack("i", 0)
    with contextlib.suppress(OSError):
        queued = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
    return transport.get_write_buffer_size() + int(struct.unpack("i", queued)[0])
