"""An engine's stream on its way to the client: as bytes, never decoded."""

import logging
from collections.abc import AsyncIterator

from aiohttp import web

from mooncake_connector.scheduler.proxy.answer import StreamBroken
from mooncake_connector.scheduler.proxy.openai import broken_event
from mooncake_connector.scheduler.proxy.timeline import Timeline

log = logging.getLogger(__name__)


async def relay(
    http: web.Request,
    response: web.StreamResponse,
    chunks: AsyncIterator[bytes],
    timeline: Timeline | None = None,
) -> str:
    """Send `chunks` as they come, no faster than the client takes them; returns the outcome.

    That is ``stream_broken`` if they break off (`StreamBroken`), which the client is told by an error event;
    ``cancelled`` if the client is gone; else ``ok``.
    """
    outcome = "ok"
    try:
        await response.prepare(http)
        try:
            async for chunk in chunks:
                if not chunk:
                    continue
                await response.write(chunk)
                if timeline and "first_byte" not in timeline.moments:
                    timeline.mark("first_byte")
        except StreamBroken as error:
            log.warning("%s", error)
            outcome = "stream_broken"
            # The blank line ends an event that was cut in two; no [DONE] follows, for it is not done.
            await response.write(b"\n\n" + broken_event(http.path, str(error)))
        await response.write_eof()
    except ConnectionResetError:
        return "cancelled"
    return outcome
