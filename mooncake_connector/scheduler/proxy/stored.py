"""Responses that engines keep (``/v1/responses`` with vLLM's ``VLLM_ENABLE_RESPONSES_API_STORE=1``).

Each is in the memory of the decode engine that made it and nowhere else. Who has it is asked, not
remembered: so it is found by every proxy in front of the same engines, and after a restart of the proxy.
"""

import asyncio
from collections.abc import Mapping
from contextlib import closing
from urllib.parse import quote

from mooncake_connector.scheduler.engines.client import EngineClient
from mooncake_connector.scheduler.engines.pool import Instance, Pool
from mooncake_connector.scheduler.proxy.answer import BROKEN
from mooncake_connector.scheduler.proxy.openai import RESPONSES

ASK_SECONDS = 5.0


class Stored:
    """Finds them."""

    def __init__(self, pool: Pool, client: EngineClient) -> None:
        self._pool = pool
        self._client = client

    async def holder(self, response_id: str, headers: Mapping[str, str]) -> Instance | None:
        """The decode engine that has it, or the only one there is; None if nobody has.

        Args:
            headers: the client's, as they are forwarded.
        """
        decodes = self._pool.live("decode")
        if len(decodes) < 2:
            return next(iter(decodes), None)
        path = f"{RESPONSES}/{quote(response_id, safe='')}"
        have = await asyncio.gather(*(self._has(decode.url, path, headers) for decode in decodes))
        return next((decode for decode, has in zip(decodes, have, strict=True) if has), None)

    async def _has(self, url: str, path: str, headers: Mapping[str, str]) -> bool:
        try:
            async with asyncio.timeout(ASK_SECONDS):
                with closing(await self._client.request("GET", url, path, b"", headers)) as reply:
                    await reply.read()
                    return reply.status == 200
        except BROKEN:
            return False
