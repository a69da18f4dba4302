"""The peer's volume, used from here: what a Primary without a good disk serves its clients from.

The Primary is then a client of its Secondary (`replica.peer_service` is the other end). What clients ask is kept until
it is answered: when the link is lost it is asked again on the next one, if that comes within the timeout and the peer
has run on meanwhile. So a change of links costs a pause and no error; and it is what a local copy goes on with once it
has been resynced.
"""

import asyncio
import collections
import contextlib
import errno
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nbdserver import extents
from nbdserver.export import NO_ERRORS, WriteDone
from replica import wire
from replica.bitmap import BLOCK_SHIFT, Bitmap, blocks_of
from replica.link import PeerLink
from replica.store import Store
from replica.volume import HandedOver, Volume

log = logging.getLogger("replica.volume")

Writes = Sequence[tuple[int, memoryview]]


@dataclass(slots=True, eq=False)
class _Batch:
    """Plain writes, answered together."""

    writes: Writes
    done: WriteDone


@dataclass(slots=True, eq=False)
class _Request:
    """Anything else; the answer is READ_DATA's payload, or empty."""

    kind: int
    payload: bytes
    flags: int
    offset: int
    answer: "asyncio.Future[bytes]"


class PeerVolume:
    """Clients' requests, for the peer's volume. Before `serve_on`, and between two links, everything waits."""

    def __init__(self, timeout_s: float, before: int = 0) -> None:
        #: The generation that clients have seen; 0: none of the peer's yet.
        self.generation = 0
        #: The one that both copies had before; 0: this node had none.
        self.before = before
        self._timeout_s = timeout_s
        self._sequence = 0
        self._link: PeerLink | None = None
        #: Asked, in order: (number of the last write, batch); number → request.
        self._batches: collections.deque[tuple[int, _Batch]] = collections.deque()
        self._requests: dict[int, _Request] = {}
        self._waiting: list[_Batch | _Request] = []
        self._rested: asyncio.Event | None = None
        self._failed = False
        self._adopted: HandedOver | None = None
        self._applied: list[Callable[[bool], None]] = []
        self._local: tuple[Store, Bitmap] | None = None
        #: Set while the peer serves, and for good when it has failed to.
        self.decided = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._start_timer()

    @property
    def open(self) -> bool:
        """Whether the peer serves now."""
        return self._link is not None

    def adopt(self, link: PeerLink, handed_over: HandedOver) -> None:
        """Go on with what a volume handed over whose disk has failed; `link` is the one that it mirrored on."""
        self._adopted = handed_over
        self._sequence = handed_over.sequence
        self._handle(link)
        for offset, data, told in handed_over.waiting:
            self.write_batch([(offset, data)], _of_one(told))

    # ── the link ─────────────────────────────────────────────────────────────────────────────────────────────

    def serve_on(self, link: PeerLink, generation: int) -> None:
        """The peer serves on this link, and has recorded that this node's disk lacks what comes from now on."""
        self.generation = generation
        self._failed = False
        self._stop_timer()
        self.decided.set()
        self._link = link
        self._handle(link)
        applied, self._applied = self._applied, []
        for answer in applied:
            answer(True)
        waiting, self._waiting = self._waiting, []
        for work in waiting:
            self._ask(work)

    def _handle(self, link: PeerLink) -> None:
        link.handlers[wire.APPLIED] = self._on_applied
        link.handlers[wire.RECEIVED] = _ignore
        link.handlers[wire.DONE] = self._on_done
        link.handlers[wire.READ_DATA] = self._on_read_data

    def read_here(self, store: Store, bitmap: Bitmap) -> None:
        """A resync of the local disk runs: what is not dirty may be read from it."""
        self._local = (store, bitmap)

    def link_lost(self) -> None:
        """The link is gone; everything waits for the next one, though not for ever."""
        self._link = self._local = None
        self.decided.clear()
        self._drop_adopted()
        sent: list[tuple[int, _Batch | _Request]] = [*self._batches, *self._requests.items()]
        self._batches.clear()
        self._requests.clear()
        self._waiting[:0] = [work for _, work in sorted(sent, key=lambda item: item[0])]
        self._check_rested()
        self._rested = None
        if self._timer is None and not self._failed:
            self._start_timer()

    def _drop_adopted(self) -> None:
        """What a volume had mirrored on a lost link cannot be asked again: its data is gone."""
        applied, self._applied = self._applied, []
        for answer in applied:
            answer(False)
        if self._adopted is not None:
            in_flight, asked = self._adopted.in_flight, self._adopted.asked
            while in_flight:
                done, _, count = in_flight.popleft()[1]
                _fail(done, count)
            for future in asked.values():
                if not future.done():
                    future.set_result(False)
            asked.clear()
            self._adopted = None

    def _start_timer(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._timed_out)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _timed_out(self) -> None:
        self._timer = None
        log.error("no disk here, and for %g s no peer to work through: clients get I/O errors.", self._timeout_s)
        self.fail()

    def fail(self) -> None:
        """Answer what waits, and what comes, with an error, until the peer serves (again)."""
        self._failed = True
        self.decided.set()
        self._stop_timer()
        self._drop_adopted()
        waiting, self._waiting = self._waiting, []
        for work in waiting:
            _refuse(work)

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────

    async def rest(self) -> None:
        """Ask nothing more; return when all that was asked is answered, or back to wait as the link was lost."""
        self._rested = asyncio.Event()
        self._check_rested()
        await self._rested.wait()

    def _check_rested(self) -> None:
        if self._rested is not None and not self._batches and not self._requests:
            self._rested.set()

    def hand_back(self, volume: Volume) -> None:
        """The local copy, which the export already serves, goes on with what waits."""
        self.link_lost()
        self._stop_timer()
        waiting, self._waiting = self._waiting, []
        for work in waiting:
            if isinstance(work, _Batch):
                volume.write_batch(work.writes, work.done)
            elif not work.answer.done():
                # Not an answer to the client: the export asks the copy that it serves now.
                work.answer.set_exception(OSError(errno.ESTALE, "the local copy serves again"))

    # ── what clients ask ─────────────────────────────────────────────────────────────────────────────────────

    def write_batch(self, writes: Writes, done: WriteDone) -> bool:
        """See `nbdserver.export.Export.write_batch`."""
        self._ask(_Batch(writes, done))
        return True

    def read_now(self, offset: int, length: int) -> bytes | None:
        """From the local page cache, if the resync has brought these blocks."""
        store = self._good_here(offset, length)
        with contextlib.suppress(OSError):
            return None if store is None else store.read_now(offset, length)
        return None

    async def read(self, offset: int, length: int) -> bytes:
        """From the local disk if the resync has brought these blocks, else from the peer."""
        store = self._good_here(offset, length)
        if store is not None:
            with contextlib.suppress(OSError):
                return await store.read(offset, length)
        pieces = [
            self._request(wire.READ, wire.pack_length(min(wire.MAX_PAYLOAD_BYTES, offset + length - at)), offset=at)
            for at in range(offset, offset + length, wire.MAX_PAYLOAD_BYTES)
        ]
        data = b"".join(await asyncio.gather(*pieces))
        if len(data) != length:
            raise OSError(errno.EIO, "the peer answered a read with another length")
        return data

    async def write_durable(self, offset: int, data: bytes) -> None:
        """Write with FUA: durable on every in-sync node."""
        await self._request(wire.WRITE_DURABLE, data, offset=offset)

    async def zero(self, offset: int, length: int, punch: bool) -> None:
        """Make the range read as zeroes."""
        flags = wire.FLAG_PUNCH if punch else 0
        await self._request(wire.ZERO, wire.pack_length(length), flags=flags, offset=offset)

    async def flush(self) -> None:
        """Durable: every write answered before this call."""
        await self._request(wire.FLUSH)

    def zeroes_fast(self, offset: int, length: int, punch: bool) -> bool:
        """Never: what the peer's disk, and the one that is being resynced, make of it is not known here."""
        return False

    async def block_status(self, offset: int, length: int, most: int) -> list[extents.Extent]:
        """The holes of the local disk, where the resync has brought these blocks; all else counts as data.

        Ends where the one begins and the other ends.
        """
        local = self._local
        if local is None:
            return [(length, extents.DATA)]
        store, bitmap = local
        first, count = blocks_of(offset, length)
        dirty = bitmap.next_run(first, count)
        if dirty is not None and dirty[0] == first:
            return [(min(offset + length, (first + dirty[1]) << BLOCK_SHIFT) - offset, extents.DATA)]
        if dirty is not None:
            length = min(length, (dirty[0] << BLOCK_SHIFT) - offset)

        async def next_data(at: int, end: int) -> tuple[int, int]:
            if self._local is not local:
                raise OSError(errno.ESTALE, "the link was lost, or the disk")
            return await store.next_data(at, end)

        with contextlib.suppress(OSError):
            found = await extents.walk(next_data, offset, length, most, asyncio.get_running_loop().time)
            if self._local is local:
                return found
        return [(length, extents.DATA)]

    async def prefetch(self, offset: int, length: int) -> None:
        """Only where a read would use the local disk."""
        store = self._good_here(offset, length)
        if store is not None:
            with contextlib.suppress(OSError):
                await store.prefetch(offset, length)

    def _good_here(self, offset: int, length: int) -> Store | None:
        if self._local is None:
            return None
        store, bitmap = self._local
        return None if bitmap.any_in(*blocks_of(offset, length)) else store

    async def _request(self, kind: int, payload: bytes = b"", *, flags: int = 0, offset: int = 0) -> bytes:
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._ask(_Request(kind, payload, flags, offset, answer))
        return await answer

    def _ask(self, work: _Batch | _Request) -> None:
        link = self._link
        if self._failed:
            _refuse(work)
        elif link is None or self._rested is not None:
            self._waiting.append(work)
        elif isinstance(work, _Batch):
            for offset, data in work.writes:
                self._sequence += 1
                header = wire.pack_header(wire.WRITE, data, 0, 0, self._sequence, offset, link.integrity)
                link.send_buffers([header, data])
            self._batches.append((self._sequence, work))
        else:
            self._sequence += 1
            self._requests[self._sequence] = work
            link.send(work.kind, work.payload, flags=work.flags, sequence=self._sequence, offset=work.offset)

    # ── what the peer answers ────────────────────────────────────────────────────────────────────────────────

    def _on_applied(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        if self._adopted is not None:
            in_flight = self._adopted.in_flight
            while in_flight and in_flight[0][0] <= sequence:
                done, _, count = in_flight.popleft()[1]
                self._answer_adopted(done, count)
        while self._batches and self._batches[0][0] <= sequence:
            self._batches.popleft()[1].done(NO_ERRORS)
        self._check_rested()

    def _answer_adopted(self, done: WriteDone, count: int) -> None:
        """The peer has it, this node's disk perhaps not: good once the peer has recorded that it goes on alone."""

        def answer(served: bool) -> None:
            if served:
                done(NO_ERRORS)
            else:
                _fail(done, count)

        if self._link is not None:
            answer(True)
        else:
            self._applied.append(answer)

    def _on_done(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        request = self._requests.pop(sequence, None)
        if request is None:
            adopted = self._adopted.asked.pop(sequence, None) if self._adopted is not None else None
            if adopted is not None and not adopted.done():
                adopted.set_result(not flags & wire.FLAG_ERROR)
            return
        self._finish(request, flags, offset, b"")

    def _on_read_data(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        request = self._requests.pop(sequence, None)
        if request is not None:
            self._finish(request, flags, offset, bytes(payload))

    def _finish(self, request: _Request, flags: int, number: int, data: bytes) -> None:
        if not request.answer.done():
            if flags & wire.FLAG_ERROR:
                request.answer.set_exception(OSError(number or errno.EIO, "the peer's disk reports an error"))
            else:
                request.answer.set_result(data)
        self._check_rested()


def _of_one(told: Callable[[int], None]) -> WriteDone:
    """What to call when a batch of one write is done, for who wants its error number, or 0."""
    return lambda errors: told(errors.get(0, 0))


def _refuse(work: _Batch | _Request) -> None:
    if isinstance(work, _Batch):
        _fail(work.done, len(work.writes))
    elif not work.answer.done():
        work.answer.set_exception(OSError(errno.EIO, "neither this node nor its peer has a disk to serve from"))


def _fail(done: WriteDone, count: int) -> None:
    done(dict.fromkeys(range(count), errno.EIO))


def _ignore(flags: int, sequence: int, offset: int, payload: memoryview) -> None:
    """The peer's acknowledgements for another protocol than C."""
