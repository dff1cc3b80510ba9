"""The clients that users have, unchanged: the official openai package and vLLM's own benchmark."""

import asyncio
import json
import sys
from pathlib import Path

import openai
import pytest

from mooncake_connector.demo.models import make
from tests.engine.harness import Cluster

WORDS = "prefill and decode are two phases of one answer; " * 12


async def test_openai_client(cluster: Cluster) -> None:
    answers = []
    for url in (cluster.single.url, cluster.url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            model = (await client.models.list()).data[0].id
            whole = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": WORDS}], max_tokens=16, temperature=0
            )
            stream = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": WORDS + "again"}],
                max_completion_tokens=16,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in stream]
            text = await client.completions.create(model=model, prompt=WORDS, max_tokens=16, temperature=0)
        answers.append(
            (
                whole.choices[0].message.content,
                "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
                text.choices[0].text,
                chunks[-1].usage.completion_tokens if chunks[-1].usage else None,
                whole.usage.total_tokens if whole.usage else None,
            )
        )
    assert answers[0] == answers[1]


async def test_openai_client_sees_errors(cluster: Cluster) -> None:
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            await client.completions.create(model="m", prompt=WORDS, max_tokens=-1)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": WORDS}], temperature=-2.0
            )


async def test_vllm_bench_serve(cluster: Cluster, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
    command += ["--backend", "openai", "--base-url", cluster.url, "--model", "m"]
    command += ["--tokenizer", str(make(cluster.shape.model)), "--dataset-name", "random"]
    command += ["--random-input-len", "300", "--random-output-len", "16", "--num-prompts", "24"]
    command += ["--request-rate", "20", "--max-concurrency", "8", "--ignore-eos", "--disable-tqdm"]
    command += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 300)
    assert process.returncode == 0, output.decode()[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == 24
    assert result["total_output_tokens"] == 24 * 16
