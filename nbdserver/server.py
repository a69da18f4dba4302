"""Listens on TCP and unix sockets and serves several exports by name."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
import sys
from collections.abc import Iterable
from typing import Any

from nbdserver.connection import Connection
from nbdserver.export import Export
from nbdserver.limits import Limits
from nbdserver.tls import ServerTls

log = logging.getLogger("nbdserver")

DEFAULT_PORT = 10809
# Connections that the kernel keeps until they are accepted: with few, a crowd delays everybody else by seconds.
_BACKLOG = 1024


class ListenError(Exception):
    """The server cannot listen where it was told to; the text is one sentence for the user."""


class Server:
    """NBD server on the running loop.

    `default` is what a client gets that asks for the name ""; without it that name is unknown. `tls`: whether clients
    may or have to use TLS; None: they cannot.
    """

    def __init__(
        self,
        exports: Iterable[Export] = (),
        *,
        default: Export | None = None,
        limits: Limits | None = None,
        tls: ServerTls | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self._tls = tls
        self.default = default
        self.connections: dict[Connection, None] = {}  # a set in the order of their coming
        self._exports = {export.name: export for export in exports}
        if default is not None:
            self._exports.setdefault(default.name, default)
        self._listeners: list[asyncio.AbstractServer] = []
        self._unix_paths: list[tuple[str, int]] = []  # with the inode, to remove only what is ours
        self._stopping = False

    # ---- exports (nbdserver.handshake.Directory)

    @property
    def shutting_down(self) -> bool:
        return self._stopping

    def find(self, name: str) -> Export | None:
        if name == "" and self.default is not None:
            return self.default
        return self._exports.get(name)

    def listing(self) -> Iterable[Export]:
        return list(self._exports.values())

    def add_export(self, export: Export) -> None:
        self._exports[export.name] = export

    def remove_export(self, name: str) -> None:
        """No new client gets it; those who have it open keep it (see ExportClient.drain)."""
        removed = self._exports.pop(name, None)
        if removed is not None and removed is self.default:
            self.default = None

    # ---- listening

    async def listen_tcp(self, host: str, port: int) -> list[tuple[str, int]]:
        """Listen; returns the addresses (port 0 takes a free port). Raises ListenError."""
        try:
            listener = await asyncio.get_running_loop().create_server(self._connection, host, port, backlog=_BACKLOG)
        except (OSError, OverflowError) as error:
            raise ListenError(_tcp_sentence(host, port, error)) from None
        self._listeners.append(listener)
        return [(name[0], name[1]) for name in (sock.getsockname() for sock in listener.sockets)]

    async def listen_unix(self, path: str) -> None:
        """Listen; a socket file that nobody listens on any more is replaced. Raises ListenError."""
        loop = asyncio.get_running_loop()
        if await self._is_listened_on(path):
            raise ListenError(f"{path} is in use by another server; stop that one or choose another path")
        try:
            listener = await loop.create_unix_server(self._connection, path, backlog=128)
            self._unix_paths.append((path, os.stat(path).st_ino))
        except OSError as error:
            text = os.strerror(error.errno) if error.errno else str(error)
            raise ListenError(f"cannot listen on {path}: {text}; choose another path") from None
        self._listeners.append(listener)

    async def _is_listened_on(self, path: str) -> bool:
        try:
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise ListenError(f"{path} exists and is not a socket; remove it or choose another path")
            transport, _ = await asyncio.get_running_loop().create_unix_connection(asyncio.Protocol, path)
        except OSError:
            return False
        transport.abort()
        return True

    async def listen_socket(self, sock: socket.socket) -> None:
        """Listen on a bound socket, such as one passed by systemd; a unix socket's file stays when it is closed."""
        loop = asyncio.get_running_loop()
        if sock.family == socket.AF_UNIX:
            keep_file: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
            listener: asyncio.AbstractServer = await loop.create_unix_server(self._connection, sock=sock, **keep_file)
        else:
            listener = await loop.create_server(self._connection, sock=sock)
        self._listeners.append(listener)

    def close_listeners(self) -> None:
        """Accept no further connection."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for path, inode in self._unix_paths:
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == inode:
                    os.unlink(path)
        self._unix_paths.clear()

    # ---- connections (nbdserver.connection.Owner)

    def _connection(self) -> Connection:
        return Connection(self, self.limits, self._tls)

    @property
    def claimants(self) -> Iterable[Connection]:
        return self.connections

    def admit(self, connection: Connection) -> bool:
        if self._stopping:
            return False
        if len(self.connections) >= self.limits.max_connections and not self._make_room():
            log.warning("refusing %s: there are %d clients already", connection.peer_name, len(self.connections))
            return False
        self.connections[connection] = None
        return True

    def _make_room(self) -> bool:
        """Drop the oldest connection that is still in the handshake: who only connects must not keep clients out, who
        need a few milliseconds for it.
        """
        for connection in self.connections:
            if not connection.is_open:
                del self.connections[connection]
                connection.abort()
                return True
        return False

    def finished(self, connection: Connection) -> None:
        self.connections.pop(connection, None)

    # ---- the end

    async def drain(self) -> None:
        """Let every connection finish what it has received, answer it and close (see ExportClient.drain)."""
        await asyncio.gather(*(connection.drain() for connection in list(self.connections)))

    async def stop(self) -> None:
        """Stop listening, drain, and wait until every connection is closed.

        Takes as long as the exports need for the requests under way, plus at most the drain and linger
        times of `limits` for clients that do not co-operate.
        """
        self._stopping = True
        self.close_listeners()
        await asyncio.gather(*(client.drain() for client in list(self.connections) if client.is_open))
        # Those who are still in the handshake were told so meanwhile (ERR_SHUTDOWN) and go last.
        connections = list(self.connections)
        await self.drain()
        for connection in connections:
            await connection.closed.wait()

    def abort(self) -> None:
        """Stop listening and drop every connection at once."""
        self._stopping = True
        self.close_listeners()
        for connection in list(self.connections):
            connection.abort()


def _tcp_sentence(host: str, port: int, error: OSError | OverflowError) -> str:
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return f"cannot listen on {where}: the port is in use; stop the other server or choose another port"
    if number == errno.EADDRNOTAVAIL:
        return f"cannot listen on {where}: this machine does not have that address; choose one that it has"
    if number == errno.EACCES:
        return f"cannot listen on {where}: not permitted; choose a port above 1023"
    text = os.strerror(number) if number and number > 0 else str(error)
    return f"cannot listen on {where}: {text}; choose another address"
