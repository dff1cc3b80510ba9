"""Simulated vLLM engines for load tests of proxies: they answer on real sockets, and compute nothing.

    python benchmarks/sim_engine.py --prefill 8100 8101 --decode 8200 8201 [--preset h200-8b]

Any number of engines run in one process, and any number of processes together make a deployment: a decode
engine learns from the prefill engine (a datagram to the number of its HTTP port, a call if it is in the same
process) that a prompt's KV is complete. Timing is fixed (``--prefill-seconds``, ``--step-seconds``,
``--handoff-seconds``; prompts never queue), or that of the simulator's engine model (``--preset``, ``Costs``:
prompts one after the other, decode steps by batch and context). A step sends one token to every stream.

They serve /v1/completions and /v1/chat/completions, streamed or not, /health, /v1/models, and the P/D
parameters of this project's connector (with what its probe answers), of vLLM's NIXL and Mooncake connectors
as vllm-router sends them, and of SGLang (``bootstrap_room``). Bodies are not checked, drafts not supported.

A token's text is ``" t=T e=E"``: T is when it was sent (microseconds, CLOCK_MONOTONIC), and of a first token
E how long the engines took for it; what is missing from the client's time is the proxy's and the sockets'.
"""

import argparse
import asyncio
import gc
import itertools
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import msgspec
import uvloop

from benchmarks.sim_answers import MODEL, Body, Stream, event, usage, whole
from benchmarks.sim_http import Http, json_answer, sse
from mooncake_connector.scheduler.simulator.costs import Costs
from mooncake_connector.scheduler.simulator.presets import PRESETS, preset

BLOCK = 16
CHARS_PER_TOKEN = 4
# Prompts that nobody came for are forgotten.
MOST_KEPT = 20_000
HOST = "127.0.0.1"


class Fixed(msgspec.Struct, frozen=True):
    """Costs that depend on nothing, as much of `Costs` as is used here; seconds."""

    prompt: float
    one_step: float
    handoff: float
    kv_tokens: int = 1 << 24

    def prefill(self, tokens: int) -> float:
        return self.prompt

    def step(self, batch: int, context: int) -> float:
        return self.one_step


