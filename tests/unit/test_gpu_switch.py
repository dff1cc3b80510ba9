"""Settings switched on a running connector (benchmarks/gpu_switch.py), and the transports' constants."""

import argparse
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from benchmarks import gpu_switch
from benchmarks.gpu_switch import Kept, label, parse, switch, use
from mooncake_connector.config import ConnectorConfig
from mooncake_connector.kv_transfer import dispatcher
from mooncake_connector.kv_transfer.transport import receiver, staging, stream, wire
from mooncake_connector.kv_transfer.transport.cuda import kernel
from mooncake_connector.kv_transfer.transport.cuda.rail import CopyPolicy

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from gpu_tuning import tune


class End:
    def __init__(self) -> None:
        self._config = ConnectorConfig(push_bytes=64 << 20)


class Stream:
    def __init__(self, context: object, *, urgent: bool) -> None:
        self.urgent = urgent

    def synchronize(self) -> None: ...


class Rail:
    _down: str | None = None

    def __init__(self) -> None:
        self._policy, self._lock, self._context = CopyPolicy("auto", 12), threading.Lock(), None
        self._stream = Stream(None, urgent=True)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    monkeypatch.setattr(gpu_switch, "Stream", Stream)
    monkeypatch.setattr(kernel, "THREADS", kernel.THREADS)
    for kind in (End, Rail):
        monkeypatch.setattr(kind, "__init__", kind.__init__)
    return Kept(End, Rail)


def test_what_is_not_named_is_as_it_came(kept: Kept) -> None:
    end, rail, gone = End(), Rail(), Rail()
    gone._down = "broken"
    first = rail._stream
    settings = {"cuda_copy": "copy_engine", "push_bytes": 1, "priority": "low", "threads": 256}
    assert use(kept, settings) == {"rails": 1, "ends": 1}
    assert (rail._policy, rail._stream.urgent) == (CopyPolicy("copy_engine", 12), False)
    assert (end._config.push_bytes, end._config.cuda_copy, kernel.THREADS) == (1, "copy_engine", 256)
    assert gone._policy.copy == "auto"
    use(kept, {"cuda_sms": 4})
    assert (rail._policy, rail._stream) == (CopyPolicy("auto", 4), first)
    assert (end._config.push_bytes, end._config.cuda_copy, kernel.THREADS) == (64 << 20, "auto", 1024)


def test_settings_are_known_before_anything_starts() -> None:
    assert parse('[{}, {"cuda_copy": "copy_engine", "threads": 512}]')[1]["threads"] == 512
    for wrong in ("{}", "[1]", "nothing", '[{"cuda_smss": 1}]'):
        with pytest.raises(argparse.ArgumentTypeError):
            parse(wrong)
    assert label({}) == "as it comes"
    assert label({"cuda_sms": 4, "priority": "low"}) == "cuda_sms=4 priority=low"


async def test_an_engine_is_asked_and_may_refuse() -> None:
    asked: list[Any] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(await request.json())
        if len(asked) > 1:
            return web.Response(status=500, text="no such method")
        return web.json_response({"results": [{"rails": 1, "ends": 2}, {"rails": 0, "ends": 2}]})

    app = web.Application()
    app.router.add_post("/collective_rpc", answer)
    async with TestServer(app) as server, ClientSession() as session:
        url = str(server.make_url("")).rstrip("/")
        assert await switch(session, url, {"cuda_sms": 4}) == {"rails": 1, "ends": 4}
        assert asked == [{"method": "switch_connector", "args": ['{"cuda_sms": 4}']}]
        with pytest.raises(RuntimeError, match="no such method"):
            await switch(session, url, {})


def test_constants_are_set_wherever_they_are_used_and_set_back() -> None:
    def now() -> tuple[int, ...]:
        return staging.LOAD_BYTES, stream.LOAD_BYTES, staging.UNLOADS, receiver.RECEIVE_BUFFER_BYTES

    load, load_again, unloads, buffer = now()
    tune({"LOAD_BYTES": 5, "UNLOADS": 7, "connections": 3})
    assert now() == (5, 5, 7, buffer)
    tune({"RECEIVE_BUFFER_BYTES": 9})
    assert now() == (load, load_again, unloads, 9)
    tune({})
    assert now() == (load, load_again, unloads, buffer)
    with pytest.raises(ValueError, match="NOTHING_LIKE_IT"):
        tune({"NOTHING_LIKE_IT": 1})


def test_slices_are_cut_as_told_and_then_as_before() -> None:
    def now() -> tuple[float, int]:
        policy = dispatcher.Dispatcher()._policy
        return policy.slice_time_s, policy.max_bytes

    before = now()
    tune({"slice_time_s": 0.5, "max_bytes": 77})
    assert now() == (0.5, 77)
    tune({"slice_time_s": 0.25})
    assert now() == (0.25, before[1])
    tune({})
    assert now() == before


@pytest.mark.parametrize("option", [socket.SO_SNDBUF, socket.SO_RCVBUF])
def test_a_buffer_is_not_made_smaller_than_asked_for(option: int) -> None:
    with socket.socket() as sock:
        before = sock.getsockopt(socket.SOL_SOCKET, option)
        for more_than_any_system_allows in (1 << 62, 0):
            wire.widen(sock, option, more_than_any_system_allows)
            assert sock.getsockopt(socket.SOL_SOCKET, option) == before
        wire.widen(sock, option, 50_000)
        assert sock.getsockopt(socket.SOL_SOCKET, option) in (50_000, 100_000)  # Linux doubles it
