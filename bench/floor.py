"""The bound: a synchronous pair that does the least that such a pair has to do, in Python, on uvloop.

    python -m bench.floor --image FILE --port P                  # the Secondary
    python -m bench.floor --image FILE --port P --serve PATH     # the Primary, for clients on a Unix socket
    python -m bench.floor --image FILE --steps write --serve PATH    # less than that: see `Steps`

The Primary takes requests apart, sends them on as they are, writes, and answers when the Secondary says that it has
written as well. Both act on all that a receive brought at once, as Replica does. What Replica does besides is missing:
activity log, bitmap, checks, liveness, limits, errors, recovery. The distance between the two is what all that costs.
Nobody should use this for data: a second client at the same time, or a lost link, is the end of it.
"""

import argparse
import asyncio
import enum
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from struct import Struct
from typing import Final, cast

import uvloop

from nbdserver import constants as c

_REQUEST: Final = Struct(">IHH8sQI")  # magic, flags, command, cookie, offset, length
_OPTION: Final = Struct(">QII")
_GREETING: Final = Struct(">QQH").pack(c.INIT_MAGIC, c.OPTION_MAGIC, c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES)
_CLIENT_FLAGS_BYTES: Final = 4
_REPLY_OK: Final = Struct(">II").pack(c.SIMPLE_REPLY_MAGIC, 0)
_APPLIED: Final = Struct(">Q")  # the Secondary's word: how many changes it has carried out since the beginning
_BUFFER_BYTES: Final = 512 << 10
#: A larger write is sent on and written in the pieces in which it arrives.
_WHOLE_BYTES: Final = 128 << 10


class Steps(enum.StrEnum):
    """What is done with a write before it is answered; the difference of two is what the step costs."""

    RECEIVE = "receive"  # nothing
    WRITE = "write"  # it is written here
    SEND = "send"  # it is written here and by the Secondary


class Requests(asyncio.BufferedProtocol):
    """Receives requests and carries out the changes: what both ends have in common."""

    def __init__(self, image: int, steps: Steps = Steps.SEND) -> None:
        self._image = image
        self._writes = steps is not Steps.RECEIVE
        self._view = memoryview(bytearray(_BUFFER_BYTES))
        self._start = self._end = 0
        #: Of a large write: where its next piece goes, how much is to come, its cookie.
        self._offset = self._missing = 0
        self._cookie = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=0)  # what is written is sent at once

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._start == self._end:
            self._start = self._end = 0
        elif len(self._view) - self._end < _WHOLE_BYTES + _REQUEST.size:
            self._renew()
        return self._view[self._end :]

    def _renew(self) -> None:
        """Go on in new memory: somebody still has slices of the old one, or it is full."""
        rest = self._view[self._start : self._end]
        self._view = memoryview(bytearray(_BUFFER_BYTES))
        self._view[: len(rest)] = rest
        self._start, self._end = 0, len(rest)

    def buffer_updated(self, nbytes: int) -> None:
        self._end += nbytes
        self.take()

    def take(self) -> None:
        """Carry out all that is there."""
        view, position, end = self._view, self._start, self._end
        pieces: list[tuple[int, memoryview]] = []
        done: list[bytes] = []
        is_flush = False
        while position < end:
            if self._missing:
                length = min(self._missing, end - position)
                pieces.append((self._offset, view[position : position + length]))
                position += length
                self._offset += length
                self._missing -= length
                if not self._missing:
                    done.append(self._cookie)
                continue
            if end - position < _REQUEST.size:
                break
            _, _, command, cookie, offset, length = _REQUEST.unpack_from(view, position)
            data_at = position + _REQUEST.size
            if command == c.CMD_WRITE:
                if length > _WHOLE_BYTES:
                    self._offset, self._missing, self._cookie = offset, length, cookie
                    position = data_at
                    continue
                if data_at + length > end:
                    break
                pieces.append((offset, view[data_at : data_at + length]))
                done.append(cookie)
                position = data_at + length
                continue
            position = data_at
            if command == c.CMD_READ:
                self.read(cookie, offset, length)
            elif command == c.CMD_FLUSH:
                is_flush = True
                done.append(cookie)
        received, self._start = view[self._start : position], position
        if pieces or done or self._missing:
            self.send_on(received, done)
        if self._writes:
            for offset, piece in pieces:
                os.pwrite(self._image, piece, offset)
        if is_flush:
            os.fdatasync(self._image)
        if done:
            self.changed(done)

    def send_on(self, received: memoryview, cookies: Sequence[bytes]) -> None:
        """Before the changes are carried out here: they may begin at the other end, which skips reads among them."""

    def changed(self, cookies: list[bytes]) -> None:
        """These changes have been carried out here."""

    def read(self, cookie: bytes, offset: int, length: int) -> None:
        """Answer a read."""


