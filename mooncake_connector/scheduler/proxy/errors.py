"""The proxy's own error answers, in OpenAI's form."""

import logging
from collections.abc import Awaitable, Callable

from aiohttp import hdrs, web

from mooncake_connector.scheduler.proxy import rejection
from mooncake_connector.scheduler.proxy.answer import Overloaded
from mooncake_connector.scheduler.proxy.headers import identify
from mooncake_connector.scheduler.proxy.openai import error_body

log = logging.getLogger(__name__)

# Of these the rest of the request's body is still to come, and nobody wants it.
CUT_SHORT = (web.HTTPRequestTimeout.status_code, web.HTTPRequestEntityTooLarge.status_code)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def error_answer(status: int, message: str, kind: str, param: str | None = None) -> web.Response:
    """An error answer; `kind` is OpenAI's ``type``."""
    body = error_body(message, kind, status, param)
    return web.Response(status=status, body=body, content_type="application/json")


def rejection_answer(overloaded: Overloaded) -> web.Response:
    """The answer to a request that the conductor rejects."""
    headers = {hdrs.RETRY_AFTER: str(rejection.retry_seconds(overloaded.rejected))}
    body = rejection.body(overloaded.rejected)
    return web.Response(status=rejection.STATUS, body=body, headers=headers, content_type="application/json")


@web.middleware
async def openai_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Note who the request is, and give what aiohttp or a bug answers OpenAI's form."""
    identify(request)
    try:
        return await handler(request)
    except web.HTTPNotFound:
        return error_answer(404, f"the proxy has no {request.method} {request.path}", "NotFoundError")
    except web.HTTPException as raised:
        kind = raised.reason.replace(" ", "") + "Error"
        answer = error_answer(raised.status, raised.text or raised.reason, kind)
        if allowed := raised.headers.get(hdrs.ALLOW):
            answer.headers[hdrs.ALLOW] = allowed
        if raised.status in CUT_SHORT:
            answer.force_close()
        return answer
    except Exception:
        log.exception("%s %s failed", request.method, request.rel_url.raw_path)
        return error_answer(500, "the proxy failed; its log has the cause", "InternalServerError")
