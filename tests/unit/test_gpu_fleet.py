"""The GPU tests' engines, as far as they need no GPU: their ports, and a second start."""

import socket
import sys
from pathlib import Path

import pytest

from mooncake_connector.scheduler.actuator.local import LocalEngine
from mooncake_connector.scheduler.actuator.process import LocalProcess
from tests.gpu import fleet
from tests.gpu.fleet import FIRST_PORT, PORTS, SHAPES, Fleet, own_ports

# Fails as vLLM does as often as the second argument says, then answers the health check.
SERVER = """
import http.server, pathlib, sys
port, times, why, tried = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], pathlib.Path(sys.argv[4])
count = len(tried.read_text()) if tried.exists() else 0
tried.write_text("x" * (count + 1))
if count < times:
    sys.exit(f"RuntimeError: {why}")
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""


def test_every_engine_has_ports_of_its_own(tmp_path: Path) -> None:
    names = list(SHAPES)
    made = Fleet(names, tmp_path)
    engines = [
        made._made(name, tmp_path, port) for name, port in zip(names, own_ports(len(names)), strict=True)
    ]
    blocks = [range(e.port, e.port + PORTS) for e in engines]
    assert len({port for block in blocks for port in block}) == PORTS * len(names)
    for engine, block in zip(engines, blocks, strict=True):
        assert int(engine.env["VLLM_PORT"]) in block
        assert int(engine.env["VLLM_PORT"]) != engine.port


def test_a_block_that_somebody_uses_is_left_out() -> None:
    first = own_ports(1)[0]
    with socket.create_server(("", first)):
        assert first not in own_ports(3)
    assert first in own_ports(1)


def test_a_block_is_not_what_others_choose_from() -> None:
    assert FIRST_PORT > 1024
    assert own_ports(0) == []
    assert max(own_ports(2 * len(SHAPES))) + PORTS <= 10_000


class Server(LocalProcess):
    """In place of an engine."""

    def __init__(self, folder: Path, port: int, times: int, why: str) -> None:
        (folder / "flaky.py").write_text(SERVER)
        super().__init__(
            "flaky",
            [str(port), str(times), why, str(folder / "tried")],
            name="flaky",
            port=port,
            env={"PYTHONPATH": str(folder), "PATH": str(Path(sys.executable).parent)},
            logs=folder,
        )


@pytest.mark.parametrize(
    ("times", "why", "starts", "tries"),
    [
        (1, "The server socket has failed to listen: EADDRINUSE", True, 2),
        (1, "[Errno 98] Address already in use", True, 2),
        (2, "EADDRINUSE", False, 2),
        (1, "CUDA out of memory", False, 1),
    ],
)
def test_a_port_that_was_taken_gets_a_second_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, times: int, why: str, starts: bool, tries: int
) -> None:
    def made(self: Fleet, name: str, model: Path, port: int) -> LocalEngine:
        return Server(tmp_path, port, times, why)  # type: ignore[return-value]

    monkeypatch.setattr(Fleet, "_made", made)
    monkeypatch.setattr(fleet, "MODELS", {"llama": lambda folder: None})
    one = Fleet(["p"], tmp_path)
    one.start()
    try:
        if starts:
            assert one["p"].healthy()
        else:
            with pytest.raises(AssertionError, match="did not start"):
                one["p"]
    finally:
        one.close()
    assert len((tmp_path / "tried").read_text()) == tries
