"""GPU tests: what they need and where it is missing, their order, and what they share."""

import subprocess
from collections.abc import Iterator

import pytest

from tests.gpu.fleet import Fleet, vllm_here
from tests.gpu.processes import Environment, Processes

ORDER = ["cuda_ipc", "fences", "audit", "kernel", "registration", "staging", "vllm"]
"""The quick ones first; meanwhile the engines start."""

EXPANDABLE: Environment = (("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),)


def only(device: int) -> Environment:
    """The environment of a process that sees one GPU."""
    return (("CUDA_VISIBLE_DEVICES", str(device)),)


def gpus() -> int:
    """GPUs of this machine; counted without starting CUDA in this process."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpus(n): needs so many GPUs; 0: is for machines without")
    config.addinivalue_line("markers", "engines(*names): needs these vLLM engines (tests/gpu/fleet.py)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.parent.name == "gpu"]
    if not here:
        return
    have, lack = gpus(), vllm_here()
    for item in here:
        item.add_marker(pytest.mark.gpu)
        need = item.get_closest_marker("gpus")
        count = need.args[0] if need else 0
        if count > have:
            what = f"{count} GPUs" if count > 1 else "a GPU"
            item.add_marker(pytest.mark.skip(reason=f"needs {what}, here are {have}"))
        elif need and not count and have:
            item.add_marker(
                pytest.mark.skip(reason="tries the tests themselves, where no GPU's time is spent")
            )
        elif item.get_closest_marker("engines") and lack:
            item.add_marker(pytest.mark.skip(reason=lack))
        elif item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(240))

    def place(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return ORDER.index(name) if name in ORDER else len(ORDER) - 1

    others = [item for item in items if item.path.parent.name != "gpu"]
    items[:] = others + sorted(here, key=place)


def _runs(item: pytest.Item) -> bool:
    return item.get_closest_marker("skip") is None


@pytest.fixture(scope="session", autouse=True)
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The engines that the tests of this run name; all of them begin to start when the first test does."""
    names = [
        name
        for item in request.session.items
        if _runs(item) and (marker := item.get_closest_marker("engines"))
        for name in marker.args
    ]
    made = Fleet(list(dict.fromkeys(names)), tmp_path_factory.mktemp("engines"))
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def _stock(fleet: Fleet) -> Iterator[Processes]:
    made = Processes()
    if have := gpus():
        # All that the tests take, kills included: torch takes seconds to import.
        made.prepare(6)
        made.prepare(2, EXPANDABLE)
        for device in range(min(have, 2)):
            made.prepare(1, only(device))
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def processes(_stock: Processes) -> Iterator[Processes]:
    """Other processes; what a test takes it need not give back."""
    yield _stock
    _stock.give_back()
