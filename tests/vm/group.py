"""In a guest: the agents of a group with data (replica, map, mount), as the cluster manager would drive them."""

import asyncio
import contextlib
import os
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from replica.heartbeat import clock
from replica.heartbeat.agents.base import Agent, Start, Surroundings
from replica.heartbeat.agents.kinds import kind
from replica.heartbeat.agents.threads import in_thread
from replica.heartbeat.settings import Auth, AuthMethod, HeartbeatSettings, ResourceSettings

_FOLDER = Path("/run/replica")
_START = Start(peer_is_dead=False)


def live_and_die(node: str, peer: str, device: str, folder: str, file_system: str, words: str) -> str:
    """Start the group on a node, write words to a file there, kill its replicad, write once more, and stop it. What the
    file had at first is returned; an error of whatever was asked is raised.
    """
    return asyncio.run(_live_and_die(node, peer, device, Path(folder), file_system, words))


async def _live_and_die(node: str, peer: str, device: str, folder: Path, file_system: str, words: str) -> str:
    agents = list(_agents(node, peer, device, folder, file_system))
    for agent in agents:
        await agent.start(_START)
        await agent.monitor()
        assert await agent.active()
    file = folder / "file"
    before = file.read_text() if file.exists() else ""
    await in_thread(_write, file, words)
    _kill(node)
    writing = asyncio.create_task(in_thread(_write, file, f"{words}, again"))
    for agent in agents:
        agent.hold(clock.now() + 60)
        await agent.monitor()
    await writing  # it has seen a pause, and no error
    for agent in reversed(agents):
        await agent.stop()
        assert not await agent.active()
        await agent.close()
    return before


def _agents(node: str, peer: str, device: str, folder: Path, file_system: str) -> Iterator[Agent]:
    settings = HeartbeatSettings(
        "test",
        node,
        peer,
        Auth(AuthMethod.CRC, b""),
        (),
        (),
        _FOLDER / "state",
        _FOLDER / "run",
        config_path=_FOLDER / "replica.toml",
    )
    for given in (
        {"replica": "r0"},
        {"map": "r0", "device": device},
        {"mount": str(folder), "device": device, "type": file_system},
    ):
        one = kind(next(iter(given)))
        options = {
            name: option.parse(given[name]) if name in given else option.default for name, option in one.options.items()
        }
        resource = ResourceSettings(one.name, one.title(options), options, "test:1", start_timeout_s=80)
        yield one.make(resource, Surroundings(settings, lambda: None))


def _write(file: Path, words: str) -> None:
    with file.open("w") as opened:
        opened.write(words)
        opened.flush()
        os.fsync(opened.fileno())


def _kill(node: str) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.connect(str(_FOLDER / "run" / node / "r0.sock"))
        pid, _, _ = struct.unpack("=iii", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    os.kill(pid, signal.SIGKILL)
