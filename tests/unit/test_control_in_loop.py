"""The client of control sockets for an event loop says what the blocking one says."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from replica import control_client
from replica.control import NotRunning, WentAway
from replica.errors import ReplicaError
from tests.unit.scripted_daemon import running


@pytest.fixture
def path(short_dir: Path) -> Path:
    """Of a control socket."""
    return short_dir / "run/node1/r0.sock"


def call(path: Path, verb: str, args: dict[str, Any] | None = None) -> Any:
    """In an event loop of its own."""
    return asyncio.run(asyncio.wait_for(control_client.call(path, verb, args), 30))


async def watched(path: Path) -> list[dict[str, Any]]:
    """All events."""
    return [event async for event in control_client.events(path, "watch")]


def test_results_and_refusals(path: Path) -> None:
    with running(path) as daemon:
        daemon.answers["status"] = {"role": "Primary"}
        assert call(path, "status") == {"role": "Primary"}
        assert call(path, "promote", {"force": True}) is None
        assert daemon.requests == [("status", {}), ("promote", {"force": True})]
        daemon.answers["promote"] = ReplicaError("r0 cannot: wait")
        with pytest.raises(ReplicaError, match=r"^r0 cannot: wait$"):
            call(path, "promote")


def test_events_until_the_end(path: Path) -> None:
    with running(path) as daemon:
        daemon.events, daemon.ends = [{"number": number} for number in range(3)], True
        assert asyncio.run(watched(path)) == daemon.events


def test_nobody_serves(path: Path) -> None:
    with pytest.raises(NotRunning, match=r"replicad r0 is not running on this node .* `replicad r0`"):
        call(path, "status")
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        async def cut() -> None:
            asking = asyncio.create_task(control_client.call(path, "status"))
            connection, _ = await asyncio.to_thread(listener.accept)
            connection.close()
            with pytest.raises(WentAway, match="went away before it answered status"):
                await asking

        asyncio.run(asyncio.wait_for(cut(), 30))
