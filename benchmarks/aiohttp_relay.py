"""What a proxy in Python usually is at best: aiohttp sends each request to prefill and decode, and relays.

It chooses in turn, and checks, measures and retries nothing.
"""

import argparse
import asyncio
import itertools
import uuid
from urllib.parse import urlsplit

import aiohttp
import msgspec
import uvloop
from aiohttp import web

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Relay:
    """Args: the engines' base URLs."""

    def __init__(self, prefill: list[str], decode: list[str]) -> None:
        self._prefill = itertools.cycle(prefill)
        self._decode = itertools.cycle(decode)
        self._lingering: set[asyncio.Task[None]] = set()

    async def serve(self, host: str, port: int) -> None:
        """For ever."""
        app = web.Application(client_max_size=1 << 28)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/chat/completions", self._generate)
        runner = web.AppRunner(app, access_log=None)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as self._session:
            await runner.setup()
            await web.TCPSite(runner, host, port, backlog=4096).start()
            await asyncio.Event().wait()

    async def _generate(self, http: web.Request) -> web.StreamResponse:
        raw = await http.read()
        source, target = next(self._prefill), next(self._decode)
        id = uuid.uuid4().hex
        sends = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": id}
        gets = {"do_remote_prefill": True, "do_remote_decode": False, "transfer_id": id}
        gets |= {"remote_host": urlsplit(source).hostname, "remote_port": urlsplit(source).port}
        fields = _fields.decode(raw) | {"max_tokens": 1, "stream": False, "kv_transfer_params": sends}
        prompt = asyncio.create_task(self._post(source + http.path, msgspec.json.encode(fields)))
        self._lingering.add(prompt)
        prompt.add_done_callback(self._lingering.discard)
        body = raw[:-1] + b',"kv_transfer_params":' + msgspec.json.encode(gets) + b"}"
        headers = {"Content-Type": "application/json"}
        async with self._session.post(target + http.path, data=body, headers=headers) as reply:
            if "event-stream" not in reply.content_type:
                return web.Response(body=await reply.read(), content_type="application/json")
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
            await response.prepare(http)
            async for chunk in reply.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    async def _post(self, url: str, body: bytes) -> None:
        headers = {"Content-Type": "application/json"}
        async with self._session.post(url, data=body, headers=headers) as reply:
            await reply.read()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prefill", nargs="+", required=True, metavar="URL")
    parser.add_argument("--decode", nargs="+", required=True, metavar="URL")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    uvloop.run(Relay(options.prefill, options.decode).serve("127.0.0.1", options.port))
