"""Driving a prefill and a decode engine by hand, as a proxy does: for what a proxy's retries would hide."""

import asyncio
import uuid
from typing import Any

import aiohttp

from tests.engine.harness import complete, greedy

Http = aiohttp.ClientSession


async def probe(http: Http, url: str) -> dict[str, Any]:
    """What the engine's connector says of itself."""
    answer = await complete(http, url, [5], 1, kv_transfer_params={"probe": True})
    return dict(answer["kv_transfer_params"])


def prefill_params(transfer_id: str) -> dict[str, Any]:
    return {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}


def decode_params(transfer_id: str, prefill: dict[str, Any]) -> dict[str, Any]:
    """For decode; `prefill` is the prefill engine's probe."""
    return {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "transfer_id": transfer_id,
        "remote_engine_id": prefill["engine_id"],
        "remote_host": prefill["host"],
        "remote_port": prefill["port"],
        "tp_size": prefill["tp_size"],
    }


class Pair:
    """One request's two halves as tasks that can be cancelled apart."""

    def __init__(
        self,
        http: Http,
        prefill_url: str,
        decode_url: str,
        probed: dict[str, Any],
        prompt: list[int],
        n: int = 16,
        *,
        prefill_delay: float = 0.0,
        decode_delay: float = 0.0,
    ) -> None:
        id = uuid.uuid4().hex

        async def prefill() -> list[int]:
            await asyncio.sleep(prefill_delay)
            return await greedy(http, prefill_url, prompt, 1, kv_transfer_params=prefill_params(id))

        async def decode() -> list[int]:
            await asyncio.sleep(decode_delay)
            params = decode_params(id, probed)
            return await greedy(http, decode_url, prompt, n, stream=True, kv_transfer_params=params)

        self.prefill = asyncio.create_task(prefill())
        self.decode = asyncio.create_task(decode())

    async def gather(self) -> list[Any]:
        """Both results, or the exceptions they ended with."""
        return await asyncio.gather(self.prefill, self.decode, return_exceptions=True)
