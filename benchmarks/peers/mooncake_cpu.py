"""vLLM's in-tree MooncakeConnector, made to start on a CPU-only torch: for comparison, never for use.

It asks torch.accelerator for a device index and the platform to set a device; neither exists on a CPU. Loaded
by vLLM as ``kv_connector_module_path`` in the peer's engines only.
"""

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_connector import MooncakeConnector
from vllm.platforms import current_platform

torch.accelerator.current_device_index = lambda: 0
type(current_platform).set_device = classmethod(lambda cls, device: None)


class MooncakeCpu(MooncakeConnector):
    """The in-tree connector under a name that vLLM's registry does not have."""

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
