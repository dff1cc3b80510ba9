"""Our log lines among vLLM's, in its form."""

import logging


def log_with_vllm() -> None:
    """Give this package vLLM's log handlers, unless the user configured logging of it."""
    ours, theirs = logging.getLogger("mooncake_connector"), logging.getLogger("vllm")
    if not ours.handlers and theirs.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level or logging.INFO)
        ours.propagate = False
