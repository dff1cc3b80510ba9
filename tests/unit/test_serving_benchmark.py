"""What the serving benchmarks conclude from what they see: clients, loads, verdicts."""

import itertools
import json
from collections.abc import AsyncIterator, Sequence

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks import serving
from benchmarks.gpu_engines import LLAMA_8B, TINY
from benchmarks.report import row
from benchmarks.saved import Saved
from benchmarks.ttft_client import body, gap_of_logits, stream
from benchmarks.ttft_measures import percentile, steps


class FakeEngine:
    """Answers every completion with the given lines, or with the given likeliest tokens."""

    def __init__(self, lines: Sequence[str] = (), likely: dict[str, float] | None = None) -> None:
        self.lines = lines
        self.likely = likely
        self.asked: list[dict] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        if self.likely is not None:
            return web.json_response({"choices": [{"logprobs": {"top_logprobs": [self.likely]}}]})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for line in self.lines:
            await response.write(line.encode() + b"\n\n")
        return response


@pytest.fixture
async def serve() -> AsyncIterator:
    servers = []

    async def start(engine: FakeEngine) -> str:
        app = web.Application()
        app.router.add_post("/v1/completions", engine.answer)
        server = TestServer(app)
        await server.start_server()
        servers.append(server)
        return str(server.make_url("")).rstrip("/")

    yield start
    for server in servers:
        await server.close()


def chunk(text: str) -> str:
    return "data: " + json.dumps({"choices": [{"text": text}], "usage": None})


USAGE = 'data: {"choices": [], "usage": {"completion_tokens": 3}}'


async def test_a_stream_is_read_to_its_end_with_tokens_gaps_and_timeline(serve):
    url = await serve(
        FakeEngine(
            [chunk(" 17"), chunk(" 4 4000"), USAGE, ': timeline {"proxy": {"received": 1.5}}', "data: [DONE]"]
        )
    )
    async with aiohttp.ClientSession() as session:
        answer = await stream(session, url, body([5, 6], 3))
    assert answer.tokens == (17, 4, 4000)
    assert (answer.count, len(answer.gaps)) == (3, 1)
    assert answer.timeline == {"proxy": {"received": 1.5}}
    assert answer.ttft > 0


@pytest.mark.parametrize(
    "lines", [[chunk(" 17")], ['data: {"error": {"message": "no"}}'], [], [USAGE, "data: [DONE]"]]
)
async def test_a_stream_that_breaks_off_is_no_measurement(serve, lines):
    url = await serve(FakeEngine(lines))
    async with aiohttp.ClientSession() as session:
        with pytest.raises(RuntimeError):
            await stream(session, url, body([5], 3))


async def test_a_tie_is_told_from_a_wrong_token(serve):
    engine = FakeEngine(likely={" 7": -1.0, " 8": -1.01, " 9": -3.0})
    url = await serve(engine)
    async with aiohttp.ClientSession() as session:
        assert await gap_of_logits(session, url, [1, 2], [5, 8], [5, 7]) == pytest.approx(0.01)
        assert await gap_of_logits(session, url, [1, 2], [5, 9], [5, 7]) == pytest.approx(2.0)
        assert await gap_of_logits(session, url, [1, 2], [5, 6], [5, 7]) == float("inf")
    assert engine.asked[0]["prompt"] == [1, 2, 5]


@pytest.mark.parametrize("scale", [LLAMA_8B, TINY])
def test_the_trace_fits_the_model_and_keeps_its_order(scale):
    trace = serving.load_trace(scale=scale, slower=scale.slower)
    assert len(trace) == 556
    assert all(a.at <= b.at for a, b in itertools.pairwise(trace))
    assert max(a.prompt + a.output for a in trace) < scale.max_model_len
    assert min(a.output for a in trace) >= 2


def test_a_load_has_the_rate_that_was_asked_for():
    trace = serving.load_trace(scale=LLAMA_8B)
    for rate in serving.RATES:
        arrivals = serving.at_rate(trace, rate, 15.0)
        assert len(arrivals) == rate * 15
        assert arrivals[0].at == 0
        assert 12 < arrivals[-1].at < 15
    with pytest.raises(ValueError, match="556"):
        serving.at_rate(trace, 100.0, 15.0)


def test_what_was_never_answered_misses_its_slo():
    arrival = serving.Arrival(0.0, 100, 10)
    nan = float("nan")
    outcomes = [
        serving.Outcome(arrival, 0.1, 0.01, (0.01, 0.02)),
        serving.Outcome(arrival, serving.SLO_TTFT * 2, 0.01, (0.01,)),
        serving.Outcome(arrival, 0.1, serving.SLO_TBT * 2, (0.01,)),
        serving.Outcome(arrival, nan, nan),
    ]
    found = {r["metric"]: r["value"] for r in serving.rows_of("x", 2.0, 2.0, outcomes)}
    assert found["goodput"] == 0.5
    assert found["within_slo"] == 25
    assert found["unanswered"] == 1
    assert found["ttft_p50"] == 100
    assert found["tbt_p99"] == 20
    assert found["tbt_mean"] == 12.5
    nobody = serving.rows_of("x", 2.0, 2.0, outcomes[3:])
    assert {r["metric"]: r["value"] for r in nobody} == {"goodput": 0, "within_slo": 0, "unanswered": 1}


def test_percentiles_are_values_that_were_seen():
    assert [percentile([3, 1, 2, 4], p) for p in (0, 50, 75, 99)] == [1, 2, 3, 4]


def test_steps_show_every_moment_of_every_length():
    rows = []
    for length in (5, 50):
        for name, at in (("proxy.received", 1.0), ("client.first_chunk", 4.0)):
            case = {"prompt_tokens": length, "moment": name}
            rows.append(row("ttft", "x", case, "moment", [at], "ms"))
            rows.append(row("ttft", "x", case, "step", [at / 2], "ms"))
    lines = steps(rows).splitlines()
    assert len(lines) == 3
    assert lines[0].split()[-2:] == ["5", "50"]
    assert lines[2].split() == ["client.first_chunk", "4.00", "+2.00", "4.00", "+2.00"]


def test_rows_are_in_the_file_as_soon_as_they_come(tmp_path):
    saved = Saved(tmp_path / "a.json", facts={"gpus": 2})
    saved.add([row("ttft", "x", {}, "ttft", [1.0], "ms")])
    saved.add([row("ttft", "y", {}, "ttft", [2.0], "ms")])
    saved.single("each", [1, 2])
    document = json.loads((tmp_path / "a.json").read_text())
    assert [r["subject"] for r in document["rows"]] == ["x", "y"]
    assert document["machine"]["gpus"] == 2
    assert json.loads((tmp_path / "a.requests.json").read_text()) == {"each": [1, 2]}
