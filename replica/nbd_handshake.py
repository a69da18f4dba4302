"""The client's side of the NBD handshake, on a blocking socket: fixed newstyle, one export, no TLS.

Source: NetworkBlockDevice/nbd, doc/proto.md, "Newstyle negotiation".
"""

import socket
import time
from typing import NamedTuple

from nbdserver import constants as c
from nbdserver.client_identity import ClientIdentity
from nbdserver.handshake_coding import CLIENT_FLAGS, INFO_EXPORT, OPTION, OPTION_REPLY, SERVER_GREETING, U16, U32


class NbdRefused(Exception):
    """The server does not open the export now; its sentence is the message."""


class NbdLost(Exception):
    """The connection ended, or is no NBD."""


class ExportInfo(NamedTuple):
    """What the server says of an export: its size and the transmission flags."""

    size_bytes: int
    flags: int


class Shaker:
    """A handshake under way. All of it together may take `timeout_s`.

    Raises `NbdRefused`, `NbdLost`, TimeoutError, or another OSError. The caller closes the socket.
    """

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self._connection = connection
        self._deadline = time.monotonic() + timeout_s

    def greet(self) -> None:
        """Up to the client's flags."""
        init, option_magic, flags = SERVER_GREETING.unpack(self._exactly(SERVER_GREETING.size))
        if init != c.INIT_MAGIC or option_magic != c.OPTION_MAGIC or not flags & c.FLAG_FIXED_NEWSTYLE:
            raise NbdLost("what answers there is no NBD server of the fixed newstyle")
        self._send(CLIENT_FLAGS.pack(c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES))

    def claim(self, identity: ClientIdentity) -> None:
        """Let the server drop all older connections of this client; returns when it has."""
        self._send_option(c.OPT_CLAIM, identity.packed())
        kind, answer = self._answer()
        if kind == c.REP_ERR_UNSUP:
            raise NbdRefused("the server is no nbdserver of Replica, or of an older version: it cannot fence a client")
        if kind != c.REP_ACK:
            raise NbdRefused(answer.decode(errors="replace"))

    def info(self, export: str) -> ExportInfo:
        """Ask for the export without opening it."""
        return self._describe(c.OPT_INFO, export)

    def go(self, export: str) -> ExportInfo:
        """Open the export: the transmission phase follows."""
        return self._describe(c.OPT_GO, export)

    def _describe(self, option: int, export: str) -> ExportInfo:
        name = export.encode()
        self._send_option(option, U32.pack(len(name)) + name + U16.pack(0))
        found: ExportInfo | None = None
        while True:
            kind, answer = self._answer()
            if kind == c.REP_ACK:
                if found is None:
                    raise NbdLost("the server did not say how large the export is")
                return found
            if kind != c.REP_INFO:
                raise NbdRefused(answer.decode(errors="replace"))
            if len(answer) == INFO_EXPORT.size:
                info, size_bytes, flags = INFO_EXPORT.unpack(answer)
                found = ExportInfo(size_bytes, flags) if info == c.INFO_EXPORT else found

    def _send_option(self, option: int, data: bytes) -> None:
        self._send(OPTION.pack(c.OPTION_MAGIC, option, len(data)) + data)

    def _answer(self) -> tuple[int, bytes]:
        magic, _, kind, length = OPTION_REPLY.unpack(self._exactly(OPTION_REPLY.size))
        if magic != c.OPTION_REPLY_MAGIC or length > c.MAX_OPTION_BYTES:
            raise NbdLost("the server sent something that is no answer to an option")
        return kind, self._exactly(length)

    def _send(self, data: bytes) -> None:
        self._limit()
        self._connection.sendall(data)

    def _exactly(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            self._limit()
            received = self._connection.recv(length - len(data))
            if not received:
                raise NbdLost("the server closed the connection during the handshake")
            data += received
        return bytes(data)

    def _limit(self) -> None:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._connection.settimeout(left_s)
