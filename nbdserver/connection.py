"""One client connection: the handshake, then a RequestEngine, then an orderly end."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Protocol, cast

from nbdserver.client_identity import Claimant, ClientIdentity, fence
from nbdserver.engine import RequestEngine
from nbdserver.export import Export
from nbdserver.handshake import GREETING, Directory, Handshake, Opened, StartTls, TlsMode
from nbdserver.limits import Limits
from nbdserver.receive_buffer import ReceiveBuffer
from nbdserver.socket_options import describe_peer, tune_socket
from nbdserver.tls import ServerTls
from nbdserver.tls_transport import TlsFailure, TlsTransport

log = logging.getLogger("nbdserver")


class Owner(Directory, Protocol):
    """The server, as a connection sees it."""

    @property
    def claimants(self) -> Iterable[Claimant]: ...
    def admit(self, connection: "Connection") -> bool: ...
    def finished(self, connection: "Connection") -> None: ...


class Connection(asyncio.BufferedProtocol):
    """Implements `nbdserver.export.ExportClient`.

    `closed` is set when the transport is gone and none of its requests is under way any more.
    """

    def __init__(self, owner: Owner, limits: Limits, tls: ServerTls | None = None) -> None:
        self.peer_name = "a client"
        self.closed = asyncio.Event()
        self.identity: ClientIdentity | None = None
        self._claiming: asyncio.Task[None] | None = None
        self._owner = owner
        self._limits = limits
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._received = ReceiveBuffer()
        self._handshake: Handshake | None = Handshake(owner, tls.mode if tls else TlsMode.OFF)
        self._export: Export | None = None
        self._engine: RequestEngine | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._is_lost = False
        self._is_half_closed = False
        self._drained: asyncio.Future[None] | None = None

    # ---- transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.peer_name = describe_peer(self._transport)
        if not self._owner.admit(self):
            self._transport.abort()
            return
        tune_socket(self._transport)
        self._transport.set_write_buffer_limits(high=self._limits.unsent_reply_bytes)
        self._after(self._limits.handshake_timeout_s, self._handshake_timed_out)
        self._transport.write(GREETING)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._received.room()

    def buffer_updated(self, nbytes: int) -> None:
        self._received.end += nbytes
        if self._engine is None:
            self._shake_hands()
        elif self._is_half_closed:
            self._received.clear()
        else:
            self._engine.process()

    def eof_received(self) -> bool:
        """The client sends nothing more; it may still wait for replies."""
        if self._engine is None or self._is_half_closed:
            return False
        self._engine.stop()
        return True

    def pause_writing(self) -> None:
        if self._engine is not None:
            self._engine.pause_sending()

    def resume_writing(self) -> None:
        if self._engine is not None:
            self._engine.resume_sending()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        if self._engine is not None and isinstance(exc, TlsFailure):
            log.warning("dropping %s: %s", self.peer_name, exc)
        for timer in self._timers:
            timer.cancel()
        if self._claiming is not None:
            self._claiming.cancel()
        if self._engine is None:
            self._finish()
        else:
            self._engine.lost()

    @property
    def is_open(self) -> bool:
        """The handshake is over."""
        return self._engine is not None

    # ---- ExportClient

    async def drain(self) -> None:
        """See ExportClient. A client that does not take its replies is dropped after a while."""
        if self._drained is None:
            self._drained = self._loop.create_future()
            if self._engine is None:
                self.abort()
                self._drained.set_result(None)
            elif not self.closed.is_set():
                self._after(self._limits.drain_timeout_s, self._drain_timed_out)
                self._engine.drain()
            else:
                self._drained.set_result(None)
        await asyncio.shield(self._drained)

    def abort(self) -> None:
        """See ExportClient."""
        self._transport.abort()

    def revoke(self) -> None:
        """See `client_identity.Claimant`."""
        log.info("dropping %s: its client has replaced this connection", self.peer_name)
        self._handshake = None
        if self._engine is not None:
            self._engine.stop()
        self.abort()

    # ---- handshake

    def _handshake_timed_out(self) -> None:
        if self._engine is None:
            seconds = self._limits.handshake_timeout_s
            log.warning("dropping %s: it did not finish the handshake in %g s", self.peer_name, seconds)
            self.abort()

    def _shake_hands(self) -> None:
        received, handshake = self._received, self._handshake
        data = received.view[received.start : received.end]
        received.clear()
        if handshake is None:  # it is being closed
            return
        self._go_on(handshake, handshake.feed(data))

    def _go_on(self, handshake: Handshake, output: bytes) -> None:
        if output:
            self._transport.write(output)
        if handshake.claim is not None:
            self._transport.pause_reading()
            self._claiming = self._loop.create_task(self._claim(handshake, handshake.claim))
            return
        outcome = handshake.outcome
        if outcome is None:
            return
        self._handshake = None
        if isinstance(outcome, Opened):
            self._received.put_back(handshake.rest)
            self._open(outcome)
        elif isinstance(outcome, StartTls):
            self._start_tls(handshake.secured())
        else:
            log.info("closing the connection of %s: %s", self.peer_name, outcome.reason)
            self._close()

    async def _claim(self, handshake: Handshake, identity: ClientIdentity) -> None:
        self.identity = identity
        refusal = await fence(identity, self._owner.claimants)
        self._claiming = None
        if self._handshake is handshake and not self._transport.is_closing():
            self._transport.resume_reading()
            self._go_on(handshake, handshake.claimed(refusal))

    def _start_tls(self, handshake: Handshake) -> None:
        assert self._tls is not None  # without it, STARTTLS is not understood
        self._handshake = handshake
        transport = TlsTransport(self._transport, self._tls.context, server_side=True, finished=self._tls_finished)
        transport.set_protocol(self)
        self._transport = transport

    def _tls_finished(self, failure: TlsFailure | None) -> None:
        if failure is not None:
            log.warning("closing the connection of %s: %s", self.peer_name, failure)
            self._handshake = None

    def _open(self, opened: Opened) -> None:
        export = opened.export
        log.info("%s opened export %r", self.peer_name, export.name)
        self._export = export
        self._engine = RequestEngine(
            export,
            opened.dialect,
            self._transport,
            self._received,
            self._limits,
            self.peer_name,
            self._settled,
        )
        export.opened(self)
        self._engine.process()

    # ---- the end

    def _settled(self) -> None:
        """Nothing is under way any more and no request will be taken."""
        if self._is_lost:
            self._finish()
        elif self._drained is not None and not self._drained.done():
            self._half_close()
        elif not self._is_half_closed:
            self._close()

    def _half_close(self) -> None:
        """Say that nothing more will come, and give a client in the middle of a request time to see it.

        Closing with unread input would make the kernel send a reset, which can destroy replies that the
        client has not read yet.
        """
        assert self._drained is not None
        self._drained.set_result(None)
        self._is_half_closed = True
        self._received.clear()
        if self._transport.is_closing():
            return
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._transport.resume_reading()
        self._after(self._limits.linger_s, self._transport.close)

    def _drain_timed_out(self) -> None:
        """Drop a client that is what the drain waits for; storage may take the time that it needs."""
        if self._is_half_closed or (self._engine is not None and self._engine.waits_for_client):
            self.abort()
        else:
            self._after(self._limits.drain_timeout_s, self._drain_timed_out)

    def _close(self) -> None:
        """Close after sending what is left, unless the client does not take it."""
        if not self._transport.is_closing():
            self._transport.close()
            self._after(self._limits.drain_timeout_s, self.abort)

    def _finish(self) -> None:
        if self.closed.is_set():
            return
        self.closed.set()
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._owner.finished(self)
        if self._export is not None:
            log.info("%s is gone", self.peer_name)
            self._export.closed(self)

    def _after(self, delay_s: float, call: Callable[[], None]) -> None:
        self._timers.append(self._loop.call_later(delay_s, call))
