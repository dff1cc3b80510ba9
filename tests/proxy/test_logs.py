"""The log of a running proxy: one line for each request, and nothing in it that is secret."""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mooncake_connector.scheduler.proxy.access import AccessLine
from tests.proxy.fakes import MODEL, FakeEngine, events

KEY, PROMPT, QUERY, ENGINE_KEY, ADMIN = "sk-client", "my diary", "q-secret", "sk-engine", "sk-admin"
SECRETS = (KEY, PROMPT, QUERY, ENGINE_KEY, ADMIN)


# Its URL, where its log goes, its engines.
Running = tuple[str, Path, list[FakeEngine], asyncio.subprocess.Process]


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@asynccontextmanager
async def running(tmp_path: Path, *options: str) -> AsyncIterator[Running]:
    """The command with engines behind it."""
    engines = [FakeEngine("kv_producer"), FakeEngine("kv_consumer")]
    for engine in engines:
        await engine.start()
    config, log = tmp_path / "proxy.yaml", tmp_path / "log"
    config.write_text(
        f"""
prefill: {engines[0].url}
decode: {engines[1].url}
port: 0
admin_port: 0
admin_keys: [{sha256(ADMIN)}]
require_key: true
classes: {{gold: {{api_keys: [{sha256(KEY)}]}}}}
"""
    )
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mooncake_connector.cli", "proxy", "--config", config, *options),
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=os.environ
            | {"MOONCAKE_PROXY_ENGINE_API_KEY": ENGINE_KEY, "MOONCAKE_PROXY_LEAVE_SECONDS": "0"},
        )
    try:
        assert process.stdout
        url = (await asyncio.wait_for(process.stdout.readline(), 10)).decode().split()[-1]
        yield url, log, engines, process
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 10)
        for engine in engines:
            await engine.stop()


async def ask(url: str, engines: list[FakeEngine]) -> None:
    """Everything that leaves a line: what goes well, what fails, and what is no HTTP."""
    headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "mine"}
    chat = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "stream": True}
    text = {"model": MODEL, "prompt": PROMPT}
    async with aiohttp.ClientSession(url, headers=headers) as http:
        async with asyncio.timeout(10):
            while (await http.get("/health")).status != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        async with http.post(f"/v1/chat/completions?api_key={QUERY}", json=chat) as reply:
            assert b"".join(events()) == await reply.read()
        # vLLM's refusals repeat what they refuse.
        for engine in engines:
            engine.says = f"bad input: {PROMPT}"
            for failures in ([500], ["reset"], [400], ["event"], [500, 500, 500]):
                for body in (text, text | {"stream": True}):
                    engine.failures = list(failures)
                    await (await http.post("/v1/completions", json=body)).read()
        await http.post("/v1/completions", data=b'{"prompt": "my diary", ')
        await http.post(f"/nothing/%0aINFO?api_key={QUERY}", json=text)
        await http.post("/v1/embeddings", json={"model": MODEL, "input": PROMPT})
    async with aiohttp.ClientSession(url) as http:
        assert (await http.post("/v1/completions", json=text)).status == 401
    host, port = url.removeprefix("http://").split(":")
    for wrong in (f"GET /?{QUERY} HTTP/1.1\r\nAuthorization {KEY}\r\n\r\n", f"{PROMPT}\r\n\r\n"):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(wrong.encode())
        await reader.read()
        writer.close()


@pytest.mark.parametrize("form", ["text", "json"])
async def test_no_secret_is_in_the_log_and_each_request_is(tmp_path: Path, form: str):
    async with running(tmp_path, "--log-level", "debug", "--log-format", form) as (url, log, engines, _):
        await ask(url, engines)
    text = log.read_text()
    for secret in SECRETS:
        assert secret not in text
        assert sha256(secret) not in text
    assert "Traceback" not in text
    if form == "json":
        lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
        chat = next(line for line in lines if line.get("path") == "/v1/chat/completions")
        assert chat["logger"] == "mooncake_connector.access"
        assert (chat["request_id"], chat["status"], chat["outcome"]) == ("mine", 200, "ok")
        assert (chat["tenant"], chat["class"]) == (sha256(KEY)[:12], "gold")
        assert (chat["prefill"], chat["decode"]) == (engines[0].url, engines[1].url)
        assert chat["tokens"] > 0
        assert 0 < chat["ttft"] <= chat["seconds"]
        denied = next(line for line in lines if line.get("status") == 401)
        assert "tenant" not in denied
        warnings = [line for line in lines if line["level"] == "warning" and "failed" in line["message"]]
        assert {line["request_id"] for line in warnings} == {"mine"}
    else:
        assert "path=/v1/chat/completions status=200 outcome=ok" in text
        assert "path=/nothing/%0AINFO status=404" in text
        assert "[request_id=mine]" in text


def test_what_is_empty_is_left_out_of_a_line():
    line = AccessLine({"status": 0, "decode": "", "ttft": None, "seconds": 0.5})
    assert str(line) == "status=0 seconds=0.5"
