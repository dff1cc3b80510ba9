"""Engines and proxies as child processes of this one, on this machine."""

import contextlib
import json
import os
import random
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mooncake_connector.scheduler.actuator.base import Role
from mooncake_connector.scheduler.actuator.preload import PreloadedVllm
from mooncake_connector.scheduler.actuator.process import LocalProcess, start_all, stop_all

__all__ = [
    "LocalEngine",
    "LocalProcess",
    "LocalProxy",
    "PreloadedVllm",
    "engine_environment",
    "free_port",
    "push_config",
    "start_all",
    "stop_all",
]


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on, outside the range that the system hands out by itself.

    It will be bound some time later: one of that range could be some connection's by then.
    """
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def push_config(role: Role = "both", extra: Mapping[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """The value of vLLM's ``--kv-transfer-config`` that loads this project's connector.

    Args:
        role: producer prefills, consumer decodes, both does either.
        extra: the connector's own settings (``kv_connector_extra_config``).
        fields: further fields of vLLM's KVTransferConfig, such as ``kv_load_failure_policy="fail"``.
    """
    return {
        "kv_connector": "MooncakePushConnector",
        "kv_connector_module_path": "mooncake_connector.kv_transfer.vllm",
        "kv_role": f"kv_{role}",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": dict(extra or {}),
        **fields,
    }


class LocalEngine(LocalProcess):
    """A real vLLM server with the OpenAI interface.

    Args:
        model: a folder, or a name that vLLM can resolve.
        role: loads this project's connector in that role; None loads no connector.
        extra: the connector's own settings (``kv_connector_extra_config``).
        kv_config: a whole ``--kv-transfer-config`` for another connector, in place of `role` and `extra`.
        args: further arguments of vLLM's server, such as ``("--dtype", "float32")``.
        served_name: the model's name in requests.
        port: 0 takes a free one.
        env: additions to the environment; they win over everything else.
        logs: folder of the log file, by default a fresh temporary one.
        preload: forks the server from there instead of starting a fresh interpreter.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        role: Role | None = None,
        extra: Mapping[str, Any] | None = None,
        kv_config: Mapping[str, Any] | None = None,
        args: Sequence[str] = (),
        served_name: str = "m",
        name: str = "engine",
        port: int = 0,
        env: Mapping[str, str] | None = None,
        logs: Path | None = None,
        preload: PreloadedVllm | None = None,
    ) -> None:
        port = port or free_port()
        if kv_config is None and role is not None:
            kv_config = push_config(role, extra)
        server = ["--model", str(model), "--served-model-name", served_name]
        server += ["--host", "127.0.0.1", "--port", str(port)]
        if kv_config is not None:
            server += ["--kv-transfer-config", json.dumps(kv_config)]
        self.model = served_name
        super().__init__(
            "vllm.entrypoints.openai.api_server",
            [*server, *args],
            name=name,
            port=port,
            env=engine_environment(model, env),
            logs=logs,
            preload=preload,
        )


class LocalProxy(LocalProcess):
    """``mooncake-connector proxy`` before the given engines' URLs; ready once both pools can serve."""

    def __init__(
        self,
        prefill: Iterable[str],
        decode: Iterable[str],
        *,
        args: Sequence[str] = (),
        name: str = "proxy",
        port: int = 0,
        env: Mapping[str, str] | None = None,
        logs: Path | None = None,
    ) -> None:
        port = port or free_port()
        server = ["proxy", "--host", "127.0.0.1", "--port", str(port)]
        for option, urls in (("--prefill", prefill), ("--decode", decode)):
            for url in urls:
                server += [option, url]
        super().__init__(
            "mooncake_connector",
            [*server, *args],
            name=name,
            port=port,
            # No load balancer is before it.
            env={"MOONCAKE_PROXY_LEAVE_SECONDS": "0", **os.environ, **(env or {})},
            logs=logs,
        )


def engine_environment(model: str | Path, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment plus what CPU engines side by side need; what is set already stays."""
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if Path(model).is_dir():
        defaults["HF_HUB_OFFLINE"] = "1"
    return {**defaults, **os.environ, **(env or {})}
