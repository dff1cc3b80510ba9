"""Local processes: they come up, tell why they did not, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mooncake_connector.errors import EngineStartError
from mooncake_connector.scheduler.actuator.local import LocalProcess, free_port, push_config

# A server with a child of its own, as an engine has; the child ignores SIGTERM.
SERVER = """
import http.server, signal, subprocess, sys
if "crash" in sys.argv:
    sys.exit("no such model")
code = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
print("child", subprocess.Popen([sys.executable, "-c", code]).pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def server(tmp_path: Path, *args: str) -> LocalProcess:
    (tmp_path / "tiny_server.py").write_text(SERVER)
    port = free_port()
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    return LocalProcess("tiny_server", [str(port), *args], name="tiny", port=port, env=env, logs=tmp_path)


def exists(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while exists(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def child_of(process: LocalProcess) -> int:
    line = next(line for line in process.log_text().splitlines() if line.startswith("child "))
    return int(line.split()[1])


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_its_end_takes_its_children_along(tmp_path: Path, end: str) -> None:
    process = server(tmp_path)
    process.start()
    process.wait_ready(20)
    pid, child = process.pid, child_of(process)
    assert exists(pid)
    assert exists(child)
    getattr(process, end)()
    assert not process.alive()
    assert gone_within(pid, 1)
    assert gone_within(child, 1)
    process.stop()


def test_it_starts_again_on_the_same_port(tmp_path: Path) -> None:
    process = server(tmp_path)
    with process:
        process.wait_ready(20)
        process.kill()
        assert not process.healthy()
        process.start()
        process.wait_ready(20)
        assert process.healthy()


def test_a_stopped_process_is_alive_and_can_be_ended(tmp_path: Path) -> None:
    process = server(tmp_path)
    with process:
        process.wait_ready(20)
        pid = process.pid
        process.signal(signal.SIGSTOP)
        assert process.alive()
    assert gone_within(pid, 1)


def test_a_failed_start_shows_the_end_of_the_log(tmp_path: Path) -> None:
    process = server(tmp_path, "crash")
    process.start()
    with pytest.raises(EngineStartError, match="no such model"):
        process.wait_ready(20)
    process.stop()


def test_it_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "tiny_server.py").write_text(SERVER)
    port = free_port()
    code = (
        "import os, time; from pathlib import Path\n"
        "from mooncake_connector.scheduler.actuator.local import LocalProcess\n"
        f"p = LocalProcess('tiny_server', ['{port}'], name='tiny', port={port}, env=os.environ, "
        f"logs=Path({str(tmp_path)!r}))\n"
        "p.start(); p.wait_ready(20); print(p.pid, flush=True); time.sleep(300)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert exists(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone_within(pid, 5)


def test_push_config_recomputes_by_default() -> None:
    config = push_config("consumer", {"path": "tcp"})
    assert config["kv_role"] == "kv_consumer"
    assert config["kv_load_failure_policy"] == "recompute"
    assert config["kv_connector_extra_config"] == {"path": "tcp"}
    assert push_config(kv_load_failure_policy="fail")["kv_load_failure_policy"] == "fail"
