"""Load for proxies: one process, raw sockets, few microseconds a chunk: what is measured is the proxy.

    python benchmarks/load_client.py '{"proxy": 8000, "rate": 200, "seconds": 10, "out": "figures.npz"}'

Written to `out`, arrays: `at` (seconds from the begin), `ttft` (seconds to a stream's first token) and
`added` (of that, what the engines did not take, by their own clock) of each request; `chunk_at` and `chunk`
(seconds from an engine's write to the arrival here) of each further token; `whole` (seconds to its end);
`failures`, why, of those that failed. Clocks are CLOCK_MONOTONIC, so all of it is on one machine.
"""

import asyncio
import gc
import random
import re
import resource
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import uvloop

HOST = "127.0.0.1"
_token = re.compile(rb" t=(\d+)(?: e=(\d+))?")
_length = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


class Plan(msgspec.Struct, forbid_unknown_fields=True):
    """What to do.

    Attributes:
        proxy: its port; 0: straight to the engines, to a prefill and a decode one at once, in turn.
        prefill, decode: the engines' ports, used without a proxy.
        rate: requests per second, with exponential pauses; 0: `streams` requests, spread over `ramp` seconds.
        seconds: how long requests are sent; who is under way then is waited for.
        streams: how many requests are under way; each is followed by the next if `again`.
        prompt_bytes, tokens, stream, chat: of each request.
    """

    out: str
    proxy: int = 0
    prefill: list[int] = []
    decode: list[int] = []
    rate: float = 0.0
    seconds: float = 10.0
    streams: int = 0
    ramp: float = 0.0
    again: bool = False
    prompt_bytes: int = 1000
    tokens: int = 32
    stream: bool = True
    chat: bool = True
    seed: int = 1


class Figures:
    """What was measured."""

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.arrays = {name: array("d") for name in ("at", "ttft", "added", "whole", "chunk_at", "chunk")}
        self.failures: Counter[str] = Counter()
        self.done = 0

    def add(self, name: str, value: float) -> None:
        self.arrays[name].append(value)


class Connection(asyncio.Protocol):
    """A connection that is used again and again, for one request at a time."""

    def __init__(self, figures: Figures, port: int) -> None:
        self.port = port
        self.closed = False
        self._figures = figures
        self._done: Done | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def ask(
        self, request: bytes, tokens: int, streamed: bool, done: Callable[["Connection", str], None]
    ) -> None:
        """Send it; `done` is called with what went wrong, or nothing.

        Args:
            tokens: how many the answer has; 0: any, and nothing is noted of it.
        """
        self._done = done
        self._tokens = tokens
        self._streamed = streamed
        self._seen = 0
        self._rest = b""
        self._needed = -1
        self._began = False
        self._sent = time.monotonic()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        data = self._rest + data
        if not self._began:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._rest = data
                return
            self._began = True
            if not data.startswith(b"HTTP/1.1 200"):
                self._over(data[9:12].decode() or "no HTTP")
                self._transport.abort()
                return
            if found := _length.search(data, 0, end):
                self._needed = int(found[1])
            data = data[end + 4 :]
        if self._needed >= 0:
            if len(data) < self._needed:
                self._rest = data
                return
            self._note(data, now)
            self._over("")
            return
        ended = data.endswith(b"0\r\n\r\n")
        cut = len(data) if ended else data.rfind(b"\n\n") + 2
        if cut > 1:
            self._note(data[:cut], now)
        self._rest = data[cut:] if cut > 1 else data
        if ended:
            self._over("")

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._done:
            self._over("closed")

    def _note(self, data: bytes, now: float) -> None:
        figures = self._figures
        if not self._tokens:
            return
        for sent, engines in _token.findall(data):
            self._seen += 1
            if engines:
                figures.add("at", self._sent - figures.begin)
                figures.add("ttft", now - self._sent)
                figures.add("added", now - self._sent - int(engines) / 1e6)
            elif self._streamed:
                figures.add("chunk_at", now - figures.begin)
                figures.add("chunk", now - int(sent) / 1e6)
        if not self._streamed:
            self._seen = self._tokens

    def _over(self, why: str) -> None:
        if not why and self._tokens:
            self._figures.add("whole", time.monotonic() - self._sent)
            if self._seen != self._tokens:
                why = f"{self._seen} of {self._tokens} tokens"
        done, self._done = self._done, None
        if done:
            done(self, why)


Done = Callable[[Connection, str], None]


