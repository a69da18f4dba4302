"""An NBD client on a bare socket: it sends what the test says, right or wrong; by the protocol text alone."""

import os
import select
import socket
import ssl
import struct
from collections.abc import Callable
from pathlib import Path

OPTION_MAGIC = 0x49484156454F5054
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_INFO, OPT_GO = 1, 2, 3, 5, 6, 7
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA = 1
EINVAL, ENOSPC = 22, 28

#: Longer than anything takes.
PATIENCE_S = 30.0

#: Connects a new socket to the server.
Connect = Callable[[], socket.socket]


class Ended(Exception):
    """The server has closed the connection."""


def to_address(host: str, port: int) -> Connect:
    return lambda: socket.create_connection((host, port), PATIENCE_S)


def to_path(path: Path) -> Connect:
    def connect() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(PATIENCE_S)
        connection.connect(str(path))
        return connection

    return connect


def option(number: int, data: bytes = b"", *, length: int | None = None, magic: int = OPTION_MAGIC) -> bytes:
    """An option; `length` instead of the right one."""
    return struct.pack(">QII", magic, number, len(data) if length is None else length) + data


def info(name: bytes, *infos: int, name_length: int | None = None, count: int | None = None) -> bytes:
    """The data of INFO and GO, with wrong lengths if asked."""
    head = struct.pack(">I", len(name) if name_length is None else name_length) + name
    return head + struct.pack(f">H{len(infos)}H", len(infos) if count is None else count, *infos)


def request(
    command: int,
    cookie: int,
    offset: int = 0,
    length: int | None = None,
    data: bytes = b"",
    *,
    flags: int = 0,
    magic: int = REQUEST_MAGIC,
) -> bytes:
    """A request; `length` defaults to that of the data."""
    return struct.pack(">IHHQQI", magic, flags, command, cookie, offset, len(data) if length is None else length) + data


class RawClient:
    """A connection; closed at the end of its `with`. With `tls`, its greeting includes STARTTLS."""

    def __init__(self, connect: Connect, tls: ssl.SSLContext | None = None) -> None:
        self.socket = connect()
        self.socket.settimeout(PATIENCE_S)
        self._tls = tls

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *ignored: object) -> None:
        self.socket.close()

    def send(self, *data: bytes) -> None:
        """All of it; Ended when the server hung up."""
        try:
            self.socket.sendall(b"".join(data))
        except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
            raise Ended from None

    def receive(self, count: int) -> bytes:
        """Exactly so many bytes; Ended when fewer come."""
        data = bytearray()
        while len(data) < count:
            try:
                piece = self.socket.recv(min(count - len(data), 1 << 20))
            except ConnectionResetError:
                raise Ended from None
            if not piece:
                raise Ended
            data += piece
        return bytes(data)

    def receive_all(self) -> bytes:
        """Everything until the server hangs up."""
        data = bytearray()
        try:
            while piece := self.socket.recv(1 << 20):
                data += piece
        except ConnectionResetError:
            pass
        return bytes(data)

    def greet(self, flags: int = 3) -> "RawClient":
        """The greeting, there and back."""
        assert self.receive(16) == b"NBDMAGICIHAVEOPT"
        self.receive(2)
        self.send(struct.pack(">I", flags))
        if self._tls is not None:
            self.send(option(OPT_STARTTLS))
            assert self.option_reply() == (OPT_STARTTLS, 1, b"")
            self.socket = self._tls.wrap_socket(self.socket)
        return self

    def open(self) -> "RawClient":
        """The default export; the transmission phase begins."""
        self.greet()
        self.send(option(OPT_EXPORT_NAME))
        self.receive(10)
        return self

    def push(self, data: bytes, times: int, quiet_ms: int = 300) -> int:
        """Send it over and over without reading, until the server takes no more for so long; how often it did."""
        self.socket.setblocking(False)
        poll = select.poll()
        poll.register(self.socket, select.POLLOUT)
        sent, at = 0, 0
        while sent < times and poll.poll(quiet_ms):
            try:
                at += self.socket.send(data[at:])
            except (BlockingIOError, ssl.SSLWantWriteError):
                continue
            except ConnectionError:
                break
            if at == len(data):
                sent, at = sent + 1, 0
        self.socket.settimeout(PATIENCE_S)
        return sent

    def option_reply(self) -> tuple[int, int, bytes]:
        """(option, kind, data)"""
        magic, number, kind, length = struct.unpack(">QIII", self.receive(20))
        assert magic == 0x0003E889045565A9
        return number, kind, self.receive(length)

    def reply(self, data_length: int = 0) -> tuple[int, int, bytes]:
        """(cookie, error, data) of a simple reply."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == SIMPLE_REPLY_MAGIC
        return cookie, error, self.receive(0 if error else data_length)

    def ask(self, command: int, offset: int = 0, length: int | None = None, data: bytes = b"", flags: int = 0) -> int:
        """One request and its error number; the data of a read is thrown away."""
        self.send(request(command, 0xC0FFEE, offset, length, data, flags=flags))
        cookie, error, _ = self.reply((length or 0) if command == READ else 0)
        assert cookie == 0xC0FFEE
        return error


def memory_bytes(pid: int) -> int:
    """Memory that a process holds now: its own, not that of the files it has mapped."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in the status of a process")


class Peak:
    """The most memory that a process held since this was made."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        self._before = self._now()

    def _now(self) -> int:
        for line in Path(f"/proc/{self._pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmHWM in the status of a process")

    def grown_bytes(self) -> int:
        """More than it held at the beginning."""
        return self._now() - self._before


def descriptors(pid: int) -> int:
    """How many files and sockets a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))
