"""Requests that only an engine's connector answers: to let go of a transfer, or to tell of it."""

import asyncio
from collections.abc import Mapping
from contextlib import closing, suppress
from typing import Any

from mooncake_connector.scheduler.engines.base import Engine
from mooncake_connector.scheduler.engines.client import EngineClient
from mooncake_connector.scheduler.proxy.answer import BROKEN
from mooncake_connector.scheduler.proxy.openai import COMPLETIONS, ClientRequest

LINGER = 5.0


class Aside:
    """What is said to connectors beside a client's request, with that client's headers."""

    def __init__(self, engine: Engine, client: EngineClient) -> None:
        self._engine = engine
        self._client = client

    async def release(
        self, url: str, request: ClientRequest, headers: Mapping[str, str], transfer_id: str
    ) -> None:
        """Tell prefill that nobody comes: decode may never have seen the request, and the lease is long."""
        await self._post(url, self._engine.release_body(request, transfer_id), headers, LINGER)

    async def told(
        self,
        url: str,
        request: ClientRequest,
        headers: Mapping[str, str],
        transfer_id: str,
        within: float = LINGER,
    ) -> dict[str, Any]:
        """What a connector remembers of a transfer: ``timeline`` and ``first_token``; empty if nothing."""
        body = self._engine.timeline_body(request, transfer_id)
        return self._engine.prefill_params(await self._post(url, body, headers, within)) or {}

    async def _post(self, url: str, body: bytes, headers: Mapping[str, str], within: float) -> bytes:
        own = {k: v for k, v in headers.items() if k.lower() != "x-request-id"}
        with suppress(*BROKEN):
            async with asyncio.timeout(within):
                with closing(await self._client.post(url, COMPLETIONS, body, own)) as reply:
                    return await reply.read()
        return b""
