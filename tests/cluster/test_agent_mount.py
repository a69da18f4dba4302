"""The agent of kind "mount" on a replicated resource, by nbdfuse: the data move with the group."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest

from replica.heartbeat.agents import mounts
from replica.heartbeat.agents.base import AgentError, Start, Surroundings
from replica.heartbeat.agents.mount import KINDS, MountAgent
from replica.heartbeat.settings import Auth, AuthMethod, HeartbeatSettings, ResourceSettings
from tests.cluster.cluster import PATIENCE_S, Cluster, Node
from tests.cluster.mounted import Mounted, need_mounts

START = Start(peer_is_dead=False)


class Agent:
    """The agent of one node, and when it has had news."""

    def __init__(self, node: Node, *, stop_timeout_s: float = 60.0) -> None:
        folder = node.cluster.folder / node.name
        settings = HeartbeatSettings(
            "test",
            node.name,
            node.peer.name,
            Auth(AuthMethod.CRC, b""),
            (),
            (),
            folder / "state",
            folder / "run",
            config_path=node.config,
        )
        given = {"mount": str(folder / "mnt"), "device": "nbd:r0", "type": "ext4"}
        (kind,) = KINDS
        options = {
            name: option.parse(given[name]) if name in given else option.default
            for name, option in kind.options.items()
        }
        resource = ResourceSettings("mount", kind.title(options), options, "test:1", stop_timeout_s=stop_timeout_s)
        self.news = asyncio.Event()
        self.folder = folder / "mnt"
        self.volume = str(folder / "run/nbdfuse-r0/volume")
        self.agent = MountAgent(resource, Surroundings(settings, self.news.set))


@contextlib.asynccontextmanager
async def agents(*made: Agent) -> AsyncIterator[None]:
    """They have left nothing behind at the end."""
    try:
        yield
    finally:
        for one in made:
            await one.agent.stop()
            await one.agent.close()
            assert mounts.mounted_at(str(one.folder)) is None
            assert mounts.loops_of(one.volume) == []
            assert mounts.running("nbdfuse", one.volume) == []


def run(work: Coroutine[Any, Any, None]) -> None:
    """In an event loop of its own."""
    asyncio.run(asyncio.wait_for(work, 2 * PATIENCE_S))


@pytest.fixture
def formatted(pair: Cluster) -> Cluster:
    """A pair with an ext4 on the volume; node1 is Primary."""
    need_mounts()
    files = Mounted(pair.folder, pair.node1)
    try:
        files.attach()
        files.make()
        files.detach()
    finally:
        files.abandon()
    return pair


@pytest.mark.root
def test_the_data_are_where_the_group_is(formatted: Cluster) -> None:
    async def work() -> None:
        one, two = Agent(formatted.node1), Agent(formatted.node2)
        async with agents(one, two):
            with pytest.raises(AgentError, match=r"nbdfuse ended .*r0"):
                await two.agent.start(START)
            await one.agent.start(START)
            await one.agent.monitor()
            (one.folder / "file").write_text("here")
            again = Agent(formatted.node1)  # a new daemon goes on with it
            assert await again.agent.active()
            await again.agent.start(START)
            await again.agent.monitor()
            await again.agent.stop()
            assert not await again.agent.active()
            formatted.node2.ctl("takeover")
            await two.agent.start(START)
            assert (two.folder / "file").read_text() == "here"

    run(work())


@pytest.mark.root
def test_a_server_that_dies_is_noticed_and_mended(formatted: Cluster) -> None:
    async def work() -> None:
        one = Agent(formatted.node1)
        async with agents(one):
            await one.agent.start(START)
            await asyncio.to_thread(_write, one.folder / "file", "here")
            one.news.clear()
            formatted.node1.kill9()
            with contextlib.suppress(OSError):
                await asyncio.to_thread(_write, one.folder / "other", "wakes nbdfuse")
            await one.news.wait()
            with pytest.raises(AgentError):
                await one.agent.monitor()
            await one.agent.stop()
            formatted.node1.start()
            formatted.node1.wait_replication("Established", "SyncSource")
            formatted.node1.ctl("promote")
            await one.agent.start(START)
            assert (one.folder / "file").read_text() == "here"

    run(work())


@pytest.mark.root
def test_a_server_that_hangs_is_given_up_by_a_stop(formatted: Cluster) -> None:
    async def work() -> None:
        one = Agent(formatted.node1, stop_timeout_s=1.0)
        async with agents(one):
            await one.agent.start(START)
            (one.folder / "file").write_text("here")
            formatted.node1.freeze()
            await one.agent.stop()
            formatted.node1.signal(signal.SIGCONT)

    run(work())


def _write(path: Path, words: str) -> None:
    """Durably."""
    with path.open("w") as file:
        file.write(words)
        file.flush()
        os.fsync(file.fileno())
