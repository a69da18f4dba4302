"""A client that follows the Primary: it writes on, wherever that is, and notes when each answer came."""

import bisect
import contextlib
import itertools
import multiprocessing
import random
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Final

from replica.demo.nbd_client import NbdClient, NbdLost, NbdRefused

_BLOCK_BYTES: Final = 4 << 10
_SPAN_BLOCKS: Final = (64 << 20) // _BLOCK_BYTES
#: A client that has lost its server asks the nodes in turn, so often.
_RETRY_S: Final = 0.002
_LOOK_S: Final = 0.005


class Follower:
    """``depth`` writes of 4 KiB are always under way; after the loss of a server others are sent to the next one."""

    def __init__(self, sockets: Sequence[Path], export: str, depth: int = 1, seed: int = 1) -> None:
        self._sockets = sockets
        self._export = export
        self._depth = depth
        self._rng = random.Random(seed)
        self._data = self._rng.randbytes(_BLOCK_BYTES)
        #: When answers came, by the monotonic clock.
        self.answered_s: list[float] = []
        #: Answers that said something else than "done": no client should get any.
        self.errors = 0

    def run(self, stop: "threading.Event | Event") -> None:
        """Until `stop` is set."""
        client: NbdClient | None = None
        while not stop.is_set():
            try:
                client = client or self._connect(stop)
                if client is None:
                    return
                while len(client.in_flight) < self._depth:
                    client.start_write(self._rng.randrange(_SPAN_BLOCKS) * _BLOCK_BYTES, self._data)
                for reply in client.receive():
                    self.answered_s.append(time.monotonic())
                    self.errors += bool(reply.error)
            except NbdLost:
                if client is not None:
                    client.close()
                client = None
        if client is not None:
            client.close()

    def _connect(self, stop: "threading.Event | Event") -> NbdClient | None:
        for path in itertools.cycle(self._sockets):
            with contextlib.suppress(OSError, NbdLost, NbdRefused):
                return NbdClient.connect(path, self._export)
            if stop.wait(_RETRY_S / len(self._sockets)):
                break
        return None

    # ── for the other thread ─────────────────────────────────────────────────────────────────────────────────

    def wait_answers(self, more: int, patience_s: float = 60.0) -> None:
        """Until so many more answers have come; RuntimeError when they do not."""
        goal, deadline_s = len(self.answered_s) + more, time.monotonic() + patience_s
        while len(self.answered_s) < goal:
            if time.monotonic() > deadline_s:
                raise RuntimeError("the client gets no answers any more")
            time.sleep(_LOOK_S)

    def longest_pause_s(self, since_s: float) -> float:
        """Between two answers in a row, the second of which came after `since_s`."""
        times = self.answered_s[_first_after(self.answered_s, since_s) - 1 :]
        return max(after - before for before, after in itertools.pairwise(times))

    def first_answer_s(self, since_s: float) -> float:
        """When the first answer came after `since_s`."""
        return self.answered_s[_first_after(self.answered_s, since_s)]


def _first_after(times: Sequence[float], since_s: float) -> int:
    return bisect.bisect_right(times, since_s)


@contextlib.contextmanager
def following(follower: Follower) -> Iterator[Follower]:
    """It runs, in a thread of its own."""
    stop = threading.Event()
    thread = threading.Thread(target=follower.run, args=(stop,), daemon=True)
    thread.start()
    try:
        follower.wait_answers(1)
        yield follower
    finally:
        stop.set()
        thread.join(60)


@contextlib.contextmanager
def load(sockets: Sequence[Path], export: str, depth: int) -> Iterator[None]:
    """Another client, in a process of its own, so that it does not keep the one that is timed waiting."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    process = context.Process(target=Follower(sockets, export, depth, seed=2).run, args=(stop,), daemon=True)
    process.start()
    try:
        yield
    finally:
        stop.set()
        process.join(60)
