"""One TCP connection to the peer: greeting, frames in and out, liveness.

A `PeerLink` lives through three phases, greeting → open → closed, and never back. What was read from a link that is
closed is not delivered: `close()` clears the handlers before anything else, so that "the past stays past".

The hot path is `_deliver`: everything a receive brought is parsed at once, consecutive WRITE frames go to the volume
as one batch, and payloads are slices of the receive buffer, never copies.
"""

import asyncio
import collections
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

from nbdserver.tls_transport import TLS_HANDSHAKE, TlsFailure
from replica import auth, wire
from replica.errors import ReplicaError

log = logging.getLogger("replica.link")

#: Room for several whole frames: one receive then brings a batch, and a partial frame is moved rarely.
RECEIVE_BUFFER_BYTES: Final = 2 * (wire.MAX_PAYLOAD_BYTES + wire.HEADER_BYTES)
#: At most so much per receive: what was just received is still in the core's cache when it is written to the store,
#: and the peer's next frames arrive meanwhile (measured: half as fast again as with 512 KiB for 1 MiB writes). 64 KiB
#: would cut sixteen writes of 4 KiB, with their headers, into two, each of which is acknowledged by itself.
RECEIVE_BYTES: Final = 128 << 10
#: Room for two frames of a greeting.
_GREETING_BUFFER_BYTES: Final = 2 * (wire.MAX_GREETING_BYTES + wire.HEADER_BYTES)
GREETING_TIMEOUT_S: Final = 5.0

#: (flags, sequence, offset, payload); the payload is only valid during the call.
FrameHandler = Callable[[int, int, int, memoryview], None]
#: A batch of WRITE frames in order: (offset, data), and the sequence number of the last one.
WritesHandler = Callable[[Sequence[tuple[int, memoryview]], int], None]


@dataclass(frozen=True)
class LinkSettings:
    """What a link needs to know of the configuration."""

    identity: auth.Identity
    secret: bytes
    timeout_s: float
    ping_interval_s: float


class LinkOwner(Protocol):
    """Who is told about a link's life (replica.resource.connection)."""

    def link_opened(self, link: "PeerLink") -> None: ...
    def link_closed(self, link: "PeerLink", reason: str) -> None: ...


class LinkLost(ReplicaError):
    """The connection ended while something was being waited for."""


