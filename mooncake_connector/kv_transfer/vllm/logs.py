"""Our log lines among vLLM's, in its form."""

import logging


def log_with_vllm() -> None:
    """Let vLLM's logger handle this package's lines, unless the user configured logging of them.

    vLLM configures its logger at a moment of its own, so we become its child rather than copy its handlers.
    """
    ours = logging.getLogger("mooncake_connector")
    if not ours.handlers:
        ours.parent = logging.getLogger("vllm")
