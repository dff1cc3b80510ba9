"""Real engines for the tests here: one cluster for the whole session, others on demand, one at a time."""

import os
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from mooncake_connector.scheduler.actuator.local import PreloadedVllm, engine_environment
from tests.engine.harness import Cluster, Clusters, Shape, running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name in ("engine", "faults"):
            item.add_marker(pytest.mark.engine)
            if item.get_closest_marker("timeout") is None:
                # The first test pays for the start of the engines.
                item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def preload() -> Iterator[PreloadedVllm | None]:
    """Forks engines instead of starting each afresh; set MOONCAKE_TEST_PRELOAD=0 to do without."""
    if os.environ.get("MOONCAKE_TEST_PRELOAD") == "0":
        yield None
        return
    with PreloadedVllm(engine_environment(".")) as vllm:
        yield vllm


@pytest.fixture(scope="session")
def _session_cluster(
    tmp_path_factory: pytest.TempPathFactory, preload: PreloadedVllm | None
) -> Iterator[Cluster]:
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with running(Shape(args=tools), tmp_path_factory.mktemp("cluster"), preload) as cluster:
        yield cluster


@pytest.fixture
def cluster(_session_cluster: Cluster) -> Cluster:
    """P, D and a single tiny-llama engine in float32, and the proxy; what an earlier test killed is back."""
    for process in _session_cluster.processes:
        if not process.alive():
            process.start()
    for process in _session_cluster.processes:
        process.wait_ready(400)
    return _session_cluster


@pytest.fixture(scope="session")
def clusters(tmp_path_factory: pytest.TempPathFactory, preload: PreloadedVllm | None) -> Iterator[Clusters]:
    """Call it with a `Shape` for a cluster of that shape."""
    factory = Clusters(lambda name: tmp_path_factory.mktemp(f"cluster-{name}"), preload)
    yield factory
    factory.close()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client without a limit on connections, and with none kept."""
    timeout = aiohttp.ClientTimeout(total=120)
    # No connection is used twice: engines close idle ones, and those of engines that were stopped are dead.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield session


@pytest.fixture(scope="module")
def gemma(clusters: Clusters) -> Cluster:
    """Sliding windows beside full attention."""
    return clusters(Shape(model="tiny-gemma3"))


@pytest.fixture(scope="module")
def tp2(clusters: Clusters) -> Cluster:
    """Two ranks on every engine, the single one included."""
    return clusters(Shape(args=("--tensor-parallel-size", "2")))
