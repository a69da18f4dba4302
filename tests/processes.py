"""Processes that tests look at from outside."""

import os
import select
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

#: Longer than anything takes.
PATIENCE_S = 30.0


def gone(pid: int) -> None:
    """Return when the process has ended (and is no child of ours that would have to be reaped)."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], PATIENCE_S)[0], f"process {pid} lives on"
    finally:
        os.close(descriptor)


_LEASE_HOLDER = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, lambda *_: os.write(1, b"asked\\n"))
fd = os.open(sys.argv[1], os.O_RDONLY)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
os.write(1, b"held\\n")
sys.stdin.read()
"""


class StuckProgram:
    """A file that cannot be opened for as long as this holds a lease on it: as on a disk that does not answer."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-c", _LEASE_HOLDER, str(path)]
        self._holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"held\n":
            pytest.skip("leases on files are not supported here")
        self.asked = self._holder.stdout.fileno()

    def release(self) -> None:
        self._holder.communicate()


_PASS_ON = """
import fcntl, os, sys
end = sys.argv.index("--")
count, passed, command = sys.argv[1], sys.argv[2:end], sys.argv[end + 1 :]
for target, fd in enumerate([fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in passed], 3):
    os.dup2(fd, target, inheritable=True)
    os.close(fd)
os.environ["LISTEN_PID"], os.environ["LISTEN_FDS"] = str(os.getpid()), count
os.execv(command[0], command)
"""


def passing(
    sockets: Sequence[socket.socket], command: Sequence[str], count: str | None = None
) -> tuple[list[str], dict[str, Any]]:
    """Command and options for Popen that run `command` (with its whole path) as systemd would, with these sockets
    passed to it; `count`: what LISTEN_FDS says instead of their number.
    """
    fds = [sock.fileno() for sock in sockets]
    said = str(len(fds)) if count is None else count
    whole = [sys.executable, "-c", _PASS_ON, said, *map(str, fds), "--", *command]
    return whole, {"pass_fds": fds}
