"""Engines on real sockets that speak as much of vLLM's HTTP as the proxy sees, and fail on command."""

import asyncio
import contextlib
import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from multidict import CIMultiDict

MODEL = "tiny"
DONE = b"data: [DONE]\n\n"
# Seconds that bound failures only: nobody waits for them, and a busy machine needs some. No default deadline
# of the proxy is as short that would end what these tests wait for.
WITHIN = 15.0
# The same where `aside.LINGER`, five seconds, would end it.
SOON = 4.5
GENERATES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/responses",
    "/v1/messages",
    "/cohere/v2/chat",
    "/generative_scoring",
)


def events(count: int = 5) -> list[bytes]:
    """A completion stream whose spacing and key order no JSON library would produce by itself."""
    found = []
    for at in range(count):
        choice = f'{{"text" : "w{at} \\u00e9", "index":0,"logprobs":null,  "finish_reason":null}}'
        found.append(f'data: {{"id":"c","object":"text_completion","choices":[{choice}]}}\n\n'.encode())
    return [*found, DONE]


@dataclass
class Call:
    """One generation request as the engine saw it; times from time.monotonic()."""

    path: str
    body: dict[str, Any]
    raw: bytes
    headers: CIMultiDict[str]
    started: float
    ended: float = 0.0
    aborted: bool = False
    method: str = "POST"
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def params(self) -> dict[str, Any]:
        return self.body.get("kv_transfer_params") or {}


