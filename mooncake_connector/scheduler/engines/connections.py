"""Connections to engines, which aiohttp keeps for the next request, with two of its gaps closed."""

import asyncio
import select
from functools import partial

import aiohttp
from aiohttp.client_proto import ResponseHandler

# uvicorn closes an idle connection after 5 s: leave before it does, or a request meets a closing socket.
KEEPALIVE_SECONDS = 4.0


class EngineConnection(ResponseHandler):
    """One connection, of one request at a time."""

    def is_connected(self) -> bool:
        # Asked of an idle one before it is used again. What an engine sent after its answer's end would be
        # taken for the next answer, another client's; and one that was closed need not be known to be yet.
        return super().is_connected() and not self.should_close and not self._readable()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        error, payload = self.exception(), self._payload
        if error and payload is not None and not payload.is_eof() and payload.exception() is None:
            # Else who reads the answer is not told of a chunk that is none, and waits for ever.
            payload.set_exception(aiohttp.ClientPayloadError(f"the answer is garbled: {error}"), error)

    def _readable(self) -> bool:
        assert self.transport is not None
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))


def connector() -> aiohttp.TCPConnector:
    """As many connections as there are requests; call it in the event loop."""
    found = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS)
    found._factory = partial(_connection, loop=asyncio.get_running_loop())
    return found


def _connection(loop: asyncio.AbstractEventLoop) -> ResponseHandler:
    return EngineConnection(loop)