class SimEngine:
    """One engine.

    Args:
        port: of HTTP, and of datagrams about KV.
        queue: whether prompts are computed one after the other.
        others: the engines of this process by port, this one included.
    """

    def __init__(
        self, role: str, port: int, costs: Costs | Fixed, queue: bool, others: dict[int, "SimEngine"]
    ) -> None:
        self.port = port
        self._role = role
        self._costs = costs
        self._queue = queue
        self._others = others
        self._busy_until = 0.0
        self._numbers = itertools.count()
        self._computed: dict[str, float] = {}
        self._wanted: dict[str, Callable[[float], None]] = {}
        self._asked: dict[str, Any] = {}
        self._batch: list[Stream] = []
        self._joining: list[Stream] = []
        self._context = 0
        self._stepping = False
        others[port] = self

    async def start(self) -> None:
        """Listen."""
        self._loop = asyncio.get_running_loop()
        self._datagrams, _ = await self._loop.create_datagram_endpoint(
            lambda: _Datagrams(self), local_addr=(HOST, self.port)
        )
        await self._loop.create_server(lambda: Http(self.serve), HOST, self.port, backlog=4096)

    def serve(self, http: Http, method: bytes, path: str, raw: bytes) -> None:
        """Answer one request."""
        if method == b"POST" and path in ("/v1/completions", "/v1/chat/completions"):
            try:
                body = _body.decode(raw)
            except msgspec.DecodeError as error:
                http.send(json_answer({"error": {"message": str(error), "code": 400}}, 400))
                return
            self._generate(http, body, path.startswith("/v1/chat"), len(raw))
        elif path == "/v1/models":
            model = {"id": MODEL, "object": "model", "owned_by": "vllm", "max_model_len": 1 << 20}
            http.send(json_answer({"object": "list", "data": [model]}))
        elif path == "/query":  # of vLLM's Mooncake connector
            http.send(json_answer({"0": {"engine_id": self._id, "worker_addr": {"0": {"0": self._address}}}}))
        elif path in ("/server_info", "/get_server_info", "/model_info", "/get_model_info"):  # of SGLang
            http.send(
                json_answer(
                    {
                        "model_path": MODEL,
                        "served_model_name": MODEL,
                        "tokenizer_path": MODEL,
                        "is_generation": True,
                        "disaggregation_mode": self._role,
                        "version": "0.0.0",
                        "tp_size": 1,
                        "dp_size": 1,
                    }
                )
            )
        else:
            http.send(json_answer({}, 200 if path.startswith("/health") or path == "/version" else 404))

    @property
    def _id(self) -> str:
        return f"sim-{self.port}"

    @property
    def _address(self) -> str:
        return f"tcp://{HOST}:{self.port}"

    def _generate(self, http: Http, body: Body, chat: bool, size: int) -> None:
        params = body.kv_transfer_params or {}
        tokens = max(1, size // CHARS_PER_TOKEN)
        if params.get("probe"):
            http.send(json_answer({"choices": [], "kv_transfer_params": self._probe()}))
        elif params.get("release") or isinstance(params.get("timeline"), str):
            http.send(json_answer({"choices": [], "kv_transfer_params": {"timeline": {}}}))
        elif params.get("do_remote_decode") or (body.bootstrap_room is not None and self._role == "prefill"):
            self._prefill(http, body, params, tokens)
        else:
            stream = Stream(http, body, chat, tokens)
            if stream.streamed:
                http.begin_stream()
            source = _source(body, params)
            if source is None:
                self._compute(tokens, lambda seconds: self._join(stream, seconds))
                return

            def came(seconds: float) -> None:
                stream.computed = seconds
                stream.ready = time.monotonic()
                self._loop.call_later(self._costs.handoff, self._join, stream)

            self._fetch(*source, came)

    def _prefill(self, http: Http, body: Body, params: dict[str, Any], tokens: int) -> None:
        id = params.get("transfer_id")
        if id is None and body.bootstrap_room is not None:
            id = str(body.bootstrap_room)
        key = f"{self._id}-{next(self._numbers)}" if id is None else str(id)
        received = time.monotonic()

        def computed(seconds: float) -> None:
            self._has(key, seconds)
            done = time.monotonic()
            handed = {
                # For this project's proxy.
                "transfer_id": key,
                "timeline": {"received": received, "scheduled": done - seconds, "prefilled": done},
                "cached_tokens": 0,
                # For vLLM's NIXL connector.
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_engine_id": self._id,
                "remote_block_ids": [],
                "remote_host": HOST,
                "remote_port": self.port,
                "tp_size": 1,
            }
            choice = {"index": 0, "text": " t=0", "logprobs": None, "finish_reason": "length"}
            answer = {"id": "cmpl-sim", "object": "text_completion", "created": 0, "model": MODEL}
            answer |= {"choices": [choice], "kv_transfer_params": handed}
            if body.stream:
                http.begin_stream()
                http.end_stream(sse(msgspec.json.encode(answer)))
            else:
                http.send(json_answer(answer))

        self._compute(tokens, computed)

    def _compute(self, tokens: int, done: Callable[[float], None]) -> None:
        """Let the time pass that a prompt takes, then tell how much it was (waiting not included)."""
        seconds = self._costs.prefill(tokens)
        now = time.monotonic()
        start = max(now, self._busy_until) if self._queue else now
        self._busy_until = start + seconds
        self._loop.call_later(start + seconds - now, lambda: done(time.monotonic() - start))

    def _has(self, key: str, seconds: float) -> None:
        """A prompt's KV is complete: tell who waits, or keep it."""
        if (asked := self._asked.pop(key, None)) is not None:
            asked(seconds)
            return
        self._computed[key] = seconds
        if len(self._computed) > MOST_KEPT:
            del self._computed[next(iter(self._computed))]

    def _fetch(self, host: str, port: int, key: str, came: Callable[[float], None]) -> None:
        """Have the prefill engine at `port` tell when a prompt's KV is complete."""
        if (source := self._others.get(port)) is not None and host in (HOST, "localhost"):
            source.wanted(key, came)
        else:
            self._wanted[key] = came
            self._datagrams.sendto(b"want " + key.encode(), (host, port))

    def wanted(self, key: str, came: Callable[[float], None]) -> None:
        """Somebody waits for a prompt's KV."""
        if (seconds := self._computed.pop(key, None)) is not None:
            came(seconds)
        else:
            self._asked[key] = came

    def heard(self, data: bytes, sender: tuple[str, int]) -> None:
        """A datagram of another process's engine."""
        verb, key, *rest = data.decode().split(" ")
        if verb == "want":
            self.wanted(key, lambda seconds: self._datagrams.sendto(f"have {key} {seconds}".encode(), sender))
        elif (came := self._wanted.pop(key, None)) is not None:
            came(float(rest[0]))

    def _join(self, stream: Stream, computed: float | None = None) -> None:
        """Decode from the next step on."""
        if computed is not None:
            stream.computed = computed
            stream.ready = time.monotonic()
        self._joining.append(stream)
        if not self._stepping:
            self._stepping = True
            self._next = time.monotonic()
            self._begin()

    def _begin(self) -> None:
        for stream in self._joining:
            self._batch.append(stream)
            self._context += stream.context
        self._joining.clear()
        self._next += self._costs.step(len(self._batch), self._context)
        self._loop.call_later(self._next - time.monotonic(), self._step)

    def _step(self) -> None:
        """A step is over: every sequence has one token more."""
        now = time.monotonic()
        at = int(now * 1e6)
        same = {chat: sse(event(chat, f" t={at}")) for chat in (False, True)}
        going = []
        for stream in self._batch:
            stream.made += 1
            stream.left -= 1
            if stream.http.closed:
                self._context -= stream.context + stream.made - 1
                continue
            if stream.made == 1 and stream.streamed:
                # By the clock at this write: the others of the batch were written before.
                now = time.monotonic()
                engines = int((stream.computed + now - stream.ready) * 1e6)
                chunk = sse(event(stream.chat, f" t={int(now * 1e6)} e={engines}", first=True))
            else:
                chunk = same[stream.chat]
            if stream.left > 0:
                going.append(stream)
                self._context += 1
                if stream.streamed:
                    stream.http.write(chunk)
                continue
            self._context -= stream.context + stream.made - 1
            if not stream.streamed:
                stream.http.send(whole(stream, now))
            else:
                stream.http.end_stream(chunk + (sse(usage(stream)) if stream.usage else b""))
        self._batch = going
        if going or self._joining:
            if self._next < now - 1.0:
                self._next = now  # the machine was away: no token comes twice as fast for that
            self._begin()
        else:
            self._stepping = False

    def _probe(self) -> dict[str, Any]:
        return {
            "engine_id": self._id,
            "incarnation": "1",
            "host": HOST,
            "port": self.port,
            "block_size": BLOCK,
            "max_model_len": 1 << 20,
            "layout": "sim",
            "model": MODEL,
            "model_hash": MODEL,
            "dtype": "float16",
            "role": "kv_producer" if self._role == "prefill" else "kv_consumer",
            "version": "sim",
            "protocol": 1,
            "kv_tokens": self._costs.kv_tokens,
        }


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, engine: SimEngine) -> None:
        self._engine = engine

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._engine.heard(data, addr)


