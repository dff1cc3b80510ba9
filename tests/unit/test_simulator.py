"""The simulated world around the real conductor: nobody is lost, same seed same result, sums done by hand."""

import itertools
import json
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_connector import cli
from mooncake_connector.errors import ConfigError
from mooncake_connector.scheduler.policy.base import Slo
from mooncake_connector.scheduler.policy.scheduling import Scheduling
from mooncake_connector.scheduler.simulator import trace
from mooncake_connector.scheduler.simulator.presets import PRESETS, preset
from mooncake_connector.scheduler.simulator.report import summary
from mooncake_connector.scheduler.simulator.setup import Setup, parse_pools
from mooncake_connector.scheduler.simulator.trace import BLOCK, Job, Line
from mooncake_connector.scheduler.simulator.world import World

SMALL = msgspec.structs.replace(preset("h200-8b"), kv_tokens=20_000)
EXAMPLE = Path(__file__).parents[2] / "examples" / "conversation_120s.jsonl"
ADMISSIONS = st.sampled_from(["none", "baseline", "early", "predicted", "per_request"])
ROUTINGS = st.sampled_from(["conductor", "local_cache", "least_loaded", "round_robin", "random"])
JOBS = st.lists(
    st.builds(
        lambda pause, blocks, rest, output, group: (pause, blocks, rest, output, group),
        st.floats(0, 0.5),
        st.integers(0, 20),
        st.integers(1, BLOCK - 1),
        st.integers(1, 400),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=40,
)


def some(drawn: list[tuple[float, int, int, int, int]]) -> list[Job]:
    at, jobs = 0.0, []
    for pause, blocks, rest, output, group in drawn:
        at += pause
        keys = tuple(group * 1000 + block for block in range(blocks))
        jobs.append(Job(at, blocks * BLOCK + rest, output, keys))
    return jobs


def played(pools: str, jobs: list[Job], **more: object) -> World:
    scheduling = Scheduling(
        routing=more.pop("routing", "conductor"),  # type: ignore[arg-type]
        admission=more.pop("admission", "none"),  # type: ignore[arg-type]
        slo=more.pop("slo", Slo()),  # type: ignore[arg-type]
    )
    world = World(Setup(scheduling=scheduling, **parse_pools(pools), **({"costs": SMALL} | more)), jobs)
    world.run()
    return world


@given(
    drawn=JOBS,
    pools=st.sampled_from(["1P1D", "2P1D", "2P3D", "1C", "3C"]),
    routing=ROUTINGS,
    admission=ADMISSIONS,
    order=st.sampled_from(["concurrent", "serial"]),
    first=st.sampled_from(["decode", "prefill"]),
    whole=st.booleans(),
    tight=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_every_request_ends_once_and_leaves_nothing_behind(
    drawn: list[tuple[float, int, int, int, int]],
    pools: str,
    routing: str,
    admission: str,
    order: str,
    first: str,
    whole: bool,
    tight: bool,
) -> None:
    slo = Slo(ttft=0.5, tbt=0.005) if tight else Slo()
    world = played(
        pools,
        some(drawn),
        routing=routing,
        admission=admission,
        order=order,
        first_token=first,
        whole=whole,
        slo=slo,
    )
    allowed = {"done"} if admission == "none" else {"done", "rejected", "dropped"}
    for task in world.tasks:
        assert task.outcome in allowed
        if task.outcome == "done":
            assert task.at <= task.placed <= task.first <= task.last
            assert task.made == task.output
    world.settle()
    for engine in world.engines.values():
        assert (engine.blocks.used, engine.requests, engine.pending, engine.context) == (0, 0, 0, 0)
    for account in world.conductor.accounts(1e6):
        assert (account.prompts, account.answers) == (0, 0)


def test_who_is_dropped_after_prefill_gives_back_its_room() -> None:
    jobs = [Job(at / 10, 3000, 200) for at in range(20)]
    world = played("1P1D", jobs, admission="baseline", slo=Slo(tbt=0.005))
    assert {task.outcome for task in world.tasks} >= {"done", "dropped"}
    world.settle()
    assert [engine.blocks.used for engine in world.engines.values()] == [0, 0]


def test_the_same_seed_gives_the_same_result_and_another_one_another() -> None:
    def run(seed: int) -> list[float]:
        jobs = trace.jobs(trace.read(EXAMPLE, limit=80), speed=4, seed=seed)
        world = played("2P2D", jobs, costs=preset("h200-8b"), routing="random", seed=seed)
        return [task.last for task in world.tasks]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_one_request_takes_what_its_parts_take() -> None:
    costs = preset("h200-8b")
    world = played("1P1D", [Job(0.0, 4096, 101)], costs=costs)
    task = world.tasks[0]
    there = costs.ingress + 4096 * costs.ingress_per_token
    prefill = costs.prefill(4096) * (1 + costs.streaming)
    step = costs.step(1, 4096)
    assert task.computed == pytest.approx(there + prefill)
    # KV was on its way all the time: what is left is the last word about it.
    assert task.landed == pytest.approx(task.computed + costs.handoff)
    assert task.first == pytest.approx(task.landed + step + costs.egress + 4096 * costs.egress_per_token)
    assert task.last == pytest.approx(task.landed + costs.decode_steps(1, 4096, 101) + costs.egress)
    serial = played("1P1D", [Job(0.0, 4096, 101)], costs=costs, order="serial").tasks[0]
    assert serial.landed - task.landed == pytest.approx(4096 * costs.kv_bytes / costs.bandwidth)


def test_a_hot_prefix_is_copied_rather_than_computed() -> None:
    shared = tuple(range(60))
    jobs = [Job(0.0, 60 * BLOCK + 100, 2, shared)]
    jobs += [Job(10.0 + at / 100, 60 * BLOCK + 100, 2, shared) for at in range(4)]
    costs = preset("h200-8b")
    world = played("2P1D", jobs, costs=costs, prior="calibrated")
    hits = [task.hit for task in world.tasks]
    assert hits == [0, *[60 * BLOCK] * 4]
    assert world.copies == 1
    assert {task.prefill for task in world.tasks[1:]} == {"prefill-0", "prefill-1"}
    assert played("2P1D", jobs, costs=costs, prefix_caching=False).copies == 0


def test_what_was_predicted_of_prefill_comes_true_though_nobody_told_the_costs() -> None:
    jobs = trace.jobs(trace.read(EXAMPLE), speed=0.5)
    world = played("4P2D", jobs, costs=preset("a800x8-llama2-70b"))
    low, middle, high = summary(world)["predicted"]["prefill"]
    assert 0.8 < low <= middle <= high < 1.25


def test_a_trace_is_read_spread_and_sped_up(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    lines = [Line(3000.0, 1100, 7, [4, 5, 6]), Line(0.0, 10, 1, [4])]
    file.write_bytes(b"\n".join(msgspec.json.encode(line) for line in lines))
    kept = trace.jobs(trace.read(file), spread=0, speed=2)
    assert kept == [Job(0.0, 10, 1, ()), Job(1.5, 1100, 7, (4, 5))]
    spread = trace.jobs(trace.read(file), speed=2)
    assert all(a.at <= b.at < a.at + 1.5 for a, b in zip(kept, spread, strict=True))


@pytest.mark.parametrize(
    ("text", "why"), [("", "no requests"), ('{"timestamp": 1}', "line 1"), ("{", "line 1")]
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=why):
        trace.read(file)


def test_made_up_prompts_share_what_they_should() -> None:
    jobs = trace.made_up(prompt=16 * BLOCK, rate=2.0, count=50, groups=2, cached=0.5)
    shared = [set(a.keys) & set(b.keys) for a, b in itertools.pairwise(jobs)]
    assert {len(keys) for keys in shared} == {0, 8}
    assert all(len(set(job.keys)) == 16 for job in jobs)


def test_rooflines_agree_with_what_the_papers_say() -> None:
    # FAST'25: 8 x A800, LLaMA-70B with GQA: 320 KiB of KV a token.
    costs = preset("a800x8-llama2-70b")
    assert costs.kv_bytes == 320 * 1024
    assert 1.0e6 < costs.kv_tokens < 1.5e6
    # 138 GFLOP a token at 8 x 312 TFLOP/s are 55 us if nothing is lost.
    assert 55e-6 < costs.per_token < 2.5 * 55e-6


def test_the_command_prints_a_table_and_writes_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    options = ["simulate", "--trace", str(EXAMPLE), "--requests", "60", "--xpyd", "2P2D", "4C"]
    assert cli.main([*options, "--admission", "per_request", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"2P2D +conductor +per_request", printed)
    found = json.loads(file.read_text())["simulations"]
    assert [one["system"] for one in found] == ["2P2D", "4 coupled (chunked)"]
    assert len(found[0]["each"]) == 60


@pytest.mark.parametrize(
    "wrong",
    [
        ["--speed", "0"],
        ["--preset", "h300"],
        ["--xpyd", "P2D"],
        ["--routing", "best"],
        ["--requests", "x"],
        ["--trace", "nowhere.jsonl"],
    ],
)
def test_a_wrong_option_is_named(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", "--trace", str(EXAMPLE), *wrong]) == 2
    assert f"{wrong[0]} {wrong[1]}" in capsys.readouterr().err


def test_presets_say_where_they_come_from() -> None:
    assert all(len(costs.source) > 20 for costs in PRESETS.values())
