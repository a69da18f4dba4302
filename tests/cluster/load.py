"""Random load on a volume, and the model that knows what every sector may hold afterwards.

Each write has a number of its own and fills its sectors with it, so that one look at a sector tells which write it
came from. The model keeps for each sector the value that was acknowledged last, and the values of writes whose fate
is unknown because the server died first. Never are two requests that overlap under way at once: of those nobody could
say which one wins.
"""

import errno
import os
import random
import select
import struct
import threading
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SECTOR_BYTES = 512
_MAX_SECTORS = (256 << 10) // SECTOR_BYTES
_STAMP = struct.Struct("<QQ")
_REPEAT = SECTOR_BYTES // _STAMP.size
_READ_BYTES = 1 << 20
_ZERO = bytes(SECTOR_BYTES)


def sector_content(write: int, sector: int) -> bytes:
    """What write number `write` puts into this sector; write 0 stands for zeroes."""
    return _STAMP.pack(write, sector) * _REPEAT if write else _ZERO


def write_of(content: bytes | memoryview, sector: int) -> int | None:
    """The number of the write that a sector's content came from; None when it is no write's."""
    if content == _ZERO:
        return 0
    write, where = _STAMP.unpack_from(content)
    return write if where == sector and content == _STAMP.pack(write, where) * _REPEAT else None


