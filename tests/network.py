"""Network namespaces of a test's own: nothing of them is seen on this machine, and they end with the test."""

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_CLONE_NEWNET = 0x40000000
_CAP_SYS_ADMIN = 1 << 21


def own_network(test: Callable[..., Any]) -> Callable[..., Any]:
    """Run a test in a thread that has an empty network namespace, which what it starts inherits."""

    @functools.wraps(test)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        _need_namespaces()
        outcome: list[BaseException | None] = []

        def work() -> None:
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                assert libc.unshare(_CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
                ip("link set lo up")
                test(*args, **kwargs)
                outcome.append(None)
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=work, name=test.__name__, daemon=True)
        thread.start()
        thread.join()
        if outcome[0] is not None:
            raise outcome[0]

    return wrapper


def ip(command: str) -> str:
    """What iproute2 prints in this thread's namespace."""
    return _run("ip", *command.split())


class Neighbour:
    """Another host on the other end of a cable: ours is `eth0`, its own too. (Addresses: 10.77.0.1 and 10.77.0.2,
    2001:db8::1 and ::2, prefixes 24 and 64.)
    """

    def __init__(self) -> None:
        self._host = subprocess.Popen(
            ["unshare", "--net", "--kill-child", "sh", "-c", "echo up; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._host.stdout is not None
        assert self._host.stdout.readline() == b"up\n"
        ip(f"link add eth0 address 02:00:00:00:00:01 type veth peer name eth0 netns {self.pid}")
        self.ip("link set dev eth0 address 02:00:00:00:00:02")
        for tool, end in ((ip, 1), (self.ip, 2)):
            tool("link set lo up")
            tool("link set eth0 up")
            tool(f"addr add 10.77.0.{end}/24 dev eth0")
            tool(f"addr add 2001:db8::{end}/64 dev eth0 nodad")

    @property
    def pid(self) -> int:
        """The process that keeps its namespace."""
        return self._host.pid

    def run(self, *command: str) -> str:
        """What a program prints there."""
        return _run(*self.inside(*command))

    def ip(self, command: str) -> str:
        """iproute2 there."""
        return self.run("ip", *command.split())

    def inside(self, *command: str) -> list[str]:
        """The command line that runs there."""
        return ["nsenter", "--target", str(self.pid), "--net", *command]

    def close(self) -> None:
        """The host is gone, and with it the cable."""
        self._host.communicate()


@contextlib.contextmanager
def neighbour() -> Iterator[Neighbour]:
    """A `Neighbour` for a while."""
    host = Neighbour()
    try:
        yield host
    finally:
        host.close()


@contextlib.contextmanager
def printing(*command: str) -> Iterator[Any]:
    """A program's output, line by line as it comes; the program is killed afterwards."""
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield program.stdout
    finally:
        program.send_signal(signal.SIGKILL)
        program.communicate()


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def _need_namespaces() -> None:
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    if not int(status["CapEff"], 16) & _CAP_SYS_ADMIN:
        pytest.skip("network namespaces take root")
