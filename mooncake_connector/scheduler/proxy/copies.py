"""Prefixes that are copied from one engine to another before they are needed there (Algorithm 1, line 27).

A copy is a one-token request that `source` prefills (it has the prefix cached) and `target` receives: the
connector's own hand-over, so that the prefix ends in the target's prefix cache.
"""

import asyncio
import logging
import uuid
from collections.abc import Callable, Mapping
from contextlib import closing

import msgspec

from mooncake_connector.scheduler.engines.base import Engine, told
from mooncake_connector.scheduler.engines.client import EngineClient
from mooncake_connector.scheduler.engines.pool import Instance
from mooncake_connector.scheduler.policy.base import Copy
from mooncake_connector.scheduler.proxy.answer import BROKEN
from mooncake_connector.scheduler.proxy.arrivals import Asked
from mooncake_connector.scheduler.proxy.aside import Aside
from mooncake_connector.scheduler.proxy.metrics import ProxyMetrics
from mooncake_connector.scheduler.proxy.openai import COMPLETIONS, ClientRequest, answered

log = logging.getLogger(__name__)

AT_ONCE = 4
DEADLINE = 10.0


class Copies:
    """Copies under way. A second request for one prefix waits for the first one's.

    Args:
        done: called with source, target, tokens and seconds of a copy that succeeded.
    """

    def __init__(
        self,
        engine: Engine,
        client: EngineClient,
        aside: Aside,
        metrics: ProxyMetrics,
        done: Callable[[str, str, int, float], None],
    ) -> None:
        self._engine = engine
        self._client = client
        self._aside = aside
        self._metrics = metrics
        self._done = done
        self._running: dict[tuple[str, str, bytes], asyncio.Task[None]] = {}

    @property
    def running(self) -> bool:
        """Whether any is under way."""
        return bool(self._running)

    def begin(
        self, source: Instance, target: Instance, asked: Asked, copy: Copy
    ) -> asyncio.Task[None] | None:
        """Have a prefix copied: wait for it, but not for ever; None if that can't be.

        Whatever comes of it, `target` can go on: it computes what it does not hold.
        """
        # The last token of a prompt is computed where it is received: it is not the prefix's.
        prompt = asked.ids[: copy.tokens + 1]
        key = (source.url, target.url, prompt.tobytes())
        task = self._running.get(key)
        if task is None:
            if len(self._running) >= AT_ONCE or not possible(source, target) or len(prompt) < 2:
                self._metrics.copies.labels("refused").inc()
                return None
            task = asyncio.create_task(self._copy(source, target, asked, copy, prompt.tolist()))
            self._running[key] = task
            task.add_done_callback(lambda _: self._running.pop(key))
        return task

    async def join(self, target: Instance, asked: Asked, within: float) -> None:
        """Wait for copies to `target` that this prompt begins with: computing it now would make them vain."""
        tasks = {
            task
            for (_, url, prefix), task in self._running.items()
            if url == target.url and asked.ids.tobytes().startswith(prefix[: -asked.ids.itemsize])
        }
        if tasks:
            await asyncio.wait(tasks, timeout=within)

    async def close(self) -> None:
        """Cancel what is under way."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _copy(
        self, source: Instance, target: Instance, asked: Asked, copy: Copy, prompt: list[int]
    ) -> None:
        if source.info is None:
            return
        clock = asyncio.get_running_loop().time
        began = clock()
        id = uuid.uuid4().hex
        headers = {name: value for name, value in asked.headers.items() if name.lower() != "x-request-id"}
        request = _request_of(asked.request, prompt)
        sent = self._engine.prefill_body(request, id)
        received = self._engine.decode_body(request, self._engine.decode_params(source.info, id))
        outcome = "failed"
        try:
            async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as both:
                both.create_task(self._post(source.url, sent, headers))
                both.create_task(self._post(target.url, received, headers))
            outcome = "copied"
        except* (*BROKEN, _Refused) as errors:
            said = told(errors.exceptions[0])
            log.warning("%s did not get a prefix from %s: %s", target.url, source.url, said)
        finally:
            self._metrics.copies.labels(outcome).inc()
            if outcome == "failed":
                await self._aside.release(source.url, request, headers, id)
        if outcome == "copied":
            self._metrics.copied_tokens.inc(copy.missing)
            self._done(source.url, target.url, copy.missing, clock() - began)

    async def _post(self, url: str, body: bytes, headers: Mapping[str, str]) -> None:
        with closing(await self._client.post(url, COMPLETIONS, body, headers)) as reply:
            said = await reply.read()
            if reply.status != 200:
                raise _Refused(f"{url} {answered(reply.status, said)}")


class _Refused(Exception):
    """An engine answered with an error."""


def possible(source: Instance, target: Instance) -> bool:
    """Whether the connectors' roles and the KV of both allow a copy."""
    if not (source.info and target.info and source.usable and target.up):
        return False
    fits = source.info.group == target.info.group
    return fits and source.info.role != "kv_consumer" and target.info.role != "kv_producer"


def _request_of(request: ClientRequest, prompt: list[int]) -> ClientRequest:
    """A completion of one token after `prompt`, whose KV is shared with the request's own."""
    fields = {name: request.fields[name] for name in ("model", "cache_salt") if name in request.fields}
    body = msgspec.json.encode(fields | {"prompt": prompt, "max_tokens": 1})
    return ClientRequest.parse(COMPLETIONS, body)