class Model:
    """What each sector of the volume may hold: `acknowledged`, or one of `uncertain`."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.sectors = size_bytes // SECTOR_BYTES
        self.acknowledged = array("Q", bytes(8 * self.sectors))
        self.uncertain: dict[int, set[int]] = {}
        self.next_write = 1

    def take_number(self) -> int:
        """A number for a new write."""
        self.next_write += 1
        return self.next_write - 1

    def acknowledge(self, first: int, count: int, write: int, *, durable: bool = False) -> None:
        """The write was answered without an error: nothing else may be read there. `durable`: it had FUA."""
        for sector in range(first, first + count):
            self.acknowledged[sector] = write
            self.uncertain.pop(sector, None)

    def doubt(self, first: int, count: int, write: int) -> None:
        """The server died before it answered: each sector has it or not."""
        for sector in range(first, first + count):
            self.uncertain.setdefault(sector, set()).add(write)

    def flush_begins(self) -> int:
        """A flush is about to be asked for; what to tell `flushed` when it is answered."""
        return 0

    def flushed(self, mark: int) -> None:
        """That flush was answered. (It makes no difference here: a process that dies takes no page cache with it.)"""

    def check(self, read: Callable[[int, int], bytes]) -> None:
        """Compare the whole volume with the model; what was uncertain is settled by what is read.

        AssertionError names the first few sectors that hold something they may not hold.
        """
        wrong: list[str] = []
        for start in range(0, self.size_bytes, _READ_BYTES):
            data = memoryview(read(start, min(_READ_BYTES, self.size_bytes - start)))
            first = start // SECTOR_BYTES
            for index in range(len(data) // SECTOR_BYTES):
                sector = first + index
                content = data[index * SECTOR_BYTES : (index + 1) * SECTOR_BYTES]
                wanted = self.acknowledged[sector]
                if content == sector_content(wanted, sector):
                    continue
                found = write_of(content, sector)
                if found is not None and found in self.uncertain.get(sector, ()):
                    self.acknowledged[sector] = found
                else:
                    wrong.append(f"sector {sector}: write {wanted} was acknowledged, found {found}")
        self.uncertain.clear()
        assert not wrong, f"{len(wrong)} sectors are wrong: " + "; ".join(wrong[:5])


@dataclass
class Request:
    """One request: `kind` is write, fua, trim, zero or flush; the range in sectors; `write` numbers its content; `mark`
    is the model's, of a flush.
    """

    kind: str
    first: int
    count: int
    write: int
    mark: int = 0


def random_request(rng: random.Random, model: Model, busy: Callable[[int, int], bool]) -> Request:
    """A request that does not overlap what is `busy`; mostly small, sometimes up to 256 KiB, clustered in places."""
    if rng.random() < 0.03:
        return Request("flush", 0, 0, 0)
    while True:
        count = rng.choice((1, 1, 2, 8, 8, 8, 16, 64, rng.randint(1, _MAX_SECTORS)))
        # Half of all go to an eighth of the volume, so that blocks are overwritten again and again.
        span = model.sectors // rng.choice((1, 8)) - count
        first = rng.randint(0, span)
        if rng.random() < 0.5:
            first &= ~7
        if not busy(first, count):
            break
    kind = rng.choices(("write", "fua", "trim", "zero"), (85, 5, 5, 5))[0]
    return Request(kind, first, count, model.take_number() if kind in ("write", "fua") else 0)


class Load(threading.Thread):
    """Keeps requests under way on several connections until `finish`, in a thread of its own.

    `connect` opens a libnbd handle. When a connection dies its requests become uncertain (and the load ends when all
    connections are gone), unless `reconnect`: then each is sent again on a new connection, as the kernel's client and
    QEMU do; `connect` may then be called again and again until it succeeds.
    """

    def __init__(
        self,
        model: Model,
        connect: Callable[[], Any],
        rng: random.Random,
        *,
        connections: int = 3,
        depth: int = 8,
        reconnect: bool = False,
        only: str | None = None,
    ) -> None:
        super().__init__(name="load", daemon=True)
        self._model = model
        self._connect = connect
        self._rng = rng
        self._depth = depth
        self._reconnect = reconnect
        self._only = only
        self._handles: list[Any] = [connect() for _ in range(connections)]
        self._flying: list[dict[int, Request]] = [{} for _ in range(connections)]
        self._again: list[Request] = []
        self._busy: dict[int, tuple[int, int]] = {}
        self._serial = 0
        self._stopping = False
        self._wake_read, self._wake_write = os.pipe()
        self._moved = threading.Condition()
        self.done = 0
        self.written_bytes = 0
        self.errors: list[str] = []
        self.failure: BaseException | None = None
        self.start()

    # ── for the test ─────────────────────────────────────────────────────────────────────────────────────────

    def wait_done(self, more: int, patience_s: float = 60.0) -> None:
        """Until so many more requests have been answered; AssertionError when the load ends or stalls before."""
        with self._moved:
            goal = self.done + more
            self._moved.wait_for(lambda: self.done >= goal or not any(self._handles), patience_s)
            assert self.done >= goal, f"the load stopped: {self.errors[:3]} {self.failure!r}"

    def finish(self) -> None:
        """End it, once everything under way is answered or its connection is dead. Raises what went wrong inside."""
        self._stopping = True
        os.write(self._wake_write, b"x")
        self.join(60.0)
        assert not self.is_alive(), "the load does not end: requests are not answered"
        for fd in (self._wake_read, self._wake_write):
            os.close(fd)
        if self.failure is not None:
            raise self.failure

    # ── the thread ───────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        try:
            while self._step():
                pass
        except BaseException as error:  # shown by `finish` in the test's own thread
            self.failure = error
        finally:
            with self._moved:
                self._handles = [None for _ in self._handles]
                self._moved.notify_all()

    def _step(self) -> bool:
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN if not self._stopping else 0)
        by_fd: dict[int, Any] = {}
        patience_ms = 1000
        for index, handle in enumerate(self._handles):
            if handle is None:
                continue
            if handle.aio_is_dead() or handle.aio_is_closed():
                self._lost(index)
                continue
            self._fill(index)
            if self._handles[index] is None or (self._stopping and not self._flying[index]):
                continue
            if handle.aio_is_dead() or handle.aio_is_closed():  # found out as requests were sent
                patience_ms = 0
                continue
            direction = handle.aio_get_direction()
            fd = handle.aio_get_fd()
            by_fd[fd] = handle
            poll.register(fd, (select.POLLIN if direction & 1 else 0) | (select.POLLOUT if direction & 2 else 0))
        if not by_fd and (self._stopping or not any(self._handles)):
            return False
        for fd, event in poll.poll(patience_ms):
            if fd == self._wake_read:
                os.read(fd, 1)
            else:
                self._notify(by_fd[fd], event)
        return True

    @staticmethod
    def _notify(handle: Any, event: int) -> None:
        import nbd

        try:
            direction = handle.aio_get_direction()
            if event & (select.POLLIN | select.POLLHUP | select.POLLERR) and direction & 1:
                handle.aio_notify_read()
            elif event & (select.POLLOUT | select.POLLHUP | select.POLLERR) and direction & 2:
                handle.aio_notify_write()
        except nbd.Error:
            pass  # the handle is dead now, which the next step sees

    def _fill(self, index: int) -> None:
        import nbd

        flying = self._flying[index]
        while len(flying) < self._depth and (self._again or not self._stopping):
            request = self._again.pop() if self._again else self._new_request()
            self._serial += 1
            serial = self._serial
            flying[serial] = request
            self._busy[serial] = (request.first, request.first + request.count)
            try:
                self._send(index, serial, request)
            except nbd.Error:
                self._lost(index)
                return

    def _new_request(self) -> Request:
        while True:
            request = random_request(self._rng, self._model, self._overlaps)
            if self._only is None or request.kind == self._only:
                return request

    def _overlaps(self, first: int, count: int) -> bool:
        return any(first < stop and start < first + count for start, stop in self._busy.values())

    def _send(self, index: int, serial: int, request: Request) -> None:
        import nbd

        handle = self._handles[index]

        def completed(error: Any) -> int:
            self._answered(index, serial, error.value)
            return 1

        offset, length = request.first * SECTOR_BYTES, request.count * SECTOR_BYTES
        if request.kind == "flush":
            request.mark = self._model.flush_begins()
            handle.aio_flush(completed)
        elif request.kind == "trim":
            handle.aio_trim(length, offset, completed)
        elif request.kind == "zero":
            flags = self._rng.choice((0, nbd.CMD_FLAG_NO_HOLE))
            handle.aio_zero(length, offset, completed, flags)
        else:
            content = b"".join(
                sector_content(request.write, sector) for sector in range(request.first, request.first + request.count)
            )
            flags = nbd.CMD_FLAG_FUA if request.kind == "fua" else 0
            handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(content)), offset, completed, flags)

    def _answered(self, index: int, serial: int, error: int) -> None:
        request = self._flying[index].pop(serial, None)
        if request is None:
            return
        if error:
            if error != errno.ENOTCONN:  # which is libnbd's own word for "the connection died before the answer"
                self.errors.append(f"{request.kind} failed: {os.strerror(error)}")
            self._unanswered(serial, request)
            return
        del self._busy[serial]
        if request.count:
            self._model.acknowledge(request.first, request.count, request.write, durable=request.kind == "fua")
        else:
            self._model.flushed(request.mark)
        with self._moved:
            self.done += 1
            self.written_bytes += request.count * SECTOR_BYTES
            self._moved.notify_all()

    def _unanswered(self, serial: int, request: Request) -> None:
        del self._busy[serial]
        if request.count:
            self._model.doubt(request.first, request.count, request.write)
        if self._reconnect:
            # It stays in front of everything else: what overlaps it must wait until it is answered.
            self._again.append(request)

    def _lost(self, index: int) -> None:
        flying, self._flying[index] = self._flying[index], {}
        for serial, request in list(flying.items()):
            self._unanswered(serial, request)
        self._handles[index] = None
        if self._reconnect:
            self._handles[index] = self._connect()
        with self._moved:
            self._moved.notify_all()
