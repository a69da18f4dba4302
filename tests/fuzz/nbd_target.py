"""A client's bytes given to a real `nbdserver` connection over a real file, and what has to hold whatever they are.

The first byte of an input says how the rest is delivered (`Delivery`); the rest is what the client sends.
"""

import asyncio
import itertools
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nbdserver import constants as c
from nbdserver.blockfile import BlockFile
from nbdserver.connection import Connection
from nbdserver.export import WriteDone
from nbdserver.file_export import FileExport
from nbdserver.limits import Limits
from tests.fuzz.replies import (
    handshake_replies,
    option_replies,
    requests_in,
    transmission_replies,
    with_own_cookies,
)

SIZE_BYTES = 1 << 20
LIMITS = Limits(in_flight_bytes=200_000, slow_requests=4, unsent_reply_bytes=100_000)
MAX_INPUT_BYTES = 1 << 20

#: How a client may open the export before its requests: with the oldest option, and with all that can be negotiated.
_NAME = b"disk"
_QUERY = b"base:allocation"
OPENINGS = (
    b"\0\0\0\3" + b"IHAVEOPT" + (1).to_bytes(4) + (0).to_bytes(4),
    b"\0\0\0\3"
    + b"IHAVEOPT"
    + (8).to_bytes(4)
    + (0).to_bytes(4)
    + b"IHAVEOPT"
    + (10).to_bytes(4)
    + (4 + len(_NAME) + 4 + 4 + len(_QUERY)).to_bytes(4)
    + len(_NAME).to_bytes(4)
    + _NAME
    + (1).to_bytes(4)
    + len(_QUERY).to_bytes(4)
    + _QUERY
    + b"IHAVEOPT"
    + (7).to_bytes(4)
    + (4 + len(_NAME) + 2).to_bytes(4)
    + len(_NAME).to_bytes(4)
    + _NAME
    + (0).to_bytes(2),
)


@dataclass(frozen=True)
class Delivery:
    """How an input reaches the server: in pieces of `piece_bytes`; whether the export keeps the views of writes until
    the server stalls; whether the client takes replies only then; which of OPENINGS comes before it.
    """

    piece_bytes: int
    keeps: bool
    reads_late: bool
    opening: bytes

    @classmethod
    def of(cls, mode: int) -> "Delivery":
        """Bits 0-2: pieces (0: all at once, else 8^(n-1) bytes), 3: keeps, 4: reads late, 5: opening."""
        step = mode & 7
        return cls(8 ** (step - 1) if step else 1 << 30, bool(mode & 8), bool(mode & 16), OPENINGS[mode >> 5 & 1])


class CheckedExport(FileExport):
    """A file that notices requests that should never have come to it, and can hold writes back."""

    def __init__(self, file: BlockFile, keeps: bool) -> None:
        super().__init__(file, name="disk", description="a file")
        self._keeps = keeps
        self._held: list[tuple[list[tuple[int, memoryview]], list[bytes], WriteDone]] = []
        self.held_bytes = 0

    def write_batch(self, writes: Sequence[tuple[int, memoryview]], done: WriteDone) -> bool:
        for offset, data in writes:
            self._in_range(offset, len(data))
        if not self._keeps:
            return super().write_batch(writes, done)
        self._held.append((list(writes), [bytes(data) for _, data in writes], done))
        self.held_bytes += sum(len(data) for _, data in writes)
        assert self.held_bytes <= LIMITS.in_flight_bytes + (512 << 10), "more is under way than the limit allows"
        return True

    def release(self) -> bool:
        """Finish what is held; whether there was anything. The views must hold what they held at first."""
        held, self._held, self.held_bytes = self._held, [], 0
        for writes, contents, done in held:
            same = all(data == content for (_, data), content in zip(writes, contents, strict=True))
            assert same, "the memory of a write that is under way was used again"
            super().write_batch(writes, done)
        return bool(held)

    def _in_range(self, offset: int, length: int) -> None:
        assert offset >= 0 and length >= 0 and offset + length <= SIZE_BYTES, f"{length} bytes at {offset}"

    def read_now(self, offset: int, length: int) -> bytes | None:
        self._in_range(offset, length)
        return None if offset & 4096 else super().read_now(offset, length)

    # In place, not in a thread: a thousand inputs a second leave no time for threads.

    async def read(self, offset: int, length: int) -> bytes:
        self._in_range(offset, length)
        await asyncio.sleep(0)
        return self._file.read(offset, length)

    async def write_durable(self, offset: int, data: bytes) -> None:
        self._in_range(offset, len(data))
        await asyncio.sleep(0)
        self._file.write_now(offset, data)

    async def flush(self) -> None:
        await asyncio.sleep(0)

    async def trim(self, offset: int, length: int) -> None:
        self._in_range(offset, length)
        await asyncio.sleep(0)

    async def zero(self, offset: int, length: int, punch: bool, *more: Any) -> None:
        self._in_range(offset, length)
        await asyncio.sleep(0)


