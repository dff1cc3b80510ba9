"""Named costs. Each says where it comes from; none is a guess without a name.

``h200-8b`` is fitted from single measurements (`benchmarks/results/ttft-gpu.json`), never from the replay
that it is validated against. ``a800x8-llama2-70b`` is a roofline with stated efficiencies.
"""

from mooncake_connector.errors import ConfigError
from mooncake_connector.scheduler.simulator.costs import Costs

_H200_8B = Costs(
    source=(
        "one H200, vLLM 0.26, Llama-3-8B's dimensions, fp16: fitted from benchmarks/results/ttft-gpu.json "
        "(scheduled to prefilled at 512, 4,096 and 32,000 tokens; 8 steady streams at three contexts)"
    ),
    # 8 streams: 5.26, 5.60, 5.89 ms as their context grew from 7,000 to 27,000 tokens: 32 ns a token, 5.03 ms
    # besides. How that divides into base and per_sequence one batch size cannot tell: 25 us are assumed.
    base=4.83e-3,
    per_sequence=25e-6,
    per_context=32e-9,
    # 103.1 ms at 4,096 tokens and 1,299 ms at 32,000 (four steps) give these two.
    per_token=21.5e-6,
    per_pair=1.15e-9,
    floor=19.6e-3,  # 512 tokens: eager steps wait for the CPU that launches their kernels
    step_tokens=8192,
    max_batch=128,
    kv_tokens=800_000,  # 141 GB x 0.9, less weights and activations, at 128 KiB a token
    kv_bytes=131_072,
    bandwidth=350e9,  # cuda_ipc at 32 KiB pages, gpu-h200.json
    handoff=5.0e-3,  # 9.9 ms added by the pair at 4,096 tokens (graphs), less decode's step
    streaming=0.04,  # prefill slowed by streaming at 4,096 tokens
    ingress=2.9e-3,
    ingress_per_token=0.44e-6,  # P's scheduler has it after 3.2, 5.6 and 17.0 ms
    egress=0.8e-3,
    egress_per_token=0.77e-6,  # from its token to the proxy: 1.2, 6.0 and 25.2 ms
)


def _roofline(
    *,
    source: str,
    parameters: float,
    layers: int,
    hidden: int,
    kv_width: int,
    gpus: int,
    flops: float,
    memory: float,
    memory_bytes: float,
    link: float,
    network: float,
    compute_efficiency: float,
    attention_efficiency: float,
    memory_efficiency: float,
    reduce_latency: float,
) -> Costs:
    """Costs of 16-bit weights spread over `gpus` by tensor parallelism.

    Args:
        kv_width: elements of K (or V) of one token in one layer.
        flops, memory, memory_bytes: of one GPU: dense 16-bit FLOP/s, bytes/s, bytes.
        link: bytes per second that a GPU sends to the others of its node.
        network: bytes per second out of the node.
        reduce_latency: seconds of one all-reduce of a few tokens; two in each layer.
    """
    weights = 2 * parameters
    kv_bytes = layers * 2 * kv_width * 2
    reduces = 2 * layers
    reduce_per_token = reduces * hidden * 2 * 2 * (gpus - 1) / gpus / link
    return Costs(
        source=source,
        base=weights / (gpus * memory * memory_efficiency) + reduces * reduce_latency,
        per_sequence=reduce_per_token,
        per_context=kv_bytes / (gpus * memory * memory_efficiency),
        per_token=2 * parameters / (gpus * flops * compute_efficiency) + reduce_per_token,
        per_pair=layers * 4 * hidden / (gpus * flops * attention_efficiency),
        step_tokens=8192,
        max_batch=256,
        kv_tokens=int((gpus * memory_bytes * 0.9 - weights) / kv_bytes),
        kv_bytes=kv_bytes,
        bandwidth=network,
        handoff=5e-3,
    )


_A800_70B = _roofline(
    source=(
        "roofline: LLaMA2-70B's dimensions (GQA), bf16, 8 x A800 80 GB (312 TFLOP/s and 2.0 TB/s each, "
        "NVLink 400 GB/s both ways together), 4 x 200 Gbps of which 87 GB/s are reached (Mooncake, FAST'25); "
        "efficiencies assumed: 0.6 of FLOP/s in matrix products, 0.4 in attention, 0.7 of memory bandwidth, "
        "15 us an all-reduce"
    ),
    parameters=69e9,
    layers=80,
    hidden=8192,
    kv_width=1024,
    gpus=8,
    flops=312e12,
    memory=2.0e12,
    memory_bytes=80e9,
    link=200e9,
    network=87e9,
    compute_efficiency=0.6,
    attention_efficiency=0.4,
    memory_efficiency=0.7,
    reduce_latency=15e-6,
)

_CPU_TINY = Costs(
    source=(
        "vLLM 0.32, two engines on two CPU cores, a Llama of 4 layers and 256 dimensions, float32: fitted by "
        "benchmarks/cpu_replay.py --fit benchmarks/results/replay-cpu.json, each while the other is at work"
    ),
    base=4.91e-3,
    per_sequence=0.11e-3,
    per_context=0.397e-6,
    per_token=96.1e-6,
    per_pair=24e-9,
    step_tokens=2048,
    max_batch=128,
    kv_tokens=262_144,
    kv_bytes=4096,
    bandwidth=1e9,
    handoff=12.7e-3,
    ingress=5.05e-3,
    ingress_per_token=2.27e-6,
    egress_per_token=1.91e-6,
)

PRESETS = {"h200-8b": _H200_8B, "a800x8-llama2-70b": _A800_70B, "cpu-tiny": _CPU_TINY}


def preset(name: str) -> Costs:
    """The costs of this name.

    Raises:
        ConfigError: There is none.
    """
    found = PRESETS.get(name)
    if found is None:
        raise ConfigError(f"--preset {name} is not known: choose one of {', '.join(PRESETS)}")
    return found
