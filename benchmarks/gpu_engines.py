"""Engines for benchmarks: vLLM servers on chosen GPUs with chosen connectors, their proxies, and their model.

The model has the dimensions of Llama-3-8B, random weights and a tokenizer in which token i reads " i", so
that answers can be compared without asking for token ids. `Lab(device="cpu")` makes the same of a tiny
model: everything but the speed can be tried there.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mooncake_connector.demo.models import default_cache
from mooncake_connector.errors import EngineStartError
from mooncake_connector.scheduler.actuator.local import (
    LocalEngine,
    LocalProcess,
    LocalProxy,
    PreloadedVllm,
    free_port,
    push_config,
    stop_all,
)

ROOT = Path(__file__).resolve().parent.parent
REVISION = "1"  # part of the model folder's name: raise it whenever what `make_model` writes changes
FIRST_TEXT_TOKEN = 2
CAPTURED = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": CAPTURED}
"""CUDA graphs for decode steps without torch.compile, which would take most of a minute for each engine.
Prefill steps are longer than any captured size and run the same either way."""


@dataclass(frozen=True)
class Scale:
    """A model's size, and what fits it.

    Attributes:
        model: fields of transformers' LlamaConfig.
        dtype: float16 on GPUs: its rounding is finer than bfloat16's, so fewer near-ties flip when decode
            computes the prompt's last token in another batch shape than one engine alone does.
        lengths: prompts to measure, tokens.
        middle: the prompt length for measurements under load.
        max_model_len: vLLM's.
        slower: how much longer everything may take than on a GPU.
    """

    model: dict[str, int]
    dtype: str
    lengths: tuple[int, ...]
    middle: int
    max_model_len: int
    slower: float = 1.0

    @property
    def vocabulary(self) -> range:
        """Tokens for random prompts."""
        return range(FIRST_TEXT_TOKEN, self.model["vocab_size"])


LLAMA_8B = Scale(
    {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 40960,
    },
    dtype="float16",
    lengths=(512, 4096, 32000),
    middle=4096,
    max_model_len=36864,
)
TINY = Scale(
    {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
    dtype="float32",
    lengths=(110, 440, 1500),
    middle=440,
    max_model_len=4096,
    slower=4.0,
)


@dataclass(frozen=True)
class Spec:
    """One engine.

    Attributes:
        name: for messages and its log.
        gpus: the CUDA devices it sees; more than one: tensor parallel over all.
        connector: none, this project's, or vLLM's NixlConnector.
        role: for this project's connector.
        graphs: decode with CUDA graphs instead of eagerly.
        kv_gib: size of its KV cache, all GPUs of it together.
        extra: the connector's own settings.
        switched: they can be switched while it runs (see gpu_switch).
        prefix_cache: it keeps what it computed for other requests.
    """

    name: str
    gpus: tuple[int, ...]
    connector: Literal["none", "ours", "nixl"] = "none"
    role: Literal["producer", "consumer", "both"] = "both"
    graphs: bool = False
    kv_gib: float = 8.0
    extra: Mapping[str, Any] = field(default_factory=dict)
    switched: bool = False
    prefix_cache: bool = False


class PeerProxy(LocalProcess):
    """One of benchmarks/peers/proxy.py."""

    def __init__(self, kind: str, prefill: str, decode: str, *rest: str, logs: Path | None = None) -> None:
        port = free_port()
        super().__init__(
            "benchmarks.peers.proxy",
            [kind, str(port), prefill, decode, *rest],
            name=f"{kind}-proxy",
            port=port,
            env=os.environ | {"PYTHONPATH": python_path()},
            logs=logs,
        )


class Lab:
    """Makes engines and proxies of one kind; starts none of them.

    Args:
        logs: folder of their logs.
        device: where engines run.
        preload: forks CPU engines from there.
        nixl: a folder with NIXL for Python's path, None where it is importable anyway.
    """

    def __init__(
        self,
        logs: Path,
        device: Literal["cuda", "cpu"] = "cuda",
        preload: PreloadedVllm | None = None,
        nixl: str | None = None,
    ) -> None:
        self.logs = logs
        self.device = device
        self.scale = LLAMA_8B if device == "cuda" else TINY
        self._preload = preload
        self._nixl = nixl
        self._model = make_model(self.scale)

    def engine(self, spec: Spec) -> LocalEngine:
        """The engine of `spec`, with random weights (see gpu_weights)."""
        scale = self.scale
        args = [
            "--dtype",
            scale.dtype,
            "--load-format",
            "random",
            "--max-model-len",
            str(scale.max_model_len),
        ]
        args += ["--max-num-seqs", "128", "--disable-uvicorn-access-log"]
        args.append("--enable-prefix-caching" if spec.prefix_cache else "--no-enable-prefix-caching")
        extension = "benchmarks.gpu_switched.Switched" if spec.switched else "benchmarks.gpu_weights.Imported"
        args += ["--worker-extension-cls", extension]
        env = {"PYTHONPATH": python_path()}
        if spec.switched:
            env["VLLM_SERVER_DEV_MODE"] = "1"
        if self.device == "cuda":
            # With a KV cache of given size nothing is profiled: engines that share a GPU can start together.
            args += ["--kv-cache-memory-bytes", str(int(spec.kv_gib * 2**30) // len(spec.gpus))]
            args += ["--gpu-memory-utilization", "0.05", "--tensor-parallel-size", str(len(spec.gpus))]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, spec.gpus))
            env["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        else:
            args += ["--block-size", "32"]
        if spec.graphs and self.device == "cuda":
            args += ["--compilation-config", json.dumps(GRAPHS)]
        else:
            args.append("--enforce-eager")
        config: dict[str, Any] | None = None
        if spec.connector == "ours":
            config = push_config(spec.role, spec.extra)
        elif spec.connector == "nixl":
            config = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": self.device}
            env |= {
                "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
                "PYTHONPATH": python_path(self._nixl),
            }
        return LocalEngine(
            self._model,
            kv_config=config,
            args=args,
            name=spec.name,
            env=env,
            logs=self.logs,
            preload=self._preload,
        )

    def proxy(
        self, prefill: Sequence[LocalEngine], decode: Sequence[LocalEngine], name: str, *args: str
    ) -> LocalProxy:
        """This project's proxy before these engines; it lets everybody in, as peers' do."""
        urls = [e.url for e in prefill], [e.url for e in decode]
        env = {"PYTHONPATH": python_path()}
        return LocalProxy(*urls, args=["--admission", "none", *args], name=name, logs=self.logs, env=env)

    def nixl_proxy(self, prefill: LocalEngine, decode: LocalEngine) -> PeerProxy:
        """A minimal serial proxy as users of NixlConnector have it."""
        return PeerProxy("nixl", prefill.url, decode.url, logs=self.logs)


def python_path(*first: str | None) -> str:
    """Python's path of this process's children: `first`, the checkout, and what was set already."""
    parts = [*first, str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(part for part in parts if part))


def make_model(scale: Scale, cache: Path | None = None) -> Path:
    """A folder with configuration and tokenizer, no weights; made once."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    size = f"{scale.model['num_hidden_layers']}x{scale.model['hidden_size']}-{scale.model['vocab_size']}"
    folder = (cache or default_cache()) / f"bench-{size}-{REVISION}-{transformers.__version__}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".bench-", dir=folder.parent))
    try:
        vocab = {"<s>": 0, "</s>": 1} | {f"Ġ{i}": i for i in scale.vocabulary}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
        ).save_pretrained(draft)
        config = transformers.LlamaConfig(
            **scale.model, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False
        )
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(draft)
        draft.chmod(0o755)
        with contextlib.suppress(OSError):  # another process was quicker
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def ready_all(processes: Sequence[LocalProcess], timeout: float) -> dict[str, str]:
    """Start `processes` side by side; what fails is stopped.

    Returns:
        For each process that failed, by name, why, with the end of its log. The others serve.
    """
    failed: dict[str, str] = {}
    for process in processes:
        process.start()
    for process in processes:
        try:
            process.wait_ready(timeout)
            print(f"  {process.name} is ready", flush=True)
        except EngineStartError as error:
            failed[process.name] = _causes(process)
            print(f"  {process.name} FAILED: {error}\n{failed[process.name]}", flush=True)
    stop_all([process for process in processes if process.name in failed], grace=1.0)
    return failed


def _causes(process: LocalProcess) -> str:
    """The lines of its log that name errors: the log's end is often a long way from the cause."""
    lines = [
        line[-300:] for line in process.log_text().splitlines() if re.search(r"\w(Error|Exception)\b", line)
    ]
    return "\n".join(dict.fromkeys(lines[:8])) or process.last_line()


def gpus() -> list[dict[str, str]]:
    """Name, memory and driver of each GPU; empty without any."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    names = ("name", "memory", "driver")
    return [dict(zip(names, line.split(", "), strict=False)) for line in said.splitlines() if line]


def peers_path() -> str | None:
    """The site-packages folder of .venv-peers, None where it is missing."""
    found = list((ROOT / ".venv-peers").glob("lib/python*/site-packages"))
    return str(found[0]) if found else None
