"""What may be at the other end of the peer link besides a node: a stranger, a peer that misbehaves, a bad wire."""

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from replica import auth, wire
from tests.cluster.cluster import PATIENCE_S, Cluster

_RECEIVE_BYTES = 64 << 10


def dial(cluster: Cluster) -> socket.socket:
    """A bare connection to node2's peer port."""
    connection = socket.create_connection(("127.0.0.2", cluster.port), PATIENCE_S)
    connection.settimeout(PATIENCE_S)
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    """Everything until the other end closes (or resets) the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(_RECEIVE_BYTES):
            received += data
    return received


class FakePeer:
    """Speaks the link protocol as node1 would, with the real secret (or the one given), and does as the test says."""

    def __init__(self, cluster: Cluster, secret: bytes | None = None) -> None:
        self._socket = dial(cluster)
        self._buffer = b""
        secret = secret or cluster.key.read_bytes().strip()
        me = auth.Identity("test", cluster.resource, "node1", "node2", "C", False)
        mine = auth.hello(me, b"n" * auth.NONCE_BYTES)
        self.send(wire.pack(wire.HELLO, mine))
        theirs = self.receive(wire.HELLO)
        self.send(wire.pack(wire.AUTH, auth.proof(secret, dialer=True, own_hello=mine, peer_hello=theirs)))
        self.receive(wire.AUTH)

    def send(self, data: bytes) -> None:
        """These bytes."""
        self._socket.sendall(data)

    def receive(self, wanted: int) -> bytes:
        """The payload of the next frame of this kind; others are passed over."""
        while True:
            kind, payload = self.receive_any()
            if kind == wanted:
                return payload
            assert kind != wire.ERROR, payload.decode()

    def receive_any(self) -> tuple[int, bytes]:
        """The next frame: its kind and payload."""
        self._need(wire.HEADER_BYTES)
        kind, _, _, length, _, _, _ = wire.HEADER.unpack_from(self._buffer)
        self._need(wire.HEADER_BYTES + length)
        payload = self._buffer[wire.HEADER_BYTES : wire.HEADER_BYTES + length]
        self._buffer = self._buffer[wire.HEADER_BYTES + length :]
        return kind, payload

    def _need(self, count: int) -> None:
        while len(self._buffer) < count:
            data = self._socket.recv(_RECEIVE_BYTES)
            assert data, "node2 closed the connection"
            self._buffer += data

    def be_in_step(self) -> None:
        """Shake hands as a Primary whose copy is the same as node2's, so that writes are taken from then on."""
        state = wire.unpack_map(self.receive(wire.STATE))
        mine = {"role": "Primary", "disk": "UpToDate", "paused": False, "ran_on": False, "served": 0}
        self.send(wire.pack(wire.STATE, wire.pack_map({**mine, "side": {**state["side"], "is_primary": False}})))

    def close(self) -> None:
        """Vanish."""
        self._socket.close()


class Proxy:
    """Stands between the nodes on an address of its own; `spoil` may change what passes from node1 to node2."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.2", 0))
        self.port: int = self._listener.getsockname()[1]
        self.spoil: Callable[[bytes], bytes] = lambda data: data
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # shutdown, not close: it wakes a thread that is blocked on the socket.
        for connection in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._target)
                except OSError:
                    near.close()
                    continue
                self._sockets += [near, far]
                for pair in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: Any, sink: Any, forward: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_RECEIVE_BYTES):
                sink.sendall(self.spoil(data) if forward else data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
