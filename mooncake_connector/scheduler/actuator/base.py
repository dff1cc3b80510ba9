"""What whoever starts engines must offer, whichever machine they run on."""

from collections.abc import Callable
from typing import Literal, Protocol

Role = Literal["producer", "consumer", "both"]
Progress = Callable[[float, str], None]
"""Called while something starts: seconds since its start, and its latest log line."""


class Instance(Protocol):
    """One running server, an engine or a proxy, from its start to its end."""

    name: str
    url: str

    def start(self) -> None:
        """Begin starting; returns at once."""

    def wait_ready(self, timeout: float = 180.0, on_progress: Progress | None = None) -> None:
        """Block until it answers on `url`, for at most `timeout` seconds.

        Raises:
            EngineStartError: it ended, or `timeout` passed; the message has the end of its log.
        """

    def alive(self) -> bool:
        """Whether its process is there; says nothing about its health."""

    def stop(self) -> None:
        """End it and everything it started; when this returns nothing of it is left. Safe to call twice."""