class Secondary(Requests):
    """Carries out what the Primary sends on, and says how much that was."""

    _applied = 0

    def changed(self, cookies: list[bytes]) -> None:
        self._applied += len(cookies)
        self._transport.write(_APPLIED.pack(self._applied))


class Primary(Requests):
    """One client's connection."""

    def __init__(self, image: int, steps: Steps, link: "Link | None") -> None:
        super().__init__(image, steps)
        self._link = link
        self._flags_due = _CLIENT_FLAGS_BYTES
        self._is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self._link is not None:
            self._link.client = self
        self._transport.write(_GREETING)

    def take(self) -> None:
        if not self._is_open:
            self._shake_hands()
        if self._is_open:
            super().take()

    def send_on(self, received: memoryview, cookies: Sequence[bytes]) -> None:
        if self._link is not None:
            self._link.unanswered += cookies
            self._link.transport.write(received)
            if self._link.transport.get_write_buffer_size():
                self._renew()

    def changed(self, cookies: list[bytes]) -> None:
        if self._link is None:
            self.answer(cookies)

    def answer(self, cookies: list[bytes]) -> None:
        """Both ends have these."""
        self._transport.write(_REPLY_OK + _REPLY_OK.join(cookies))

    def read(self, cookie: bytes, offset: int, length: int) -> None:
        self._transport.writelines((_REPLY_OK + cookie, os.pread(self._image, length, offset)))

    def _shake_hands(self) -> None:
        """Every option but the one that ends the handshake is unknown here."""
        if self._end - self._start < self._flags_due:
            return
        self._start += self._flags_due
        self._flags_due = 0
        while self._end - self._start >= _OPTION.size and not self._is_open:
            _, option, length = _OPTION.unpack_from(self._view, self._start)
            if self._end - self._start < _OPTION.size + length:
                return
            self._start += _OPTION.size + length
            if option == c.OPT_GO:
                flags = c.EXPORT_HAS_FLAGS | c.EXPORT_SEND_FLUSH | c.EXPORT_CAN_MULTI_CONN
                size_bytes = os.fstat(self._image).st_size
                self._reply(option, c.REP_INFO, Struct(">HQH").pack(c.INFO_EXPORT, size_bytes, flags))
                self._reply(option, c.REP_ACK)
                self._is_open = True
            else:
                self._reply(option, c.REP_ERR_UNSUP)

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self._transport.write(Struct(">QIII").pack(c.OPTION_REPLY_MAGIC, option, kind, len(data)) + data)


class Link(asyncio.Protocol):
    """The Primary's connection to the Secondary."""

    client: Primary

    def __init__(self) -> None:
        self.unanswered: deque[bytes] = deque()
        self._answered = 0
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=0)

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        whole = len(data) - len(data) % _APPLIED.size
        self._rest = data[whole:]
        if whole:
            (applied,) = _APPLIED.unpack_from(data, whole - _APPLIED.size)
            count, self._answered = applied - self._answered, applied
            self.client.answer([self.unanswered.popleft() for _ in range(count)])


async def serve(image: Path, port: int, path: Path | None, steps: Steps) -> None:
    """Run one end until it is killed."""
    file = os.open(image, os.O_RDWR)
    loop = asyncio.get_running_loop()
    if path is None:
        server = await loop.create_server(lambda: Secondary(file), "127.0.0.1", port)
    else:
        link = (await loop.create_connection(Link, "127.0.0.1", port))[1] if steps is Steps.SEND else None
        server = await loop.create_unix_server(lambda: Primary(file, steps, link), path)
    await server.serve_forever()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.floor", description="The bound of what a pair in Python can do.")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0, help="of the Secondary, on 127.0.0.1")
    parser.add_argument("--serve", type=Path, help="a Unix socket for clients: this end is the Primary")
    parser.add_argument("--steps", type=Steps, default=Steps.SEND, choices=list(Steps))
    options = parser.parse_args()
    uvloop.run(serve(options.image, options.port, options.serve, options.steps))


if __name__ == "__main__":
    main()
