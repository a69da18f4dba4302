"""The control socket: how ``replicactl`` talks to the daemon of a resource, and to the cluster manager; both ends.

A stream of msgpack maps over a Unix socket, one request for each connection:

    client → {"verb": str, "args": {…}}
    daemon → {"event": {…}} any number of times, then {"ok": result} or {"error": "one sentence"}

Who may open the socket (mode 0600) may do everything, so the limits here guard against accidents (another
program, a half-written request), not against an enemy.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack

from replica.config_values import CLUSTER_MANAGER, CLUSTER_MANAGER_STEM, MAX_UNIX_PATH_BYTES
from replica.errors import ReplicaError

MAX_REQUEST_BYTES = 64 << 10
MAX_ANSWER_BYTES = 16 << 20
REQUEST_TIMEOUT_S = 10.0
# These only look: when their client goes away they are cancelled. Everything else changes the state of the
# resource and runs to its end, whoever is still there to hear of it.
WATCHING_VERBS = frozenset({"watch", "events"})

SendEvent = Callable[[dict[str, Any]], Awaitable[None]]
Handler = Callable[[str, dict[str, Any], SendEvent], Awaitable[Any]]

_log = logging.getLogger(__name__)


class ControlError(ReplicaError):
    """The control socket cannot be served or used, or the daemon refused the request."""


class NotRunning(ControlError):
    """No daemon serves this control socket."""


class WentAway(NotRunning):
    """The daemon has ended before it answered: whether it has done what it was asked is not known."""


class ControlTimeout(ControlError):
    """The daemon has not given its final answer in the time allowed."""


class ClientGone(Exception):
    """The client closed the connection while events were being sent to it."""


def _served_by(path: Path) -> str:
    """The program behind a control socket, as it is started."""
    return CLUSTER_MANAGER if path.stem == CLUSTER_MANAGER_STEM else f"replicad {path.stem}"


def new_unpacker(limit_bytes: int) -> msgpack.Unpacker:
    return msgpack.Unpacker(raw=False, strict_map_key=True, max_buffer_size=limit_bytes, max_ext_len=0)


class ControlServer:
    """Serves the control socket ``path``: ``handler(verb, args, send_event)`` answers each request.

    A `ReplicaError` from the handler is the client's answer as it is; any other exception is logged with its
    traceback, and the client gets one sentence.
    """

    def __init__(self, path: str | Path, handler: Handler) -> None:
        self.path = Path(path)
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._lock_descriptor: int | None = None
        self._connections: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Listen; raises `ReplicaError` when another daemon serves the socket or it cannot be made."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._take_lock()
            listener = _listening_socket(self.path)
            self._server = await asyncio.start_unix_server(self._connected, sock=listener)
        except OSError as error:
            await self.stop()
            problem = error.strerror or str(error)
            raise ControlError(f"cannot make the control socket {self.path} ({problem}): see run-dir") from None
        except ControlError:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop listening, end the requests under way (their clients are told), remove the socket."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self.path.unlink(missing_ok=True)
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        if self._lock_descriptor is not None:
            os.close(self._lock_descriptor)
            self._lock_descriptor = None

    def _take_lock(self) -> None:
        # The lock, not the socket, says who is alive: it ends with its process however that ends, so a socket
        # left behind can be replaced without a race between two daemons that start at the same time.
        descriptor = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ControlError(
                f"another {_served_by(self.path)} already runs for this node ({self.path}): stop it first"
            ) from None
        self._lock_descriptor = descriptor

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except asyncio.CancelledError:
            _write(writer, {"error": f"{_served_by(self.path)} stopped before it was done: ask again once it runs"})
        except (ClientGone, ConnectionError):
            _log.debug("a control client went away before its answer")
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def send_event(event: dict[str, Any]) -> None:
            if writer.is_closing():
                raise ClientGone
            _write(writer, {"event": event})
            try:
                await writer.drain()
            except ConnectionError:
                raise ClientGone from None

        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                verb, args = await _read_request(reader)
        except TimeoutError:
            _write(writer, {"error": f"no complete request came within {REQUEST_TIMEOUT_S:g} s: send one"})
            return
        except ControlError as error:
            _write(writer, {"error": str(error)})
            return
        async with _cancelled_at_end(reader) if verb in WATCHING_VERBS else contextlib.nullcontext():
            answer = await self._answer(verb, args, send_event)
        if not writer.is_closing():
            writer.write(answer)
            await writer.drain()

    async def _answer(self, verb: str, args: dict[str, Any], send_event: SendEvent) -> bytes:
        try:
            # Packed here because a result that cannot be sent is a fault of the handler like any other.
            return pack({"ok": await self._handler(verb, args, send_event)})
        except ClientGone:
            raise
        except ReplicaError as error:
            return pack({"error": str(error)})
        except Exception:
            _log.exception("the request %r failed", verb)
            return pack(
                {"error": f"{verb} failed by a fault of {_served_by(self.path)} itself: its log has the details"}
            )


def pack(message: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(message)
    return packed


def _write(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    if not writer.is_closing():
        writer.write(pack(message))


def _listening_socket(path: Path) -> socket.socket:
    """Bind ``path``, replacing a socket left behind (the caller holds the lock); raises OSError too."""
    if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
        raise ControlError(
            f"the control socket's path {path} is longer than {MAX_UNIX_PATH_BYTES} bytes: "
            "set a shorter run-dir in [cluster]"
        )
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ControlError(f"{path} is in the way of the control socket and is no socket: remove it")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Linux gives the new file the mode of the unbound socket (less the umask), so that at no instant,
        # not even between bind and chmod, somebody else can connect.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(path))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


@contextlib.asynccontextmanager
async def _cancelled_at_end(reader: asyncio.StreamReader) -> AsyncIterator[None]:
    """Cancel the current task when the client closes its connection; what it still sends is ignored."""
    task = asyncio.current_task()
    assert task is not None

    async def watch() -> None:
        with contextlib.suppress(ConnectionError):
            while await reader.read(4096):
                pass
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


async def _read_request(reader: asyncio.StreamReader) -> tuple[str, dict[str, Any]]:
    unpacker = new_unpacker(MAX_REQUEST_BYTES)
    received = 0
    while True:
        data = await reader.read(4096)
        if not data:
            raise ControlError("the request is incomplete: send one msgpack map")
        received += len(data)
        for request in messages(unpacker, data, "request"):
            match request:
                case {"verb": str(verb), **others} if others.keys() <= {"args"}:
                    args = others.get("args", {})
                    if isinstance(args, dict) and all(isinstance(key, str) for key in args):
                        return verb, args
            raise ControlError('the request is not understood: send {"verb": string, "args": {…}}')
        if received > MAX_REQUEST_BYTES:
            raise ControlError(f"the request is longer than {MAX_REQUEST_BYTES} bytes: send a shorter one")


def messages(unpacker: msgpack.Unpacker, data: bytes, what: str) -> Iterator[Any]:
    """The messages that ``data`` completes; raises `ControlError` for what is not msgpack or too long."""
    try:
        unpacker.feed(data)
        yield from unpacker
    except msgpack.BufferFull:
        raise ControlError(f"the {what} is too long: do both ends run the same version?") from None
    except (ValueError, msgpack.UnpackException):
        raise ControlError(f"the {what} is no msgpack: do both ends run the same version?") from None


def call(
    path: str | Path,
    verb: str,
    args: dict[str, Any] | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    timeout_s: float | None = None,
) -> Any:
    """Ask the daemon behind the control socket ``path`` and return its result (blocking).

    ``on_event`` gets each event; what it raises ends the request and passes through. Raises `NotRunning` when
    nobody serves the socket, `ControlTimeout` after ``timeout_s`` seconds without a final answer, and another
    `ReplicaError` with the daemon's own sentence when it refuses.
    """
    path = Path(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        for message in _exchange(connection, path, {"verb": verb, "args": args or {}}, timeout_s):
            match message:
                case {"event": dict(event)}:
                    if on_event is not None:
                        on_event(event)
                case _:
                    return answer(message, path)
    raise gone_away(path, verb)


def _exchange(connection: socket.socket, path: Path, request: dict[str, Any], timeout_s: float | None) -> Iterator[Any]:
    """Send ``request`` and yield the messages that come back, until the daemon closes the connection."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    unpacker = new_unpacker(MAX_ANSWER_BYTES)
    data = b"-"
    try:
        _limit(connection, deadline)
        _connect(connection, path)
        connection.sendall(pack(request))
        while data:
            _limit(connection, deadline)
            data = connection.recv(64 << 10)
            yield from messages(unpacker, data, "answer")
    except TimeoutError:
        waited = f"has not answered {request['verb']} within {timeout_s:g} s"
        raise ControlTimeout(f"{_served_by(path)} {waited}: it may still do it") from None
    except ConnectionError:
        return


