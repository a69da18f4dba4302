"""An address that clients connect to and that follows the Primary, as a cluster's IP address does."""

import contextlib
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.cluster.cluster import PATIENCE_S, Node

_RECEIVE_BYTES = 16 << 10


class FollowingAddress:
    """A TCP port whose connections go to the node that it was last moved to.

    `hold_after` stops what clients send once so many bytes have passed, so that a test can let a node fail in the
    middle of a client's work, however fast that is. The rest of it dies with the connection, or goes on at `release`.
    """

    def __init__(self, node: Node) -> None:
        self._target: Path = node.nbd_path
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self.export = node.cluster.resource
        self.uri = f"nbd://127.0.0.1:{self.port}/{self.export}"
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._left_bytes = 1 << 62
        self._reached = threading.Event()
        self._may_pass = threading.Event()
        self._may_pass.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        with self._lock:
            sockets = [self._listener, *self._sockets]
        for one in sockets:  # shutdown, not close: it wakes a thread that is blocked on the socket
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def move(self, node: Node) -> None:
        """New connections go to this node."""
        self._target = node.nbd_path

    def hold_after(self, count: int) -> None:
        """Let so many more bytes of the clients pass, and then none."""
        self._reached.clear()
        self._may_pass.clear()
        self._left_bytes = count

    def wait_held(self) -> None:
        """Return when clients are being held."""
        assert self._reached.wait(PATIENCE_S), "the clients have sent less than they were to be held after"

    def release(self) -> None:
        """Let everything pass again."""
        self._left_bytes = 1 << 62
        self._may_pass.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                try:
                    far.connect(str(self._target))
                except OSError:  # nobody serves there (any more)
                    near.close()
                    far.close()
                    continue
                with self._lock:
                    self._sockets += [near, far]
                threading.Thread(target=self._pump, args=(near, far, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, forward: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_RECEIVE_BYTES):
                if forward:
                    with self._lock:
                        self._left_bytes -= len(data)
                        held = self._left_bytes < 0
                    if held:
                        self._reached.set()
                        self._may_pass.wait()
                sink.sendall(data)
        # The end of either direction is the end of the connection: NBD has no use for half of one.
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
