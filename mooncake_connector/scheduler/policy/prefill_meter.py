"""What prompts really cost an engine that computes several of them at once."""

import msgspec

# So many prompts are measured together.
TOGETHER = 8


class Measured(msgspec.Struct, frozen=True):
    """One prompt.

    Attributes:
        tokens: its length.
        cached: of these, not computed.
        predicted, seconds: of computing.
    """

    tokens: int
    cached: int
    predicted: float
    seconds: float


class PrefillMeter:
    """Divides an engine's busy time among the prompts that it computed in that time.

    Chunked prefill puts the end of one prompt and the beginning of the next into one step: each one's own
    time counts what belongs to others, too. The time of several prompts together is right, and is divided as
    was predicted. A prompt that had the engine to itself is taken as measured.
    """

    def __init__(self) -> None:
        self._began = 0.0
        self._prompts: list[tuple[int, int, float]] = []

    def begin(self, moment: float) -> None:
        """Nothing is known of what was before: the engine was idle, or a prompt was given up."""
        self._began = moment
        self._prompts.clear()

    def add(
        self, tokens: int, cached: int, predicted: float, now: float, *, left: int, own: float | None
    ) -> list[Measured]:
        """A prompt was computed.

        Args:
            left: prompts that are still there.
            own: seconds from its first step to its last, if known.

        Returns:
            What is measured with it; empty as long as others are to be measured together with it.
        """
        self._prompts.append((tokens, cached, predicted))
        if left and len(self._prompts) < TOGETHER:
            return []
        spent = now - self._began
        if own is not None and not left and len(self._prompts) == 1:
            spent = own
        ratio = spent / sum(prompt[2] for prompt in self._prompts)
        found = [Measured(*prompt, prompt[2] * ratio) for prompt in self._prompts]
        self.begin(now)
        return found if ratio > 0 else []