class PeerLink(asyncio.BufferedProtocol):
    """The connection. Owned by the resource; the volume sends on it and handles its hot frames."""

    def __init__(self, settings: LinkSettings, owner: LinkOwner, nonce: bytes, *, dialer: bool) -> None:
        self._settings = settings
        self._owner = owner
        self._dialer = dialer
        self._hello = auth.hello(settings.identity, nonce)
        self._peer_hello = b""
        # Little until it is open: strangers come in crowds.
        self._view = memoryview(bytearray(_GREETING_BUFFER_BYTES))
        self._start = 0
        self._end = 0
        self._phase: Callable[[int, bytes], None] | None = self._greet_hello
        self._timer: asyncio.TimerHandle | None = None
        self._heard = False
        self._silent_s = 0.0
        self._drained: list[Callable[[], None]] = []
        self._inbox: dict[int, collections.deque[tuple[int, int, int, bytes]]] = {}
        self._waiting: dict[int, asyncio.Future[tuple[int, int, int, bytes]]] = {}
        self._requests: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._request_number = 0
        self._transport: asyncio.Transport
        self.connected = False
        self.open = False
        self.closed = False
        #: It was not lost: this node ended it, or either did so to negotiate anew.
        self.meant_to_end = False
        self.close_reason = ""
        self.session = 0
        self.integrity = settings.identity.integrity
        #: What the peer tells of its disk: see `replica.store.Store.punches_fast`.
        self.peer_punches_fast = False
        #: Handlers of frames by kind; whoever takes the link over fills them in.
        self.handlers: dict[int, FrameHandler] = {wire.REPLY: self._on_reply}
        self.on_writes: WritesHandler | None = None

    # ── sending ──────────────────────────────────────────────────────────────────────────────────────────────

    def send_buffers(self, buffers: Sequence[bytes | memoryview]) -> bool:
        """One vectored send. True when the transport still refers to the buffers (they must not be reused)."""
        self._transport.writelines(buffers)
        return self._transport.get_write_buffer_size() > 0

    def send(self, kind: int, payload: bytes = b"", *, flags: int = 0, sequence: int = 0, offset: int = 0) -> None:
        """Send one frame; silently nothing on a closed link (its owner has been told)."""
        if not self.closed:
            self._transport.write(
                wire.pack(
                    kind,
                    payload,
                    flags=flags,
                    sequence=sequence,
                    offset=offset,
                    integrity=self.integrity and self.open,
                )
            )

    def send_in_place(self, kind: int, payload: bytes, *, sequence: int, offset: int) -> None:
        """`send` of a payload that is long enough for a copy to count."""
        if not self.closed:
            header = wire.pack_header(kind, payload, 0, 0, sequence, offset, self.integrity and self.open)
            self._transport.writelines((header, payload))

    def send_map(self, kind: int, message: dict[str, Any]) -> None:
        """Send a control frame."""
        self.send(kind, wire.pack_map(message))

    @property
    def congested(self) -> bool:
        """Whether bytes wait in this process because the socket takes no more."""
        return self._transport.get_write_buffer_size() > 0

    def when_drained(self, callback: Callable[[], None]) -> None:
        """Call back once everything sent so far is in the socket's buffer (at once if it is already)."""
        if self.closed or not self.congested:
            callback()
        else:
            self._drained.append(callback)

    async def drained(self) -> None:
        """Wait until everything sent so far is in the socket's buffer, or the link is closed."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.when_drained(lambda: None if future.done() else future.set_result(None))
        await future

    def pause_reading(self) -> None:
        """Take nothing more from the peer, for less than the timeout; it hears this node meanwhile."""
        if not self.closed and not self._transport.is_closing():
            self._heard = True  # it is not the peer that is silent
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Go on with that."""
        if not self.closed and not self._transport.is_closing():
            self._heard = True
            self._transport.resume_reading()

    # ── waiting for the peer's word ──────────────────────────────────────────────────────────────────────────

    def expect(self, *kinds: int) -> None:
        """Keep frames of these kinds for `receive` (called before the peer can send them)."""
        for kind in kinds:
            self._inbox[kind] = collections.deque()
            self.handlers[kind] = self._inbox_handler(kind)

    async def receive(self, kind: int) -> tuple[int, int, int, bytes]:
        """The next frame of an expected kind: (flags, sequence, offset, payload). Raises LinkLost."""
        inbox = self._inbox[kind]
        if inbox:
            return inbox.popleft()
        self._raise_if_closed()
        future = self._waiting[kind] = asyncio.get_running_loop().create_future()
        try:
            frame: tuple[int, int, int, bytes] = await future
            return frame
        finally:
            self._waiting.pop(kind, None)

    async def request(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Ask the peer's resource to do something; its answer. Raises LinkLost, TimeoutError, or the peer's refusal."""
        self._raise_if_closed()
        self._request_number += 1
        number = self._request_number
        future = self._requests[number] = asyncio.get_running_loop().create_future()
        try:
            self.send(wire.REQUEST, wire.pack_map(message), sequence=number)
            async with asyncio.timeout(timeout_s):
                reply: dict[str, Any] = await future
        finally:
            self._requests.pop(number, None)
        if "error" in reply:
            raise ReplicaError(str(reply["error"]))
        return reply

    def _inbox_handler(self, kind: int) -> FrameHandler:
        inbox = self._inbox[kind]

        def handle(flags: int, sequence: int, offset: int, payload: memoryview) -> None:
            frame = (flags, sequence, offset, bytes(payload))
            future = self._waiting.get(kind)
            if future is not None and not future.done():
                future.set_result(frame)
            else:
                inbox.append(frame)

        return handle

    def _on_reply(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        future = self._requests.get(sequence)
        if future is not None and not future.done():
            future.set_result(wire.unpack_map(payload))

    def _raise_if_closed(self) -> None:
        if self.closed:
            raise LinkLost(f"the connection to {self._settings.identity.peer} was lost: {self.close_reason}")

    # ── asyncio's side ───────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.connected = True
        # Everything is written at once, not at the end of the loop's round: the peer works while we write locally.
        self._transport.set_write_buffer_limits(high=0)
        self._timer = asyncio.get_running_loop().call_later(GREETING_TIMEOUT_S, self._greeting_timed_out)
        self.send(wire.HELLO, self._hello)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view[self._end : self._end + RECEIVE_BYTES]

    def buffer_updated(self, nbytes: int) -> None:
        self._heard = True
        self._end += nbytes
        try:
            if self.open:
                self._deliver()
            else:
                self._greet()
        except wire.ProtocolError as error:
            self._fail(str(error))
        self._compact()

    def eof_received(self) -> bool:
        self.close("the peer closed the connection.")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, ReplicaError):  # TLS has not come about, and there never was a connection
            self.close(str(exc))
        elif isinstance(exc, TlsFailure):
            self.close(f"TLS with {self._settings.identity.peer} failed: {exc}.")
        else:
            self.close(f"the connection broke ({exc})." if exc else "the peer closed the connection.")

    def pause_writing(self) -> None:
        """The socket is full; `congested` says so to whoever must hold back."""

    def resume_writing(self) -> None:
        callbacks, self._drained = self._drained, []
        for callback in callbacks:
            callback()

    # ── frames ───────────────────────────────────────────────────────────────────────────────────────────────

    def _deliver(self) -> None:
        """Parse and hand over every whole frame in the buffer."""
        view, start, end = self._view, self._start, self._end
        unpack, header_bytes = wire.HEADER.unpack_from, wire.HEADER_BYTES
        writes: list[tuple[int, memoryview]] = []
        last = 0
        while end - start >= header_bytes:
            kind, flags, volume, length, sequence, offset, check = unpack(view, start)
            if length > wire.MAX_PAYLOAD_BYTES or volume:
                raise wire.ProtocolError(
                    f"a {wire.kind_name(kind)} frame of {length} bytes for volume {volume} is out of bounds."
                )
            stop = start + header_bytes + length
            if stop > end:
                break
            payload = view[start + header_bytes : stop]
            self._start = start = stop
            if self.integrity and check != wire.checksum(kind, flags, volume, length, sequence, offset, payload):
                raise wire.ProtocolError(f"a {wire.kind_name(kind)} frame arrived with a wrong checksum.")
            if kind == wire.WRITE:
                writes.append((offset, payload))
                last = sequence
                continue
            if writes:
                self._deliver_writes(writes, last)
                writes = []
            self._dispatch(kind, flags, sequence, offset, payload)
            if self.closed:
                return
        if writes:
            self._deliver_writes(writes, last)

    def _deliver_writes(self, writes: list[tuple[int, memoryview]], last: int) -> None:
        if self.on_writes is None:
            raise wire.ProtocolError("a WRITE frame arrived where none is due.")
        self.on_writes(writes, last)

    def _dispatch(self, kind: int, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        handler = self.handlers.get(kind)
        if handler is not None:
            handler(flags, sequence, offset, payload)
        elif kind == wire.PING:
            self.send(wire.PONG)
        elif kind == wire.ERROR:
            self.meant_to_end = bool(flags & wire.FLAG_AGAIN)
            self.close(f"the peer says: {_sentence(payload)}")
        elif kind != wire.PONG:
            raise wire.ProtocolError(f"a {wire.kind_name(kind)} frame arrived where none is due.")

    def _compact(self) -> None:
        """Keep room for a whole frame behind what is still incomplete."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start:
            rest = self._end - self._start
            self._view[:rest] = self._view[self._start : self._end]
            self._start, self._end = 0, rest

    # ── greeting ─────────────────────────────────────────────────────────────────────────────────────────────

    def _greet(self) -> None:
        """Take frames one by one, each small, until the peer has proven itself."""
        while not self.open and not self.closed and self._end - self._start >= wire.HEADER_BYTES:
            kind, _, _, length, _, _, _ = wire.HEADER.unpack_from(self._view, self._start)
            if kind == TLS_HANDSHAKE:
                identity = self._settings.identity
                raise wire.ProtocolError(
                    f"{identity.peer} uses TLS on the peer link and {identity.node} does not: give both the same `tls`."
                )
            if length > wire.MAX_GREETING_BYTES or kind not in (wire.HELLO, wire.AUTH, wire.ERROR):
                raise wire.ProtocolError("the other end does not speak the link protocol.")
            stop = self._start + wire.HEADER_BYTES + length
            if stop > self._end:
                return
            payload = bytes(self._view[self._start + wire.HEADER_BYTES : stop])
            self._start = stop
            if kind == wire.ERROR:
                self.close(f"the peer says: {_sentence(payload)}")
            elif self._phase is not None:
                self._phase(kind, payload)
        if self.open:
            self._deliver()

    def _greet_hello(self, kind: int, payload: bytes) -> None:
        if kind != wire.HELLO:
            raise wire.ProtocolError("the other end did not begin with HELLO.")
        auth.check_hello(self._settings.identity, payload)
        self._peer_hello = payload
        self._phase = self._greet_auth
        mac = auth.proof(self._settings.secret, dialer=self._dialer, own_hello=self._hello, peer_hello=self._peer_hello)
        self.send(wire.AUTH, mac)

    def _greet_auth(self, kind: int, payload: bytes) -> None:
        if kind != wire.AUTH:
            raise wire.ProtocolError("the other end did not prove that it knows the cluster's secret.")
        known = auth.verify(
            self._settings.secret,
            payload,
            dialer=self._dialer,
            own_hello=self._hello,
            peer_hello=self._peer_hello,
        )
        if not known:
            raise wire.ProtocolError(
                f"{self._settings.identity.node} and {self._settings.identity.peer} have different cluster secrets: "
                "copy the secret-file of one to the other."
            )
        hellos = (self._hello, self._peer_hello) if self._dialer else (self._peer_hello, self._hello)
        self.session = auth.session_id(self._settings.secret, dialer_hello=hellos[0], accepter_hello=hellos[1])
        self._phase = None
        rest = self._view[self._start : self._end]
        self._view = memoryview(bytearray(RECEIVE_BUFFER_BYTES))
        self._view[: len(rest)] = rest
        self._start, self._end = 0, len(rest)
        self.open = True
        self._watch()
        self._owner.link_opened(self)

    def _greeting_timed_out(self) -> None:
        self._fail(f"the greeting was not complete within {GREETING_TIMEOUT_S:.0f} s.")

    # ── liveness ─────────────────────────────────────────────────────────────────────────────────────────────

    def _watch(self) -> None:
        """(Re)start the liveness timer. Four ticks in a timeout: the cut is found within 1.25 × timeout_s."""
        if self._timer is not None:
            self._timer.cancel()
        self._tick_s = min(self._settings.timeout_s / 4, self._settings.ping_interval_s)
        self._timer = asyncio.get_running_loop().call_later(self._tick_s, self._tick)

    def _tick(self) -> None:
        if self._heard:
            self._heard = False
            self._silent_s = 0.0
        else:
            self._silent_s += self._tick_s
            if self._silent_s >= self._settings.timeout_s:
                self.close(f"nothing was heard from the peer for {self._settings.timeout_s:g} s.")
                return
        self.send(wire.PING)
        self._watch()

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────

    def _fail(self, sentence: str, flags: int = 0) -> None:
        """Tell the peer why, then close."""
        with contextlib.suppress(OSError, RuntimeError):
            self.send(wire.ERROR, sentence.encode(), flags=flags)
        self.close(sentence)

    def refuse(self, sentence: str, *, again: bool = False) -> None:
        """Close an open link with a reason the peer is told; `again`: only to negotiate anew."""
        self.meant_to_end = True
        self._fail(sentence, wire.FLAG_AGAIN if again else 0)

    def close(self, reason: str) -> None:
        """End the link now. Everything that waits on it learns of it; nothing more is delivered."""
        if self.closed:
            return
        was_open = self.open
        self.closed = True
        self.open = False
        self.close_reason = reason
        self.handlers = {}
        self.on_writes = None
        if self._timer is not None:
            self._timer.cancel()
        if self.connected:
            self._transport.close()
            # A close that the socket cannot finish (full buffer, dead peer) must not linger.
            asyncio.get_running_loop().call_later(1.0, self._transport.abort)
        lost = LinkLost(f"the connection to {self._settings.identity.peer} was lost: {reason}")
        futures: list[asyncio.Future[Any]] = [*self._waiting.values(), *self._requests.values()]
        for future in futures:
            if not future.done():
                future.set_exception(lost)
        self.resume_writing()
        if was_open:
            log.info("session %016x ended: %s", self.session, reason)
        self._owner.link_closed(self, reason)


def _sentence(payload: bytes | memoryview) -> str:
    """The text of an ERROR. It may be a stranger's, and goes into logs and the status: one line, and harmless there."""
    text = bytes(payload[:500]).decode("utf-8", "replace")
    return "".join(character if character.isprintable() else " " for character in text).strip() or "nothing"