def _limit(connection: socket.socket, deadline: float | None) -> None:
    """Let the next operation on the socket take no longer than until ``deadline`` (monotonic seconds)."""
    if deadline is not None:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError
        connection.settimeout(remaining_s)


def _connect(connection: socket.socket, path: Path) -> None:
    try:
        connection.connect(str(path))
    except TimeoutError:
        raise
    except OSError as error:
        raise connect_error(path, error) from None


def connect_error(path: Path, error: OSError) -> ControlError:
    """What it means that a control socket cannot be connected to."""
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        program = _served_by(path)
        unit = program.replace(" ", "@")
        return NotRunning(
            f"{program} is not running on this node (nobody serves {path}): "
            f"start it with `systemctl start {unit}` or `{program}`"
        )
    if isinstance(error, PermissionError):
        return ControlError(f"no permission to use {path}: run this as the user of {_served_by(path)} (root)")
    problem = error.strerror or str(error)
    return ControlError(f"cannot connect to {path} ({problem}): see run-dir in the configuration")


def answer(message: Any, path: Path) -> Any:
    """The result that a message brings, if it is no event; raises `ControlError` with the daemon's refusal."""
    match message:
        case {"ok": result}:
            return result
        case {"error": str(sentence)}:
            raise ControlError(sentence)
    raise ControlError(f"{_served_by(path)} gave an answer of an unknown form: see its log")


def gone_away(path: Path, verb: str) -> WentAway:
    """The daemon has closed the connection without an answer."""
    return WentAway(f"{_served_by(path)} went away before it answered {verb}: see its log")
