"""The vLLM connector: loaded by ``kv_connector_module_path``, or by name through ``vllm.general_plugins``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mooncake_connector.kv_transfer.vllm.connector import MooncakePushConnector

__all__ = ["MooncakePushConnector", "register"]

NAME = "MooncakePushConnector"


def __getattr__(name: str) -> Any:
    # Lazily: this module is imported by every vLLM process, also by those that use no connector.
    if name == NAME:
        from mooncake_connector.kv_transfer.vllm.connector import MooncakePushConnector

        return MooncakePushConnector
    raise AttributeError(name)


def register() -> None:
    """Entry point of ``vllm.general_plugins``: makes the connector known by its name alone."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, __name__, NAME)
