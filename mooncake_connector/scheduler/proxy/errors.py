"""The proxy's own error answers, in OpenAI's form."""

import logging
from collections.abc import Awaitable, Callable

from aiohttp import hdrs, web

from mooncake_connector.scheduler.proxy import rejection
from mooncake_connector.scheduler.proxy.answer import Overloaded
from mooncake_connector.scheduler.proxy.openai import error_body

log = logging.getLogger(__name__)

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
    """Give what aiohttp or a bug answers OpenAI's form."""
    try:
        return await handler(request)
    except web.HTTPNotFound:
        return error_answer(404, f"the proxy has no {request.method} {request.path}", "NotFoundError")
    except web.HTTPException as raised:
        return error_answer(
            raised.status, raised.text or raised.reason, raised.reason.replace(" ", "") + "Error"
        )
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return error_answer(500, "the proxy failed; its log has the cause", "InternalServerError")
