"""The process_vm path: between two processes of one host the target reads the initiator's memory, one copy.

The target reads, rather than the initiator writing, so that the target alone ever writes its own memory:
taking back a grant needs no word from the initiator, which may be stopped or gone.
"""

import errno
import os
import secrets
import signal
from functools import cache
from pathlib import Path

import numpy as np

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.transport.base import SourceIdentity
from mooncake_connector.kv_transfer.transport.grants import Grant
from mooncake_connector.kv_transfer.transport.mailbox import Visitor
from mooncake_connector.kv_transfer.transport.syscalls import Few, read_process, set_ptracer
from mooncake_connector.kv_transfer.transport.wire import CHALLENGE_BYTES, LANDED, REFUSED, UNREADABLE, Frame

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_ELSEWHERE = "process_vm: the peer runs on another host or in another pid namespace (mend: share it)"
_probe = np.frombuffer(bytearray(secrets.token_bytes(16)), np.uint8)


def identity() -> SourceIdentity:
    """This process, as a target on the same host can recognise it."""
    return SourceIdentity(os.getpid(), _host_id(), _probe.ctypes.data, _probe.tobytes())


def readable(source: SourceIdentity) -> str | None:
    """None if this process can read the memory of `source`, else why not, with the mend."""
    if source.host_id != _host_id():
        return _ELSEWHERE
    if not source.probe_value:
        return "process_vm: the peer sent no probe: use one version of mooncake_connector on both"
    return _compare(source.pid, source.probe_address, source.probe_value)


def allow_reader(pid: int) -> None:
    """Let process `pid` read this one's memory where Yama restricts that to a process's ancestors.

    Only one process can be named at a time: the last call counts. Harmless where Yama is absent or off. A
    target that isn't named is refused by the kernel, and should be reached by the tcp path.
    """
    set_ptracer(pid)


class Source:
    """An initiator's memory, and the certainty that its process id means the process at the other end.

    It isn't enough that the memory can be read: a peer could name another process, and have this one copy
    from there. So the peer has to store a challenge where it can be read.

    Args:
        source: as the peer claims.
        challenge_address: where in its memory the peer stores the challenge.

    Attributes:
        challenge: 32 random bytes, to be stored.

    Raises:
        TransportError: There is no such process here; the message has the mend.
    """

    def __init__(self, source: SourceIdentity, challenge_address: int) -> None:
        if source.host_id != _host_id():
            raise TransportError(_ELSEWHERE)
        self.challenge = secrets.token_bytes(CHALLENGE_BYTES)
        self._address = challenge_address
        self._pid = source.pid
        self._proven = False
        try:
            # Opened before the trial read: from then on the id can't pass to another process unnoticed.
            self._pidfd = os.pidfd_open(source.pid)
        except (OSError, OverflowError) as gone:
            raise TransportError(f"process_vm: process {source.pid}: {gone}") from gone

    def prove(self) -> str | None:
        """None if the challenge is in place, else why the memory can't be read."""
        reason = _compare(self._pid, self._address, self.challenge)
        self._proven = reason is None
        return reason

    def visitor(self, address: int) -> Visitor | None:
        """The peer's mailbox, if it has one and this process can read there."""
        return Visitor(self._pid, address) if address and self._proven else None

    def land(self, frame: Frame, grant: Grant) -> tuple[int, str]:
        """Copy a frame's bytes into place: a reply's status, and why they did not all land.

        Raises:
            EOFError: The initiator's process has ended.
        """
        if not self._proven:
            return UNREADABLE, "process_vm: the peer has not proven which process it is"
        place, origin = frame.place, frame.origin
        while place.left:
            if not grant.enter():
                return REFUSED, f"key {frame.key} was revoked"
            got = 0
            try:
                got = read_process(self._pid, place, origin)
            except OSError as refused:
                if refused.errno == errno.ESRCH:
                    raise EOFError(f"process {self._pid} has ended") from refused
                return UNREADABLE, f"process_vm: reading process {self._pid}: {_mend(refused)}"
            finally:
                grant.leave(got)
            if not got:
                return UNREADABLE, f"process_vm: reading process {self._pid} gave nothing"
            place.advance(got)
            origin.advance(got)
        # Only now is it certain that the process read was the initiator all along.
        try:
            signal.pidfd_send_signal(self._pidfd, 0)
        except ProcessLookupError as ended:
            raise EOFError(f"process {self._pid} has ended") from ended
        except PermissionError:
            pass  # it lives, under another user
        return LANDED, ""

    def close(self) -> None:
        """Forget the process."""
        os.close(self._pidfd)


@cache
def _host_id() -> str:
    return f"{_BOOT_ID.read_text().strip()}/{_PID_NAMESPACE.stat().st_ino}"


def _compare(pid: int, address: int, value: bytes) -> str | None:
    """None if process `pid` has `value` at `address`, else why that can't be said."""
    found = np.zeros(len(value), np.uint8)
    try:
        read_process(pid, Few(found.ctypes.data, found.size), Few(address, found.size))
    except OSError as refused:
        return f"process_vm: reading process {pid}: {_mend(refused)}"
    if found.tobytes() != value:
        return f"process_vm: process {pid} is not the peer: connect to it again"
    return None


def _mend(refused: OSError) -> str:
    if refused.errno == errno.EPERM:
        if _yama_scope() == 1:
            return (
                "not permitted by Yama: the peer must name this process (allow_reader), or set ptrace_scope=0"
            )
        if _yama_scope() > 1:
            return "not permitted by Yama: set kernel.yama.ptrace_scope to 1 or 0, or grant CAP_SYS_PTRACE"
        return "not permitted: run both as one user and dumpable, or grant CAP_SYS_PTRACE"
    if refused.errno == errno.ESRCH:
        return "no such process: it has ended, or lives in another pid namespace (mend: share it)"
    if refused.errno == errno.ENOSYS:
        return "this kernel or sandbox has no process_vm_readv: allow it, or take the tcp path"
    return refused.strerror or str(refused)


def _yama_scope() -> int:
    try:
        return int(_YAMA.read_text())
    except (OSError, ValueError):
        return 0
