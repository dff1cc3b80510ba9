"""Processes of their own for the GPU tests, each with one object whose methods are called from here.

They are started before they are needed (torch takes seconds to import) and used again, unless a test has
killed them.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

Environment = tuple[tuple[str, str], ...]

START_S = 150.0
"""How long the start of a process may take while many others start as well."""


class RemoteError(AssertionError):
    """A call failed in the other process; the message is its traceback."""


def _serve(calls: Connection) -> None:
    """What runs in the other process: one call at a time, each answered by (ok, result)."""
    import torch  # noqa: F401  (takes seconds, so it is done before anybody waits for it)

    served: Any = None
    calls.send((True, os.getpid()))
    while True:
        try:
            method, arguments = calls.recv()
        except EOFError:  # the tests are over, or were killed
            os._exit(0)
        try:
            if method == "new":
                module, name, settings = arguments
                served = getattr(importlib.import_module(module), name)(**settings)
                result = None
            elif method == "drop":
                served, old = None, served
                result = old.close() if old is not None else None
                del old
            else:
                result = getattr(served, method)(**arguments)
            calls.send((True, result))
        except BaseException:  # it is the caller's
            calls.send((False, traceback.format_exc()))


class Process:
    """Another process. `new` makes its object; `call`, or `begin` and `end`, run a method of it."""

    def __init__(self, environment: Environment = ()) -> None:
        self.environment = environment
        context = multiprocessing.get_context("spawn")
        self._calls, calls = context.Pipe()
        self._process = context.Process(target=_serve, args=(calls,), daemon=True)
        with _environment(dict(environment)):
            self._process.start()
        calls.close()
        self._started = False
        self._method = ""

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def new(self, cls: type, **settings: Any) -> "Process":
        """Make the object that calls go to."""
        self.begin("new", (cls.__module__, cls.__qualname__, settings))
        self.end(60)
        return self

    def drop(self) -> None:
        """Close the object, with its `close`."""
        self.begin("drop", ())
        self.end(60)

    def call(self, method: str, *, wait: float = 60, **arguments: Any) -> Any:
        """The method's result; its failure there is an assertion that fails here."""
        self.begin(method, arguments)
        return self.end(wait)

    def begin(self, method: str, arguments: Any = None) -> None:
        """Start a call, to do something else meanwhile."""
        if not self._started:
            self._receive(START_S, "its start")
            self._started = True
        assert not self._method, f"{self._method} has not ended"
        self._method = method
        self._calls.send((method, {} if arguments is None else arguments))

    def end(self, seconds: float = 60) -> Any:
        """The result of the call that was begun."""
        method, self._method = self._method, ""
        return self._receive(seconds, method)

    def ended(self, seconds: float) -> bool:
        """Whether the call that was begun has a result, at the latest after so many seconds."""
        return self._calls.poll(seconds)

    def _receive(self, seconds: float, what: str) -> Any:
        if not self._calls.poll(seconds):
            raise RemoteError(f"{what}: no answer in {seconds} s from process {self.pid}")
        try:
            ok, result = self._calls.recv()
        except EOFError:
            self._process.join(5)
            raise RemoteError(f"{what}: the process ended, exit code {self._process.exitcode}") from None
        if not ok:
            raise RemoteError(f"{what} failed in process {self.pid}:\n{result}")
        return result

    def signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def kill(self) -> float:
        """SIGKILL, and wait until it is gone; the seconds that took."""
        began = time.monotonic()
        self.signal(signal.SIGKILL)
        self._process.join(30)
        assert self._process.exitcode is not None, f"process {self.pid} outlives SIGKILL by 30 s"
        return time.monotonic() - began

    @property
    def running(self) -> bool:
        """Whether a call was begun and not ended."""
        return bool(self._method)

    def healthy(self) -> bool:
        return self._process.is_alive() and not self.running

    def close(self) -> None:
        if self._process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGCONT)
            self._process.kill()
            self._process.join(10)
        self._calls.close()


@contextlib.contextmanager
def _environment(extra: Mapping[str, str]) -> Any:
    before = {name: os.environ.get(name) for name in extra}
    os.environ.update(extra)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Processes:
    """A stock of processes: `take` one for a test; at its end `give_back` all that it took."""

    def __init__(self) -> None:
        self._idle: list[Process] = []
        self._taken: list[Process] = []

    def prepare(self, count: int, environment: Environment = ()) -> None:
        """Have as many on their way up."""
        have = sum(process.environment == environment for process in self._idle)
        self._idle += [Process(environment) for _ in range(count - have)]

    def take(self, environment: Environment = ()) -> Process:
        """One whose environment has these variables."""
        fitting = [process for process in self._idle if process.environment == environment]
        process = fitting[0] if fitting else Process(environment)
        if fitting:
            self._idle.remove(process)
        self._taken.append(process)
        return process

    def give_back(self) -> None:
        """What the test took: to be used again if it is well, else replaced."""
        taken, self._taken = self._taken, []
        for process in taken:
            well = False
            if process.healthy():
                try:
                    process.drop()
                    well = True
                except RemoteError as unwell:
                    print(f"process {process.pid} is not used again: {unwell}", file=sys.stderr)
            if well:
                self._idle.append(process)
            else:
                process.close()
                self._idle.append(Process(process.environment))

    def close(self) -> None:
        for process in self._idle + self._taken:
            process.close()
