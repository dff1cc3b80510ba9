"""One line in the log for each request."""

import logging
import time
from typing import Any

import msgspec
from aiohttp import web

from mooncake_connector.scheduler.engines.pool import Side
from mooncake_connector.scheduler.proxy.callers import OPEN
from mooncake_connector.scheduler.proxy.connections import Connection
from mooncake_connector.scheduler.proxy.errors import Handler
from mooncake_connector.scheduler.proxy.keys import CALLER, Caller
from mooncake_connector.scheduler.proxy.settings import InForce

log = logging.getLogger("mooncake_connector.access")


class Access(msgspec.Struct):
    """What its handler knows of a request.

    Attributes:
        prefill, decode: the engines that serve it; empty if none does.
        ttft: seconds from its arrival to its answer's first byte; None if none came.
        tokens: of the answer, None if not known.
        outcome: as in the metric ``requests_total``.
    """

    prefill: str = ""
    decode: str = ""
    ttft: float | None = None
    tokens: int | None = None
    outcome: str = ""

    def served_by(self, side: Side, url: str) -> None:
        """It goes to that engine and to no other."""
        self.prefill, self.decode = (url, "") if side == "prefill" else ("", url)


ACCESS = web.RequestKey("access", Access)


class AccessLine:
    """A log message: an object in a JSON log, ``name=value`` in text. What is empty is left out."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = {name: value for name, value in fields.items() if value not in (None, "")}

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.fields.items())


class AccessLog:
    """Middleware: tells the connection when a request begins and ends, and writes its line."""

    def __init__(self, in_force: InForce) -> None:
        self._in_force = in_force

    @web.middleware
    async def written(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Write the line when all is over, even if the client left."""
        access = request[ACCESS] = Access()
        connection = request.protocol
        assert isinstance(connection, Connection)
        connection.began()
        began = time.monotonic()
        status: int | None = None
        try:
            response = await handler(request)
            status = response.status
            return response
        except web.HTTPException as raised:
            status = raised.status
            raise
        except Exception:
            status = 500
            raise
        finally:
            # What still comes of its body is no next request.
            request.content.on_eof(connection.ended)
            wanted = self._in_force.settings.access_log and log.isEnabledFor(logging.INFO)
            if wanted and request.path not in OPEN:
                log.info(_line(request, access, status, time.monotonic() - began))


def _line(http: web.Request, access: Access, status: int | None, seconds: float) -> AccessLine:
    fields = {
        "client": http.remote,
        "method": http.method,
        # Neither the query, which may hold a key, nor decoded, which could break the line.
        "path": http.rel_url.raw_path,
        "status": status,
        "outcome": access.outcome,
        "tenant": http.get(CALLER, Caller()).shown,
        "class": http.get(CALLER, Caller()).name,
        "prefill": access.prefill,
        "decode": access.decode,
        "ttft": None if access.ttft is None else round(access.ttft, 4),
        "tokens": access.tokens,
        "seconds": round(seconds, 4),
    }
    return AccessLine(fields)
