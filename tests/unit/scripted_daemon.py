"""A control server whose answers are written down beforehand: what the commands are tested against."""

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from replica.control import ControlServer, SendEvent


def replicactl(*args: str | Path, timeout_s: float = 30) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does; its output is text."""
    command = [sys.executable, "-m", "replica.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


class ScriptedDaemon:
    """Answers each verb from ``answers`` (an exception is raised), and ``watch`` with the ``events`` in order.

    After the last event ``watch`` waits until its client leaves, unless ``ends`` is true.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        self.ends = False

    async def handle(self, verb: str, args: dict[str, Any], send_event: SendEvent) -> Any:
        self.requests.append((verb, args))
        if verb == "watch":
            for event in self.events:
                await send_event(event)
            if not self.ends:
                await asyncio.Event().wait()
        answer = self.answers.get(verb)
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextlib.contextmanager
def running(socket: Path) -> Iterator[ScriptedDaemon]:
    """Serve ``socket`` from a thread for as long as the context lasts."""
    daemon = ScriptedDaemon()
    loop = asyncio.new_event_loop()
    server = ControlServer(socket, daemon.handle)
    loop.run_until_complete(server.start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield daemon
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def status(name: str = "r0", /, volume: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A status document of a healthy Primary, with ``changes``."""
    document: dict[str, Any] = {
        "name": name,
        "node": "node1",
        "role": "Primary",
        "peer": {"name": "node2", "role": "Secondary", "disk": "UpToDate", "address": "127.0.0.2:7789"},
        "connection": "Connected",
        "replication": "Established",
        "protocol": "C",
        "last_error": None,
        "volumes": [
            {
                "volume": 0,
                "disk": "UpToDate",
                "peer_disk": "UpToDate",
                "size_bytes": 1 << 30,
                "out_of_sync_bytes": 0,
                "resync_total_bytes": 0,
                "done_percent": None,
                "eta_seconds": None,
                "resync_rate_bytes_s": None,
                "generations": {"current": "00" * 8, "base": "00" * 8, "history": []},
                "activity_log": {"slots": 1237, "hot": 3},
                "backing": "/srv/r0.img",
                **(volume or {}),
            }
        ],
        "nbd": {"listen": "unix:/x", "clients": 1},
    }
    return document | changes


def syncing(percent: float, **changes: Any) -> dict[str, Any]:
    """A status document of a sync source."""
    total = 1 << 30
    left = int(total * (1 - percent / 100))
    volume = {
        "peer_disk": "Inconsistent",
        "out_of_sync_bytes": left,
        "resync_total_bytes": total,
        "done_percent": percent,
        "eta_seconds": 200.0,
        "resync_rate_bytes_s": 80 << 20,
    }
    return status(volume=volume, replication="SyncSource", **changes)
