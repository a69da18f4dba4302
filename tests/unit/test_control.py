"""The control socket with both its ends, and with clients that are no clients (see also test_control_client)."""

import asyncio
import contextlib
import logging
import os
import random
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import uvloop

from replica import control
from replica.control import ControlServer, SendEvent, call
from replica.errors import ReplicaError


class Daemon:
    """A handler with a verb for each thing that can happen, and what happened."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()
        self.started = asyncio.Event()
        self.release = asyncio.Event()
        self.finished: list[str] = []

    async def handle(self, verb: str, args: dict[str, Any], send_event: SendEvent) -> Any:
        self.started.set()
        match verb:
            case "echo":
                return args
            case "count":
                for number in range(args["to"]):
                    await send_event({"number": number})
                return "counted"
            case "refuse":
                raise ReplicaError("r0 cannot do that: try another thing")
            case "crash":
                raise ZeroDivisionError("the secret detail")
            case "unsendable":
                return object()
            case "hang" | "watch":
                try:
                    await self.release.wait()
                except asyncio.CancelledError:
                    self.cancelled.set()
                    raise
                self.finished.append(verb)
                return verb
            case "flood":
                while True:
                    await send_event({"data": bytes(10_000)})
        return None


@contextlib.asynccontextmanager
async def serving(path: Path) -> AsyncIterator[Daemon]:
    daemon = Daemon()
    server = ControlServer(path, daemon.handle)
    await server.start()
    try:
        yield daemon
    finally:
        await server.stop()


@pytest.fixture(params=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest) -> Callable[[Awaitable[Any]], Any]:
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    def run(work: Awaitable[Any]) -> Any:
        async def bounded() -> Any:
            async with asyncio.timeout(20):
                return await work

        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(bounded())

    return run


@pytest.fixture
def path(short_dir: Path) -> Path:
    return short_dir / "run/node1/r0.sock"


async def exchange(path: Path, data: bytes, end: bool = True) -> list[Any]:
    """Send raw bytes and return the messages that come back until the server closes."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    with contextlib.suppress(ConnectionError):
        writer.write(data)
        if end:
            writer.write_eof()
    unpacker = msgpack.Unpacker(raw=False)
    with contextlib.suppress(ConnectionError):
        unpacker.feed(await reader.read())
    writer.close()
    return list(unpacker)


def test_a_request_and_its_result(run: Any, path: Path) -> None:
    async def body() -> None:
        async with serving(path):
            args = {"force": True, "size": 1 << 40, "name": "é", "data": b"\x00\xff", "none": None}
            assert await asyncio.to_thread(call, path, "echo", args) == args
            assert await asyncio.to_thread(call, str(path), "echo") == {}

    run(body())


def test_events_come_in_order_before_the_result(run: Any, path: Path) -> None:
    async def body() -> None:
        events: list[dict[str, Any]] = []
        async with serving(path):
            result = await asyncio.to_thread(call, path, "count", {"to": 5000}, events.append)
            assert await asyncio.to_thread(call, path, "count", {"to": 3}) == "counted"
        assert result == "counted"
        assert events == [{"number": number} for number in range(5000)]

    run(body())


def test_a_refusal_is_the_answer_as_it_is(run: Any, path: Path) -> None:
    async def body() -> None:
        async with serving(path):
            with pytest.raises(ReplicaError) as caught:
                await asyncio.to_thread(call, path, "refuse")
        assert str(caught.value) == "r0 cannot do that: try another thing"

    run(body())


@pytest.mark.parametrize(("verb", "logged"), [("crash", "the secret detail"), ("unsendable", "TypeError")])
def test_a_fault_goes_to_the_log_and_one_sentence_to_the_client(
    run: Any, path: Path, caplog: pytest.LogCaptureFixture, verb: str, logged: str
) -> None:
    async def body() -> None:
        async with serving(path):
            with caplog.at_level(logging.ERROR), pytest.raises(ReplicaError) as caught:
                await asyncio.to_thread(call, path, verb)
            assert await asyncio.to_thread(call, path, "echo") == {}
        assert str(caught.value) == f"{verb} failed by a fault of replicad r0 itself: its log has the details"
        assert "Traceback" in caplog.text
        assert logged in caplog.text

    run(body())


GARBAGE = [
    (b"", "incomplete"),
    (msgpack.packb({"verb": "echo", "args": {}})[:-3], "incomplete"),
    (b"GET / HTTP/1.1\r\n\r\n", "not understood"),
    (b"\xc1" * 10, "no msgpack"),
    (b"\xff", "not understood"),
    (msgpack.packb(["verb"]), "not understood"),
    (msgpack.packb({}), "not understood"),
    (msgpack.packb({"verb": 1}), "not understood"),
    (msgpack.packb({"verb": "echo", "args": [1]}), "not understood"),
    (msgpack.packb({"verb": "echo", "args": {1: 2}}), "no msgpack"),
    (msgpack.packb({"verb": "echo", "more": 1}), "not understood"),
    (msgpack.packb({"verb": b"\xff\xfe".decode("latin1")}).replace(b"\xc3", b"\xff"), "no msgpack"),
    (msgpack.packb({"verb": "echo", "args": {"x": msgpack.ExtType(5, b"abc")}}), "no msgpack"),
    (b"\x81" * 5000, "no msgpack"),
    (msgpack.packb({"verb": "echo", "args": {"x": bytes(100_000)}}), "too long"),
    (b"\xdf\xff\xff\xff\xff", "no msgpack"),
    (b"\xdd\xff\xff\xff\xff", "no msgpack"),
    (b"\xdb\xff\xff\xff\xff" + bytes(100), "incomplete"),
]


