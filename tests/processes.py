"""Processes that tests look at from outside."""

import os
import select
import subprocess
import sys
from pathlib import Path

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
