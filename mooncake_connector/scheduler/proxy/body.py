"""A request's body, no larger and no slower than it may be."""

import asyncio

from aiohttp import HttpVersion11, StreamReader, hdrs, web

from mooncake_connector.scheduler.proxy.settings import InForce

CONTINUE = "100-continue"
IN_FORCE = web.AppKey("in_force", InForce)


async def not_yet(http: web.Request) -> None:
    """What a request may expect is to be told to go on, which `read_body` does: not before its key is known.

    Raises:
        web.HTTPExpectationFailed: it expects something else.
    """
    if http.headers.get(hdrs.EXPECT, "").lower() != CONTINUE:
        raise web.HTTPExpectationFailed(text=f"the only Expect that is understood is {CONTINUE}")


async def read_body(http: web.Request) -> bytes:
    """The whole body, decompressed.

    Raises:
        web.HTTPRequestEntityTooLarge: it is larger than `max_body_mib`; no more than that is read.
        web.HTTPBadRequest: it is not compressed as it says.
        web.HTTPRequestTimeout: it did not come within `body_seconds`.
    """
    settings = http.app[IN_FORCE].settings
    limit = settings.max_body_mib << 20
    if (http.content_length or 0) > limit:
        raise _too_large(settings.max_body_mib)
    if http.headers.get(hdrs.EXPECT, "").lower() == CONTINUE and http.version == HttpVersion11:
        await http.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # aiohttp takes what was written for an answer that has begun.
        http.writer.output_size = 0
    try:
        if http.content.is_eof():
            # Most come with their headers: there is nothing to wait for.
            body = http.content.read_nowait()
        else:
            async with asyncio.timeout(settings.body_seconds):
                body = await _read(http.content, limit)
    except web.RequestPayloadError:
        raise web.HTTPBadRequest(text="the request's body is not what its headers say") from None
    except TimeoutError:
        raise web.HTTPRequestTimeout(
            text=f"the request's body did not come within {settings.body_seconds:g} s"
        ) from None
    if len(body) > limit:
        raise _too_large(settings.max_body_mib)
    return body


async def _read(content: StreamReader, limit: int) -> bytes:
    """All of it, or what is more than `limit`."""
    chunks: list[bytes] = []
    size = 0
    while size <= limit and (chunk := await content.readany()):
        chunks.append(chunk)
        size += len(chunk)
    return b"".join(chunks)


def _too_large(mib: int) -> web.HTTPRequestEntityTooLarge:
    return web.HTTPRequestEntityTooLarge(mib << 20, text=f"the request's body is larger than {mib} MiB")
