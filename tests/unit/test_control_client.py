"""The client's end of the control socket, against daemons that are away, slow or talk nonsense."""

import contextlib
import os
import socket
import threading
from pathlib import Path
from typing import Any

import msgpack
import pytest

from replica.control import ControlTimeout, NotRunning, call
from replica.errors import ReplicaError


@pytest.fixture
def path(short_dir: Path) -> Path:
    return short_dir / "run/node1/r0.sock"


def test_nobody_serves(path: Path) -> None:
    with pytest.raises(NotRunning, match=r"replicad r0 is not running on this node .* `replicad r0`"):
        call(path, "status")
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(NotRunning, match="is not running"):
        call(path, "status")
    with pytest.raises(ReplicaError, match="cannot connect to"):
        call(path.parent / ("x" * 200), "status")


def test_no_permission(path: Path) -> None:
    path.parent.mkdir(parents=True)
    user = os.geteuid()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        path.chmod(0)
        if user == 0:  # whom no mode keeps out
            os.seteuid(65534)
        try:
            with pytest.raises(ReplicaError, match="no permission to use"):
                call(path, "status")
        finally:
            os.seteuid(user)


@contextlib.contextmanager
def scripted(path: Path, answer: bytes, hold: bool = False) -> Any:
    """A listener that answers the first request with raw bytes, then closes (or holds the connection)."""
    path.parent.mkdir(parents=True)
    done = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)
                if hold:
                    done.wait(20)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (b"", "went away before it answered status"),
        (msgpack.packb({"event": {"a": 1}}), "went away before it answered status"),
        (msgpack.packb({"ok": "x" * 100})[:50], "went away"),
        (msgpack.packb("hello"), "unknown form"),
        (msgpack.packb({"error": 5}), "unknown form"),
        (b"\xc1", "no msgpack"),
        (b"\xdf\xff\xff\xff\xff", "do both ends run the same version"),
    ],
)
def test_a_daemon_that_answers_nonsense(path: Path, answer: bytes, part: str) -> None:
    with scripted(path, answer), pytest.raises(ReplicaError, match=part):
        call(path, "status")


def test_the_time_is_limited_as_a_whole(path: Path) -> None:
    events: list[dict[str, Any]] = []
    with (
        scripted(path, msgpack.packb({"event": {"a": 1}}), hold=True),
        pytest.raises(ControlTimeout, match=r"has not answered watch within 0\.2 s"),
    ):
        call(path, "watch", on_event=events.append, timeout_s=0.2)
    assert events == [{"a": 1}]


@pytest.mark.parametrize("error", [ConnectionResetError("mine"), TimeoutError("mine"), ValueError("mine")])
def test_what_the_event_function_raises_passes_through(path: Path, error: Exception) -> None:
    def raising(event: dict[str, Any]) -> None:
        raise error

    with (
        scripted(path, msgpack.packb({"event": {}}), hold=True),
        pytest.raises(type(error), match="mine"),
    ):
        call(path, "watch", on_event=raising, timeout_s=10)
