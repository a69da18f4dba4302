"""TLS of the peer link: both ends show a certificate of the cluster's CA that names their node. TLS 1.3, nothing less.

The greeting with the shared secret (`replica.auth`) goes on inside. Whoever is refused is told why: by an alert of TLS,
or, where there is a connection to say it on, by an ERROR frame as in `replica.link`.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from typing import Final, cast

from nbdserver.tls import TlsFiles
from nbdserver.tls_transport import NotTls, TlsFailure, TlsTransport
from replica import peer_names, wire
from replica.errors import ReplicaError

#: Connections that shake hands at once; more are turned away.
MAX_HANDSHAKES: Final = 8
HANDSHAKE_TIMEOUT_S: Final = 5.0
#: How long one that was refused has to read why.
_LINGER_S: Final = 1.0

ProtocolFactory = Callable[[], asyncio.BaseProtocol]
Finished = Callable[[ReplicaError | None], None]


class LinkTls:
    """The TLS of one node, for both roles. Raises TlsFileError."""

    def __init__(self, files: TlsFiles, node: str, peer: str) -> None:
        self.node = node
        self.peer = peer
        self.server = self._context(ssl.PROTOCOL_TLS_SERVER, files)
        self.server.num_tickets = 0  # nothing is resumed
        self.client = self._context(ssl.PROTOCOL_TLS_CLIENT, files)

    @staticmethod
    def _context(protocol: int, files: TlsFiles) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        # A node is known by its name, wherever it is: `replica.peer_names` compares that.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        files.load_into(context)
        return context

    def refusal(self, transport: TlsTransport) -> str:
        """Why the other end's (valid) certificate will not do; "" if it names the peer."""
        other = peer_names.refusal(transport.peer_certificate, self.peer)
        if not other:
            return ""
        return f"{self.node} expected {self.peer}'s certificate at the other end of the link, and {other}."

    def sentence(self, failure: TlsFailure) -> str:
        """Why there is no TLS, for the log and for the other end."""
        if isinstance(failure, NotTls):
            return f"{self.node} uses TLS on the peer link and {self.peer} does not: give both the same `tls`."
        return f"TLS with {self.peer} failed: {failure}."


class TlsHandshake(asyncio.BufferedProtocol):
    """One connection from its beginning until TLS is there; it then belongs to what `factory` makes.

    `finished` is told once: None when that is so, or why it came to nothing.
    """

    def __init__(self, tls: LinkTls, factory: ProtocolFactory, finished: Finished, *, server_side: bool) -> None:
        self._tls = tls
        self._factory = factory
        self._finished: Finished | None = finished
        self._server_side = server_side
        self._timer: asyncio.TimerHandle | None = None
        self._below: asyncio.Transport
        self._transport: TlsTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._below = cast(asyncio.Transport, transport)
        self._timer = asyncio.get_running_loop().call_later(HANDSHAKE_TIMEOUT_S, self._timed_out)
        context = self._tls.server if self._server_side else self._tls.client
        self._transport = TlsTransport(self._below, context, server_side=self._server_side, finished=self._shaken)

    def abort(self) -> None:
        """Give up, and tell nobody."""
        self._finished = None
        if self._timer is not None:  # it has begun
            self._timer.cancel()
            self._below.abort()

    def _timed_out(self) -> None:
        self._tell(f"TLS with {self._tls.peer} failed: no handshake within {HANDSHAKE_TIMEOUT_S:g} s.")
        self._below.abort()

    def _shaken(self, failure: TlsFailure | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if failure is not None:
            sentence = self._tls.sentence(failure)
            if isinstance(failure, NotTls) and self._server_side:
                self._below.write(wire.pack(wire.ERROR, sentence.encode()))  # in plain, as the other end speaks
            self._tell(sentence)
            return
        refusal = self._tls.refusal(self._transport)
        if refusal:
            self._transport.write(wire.pack(wire.ERROR, refusal.encode()))
            self._transport.write_eof()
            asyncio.get_running_loop().call_later(_LINGER_S, self._transport.abort)
        else:
            protocol = self._factory()
            self._transport.set_protocol(protocol)
            protocol.connection_made(self._transport)
        self._tell(refusal)

    def _tell(self, sentence: str) -> None:
        finished, self._finished = self._finished, None
        if finished is not None:
            finished(ReplicaError(sentence) if sentence else None)


class TlsAcceptor:
    """The factory of a listener: each connection shakes hands first, and then belongs to what `factory` makes.

    What `factory` makes is told of a handshake that failed, too: by `connection_lost` alone, with a ReplicaError.
    """

    def __init__(self, tls: LinkTls, factory: ProtocolFactory) -> None:
        self._tls = tls
        self._factory = factory
        self._under_way: set[TlsHandshake] = set()

    def __call__(self) -> asyncio.BaseProtocol:
        if len(self._under_way) >= MAX_HANDSHAKES:
            return _TurnedAway()

        def finished(problem: ReplicaError | None) -> None:
            self._under_way.discard(handshake)
            if problem is not None:
                cast(asyncio.BufferedProtocol, self._factory()).connection_lost(problem)

        handshake = TlsHandshake(self._tls, self._factory, finished, server_side=True)
        self._under_way.add(handshake)
        return handshake

    def close(self) -> None:
        """Drop those that still shake hands."""
        for handshake in self._under_way:
            handshake.abort()
        self._under_way.clear()


async def dial(tls: LinkTls, connect: Callable[[ProtocolFactory], Awaitable[object]], factory: ProtocolFactory) -> None:
    """Connect by `connect` and shake hands; returns when what `factory` makes has the connection.

    Raises ReplicaError with why there is no TLS, and what `connect` raises.
    """
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def finished(problem: ReplicaError | None) -> None:
        if done.done():
            return
        if problem is None:
            done.set_result(None)
        else:
            done.set_exception(problem)

    handshake = TlsHandshake(tls, factory, finished, server_side=False)
    try:
        await connect(lambda: handshake)
        await done
    except asyncio.CancelledError:
        handshake.abort()
        raise


class _TurnedAway(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()
