"""Hosts that are network namespaces: an event loop each, in a thread that has left this machine's network.

They vanish with their threads. Cables are pairs of virtual Ethernet interfaces. Takes root.
"""

import asyncio
import ctypes
import os
import shlex
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_TIMEOUT_S = 30


class Host:
    """One namespace. Whatever is called runs in its thread."""

    def __init__(self) -> None:
        self.thread_id = 0
        self._refused = ""
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        ready.wait(_TIMEOUT_S)
        if self._refused:
            self._thread.join(_TIMEOUT_S)
            pytest.skip(f"needs to make network namespaces: {self._refused}")
        self.ip("link set lo up")

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to its end on the host's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_TIMEOUT_S)

    def call(self, function: Callable[[], T]) -> T:
        """Call in the host's thread."""

        async def called() -> T:
            return function()

        return self.do(called())

    def ip(self, words: str) -> None:
        """`ip` with these words."""
        self.call(lambda: subprocess.run(["ip", *shlex.split(words)], check=True, timeout=_TIMEOUT_S))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_TIMEOUT_S)

    def _run(self, ready: threading.Event) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.thread_id = threading.get_native_id()
        if libc.unshare(_CLONE_NEWNET):
            self._refused = os.strerror(ctypes.get_errno())
        ready.set()
        if not self._refused:
            self._loop.run_forever()
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Some hosts without cables; skips the test where this process may not make them."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to make network namespaces")
    made: list[Host] = []
    try:
        for _ in range(count):
            made.append(Host())
        yield made
    finally:
        for host in made:
            host.close()


def plug(left: Host, right: Host, name: str, left_address: str, right_address: str) -> None:
    """A cable between interfaces called `name` on both, with these addresses (with a prefix length)."""
    left.ip(f"link add {name} type veth peer name {name} netns {right.thread_id}")
    for host, address in ((left, left_address), (right, right_address)):
        host.call(lambda: _without_waiting_for_duplicates(name))
        host.ip(f"address add {address} dev {name}" + (" nodad" if ":" in address else ""))
        host.ip(f"link set {name} up")


def _without_waiting_for_duplicates(name: str) -> None:
    # /proc/thread-self is that of the host's thread; link-local addresses are usable at once.
    subprocess.run(["sysctl", "-qw", f"net.ipv6.conf.{name}.accept_dad=0"], check=False)