class Shelf:
    """A directory with one export, and the owner of its connections."""

    shutting_down = False

    def __init__(self, export: FileExport) -> None:
        self._export = export

    def __getattr__(self, name: str) -> Any:
        # What a server may offer besides (TLS, say) is not offered here.
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def find(self, name: str) -> FileExport | None:
        return self._export if name in ("", "disk") else None

    def listing(self) -> list[FileExport]:
        return [self._export]

    def admit(self, connection: Connection) -> bool:
        return True

    def finished(self, connection: Connection) -> None:
        pass


class Wire(asyncio.Transport):
    """What a transport promises; the client takes replies at once, or only at `drain`."""

    def __init__(self, reads_late: bool) -> None:
        super().__init__()
        self.sent = bytearray()
        self.closing = False
        self.aborted = False
        self.reading = True
        self.protocol: Connection
        self._reads_late = reads_late
        self._unsent = 0
        self._high = 1 << 62
        self._paused = False

    def write(self, data: Any) -> None:
        if self.closing:
            return
        self.sent += data
        if self._reads_late:
            self._unsent += len(data)
            assert self._unsent <= LIMITS.unsent_reply_bytes + LIMITS.in_flight_bytes + 2 * SIZE_BYTES, (
                "too much unsent"
            )
            if self._unsent > self._high and not self._paused:
                self._paused = True
                self.protocol.pause_writing()

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def drain(self) -> bool:
        """The client takes everything; whether that makes the server go on."""
        self._unsent = 0
        if not self._paused:
            return False
        self._paused = False
        self.protocol.resume_writing()
        return True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = 1 << 62 if high is None else high

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = self.aborted = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class Client:
    """A client of a connection of its own."""

    def __init__(self, delivery: Delivery, file: BlockFile) -> None:
        self._delivery = delivery
        self.export = CheckedExport(file, delivery.keeps)
        self.wire = Wire(delivery.reads_late)
        self.connection = Connection(Shelf(self.export), LIMITS)
        self.wire.protocol = self.connection
        self.connection.connection_made(self.wire)

    async def send(self, stream: bytes) -> None:
        """Deliver it, as far as the server takes it; afterwards nothing is under way."""
        piece_bytes = max(self._delivery.piece_bytes, len(stream) // 2000)
        for start in itertools.count(0, piece_bytes):
            piece = stream[start : start + piece_bytes]
            if not piece:
                break
            while piece and not self.wire.closing:
                if not self.wire.reading:
                    await self.settle()
                    if not self.wire.reading:
                        return  # it takes nothing more
                room = self.connection.get_buffer(-1)
                assert len(room) > 0, "no room for what the client sends"
                taken = min(len(room), len(piece))
                room[:taken] = piece[:taken]
                piece = piece[taken:]
                self.connection.buffer_updated(taken)
        await self.settle()

    async def settle(self) -> None:
        """Let everything that is under way come to its end."""
        me = asyncio.current_task()
        while True:
            others = {task for task in asyncio.all_tasks() if task is not me}
            if others:
                await asyncio.wait(others)
            elif not self.export.release() and not self.wire.drain():
                return

    async def leave(self) -> None:
        """Hang up."""
        self.connection.connection_lost(None)
        await self.settle()
        assert self.connection.closed.is_set(), "something is under way for ever"


class Fixture:
    """One loop and one file for all inputs."""

    def __init__(self) -> None:
        descriptor = os.memfd_create("disk")
        os.truncate(descriptor, SIZE_BYTES)
        self._loop = asyncio.new_event_loop()
        self._file = BlockFile.open(f"/proc/self/fd/{descriptor}")
        self.failures: list[str] = []
        self._loop.set_exception_handler(lambda loop, context: self.failures.append(repr(context)))

    def run(self, work: Any) -> Any:
        """Run it, and insist that no exception got away."""
        try:
            result = self._loop.run_until_complete(work)
        finally:
            failures, self.failures = self.failures, []
        assert not failures, failures
        return result

    def client(self, delivery: Delivery) -> Client:
        return Client(delivery, self._file)


_fixture: Fixture | None = None


def _the_fixture() -> Fixture:
    global _fixture  # noqa: PLW0603 - made in the process that uses it, once
    if _fixture is None:
        _fixture = Fixture()
    return _fixture


def handshake(data: bytes) -> None:
    """The whole of what a client sends, from its flags on."""
    fixture = _the_fixture()
    fixture.run(_handshake(fixture, Delivery.of(data[0] if data else 0), data[1:MAX_INPUT_BYTES]))


async def _handshake(fixture: Fixture, delivery: Delivery, stream: bytes) -> None:
    client = fixture.client(delivery)
    sent_at_open: list[int] = []
    opened = client.export.opened

    def note(who: Any) -> None:
        sent_at_open.append(len(client.wire.sent))
        opened(who)

    client.export.opened = note  # type: ignore[method-assign]
    await client.send(stream)
    sent = bytes(client.wire.sent)
    assert client.connection.is_open == bool(sent_at_open)
    handshake_replies(sent[: sent_at_open[0]] if sent_at_open else sent, opened=bool(sent_at_open))
    await client.leave()


def transmission(data: bytes) -> None:
    """What a client sends once it has the export open: every whole request is answered once, and validly."""
    fixture = _the_fixture()
    fixture.run(_transmission(fixture, Delivery.of(data[0] if data else 0), data[1:MAX_INPUT_BYTES]))


async def _transmission(fixture: Fixture, delivery: Delivery, stream: bytes) -> None:
    stream = with_own_cookies(stream)
    requests, hangs_up = requests_in(stream)
    kinds = {request.cookie: (request.command, request.length) for request in requests}
    client = fixture.client(delivery)
    await client.send(delivery.opening)
    assert client.connection.is_open
    preamble = len(client.wire.sent)
    option_replies(bytes(client.wire.sent[18:]))
    other = fixture.client(Delivery.of(0))
    await client.send(stream)
    answers = transmission_replies(bytes(client.wire.sent[preamble:]), requests)
    assert not client.wire.aborted, "the server gave up on the connection"
    if hangs_up:
        assert client.wire.closing, "it went on after a DISC or something that is no request"
    assert Counter(cookie for cookie, _ in answers.errors) == Counter(request.cookie for request in requests)
    for cookie, error in answers.errors:
        command, length = kinds[cookie]
        in_bounds = any(r.cookie == cookie and r.offset + r.length <= SIZE_BYTES for r in requests)
        assert error or in_bounds or command == c.CMD_FLUSH, f"command {command} beyond the end was done ({length})"
    await client.leave()
    await other.send(OPENINGS[0])  # who has been connected all the time goes on undisturbed
    assert other.connection.is_open
    await other.leave()
