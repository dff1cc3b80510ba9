"""Server-sent events, as much of them as vLLM's streams use."""

EVENTS = "text/event-stream"
END = b"\n\n"
DONE = b"data: [DONE]"


class Events:
    """Cuts a stream of bytes into its events, each with the blank line that ends it."""

    def __init__(self) -> None:
        self._begun = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that `chunk` completes."""
        *events, self._begun = (self._begun + chunk).split(END)
        return [event + END for event in events]

    def rest(self) -> bytes:
        """What was fed of an event that isn't complete."""
        rest, self._begun = self._begun, b""
        return rest
