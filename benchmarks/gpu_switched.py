"""The worker's half of gpu_switch: import it before the connector is made."""

import json

from benchmarks.gpu_switch import Kept, use
from benchmarks.gpu_weights import Imported
from mooncake_connector.kv_transfer.prefill_end import PrefillEnd
from mooncake_connector.kv_transfer.transport.cuda.rail import CudaRail
from mooncake_connector.kv_transfer.vllm.worker_side import WorkerSide

KEPT = Kept(CudaRail, PrefillEnd, WorkerSide)


class Switched(Imported):
    """For vLLM's ``--worker-extension-cls``."""

    def switch_connector(self, settings: str) -> dict[str, int]:
        """Use other settings (JSON) from now on; see `gpu_switch.switch`."""
        return use(KEPT, json.loads(settings))