class Client:
    """Sends what a plan says."""

    def __init__(self, plan: Plan, figures: Figures) -> None:
        self._plan = plan
        self._figures = figures
        self._idle: dict[int, list[Connection]] = {}
        self._numbers = iter(range(1 << 62))
        self._path = "/v1/chat/completions" if plan.chat else "/v1/completions"
        self._text = "lorem ipsum dolor sit amet " * (plan.prompt_bytes // 27 + 1)
        self._under_way = 0
        self._all_done = asyncio.Event()
        self._until = float("inf")
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        plan = self._plan
        self._until = time.monotonic() + plan.seconds
        if plan.rate:
            await self._poisson(random.Random(plan.seed))
        else:
            for at in range(plan.streams):
                self._start()
                if plan.ramp and at % 10 == 9:
                    await asyncio.sleep(plan.ramp / plan.streams * 10)
        while self._under_way:
            self._all_done.clear()
            await self._all_done.wait()

    async def _poisson(self, rng: random.Random) -> None:
        due = time.monotonic()
        while due < self._until:
            pause = due - time.monotonic()
            if pause > 0:
                await asyncio.sleep(pause)
            self._start()
            due += rng.expovariate(self._plan.rate)

    def _start(self) -> None:
        self._under_way += 1
        parts = list(self._parts(next(self._numbers)))
        failed: list[str] = []
        left = [len(parts)]

        def done(connection: Connection, why: str) -> None:
            if why:
                failed.append(why)
            elif not connection.closed:
                self._idle[connection.port].append(connection)
            left[0] -= 1
            if not left[0]:
                self._done(failed)

        for port, request, tokens in parts:
            idle = self._idle.setdefault(port, [])
            while idle:
                connection = idle.pop()
                if not connection.closed:
                    connection.ask(request, tokens, self._plan.stream, done)
                    break
            else:
                task = asyncio.create_task(self._connect(port, request, tokens, done))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _connect(self, port: int, request: bytes, tokens: int, done: "Done") -> None:
        connection = Connection(self._figures, port)
        try:
            await asyncio.get_running_loop().create_connection(lambda: connection, HOST, port)
        except OSError as error:
            done(connection, f"no connection: {error.strerror}")
            return
        connection.ask(request, tokens, self._plan.stream, done)

    def _done(self, failed: list[str]) -> None:
        self._figures.done += 1
        self._figures.failures.update(failed[:1])
        self._under_way -= 1
        if self._plan.again and time.monotonic() < self._until:
            self._start()
        elif not self._under_way:
            self._all_done.set()

    def _parts(self, number: int) -> Iterator[tuple[int, bytes, int]]:
        """Port, request and tokens to expect: one to the proxy, or one each to prefill and decode."""
        plan = self._plan
        text = f"{plan.seed}-{number} {self._text}"[: plan.prompt_bytes]
        prompt = f'"messages":[{{"role":"user","content":"{text}"}}]' if plan.chat else f'"prompt":"{text}"'
        head = f'{{"model":"sim",{prompt}'
        whole = f'{head},"max_tokens":{plan.tokens},"stream":{"true" if plan.stream else "false"}'
        if plan.proxy:
            yield plan.proxy, self._request(whole + "}"), plan.tokens
            return
        id = f"{plan.seed}-{number}"
        source = plan.prefill[number % len(plan.prefill)]
        sends = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": id}
        gets = {"do_remote_prefill": True, "do_remote_decode": False, "transfer_id": id}
        gets |= {"remote_host": HOST, "remote_port": source}
        yield source, self._request(_with(head + ',"max_tokens":1', sends)), 0
        yield plan.decode[number % len(plan.decode)], self._request(_with(whole, gets)), plan.tokens

    def _request(self, body: str) -> bytes:
        head = (
            f"POST {self._path} HTTP/1.1\r\nHost: {HOST}\r\nAccept: */*\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer sk-load\r\nUser-Agent: load/1\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return (head + body).encode()


def _with(body: str, params: dict[str, Any]) -> str:
    return f'{body},"kv_transfer_params":{msgspec.json.encode(params).decode()}}}'


async def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    gc.disable()
    figures = Figures()
    await Client(plan, figures).run()
    arrays = {name: np.array(found, np.float32) for name, found in figures.arrays.items()}
    failures = np.array([f"{why}: {count}" for why, count in figures.failures.items()], dtype=str)
    seconds = time.monotonic() - figures.begin
    failed = sum(figures.failures.values())
    np.savez(plan.out, failures=failures, done=figures.done, failed=failed, seconds=seconds, **arrays)


if __name__ == "__main__":
    uvloop.run(main())
