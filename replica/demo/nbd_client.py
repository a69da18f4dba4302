"""A small pipelined NBD client: fixed newstyle, one export, a Unix socket, simple replies.

Source: NetworkBlockDevice/nbd, doc/proto.md, "Transmission phase".
"""

import socket
from pathlib import Path
from struct import Struct
from typing import NamedTuple, Self

from nbdserver import constants as c
from replica.nbd_handshake import NbdLost, NbdRefused, Shaker

__all__ = ["NbdClient", "NbdLost", "NbdRefused", "Reply"]

_REQUEST = Struct(">IHHQQI")
_REPLY = Struct(">IIQ")

_RECEIVE_BYTES = 1 << 18


class Reply(NamedTuple):
    """``error`` is an NBD error number, 0 for success; ``data`` is what a READ brought."""

    cookie: int
    error: int
    data: bytes


class NbdClient:
    """One connection in the transmission phase. ``start_*`` queue requests, `receive` sends them and waits.

    Every request is known by its cookie, a number that counts up; `in_flight` holds those without a reply.
    """

    def __init__(self, connection: socket.socket, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.in_flight: dict[int, int] = {}  # cookie → bytes of data its successful reply brings
        self._connection = connection
        self._cookie = 0
        self._output: list[bytes] = []
        self._input = bytearray()

    @classmethod
    def connect(cls, path: Path, export: str, *, timeout_s: float = 10.0) -> Self:
        """Open ``export``; raises `NbdRefused`, or OSError when nobody answers there.

        ``timeout_s`` holds for each single wait, later ones too: a server that hangs must not hang its client.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            shaker = Shaker(connection, timeout_s)
            shaker.greet()
            info = shaker.go(export)
            connection.settimeout(timeout_s)
            return cls(connection, info.size_bytes)
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        """Drop the connection; what is in flight may be done or not."""
        self._connection.close()

    def disconnect(self) -> None:
        """Say goodbye (nothing may be in flight), then close."""
        self._queue(c.CMD_DISC, 0, 0)
        try:
            self._connection.sendall(b"".join(self._output))
        finally:
            self.close()

    def start_write(self, offset: int, data: bytes) -> int:
        """Queue a WRITE; returns its cookie."""
        return self._start(c.CMD_WRITE, offset, len(data), 0, data)

    def start_read(self, offset: int, length: int) -> int:
        """Queue a READ; returns its cookie."""
        return self._start(c.CMD_READ, offset, length, length)

    def flush(self) -> None:
        """Make everything answered so far durable on both nodes; nothing else may be in flight."""
        cookie = self._start(c.CMD_FLUSH, 0, 0, 0)
        (reply,) = self.receive()
        assert reply.cookie == cookie
        if reply.error:
            raise OSError(reply.error, "the server could not flush")

    def send(self) -> None:
        """Send what is queued."""
        try:
            if self._output:
                output = b"".join(self._output)
                self._output.clear()
                self._connection.sendall(output)
        except TimeoutError:
            raise NbdLost("the server takes no more requests") from None
        except ConnectionError:
            pass  # replies may have come before the end: `receive` takes them, then reports it

    def receive(self) -> list[Reply]:
        """Send what is queued and return the replies that are there, at least one; raises `NbdLost`."""
        self.send()
        try:
            while not (replies := self._parse()):
                received = self._connection.recv(_RECEIVE_BYTES)
                if not received:
                    raise NbdLost("the server closed the connection")
                self._input += received
            return replies
        except TimeoutError:
            raise NbdLost("the server did not answer in time") from None
        except ConnectionError as error:
            raise NbdLost(f"the connection broke ({error.strerror})") from None

    def _start(self, command: int, offset: int, length: int, answer_bytes: int, data: bytes = b"") -> int:
        cookie = self._queue(command, offset, length)
        self.in_flight[cookie] = answer_bytes
        if data:
            self._output.append(data)
        return cookie

    def _queue(self, command: int, offset: int, length: int) -> int:
        self._cookie += 1
        self._output.append(_REQUEST.pack(c.REQUEST_MAGIC, 0, command, self._cookie, offset, length))
        return self._cookie

    def _parse(self) -> list[Reply]:
        """The whole replies in the buffer."""
        replies: list[Reply] = []
        position = 0
        while len(self._input) - position >= _REPLY.size:
            magic, error, cookie = _REPLY.unpack_from(self._input, position)
            if magic != c.SIMPLE_REPLY_MAGIC or cookie not in self.in_flight:
                raise NbdLost("the server sent something that is no reply")
            start = position + _REPLY.size
            stop = start + (0 if error else self.in_flight[cookie])
            if stop > len(self._input):
                break
            del self.in_flight[cookie]
            replies.append(Reply(cookie, error, bytes(self._input[start:stop])))
            position = stop
        del self._input[:position]
        return replies
