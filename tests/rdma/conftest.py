"""Tests on real verbs. ``make test LAYERS=rdma`` runs them in a guest that has two soft-RoCE NICs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rdma.nics import Cables, Nic, active_nics, lack

LACK = lack()
collect_ignore_glob = ["test_*.py"] if LACK else []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.parent == Path(__file__).parent]
    for item in here:
        item.add_marker(pytest.mark.rdma)
    if LACK:  # files named on the command line are collected, whatever is ignored
        items[:] = [item for item in items if item not in here]
        config.hook.pytest_deselected(items=here)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if LACK:
        terminalreporter.write_line(
            f"tests/rdma: NOT RUN, {LACK}; in a guest that has two: make test LAYERS=rdma, or"
            " scripts/rdma/guest.sh -- .venv/bin/python -m pytest tests/rdma",
            yellow=True,
        )


@pytest.fixture(scope="session")
def nics() -> list[Nic]:
    """The NICs that are up when the tests begin."""
    return active_nics()


@pytest.fixture
def cables() -> Iterator[Cables]:
    """For tests that take NICs down (`guest_only`): all are up again afterwards, however the test ended."""
    cables = Cables()
    yield cables
    cables.plug_all()
