"""Which headers travel between clients and engines."""

from collections.abc import Mapping

from aiohttp import hdrs, web
from multidict import CIMultiDict

from mooncake_connector.scheduler.proxy.identity import REQUEST_ID, TRACE_PARENT, Identity, current
from mooncake_connector.scheduler.proxy.keys import API_KEY, CALLER

HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
OWN = frozenset({"content-length", "x-request-id"})
# Bodies are decompressed here, and answers are to come as they are.
# The proxy's word on who served counts, and no one else's.
PREFIX = "x-mooncake-"
NOT_FORWARDED = HOP_BY_HOP | OWN | {"host", "content-encoding", "accept-encoding", "expect"}
# Clients' keys are not for engines that have their own.
NOT_FORWARDED_WITH_KEY = NOT_FORWARDED | {"authorization", API_KEY}
NOT_RETURNED = HOP_BY_HOP | OWN | {"date", "server"}


def identify(http: web.Request) -> Identity:
    """Note who the request is, for logs and for `forwarded`."""
    identity = Identity.of(http.headers.get(REQUEST_ID), http.headers.get(TRACE_PARENT))
    current.set(identity)
    return identity


def forwarded(http: web.Request) -> CIMultiDict[str]:
    """The client's headers that are the engines' business, the request's id, and the key for the engines."""
    caller = http.get(CALLER)
    if caller is None or caller.engine_key is None:
        headers = _without(http.headers, NOT_FORWARDED)
    else:
        headers = _without(http.headers, NOT_FORWARDED_WITH_KEY)
        if caller.engine_key:
            headers[hdrs.AUTHORIZATION] = f"Bearer {caller.engine_key}"
    if identity := current.get():
        headers[REQUEST_ID] = identity.request_id
    return headers


def forwarded_json(http: web.Request, named: object) -> CIMultiDict[str]:
    """Those of a JSON body, which names the request (`named`) if no header does."""
    if named is not None and REQUEST_ID not in http.headers:
        current.set(Identity.of(named, http.headers.get(TRACE_PARENT)))
    headers = forwarded(http)
    headers[hdrs.CONTENT_TYPE] = "application/json"
    return headers


def returned(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """An engine's headers that are the client's business."""
    return _without(headers, NOT_RETURNED)


async def stamp(_: web.Request, response: web.StreamResponse) -> None:
    """Say the request's id in every answer."""
    if identity := current.get():
        response.headers[REQUEST_ID] = identity.request_id


def _without(headers: Mapping[str, str], dropped: frozenset[str]) -> CIMultiDict[str]:
    if named := headers.get(hdrs.CONNECTION):
        dropped = dropped | {name.strip().lower() for name in named.split(",")}
    return CIMultiDict(
        [
            (name, value)
            for name, value in headers.items()
            if (lower := name.lower()) not in dropped and not lower.startswith(PREFIX)
        ]
    )
