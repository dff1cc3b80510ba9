"""Minimal proxies as users of the peers have them, for comparison: FastAPI and httpx, one P and one D.

nixl       P first, its answer's kv_transfer_params to D        proxy.py nixl PORT P D
mooncake   P and D at once, under one transfer_id               proxy.py mooncake PORT P D BOOTSTRAP
"""

import asyncio
import sys
import uuid

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

KIND, PORT, PREFILL, DECODE, *REST = sys.argv[1:]
app = FastAPI()
client = httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None))
known: dict[str, str] = {}


def prefill_body(body: dict, params: dict) -> dict:
    short = {**body, "stream": False, "max_tokens": 1, "kv_transfer_params": params}
    short.pop("stream_options", None)
    return short


async def from_decode(
    path: str, body: dict, headers: dict, meanwhile: asyncio.Task | None = None
) -> Response:
    if body.get("stream"):

        async def relay():
            async with client.stream("POST", DECODE + path, json=body, headers=headers) as answer:
                async for part in answer.aiter_raw():
                    yield part
            if meanwhile:
                await meanwhile

        return StreamingResponse(relay(), media_type="text/event-stream")
    answer = await client.post(DECODE + path, json=body, headers=headers)
    if meanwhile:
        await meanwhile
    return JSONResponse(answer.json(), status_code=answer.status_code)


async def nixl(path: str, body: dict) -> Response:
    headers = {"X-Request-Id": uuid.uuid4().hex}
    params = {"do_remote_decode": True, "do_remote_prefill": False}
    answer = await client.post(PREFILL + path, json=prefill_body(body, params), headers=headers)
    params = answer.json().get("kv_transfer_params") or {}
    return await from_decode(path, {**body, "kv_transfer_params": params}, headers)


async def mooncake(path: str, body: dict) -> Response:
    bootstrap = REST[0]
    if "engine" not in known:
        known["engine"] = (await client.get(bootstrap + "/query")).json()["0"]["engine_id"]
    transfer = {"transfer_id": "xfer-" + uuid.uuid4().hex}
    params = {"do_remote_decode": True, "do_remote_prefill": False, **transfer}
    prefill = asyncio.create_task(client.post(PREFILL + path, json=prefill_body(body, params)))
    params = {"do_remote_decode": False, "do_remote_prefill": True, **transfer}
    params |= {"remote_engine_id": known["engine"], "remote_bootstrap_addr": bootstrap}
    return await from_decode(path, {**body, "kv_transfer_params": params}, {}, meanwhile=prefill)


@app.post("/v1/completions")
@app.post("/v1/chat/completions")
async def serve(request: Request) -> Response:
    handler = {"nixl": nixl, "mooncake": mooncake}[KIND]
    return await handler(request.url.path, await request.json())


@app.get("/health")
async def health() -> dict:
    return {}


uvicorn.run(app, host="127.0.0.1", port=int(PORT), log_level="warning")
