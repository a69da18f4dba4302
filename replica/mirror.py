"""The Secondary's side of replication: applies the Primary's frames to the local disk and answers them.

Plain writes are applied inline, in order, and answered by one cumulative acknowledgement per batch. What may block runs
in a task and is answered by its own DONE; the Primary keeps overlapping writes back until then, so order needs no lock
here.
"""

import abc
import asyncio
import errno
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from replica import wire
from replica.backpressure import Backpressure
from replica.link import PeerLink
from replica.store import Store
from replica.tasks import spawn


class SlowChanges(Protocol):
    """What may block of a store, and of a volume."""

    size_bytes: int

    async def write_durable(self, offset: int, data: bytes) -> None: ...

    async def zero(self, offset: int, length: int, punch: bool) -> None: ...

    async def flush(self) -> None: ...


class Answers(abc.ABC):
    """Carries out what may block of the peer's frames, each in a task, and answers it with DONE."""

    def __init__(self, link: PeerLink, target: SlowChanges, failed: Callable[[OSError], None]) -> None:
        self._link = link
        self._target = target
        self._failed = failed
        self._tasks: set[asyncio.Task[None]] = set()
        self.resume()

    def resume(self) -> None:
        """Take the peer's frames (again: something else may have taken them meanwhile)."""
        self._link.on_writes = self._on_writes
        self._link.handlers[wire.WRITE_DURABLE] = self._on_write_durable
        self._link.handlers[wire.ZERO] = self._on_zero
        self._link.handlers[wire.FLUSH] = self._on_flush

    async def finished(self) -> None:
        """Return when nothing that this link brought is under way any more (before this node is promoted)."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    @abc.abstractmethod
    def _on_writes(self, writes: Sequence[tuple[int, memoryview]], last: int) -> None:
        """Plain writes, in order; `last` is the number of the last one."""

    def _on_write_durable(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        self._check(offset, len(payload))
        self._start(sequence, self._target.write_durable(offset, bytes(payload)))

    def _on_zero(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        length = wire.unpack_length(payload)
        self._check(offset, length)
        self._start(sequence, self._target.zero(offset, length, bool(flags & wire.FLAG_PUNCH)))

    def _on_flush(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        self._start(sequence, self._target.flush())

    def _check(self, offset: int, length: int) -> None:
        if not length or offset + length > self._target.size_bytes:
            raise wire.ProtocolError(f"a request for {length} bytes at {offset} is beyond the volume's end.")

    def _start(self, sequence: int, work: Coroutine[Any, Any, None]) -> None:
        self._run(self._answer(sequence, work))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = spawn(work, "request of the peer")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, sequence: int, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except OSError as error:
            self._answer_failed(sequence, error)
        else:
            self._link.send(wire.DONE, sequence=sequence)

    def _answer_failed(self, sequence: int, error: OSError) -> None:
        self._link.send(wire.DONE, flags=wire.FLAG_ERROR, sequence=sequence, offset=error.errno or errno.EIO)
        self._failed(error)


class Mirror(Answers):
    """Handlers of one link's replication frames. Dropped with the link."""

    def __init__(self, link: PeerLink, store: Store, protocol: str, disk_failed: Callable[[OSError], None]) -> None:
        super().__init__(link, store, disk_failed)
        self._store = store
        self._backpressure = Backpressure(store.headroom_bytes, link.pause_reading, link.resume_reading)
        self._early_word = protocol == "B"

    def _on_writes(self, writes: Sequence[tuple[int, memoryview]], last: int) -> None:
        if self._early_word:
            self._link.send(wire.RECEIVED, sequence=last)
        size, write_now, total = self._store.size_bytes, self._store.write_now, 0
        for offset, data in writes:
            total += len(data)
            if offset + len(data) > size:
                raise wire.ProtocolError(f"a write of {len(data)} bytes at {offset} is beyond the volume's end.")
            try:
                write_now(offset, data)
            except OSError as error:
                self._failed(error)
                return
        self._link.send(wire.APPLIED, sequence=last)
        self._backpressure.wrote(total)

    def _on_flush(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        try:
            is_flushed = self._store.flush_now()
        except OSError as error:
            self._answer_failed(sequence, error)
            return
        if is_flushed:
            self._link.send(wire.DONE, sequence=sequence)
        else:
            super()._on_flush(flags, sequence, offset, payload)