_body = msgspec.json.Decoder(Body)


def _source(body: Body, params: dict[str, Any]) -> tuple[str, int, str] | None:
    """Host and port of the prefill engine that computes the prompt, and the transfer's key."""
    if params.get("do_remote_prefill"):
        if address := params.get("remote_bootstrap_addr"):
            found = urlsplit(address if "//" in address else f"//{address}")
            return found.hostname or HOST, found.port or 0, str(params.get("transfer_id"))
        return params["remote_host"], params["remote_port"], str(params["transfer_id"])
    if body.bootstrap_room is not None:
        return body.bootstrap_host or HOST, body.bootstrap_port or 0, str(body.bootstrap_room)
    return None


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prefill", type=int, nargs="*", default=[], metavar="PORT")
    parser.add_argument("--decode", type=int, nargs="*", default=[], metavar="PORT")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="the simulator's costs, not fixed ones")
    parser.add_argument("--prefill-seconds", type=float, default=0.02)
    parser.add_argument("--step-seconds", type=float, default=0.02)
    parser.add_argument("--handoff-seconds", type=float, default=0.005)
    options = parser.parse_args()
    costs: Costs | Fixed
    if options.preset:
        costs = preset(options.preset)
    else:
        costs = Fixed(options.prefill_seconds, options.step_seconds, options.handoff_seconds)
    engines: dict[int, SimEngine] = {}
    for role, ports in (("prefill", options.prefill), ("decode", options.decode)):
        for port in ports:
            await SimEngine(role, port, costs, bool(options.preset), engines).start()
    gc.freeze()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
