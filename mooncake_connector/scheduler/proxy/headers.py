"""Which headers travel between clients and engines."""

import uuid
from collections.abc import Mapping

from aiohttp import hdrs, web

from mooncake_connector.scheduler.proxy.openai import ClientRequest

REQUEST_ID = "X-Request-Id"
HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
OWN = frozenset({"content-length", "x-request-id"})
NOT_FORWARDED = HOP_BY_HOP | OWN | {"host", "content-type", "content-encoding", "accept-encoding", "expect"}
NOT_RETURNED = HOP_BY_HOP | OWN | {"date", "server"}


def forwarded(http: web.Request) -> dict[str, str]:
    """The client's headers that are the engines' business."""
    return {name: value for name, value in http.headers.items() if name.lower() not in NOT_FORWARDED}


def identified(http: web.Request, request: ClientRequest) -> tuple[dict[str, str], str]:
    """Headers for the engines, and the request's id: the client's if it named one."""
    named = http.headers.get(REQUEST_ID) or request.get("request_id")
    usable = isinstance(named, str) and named.isprintable() and named.isascii()
    request_id = str(named) if usable else uuid.uuid4().hex
    return forwarded(http) | {REQUEST_ID: request_id, hdrs.CONTENT_TYPE: "application/json"}, request_id


def returned(headers: Mapping[str, str]) -> dict[str, str]:
    """An engine's headers that are the client's business."""
    return {name: value for name, value in headers.items() if name.lower() not in NOT_RETURNED}
