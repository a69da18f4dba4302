"""TLS on top of a transport, for a `BufferedProtocol`: what `loop.start_tls` does, and what it does not.

The transports of asyncio and uvloop cannot half-close under TLS (a client that is drained would lose its replies, or
the drain would have to wait for it), and drop the alert that tells the other side why a handshake failed.

What is written is encrypted in pieces, and only as fast as the transport below takes them: what waits is the caller's
own data, and not a second, encrypted copy of it. To the flow control both are one buffer.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Iterable
from typing import Any, Final, cast

from nbdserver.piece_queue import PIECE_BYTES, Buffer, PieceQueue

_RECEIVE_BYTES: Final = 128 * 1024
#: At most so much (and two pieces) is encrypted before the socket takes it.
_AHEAD_BYTES: Final = 512 * 1024
#: What TLS itself has to answer (to requests for new keys) while the other side takes nothing: some 2400 answers.
_OWN_BYTES: Final = 64 * 1024
#: How long a side that was refused has to read the alert before the connection is reset.
_LINGER_S: Final = 1.0
#: The first byte of the records that can begin a connection (RFC 8446, section 5.1).
TLS_HANDSHAKE: Final = 0x16
_ALERT: Final = 0x15


class TlsFailure(ConnectionError):
    """TLS did not come about, or was broken; the text says why, as part of a sentence."""


class NotTls(TlsFailure):
    """What the other side sent first is not TLS."""


class TlsTransport(asyncio.Transport, asyncio.BufferedProtocol):
    """The transport for the protocol above and the protocol of the transport `below`.

    `finished` is called once, with None when the handshake is done, or with why it failed; nothing is delivered before
    that. On a failure it may still say something in plain on `below`; that is closed in any case. Who bounds the time
    of the handshake is the caller. The protocol above (`set_protocol`) is told of the connection's end, not of its
    beginning.

    Buffers that are written must not change as long as `get_write_buffer_size` is not 0, as with uvloop's transports.
    """

    def __init__(
        self,
        below: asyncio.Transport,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        finished: Callable[[TlsFailure | None], None],
    ) -> None:
        super().__init__()
        self._below = below
        self._finished = finished
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._memory = memoryview(bytearray(_RECEIVE_BYTES))
        self._above: asyncio.BufferedProtocol | None = None
        self._shaking = True
        self._heard = False
        self._reading = True
        self._pumping = False
        self._deaf = False  # what arrives is thrown away
        self._waiting = PieceQueue()  # not encrypted yet
        self._below_is_paused = False
        self._own_bytes = 0  # what TLS itself has answered since it is
        self._above_is_paused = False
        self._mute = False  # nothing more is taken from above
        self._last: Callable[[], None] | None = None  # to be done when nothing is waiting any more
        self._said_end = False  # close_notify was sent
        self._keep_open = False  # the other side has ended its direction, ours goes on
        self._closing = False
        self._failure: TlsFailure | None = None
        below.set_protocol(self)
        self.set_write_buffer_limits(below.get_write_buffer_limits()[1])
        if not server_side:
            self._shake()

    @property
    def peer_certificate(self) -> dict[str, Any]:
        """The verified certificate of the other side, as `ssl.SSLSocket.getpeercert` has it; empty without one."""
        return cast(dict[str, Any], self._tls.getpeercert() or {})

    # ── the handshake ────────────────────────────────────────────────────────────────────────────────────────

    def _shake(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._send_down()
            return
        except ssl.SSLError as error:
            self._send_down()  # the alert
            self._fail(TlsFailure(words(error)))
            return
        self._send_down()
        self._shaking = False
        self._finished(None)
        self._pump()

    def _fail(self, failure: TlsFailure) -> None:
        self._shaking = False
        self._deaf = True
        self._finished(failure)
        # Closing with unread input would send a reset, which can destroy what says why.
        if self._below.is_closing():
            return
        self._below.resume_reading()
        if self._below.can_write_eof():
            self._below.write_eof()
        asyncio.get_running_loop().call_later(_LINGER_S, self._below.abort)

    # ── the protocol of the transport below ──────────────────────────────────────────────────────────────────

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._memory

    def buffer_updated(self, nbytes: int) -> None:
        if self._deaf:
            return
        if not self._heard:
            self._heard = True
            if self._memory[0] not in (TLS_HANDSHAKE, _ALERT):
                self._fail(NotTls("what it sent is not TLS"))
                return
        self._incoming.write(self._memory[:nbytes])
        if self._shaking:
            self._shake()
        else:
            self._pump()

    def eof_received(self) -> bool:
        if self._shaking:
            self._fail(TlsFailure("it hung up during the TLS handshake"))
        elif not self._deaf:
            # Closing sends what is on its way; a side that does not take that must not keep the connection.
            asyncio.get_running_loop().call_later(_LINGER_S, self._below.abort)
        return self._keep_open or self._last is not None

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = self._deaf = self._mute = True
        self._waiting = PieceQueue()
        self._last = None
        if self._shaking:
            self._shaking = False
            self._finished(TlsFailure("the connection was lost during the TLS handshake"))
        above, self._above = self._above, None
        if above is not None:
            above.connection_lost(self._failure or exc)

    def pause_writing(self) -> None:
        self._below_is_paused = True

    def resume_writing(self) -> None:
        self._below_is_paused = False
        self._own_bytes = 0
        self._send_waiting()
        if self._waiting or self._below_is_paused:
            return
        if self._last is not None:
            last, self._last = self._last, None
            last()
        if self._above_is_paused:
            self._above_is_paused = False
            if self._above is not None:
                self._above.resume_writing()

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────

    def _pump(self) -> None:
        """Decrypt what is there, as far as the protocol above wants it."""
        if self._pumping:
            return
        self._pumping = True
        try:
            more = True
            while more and self._reading and not self._deaf and self._above is not None:
                more = self._deliver(self._above)
        finally:
            self._pumping = False
        if self._outgoing.pending:
            self._answer()

    def _answer(self) -> None:
        """Send what TLS itself has to say. Without a bound, whoever asks and does not listen would fill the memory."""
        if self._below_is_paused:
            self._own_bytes += self._outgoing.pending
            if self._own_bytes > _OWN_BYTES:
                self._break(TlsFailure("it asks for new keys without end"))
                return
        self._send_down()

    def _deliver(self, above: asyncio.BufferedProtocol) -> bool:
        """Fill one buffer of the protocol above. False: nothing more is there."""
        room = memoryview(above.get_buffer(-1))
        filled, size = 0, len(room)
        ended = False
        failure: TlsFailure | None = None
        try:
            # Asking first: an exception for each "nothing more" would cost more than the decryption of a small record.
            while filled < size and (self._incoming.pending or self._tls.pending()):
                count = cast(
                    int, self._tls.read(size - filled, room[filled:])
                )  # it says bytes, which is without a buffer
                if count == 0:
                    ended = True
                    break
                filled += count
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            ended = True
        except ssl.SSLError as error:
            failure = TlsFailure(words(error))
        if filled:
            above.buffer_updated(filled)
        if failure is not None:
            self._break(failure)
        elif ended and not self._deaf:
            self._deaf = True
            self._keep_open = bool(above.eof_received())
            if not self._keep_open:
                self.close()
        return filled == size > 0

    def _break(self, failure: TlsFailure) -> None:
        self._failure = failure
        self._send_down()
        self.abort()

    def is_reading(self) -> bool:
        return self._reading

    def pause_reading(self) -> None:
        self._reading = False
        if not self._below.is_closing():
            self._below.pause_reading()

    def resume_reading(self) -> None:
        self._reading = True
        asyncio.get_running_loop().call_soon(self._read_on)

    def _read_on(self) -> None:
        """What is already there comes first, so that it never gets more than one receive brings."""
        self._pump()
        if self._reading and not self._below.is_closing():
            self._below.resume_reading()

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────

    def write(self, data: Buffer) -> None:
        self.writelines((data,))

    def writelines(self, list_of_data: Iterable[Buffer]) -> None:
        if self._mute or self._below.is_closing():
            return
        buffers = tuple(list_of_data)
        size_bytes = sum(map(len, buffers))
        if self._waiting or size_bytes > PIECE_BYTES or not self._below_has_room():
            self._waiting.put(buffers)
            self._send_waiting()
        elif size_bytes:
            self._encrypt(b"".join(buffers))  # one piece: every write to TLS begins a record of its own
            self._send_down()
        if self._below_is_paused and not self._above_is_paused and self.get_write_buffer_size() > self._high_bytes:
            self._above_is_paused = True
            if self._above is not None:
                self._above.pause_writing()

    def _send_waiting(self) -> None:
        """Encrypt what waits, as far as the transport below takes it."""
        while self._waiting and self._below_has_room():
            self._encrypt(self._waiting.take())
            if not self._waiting or self._outgoing.pending >= PIECE_BYTES:
                self._send_down()

    def _below_has_room(self) -> bool:
        if self._below.is_closing():
            return False
        return not self._below_is_paused or self._below.get_write_buffer_size() < _AHEAD_BYTES

    def _encrypt(self, piece: Buffer) -> None:
        view = memoryview(piece)
        try:
            while view:
                view = view[self._tls.write(view) :]
        except ssl.SSLError as error:
            self._break(TlsFailure(words(error)))

    def _send_down(self) -> None:
        if self._outgoing.pending and not self._below.is_closing():
            self._below.write(self._outgoing.read())

    def can_write_eof(self) -> bool:
        return self._below.can_write_eof()

    def write_eof(self) -> None:
        """Say (close_notify) that nothing more will come. What arrives from now on is thrown away."""
        self._deaf = True
        if not self._mute:
            self._mute = True
            self._finally(self._end_below)

    def _finally(self, last: Callable[[], None]) -> None:
        """Do this when all that was written is on its way."""
        if self._waiting and not self._below.is_closing():
            self._last = last
        else:
            self._last = None
            last()

    def _end_below(self) -> None:
        self._say_end()
        if not self._below.is_closing():
            self._below.write_eof()

    def _say_end(self) -> None:
        if self._said_end or self._shaking:
            return
        self._said_end = True
        # It complains about what the other side has not said or still sends; the notice is made first.
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        self._send_down()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """As in asyncio; but who was paused is resumed when nothing waits to be encrypted any more, not at `low`."""
        if high is None:
            high = 64 * 1024 if low is None else 4 * low
        self._high_bytes = high
        self._low_bytes = high // 4 if low is None else low
        ahead_bytes = min(high, _AHEAD_BYTES)
        self._below.set_write_buffer_limits(ahead_bytes, min(self._low_bytes, ahead_bytes // 4))

    def get_write_buffer_size(self) -> int:
        return self._waiting.size_bytes + self._below.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low_bytes, self._high_bytes

    # ── the rest of a transport ──────────────────────────────────────────────────────────────────────────────

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._tls if name == "ssl_object" else self._below.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._above = cast(asyncio.BufferedProtocol, protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        assert self._above is not None
        return self._above

    def is_closing(self) -> bool:
        return self._closing or self._below.is_closing()

    def close(self) -> None:
        """What was written is sent first, as far as the other side takes it."""
        if not self._closing:
            self._closing = self._deaf = self._mute = True
            self._finally(self._close_below)

    def _close_below(self) -> None:
        self._say_end()
        self._below.close()

    def abort(self) -> None:
        self._closing = self._deaf = self._mute = True
        self._last = None
        self._below.abort()


def words(error: ssl.SSLError) -> str:
    """What was wrong, without OpenSSL's numbers."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused ({error.verify_message})"
    reason = error.reason or str(error)
    if "PEER_DID_NOT_RETURN_A_CERTIFICATE" in reason:
        return "it showed no certificate"
    _, alert, said = reason.partition("ALERT_")
    if (alert and "CERTIFICATE" in said) or said == "UNKNOWN_CA":
        return f"it refused this side's certificate ({said.replace('_', ' ').lower()})"
    if alert:
        return f"it refused the connection ({said.replace('_', ' ').lower()})"
    return f"TLS failed ({reason.replace('_', ' ').lower()})"