@pytest.mark.parametrize(("data", "part"), GARBAGE, ids=[str(number) for number in range(len(GARBAGE))])
def test_garbage_is_answered_with_one_sentence(run: Any, path: Path, data: bytes, part: str) -> None:
    async def body() -> None:
        async with serving(path) as daemon:
            (answer,) = await exchange(path, data)
            assert answer.keys() == {"error"}
            assert part in answer["error"]
            assert "\n" not in answer["error"]
            assert not daemon.started.is_set()
            assert await asyncio.to_thread(call, path, "echo") == {}

    run(body())


def test_random_bytes_never_stop_the_server(run: Any, path: Path, rng: random.Random) -> None:
    async def body() -> None:
        async with serving(path):
            for _ in range(200):
                answers = await exchange(path, rng.randbytes(rng.choice((1, 5, 50, 500))))
                assert [answer.keys() for answer in answers] == [{"error"}]
            assert await asyncio.to_thread(call, path, "echo") == {}

    run(body())


def test_an_endless_request_is_cut_off(run: Any, path: Path) -> None:
    async def body() -> None:
        async with serving(path):
            # A string that announces more than it may: the server must not wait for, or keep, all of it.
            data = b"\x81\xa4verb\xdb\x7f\xff\xff\xff" + bytes(10 * control.MAX_REQUEST_BYTES)
            answers = await exchange(path, data, end=False)
            assert all("long" in answer["error"] or "msgpack" in answer["error"] for answer in answers)
            assert await asyncio.to_thread(call, path, "echo") == {}

    run(body())


def test_a_silent_client_is_sent_away(run: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "REQUEST_TIMEOUT_S", 0.05)

    async def body() -> None:
        async with serving(path):
            (answer,) = await exchange(path, b"\x82", end=False)
            assert "no complete request" in answer["error"]

    run(body())


async def ask_and_leave(path: Path, verb: str, daemon: Daemon) -> None:
    _, writer = await asyncio.open_unix_connection(str(path))
    writer.write(msgpack.packb({"verb": verb, "args": {}}))
    await daemon.started.wait()
    writer.close()
    await writer.wait_closed()


def test_watching_ends_when_the_client_leaves(run: Any, path: Path) -> None:
    async def body() -> None:
        async with serving(path) as daemon:
            await ask_and_leave(path, "watch", daemon)
            await daemon.cancelled.wait()

    run(body())


def test_a_change_is_finished_though_the_client_left(run: Any, path: Path) -> None:
    async def body() -> None:
        async with serving(path) as daemon:
            await ask_and_leave(path, "hang", daemon)
            assert await asyncio.to_thread(call, path, "echo") == {}
            assert not daemon.cancelled.is_set()
            daemon.release.set()
            while not daemon.finished:
                await asyncio.to_thread(call, path, "echo")
        assert daemon.finished == ["hang"]

    run(body())


def test_events_to_a_client_that_left_end_the_request(run: Any, path: Path) -> None:
    async def body() -> None:
        daemon = Daemon()
        ended = asyncio.Event()

        async def handle(verb: str, args: dict[str, Any], send_event: SendEvent) -> Any:
            try:
                return await daemon.handle(verb, args, send_event)
            finally:
                ended.set()

        server = ControlServer(path, handle)
        await server.start()
        await ask_and_leave(path, "flood", daemon)
        await ended.wait()
        await server.stop()

    run(body())


def test_stop_tells_the_clients_and_removes_the_socket(run: Any, path: Path) -> None:
    async def body() -> None:
        async with serving(path) as daemon:
            request = asyncio.create_task(exchange(path, msgpack.packb({"verb": "hang"}), end=False))
            await daemon.started.wait()
        (answer,) = await request
        assert answer["error"].startswith("replicad r0 stopped before it was done")
        assert not path.exists()
        async with serving(path):
            assert await asyncio.to_thread(call, path, "echo") == {}

    run(body())


def test_the_socket_is_for_its_owner_only(run: Any, path: Path) -> None:
    async def body() -> None:
        old = os.umask(0)
        try:
            async with serving(path):
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
                assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        finally:
            os.umask(old)

    run(body())


def test_a_socket_left_behind_is_replaced(run: Any, path: Path) -> None:
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def body() -> None:
        async with serving(path):
            assert await asyncio.to_thread(call, path, "echo") == {}

    run(body())


def test_a_second_daemon_is_refused_and_harms_nothing(run: Any, path: Path) -> None:
    async def body() -> None:
        async with serving(path):
            second = ControlServer(path, Daemon().handle)
            with pytest.raises(ReplicaError, match="another replicad r0 already runs for this node"):
                await second.start()
            await second.stop()
            assert await asyncio.to_thread(call, path, "echo") == {}

    run(body())


def test_what_is_no_socket_is_not_removed(run: Any, path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("precious")

    async def body() -> None:
        server = ControlServer(path, Daemon().handle)
        with pytest.raises(ReplicaError, match="is in the way of the control socket"):
            await server.start()
        path.unlink()
        await server.start()
        await server.stop()

    run(body())


def test_places_where_no_socket_can_be(run: Any, short_dir: Path) -> None:
    (short_dir / "file").write_text("")

    async def body() -> None:
        with pytest.raises(ReplicaError, match="set a shorter run-dir"):
            await ControlServer(short_dir / ("x" * 100) / "r0.sock", Daemon().handle).start()
        with pytest.raises(ReplicaError, match=r"cannot make the control socket .*: see run-dir"):
            await ControlServer(short_dir / "file" / "r0.sock", Daemon().handle).start()

    run(body())