class FakeEngine:
    """Answers probes and generation requests.

    `failures` is used up one per generation request: a status, "reset" (before the answer begins), "hang",
    or "event" (status 200 with an error as first event); when empty, requests succeed.
    """

    def __init__(self, role: str, **probe: Any) -> None:
        self.engine_id = f"engine-{uuid.uuid4().hex[:8]}"
        self.role = role
        self.probe_changes = probe
        self.connector = True
        self.calls: list[Call] = []
        self.probes = 0
        self.failures: list[int | str] = []
        self.says = "engine says"  # when it refuses or fails
        self.released: list[str] = []
        self.delay = 0.0
        self.goes_on = asyncio.Event()  # while it is clear, it writes nothing
        self.goes_on.set()
        self.gap = self.first_gap = 0.0
        self.per_token = 0.0  # seconds that it says its prompts took
        self.stream = events()
        self.later_streams: list[list[bytes]] = []
        self.sampled = -1
        self.break_after: int | None = None
        self.answer = (
            b'{"id":"x", "choices":[{"text":"hi","index":0,"finish_reason":"stop"}],  "object":"text"}'
        )
        self.healthy = True
        self.key = ""  # as of vLLM's --api-key
        self.responses: set[str] = set()  # those that it keeps
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def side_port(self) -> int:
        return 40000 + self.port % 1000

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 28, middlewares=[self._guarded])
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        for path in GENERATES:
            app.router.add_post(path, self._generate)
        app.router.add_get("/v1/responses/{id}", self._stored)
        app.router.add_post("/v1/responses/{id}/cancel", self._stored)
        app.router.add_route("*", "/{rest:.*}", self._other)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner:
            await self._runner.cleanup()
            self._runner = None

    async def call(self, index: int = 0) -> Call:
        """The generation request number `index`, once it is there."""
        async with asyncio.timeout(WITHIN):
            while len(self.calls) <= index:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        return self.calls[index]

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Any) -> web.StreamResponse:
        given = request.headers.get("Authorization")
        if self.key and request.path.startswith("/v1") and given != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response(
            {"object": "list", "data": [{"id": MODEL, "object": "model"}, {"id": "lora"}]}
        )

    def _probe_answer(self) -> web.Response:
        self.probes += 1
        info = {
            "engine_id": self.engine_id,
            "incarnation": f"{self.engine_id}-1",
            "host": "127.0.0.1",
            "port": self.side_port,
            "tp_size": 2,
            "pp_size": 1,
            "block_size": 32,
            "max_model_len": 2048,
            "layout": "layout-a",
            "model": MODEL,
            "model_hash": "hash-a",
            "dtype": "float32",
            "role": self.role,
            "version": "0.1.0",
            "protocol": 1,
            "addition_of_a_later_version": True,
        } | self.probe_changes
        return web.json_response({"choices": []} | ({"kv_transfer_params": info} if self.connector else {}))

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        body = json.loads(raw)
        if (body.get("kv_transfer_params") or {}).get("probe"):
            assert body["max_tokens"] == 1
            assert body["model"] == MODEL
            return self._probe_answer()
        if released := (body.get("kv_transfer_params") or {}).get("release"):
            assert body["max_tokens"] == 1
            self.released.append(released)
            return web.json_response({"choices": []})
        if isinstance((body.get("kv_transfer_params") or {}).get("timeline"), str):
            assert body["max_tokens"] == 1
            told = {"timeline": {"received": 1.5}, "first_token": self.sampled}
            return web.json_response({"choices": [], "kv_transfer_params": told})
        return await self._serve(
            request, Call(request.path, body, raw, request.headers.copy(), time.monotonic())
        )

    async def _serve(self, request: web.Request, call: Call) -> web.StreamResponse:
        self.calls.append(call)
        try:
            return await self._answer(request, call)
        except (asyncio.CancelledError, ConnectionResetError):
            call.aborted = True
            raise
        finally:
            call.ended = time.monotonic()
            call.over.set()

    async def _stored(self, request: web.Request) -> web.Response:
        found = request.match_info["id"] in self.responses
        if request.method == "POST":
            self.calls.append(Call(request.path, {}, b"", request.headers.copy(), time.monotonic()))
        return web.json_response({"id": request.match_info["id"]}, status=200 if found else 404)

    async def _other(self, request: web.Request) -> web.StreamResponse:
        """Whatever else there is: what came is kept, and answered as if it had been a generation request."""
        raw = await request.read()
        call = Call(request.raw_path, {}, raw, request.headers.copy(), time.monotonic())
        call.method = request.method
        if raw.startswith(b"{"):
            call.body = json.loads(raw)
        return await self._serve(request, call)

    async def _answer(self, request: web.Request, call: Call) -> web.StreamResponse:
        failure = self.failures.pop(0) if self.failures else None
        if failure == "reset":
            request.transport.abort()
            return web.Response()
        if failure == "hang":
            await asyncio.sleep(60)
        await self.goes_on.wait()
        await asyncio.sleep(self.delay)
        if isinstance(failure, int):
            error = {
                "message": f"{self.says} {failure}",
                "type": "EngineError",
                "param": None,
                "code": failure,
            }
            return web.json_response({"error": error}, status=failure)
        if call.params.get("do_remote_decode") and not call.body.get("stream"):
            handed = {
                "transfer_id": call.params["transfer_id"],
                "remote_engine_id": self.engine_id,
                "serial": True,
            }
            if self.per_token:
                took = self.per_token * len(call.body["prompt"])
                handed["timeline"] = {"received": 5.0, "scheduled": 5.0, "prefilled": 5.0 + took}
                handed["cached_tokens"] = 0
            return web.json_response({"choices": [], "kv_transfer_params": handed})
        if not call.body.get("stream"):
            return web.Response(body=self.answer, content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        if failure == "event":
            await response.write(b'data: {"error": {"message": "load failed", "code": 500}}\n\n')
            return response
        await asyncio.sleep(self.first_gap)
        stream = self.stream
        if self.later_streams:
            self.stream = self.later_streams.pop(0)
        for at, chunk in enumerate(stream):
            if at == self.break_after:
                with contextlib.suppress(Exception):
                    request.transport.abort()
                return response
            await self.goes_on.wait()
            await response.write(chunk)
            await asyncio.sleep(self.gap)
        return response
