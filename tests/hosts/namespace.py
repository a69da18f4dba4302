"""Processes in namespaces of their own: how process 1 of one is started, reached and ended."""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.processes import PATIENCE_S

_INIT: Final = Path(__file__).with_name("init.py")
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred
_LOG_BYTES = 1 << 16


class LabError(Exception):
    """The lab could not do something; the text has what the program behind it said."""


class Namespace:
    """Process 1 of a PID namespace, seen from outside; its end is the end of all its processes."""

    def __init__(self, what: str, spec: Mapping[str, Any], unshare: Sequence[str], within: "Namespace | None") -> None:
        """Start ``init.py what`` in new namespaces (`unshare`: their options), inside those of `within` (mounts and
        processes only); returns when it is ready.
        """
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Nothing outlives the tests, however those end: the ground dies with us, and takes along what is in it.
        command = within.enter("-m", "-p") if within else ["setpriv", "--pdeathsig", "KILL"]
        command += ["unshare", *unshare, "--fork", "--kill-child", "--propagation", "private", "--"]
        command += [sys.executable, "-I", "-S", str(_INIT), what, str(its.fileno())]
        with mine, its:
            mine.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            mine.settimeout(PATIENCE_S)
            mine.send(json.dumps(spec).encode())  # read by it when it is there
            self._starter = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[its.fileno()],
            )
            its.close()
            answer, ancillary, *_ = mine.recvmsg(16, socket.CMSG_SPACE(_CREDENTIALS.size))
        assert self._starter.stdout is not None
        with self._starter.stdout as said:
            if answer != b"ready":
                self._starter.kill()
                raise LabError(f"{spec.get('name', what)} did not come up: {said.read(_LOG_BYTES).decode()}")
        self.pid, *_ = _CREDENTIALS.unpack(ancillary[0][2])
        self._pidfd = os.pidfd_open(self.pid)
        # Held open, so that the kernel gives its number to no other one.
        self._pid_namespace = os.open(f"/proc/{self.pid}/ns/pid", os.O_RDONLY)
        self._identity = os.fstat(self._pid_namespace).st_ino

    def enter(self, *which: str) -> list[str]:
        """The beginning of a command line that runs something inside; `which` are options of nsenter."""
        return ["nsenter", "-t", str(self.pid), *which, "--"]

    @property
    def alive(self) -> bool:
        """Whether it has not ended (it may also end itself, by reboot(2))."""
        return not self.wait(0)

    def wait(self, timeout_s: float = PATIENCE_S) -> bool:
        """Wait for its end; False when it does not come."""
        return bool(select.select([self._pidfd], [], [], timeout_s)[0])

    def processes(self) -> list[int]:
        """All of its processes, by their ids out here."""
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and _pid_namespace(name) == self._identity]

    def kill(self) -> None:
        """End it and with it all of its processes; returns when they are gone. LabError when one is not."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        if not self.wait():
            raise LabError(f"process {self.pid} does not die")
        self._starter.wait(PATIENCE_S)
        left = self.processes()
        for fd in (self._pidfd, self._pid_namespace):
            os.close(fd)
        if left:
            raise LabError(f"processes {left} live on without their process 1")


def _pid_namespace(pid: str) -> int | None:
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino
    except OSError:  # gone meanwhile
        return None


def state_of(pid: int) -> str:
    """The letter that the kernel has for the state of a process, "X" when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def run(command: Sequence[str | Path], stdin: str = "") -> str:
    """What a program printed; LabError with its words when it fails or does not end in time."""
    name = " ".join(map(str, command))
    try:
        done = subprocess.run(
            command,
            check=False,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        raise LabError(f"{name} does not end") from None
    if done.returncode:
        raise LabError(f"{name} ended with {done.returncode}: {done.stdout.strip()}")
    return done.stdout
