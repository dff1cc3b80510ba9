"""The copy kernel by itself: right without a sanitizer, clean under it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpus(1)

FOUND = 9


def sanitizer() -> str:
    """Path of compute-sanitizer; skips the test where there is none."""
    for place in (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"):
        if place and Path(place).exists():
            return place
    pytest.skip("compute-sanitizer is not here: install it with CUDA's toolkit")


def run(*command: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    python = [sys.executable, "-m", "tests.gpu.kernel_alone", *([fault] if fault else [])]
    return subprocess.run(
        [*command, *python],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_alone() -> None:
    done = run()
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_sanitizer_is_silent(tool: str) -> None:
    done = run(sanitizer(), "--tool", tool, "--error-exitcode", str(FOUND))
    print(done.stdout[-300:])
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "0 errors" in done.stdout or "0 hazards" in done.stdout, done.stdout[-2000:]


@pytest.mark.parametrize("fault", ["read", "write"])
def test_sanitizer_would_speak(fault: str) -> None:
    """A copy past the end of its memory, which the same check has to find."""
    done = run(sanitizer(), "--tool", "memcheck", "--error-exitcode", str(FOUND), fault=fault)
    assert done.returncode != 0, done.stdout[-2000:]
    assert f"Invalid __global__ {fault}" in done.stdout + done.stderr, (done.stdout + done.stderr)[-2000:]
