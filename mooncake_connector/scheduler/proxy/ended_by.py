"""Waiting for decode while prefill works: decode would wait for KV that never comes."""

import asyncio
from types import TracebackType

from mooncake_connector.scheduler.proxy.answer import PrefillFailed

# What prefill refuses, decode most likely refuses too, in words that suit the client's own body. Seconds.
REFUSAL_GRACE = 1.0


class EndedBy:
    """A context that ends with `prefill`'s error if it fails before what is awaited in here has come.

    As cheap as a callback, where a task for each and `asyncio.wait` for both would cost three turns of the
    event loop, of which each takes as long as all that the other requests do in it.
    """

    __slots__ = ("_cancelling", "_error", "_inside", "_prefill", "_task", "_timer")

    def __init__(self, prefill: asyncio.Task[bytes] | None) -> None:
        self._prefill = prefill
        self._inside = False
        self._error: BaseException | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling, self._inside = task, task.cancelling(), True
        if self._prefill:
            self._prefill.add_done_callback(self._over)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The callback may be due already: then it still comes.
        self._inside = False
        if self._prefill:
            self._prefill.remove_done_callback(self._over)
        if self._timer:
            self._timer.cancel()
        failure = self._error
        if failure and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            self._error = None
            raise failure from None

    def _over(self, prefill: asyncio.Task[bytes]) -> None:
        error = None if prefill.cancelled() else prefill.exception()
        if error is None or not self._inside:
            return
        grace = REFUSAL_GRACE if isinstance(error, PrefillFailed) and error.refused else 0.0
        if grace:
            self._timer = asyncio.get_running_loop().call_later(grace, self._end, error)
        else:
            self._end(error)

    def _end(self, error: BaseException) -> None:
        self._error = error
        self._task.cancel()
