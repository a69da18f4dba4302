"""The client's side of the NBD handshake, on a blocking socket: fixed newstyle, one export, TLS if it is wanted.

Source: NetworkBlockDevice/nbd, doc/proto.md, "Newstyle negotiation" and "TLS support".
"""

import contextlib
import socket
import ssl
import time
from collections.abc import Iterator
from typing import NamedTuple

from nbdserver import constants as c
from nbdserver.client_identity import ClientIdentity
from nbdserver.handshake_coding import CLIENT_FLAGS, INFO_EXPORT, OPTION, OPTION_REPLY, SERVER_GREETING, U16, U32
from nbdserver.tls_transport import words
from replica import peer_names

_CLOSED = "the server closed the connection during the handshake"


class NbdRefused(Exception):
    """The server does not open the export now; its sentence is the message."""


class NbdLost(Exception):
    """The connection ended, or is no NBD: whether that node serves is not known."""


class NbdUnproven(NbdLost):
    """TLS is wanted, by one side at least, and did not come about: who answers, and whether it serves, is not known."""


class ExportInfo(NamedTuple):
    """What the server says of an export: its size and the transmission flags."""

    size_bytes: int
    flags: int


class Shaker:
    """A handshake under way. All of it together may take `timeout_s`.

    Raises `NbdRefused`, `NbdLost`, TimeoutError, or another OSError. A context manager that closes the connection, in
    the end, unless somebody has taken it.
    """

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self._connection = connection
        self._deadline = time.monotonic() + timeout_s
        self._is_taken = False

    def __enter__(self) -> "Shaker":
        return self

    def __exit__(self, *ignored: object) -> None:
        if not self._is_taken:
            self._connection.close()

    def take(self) -> socket.socket:
        """The connection for who goes on with it, without a timeout: an `ssl.SSLSocket` where TLS was started."""
        self._is_taken = True
        self._connection.settimeout(None)
        return self._connection

    def greet(self) -> None:
        """Up to the client's flags."""
        init, option_magic, flags = SERVER_GREETING.unpack(self._exactly(SERVER_GREETING.size))
        if init != c.INIT_MAGIC or option_magic != c.OPTION_MAGIC or not flags & c.FLAG_FIXED_NEWSTYLE:
            raise NbdLost("what answers there is no NBD server of the fixed newstyle")
        self._send(CLIENT_FLAGS.pack(c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES))

    def start_tls(self, context: ssl.SSLContext, node: str) -> None:
        """Go on inside of TLS, with a server that proves to be this node. There is no way on in plain."""
        self._send_option(c.OPT_STARTTLS, b"")
        kind, answer = self._answer()
        if kind == c.REP_ERR_UNSUP:
            raise NbdUnproven("the server does not offer TLS, and without it nothing is sent")
        if kind != c.REP_ACK:
            raise NbdUnproven(f"the server refuses TLS ({answer.decode(errors='replace')})")
        self._limit()
        try:
            secured = context.wrap_socket(self._connection)
        except ssl.SSLEOFError:
            raise NbdUnproven("the server closed the connection during the TLS handshake") from None
        except ssl.SSLError as error:
            raise NbdUnproven(words(error)) from None
        except (ConnectionError, ValueError):  # ValueError: it was closed, and nothing is there to be shaken with
            raise NbdUnproven("the server closed the connection during the TLS handshake") from None
        self._connection = secured
        other = peer_names.refusal(secured.getpeercert() or {}, node)
        if other:
            raise NbdUnproven(f"the server did not show {node}'s certificate: {other}")

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
        answer = self._exactly(length)
        if kind == c.REP_ERR_TLS_REQD:
            raise NbdUnproven(answer.decode(errors="replace"))
        return kind, answer

    def _send(self, data: bytes) -> None:
        self._limit()
        with _said_plainly():
            self._connection.sendall(data)

    def _exactly(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            self._limit()
            with _said_plainly():
                received = self._connection.recv(length - len(data))
            if not received:
                raise NbdLost(_CLOSED)
            data += received
        return bytes(data)

    def _limit(self) -> None:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._connection.settimeout(left_s)


@contextlib.contextmanager
def _said_plainly() -> Iterator[None]:
    """With TLS 1.3, a server that refuses the client's certificate says so only after the handshake."""
    try:
        yield
    except ssl.SSLEOFError:
        raise NbdUnproven(_CLOSED) from None
    except ssl.SSLError as error:
        raise NbdUnproven(words(error)) from None
