"""The agent of kind "replica" with real nodes: promoted, demoted, started again, without waiting for the dead."""

import asyncio
import contextlib
import os
import select
import signal
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from replica import control
from replica.heartbeat import clock
from replica.heartbeat.agents import replicated
from replica.heartbeat.agents.base import AgentError, Start, Surroundings
from replica.heartbeat.agents.replicated import KINDS, ReplicatedAgent
from replica.heartbeat.node_state import Readiness
from replica.heartbeat.settings import Auth, AuthMethod, HeartbeatSettings, ResourceSettings
from tests.cluster.cluster import MIB, PATIENCE_S, Cluster, Node
from tests.processes import gone

IN_ORDER, ALONE = Start(peer_is_dead=False), Start(peer_is_dead=True)


class Agent:
    """The agent of one node, and when it has had news."""

    def __init__(self, node: Node, resource: str = "r0") -> None:
        settings = HeartbeatSettings(
            "test",
            node.name,
            node.peer.name,
            Auth(AuthMethod.CRC, b""),
            (),
            (),
            Path("state"),
            Path("run"),
            config_path=node.config,
        )
        _driven.add(node)
        (kind,) = KINDS
        options = {name: option.parse(resource) for name, option in kind.options.items()}
        self.news = asyncio.Event()
        self.agent = ReplicatedAgent(
            ResourceSettings("replica", kind.title(options), options, "test:1"), Surroundings(settings, self.news.set)
        )

    async def until_ready(self, wanted: Readiness) -> str:
        """Why, when it is."""
        while self.agent.ready().readiness is not wanted:
            self.news.clear()
            await self.news.wait()
        return self.agent.ready().why

    async def until_fails(self) -> str:
        """The words of the first monitor that fails, which is run whenever there is news."""
        while True:
            self.news.clear()
            try:
                await self.agent.monitor()
            except AgentError as error:
                return str(error)
            await self.news.wait()


@contextlib.asynccontextmanager
async def agents(*nodes: Node) -> AsyncIterator[list[Agent]]:
    """An agent for each of the nodes."""
    made = [Agent(node) for node in nodes]
    try:
        yield made
    finally:
        for one in made:
            await one.agent.close()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """In an event loop of its own."""
    return asyncio.run(asyncio.wait_for(work, PATIENCE_S))


def pid_of(node: Node) -> int | None:
    """The process that serves the node's control socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(node.socket))
        except OSError:
            return None
        pid: int = struct.unpack("=iii", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        return pid


def kill(node: Node) -> None:
    """kill -9, whoever has started it; returns when it is dead."""
    pid = pid_of(node)
    assert pid is not None
    descriptor = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        assert select.select([descriptor], [], [], PATIENCE_S)[0]
    finally:
        os.close(descriptor)


_driven: set[Node] = set()


@pytest.fixture(autouse=True)
def strays(short_dir: Path) -> Iterator[None]:
    """What agents have started ends with the test."""
    _driven.clear()
    yield
    for node in _driven:
        if node.process is None and pid_of(node) is not None:
            kill(node)


def test_it_moves_from_node_to_node(libnbd: Any, pair: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicated, "LINK_VERDICT_S", 0.1)

    async def work() -> None:
        async with agents(pair.node1, pair.node2) as (one, two):
            assert await one.agent.active()
            assert not await two.agent.active()
            await one.agent.monitor()
            with pytest.raises(AgentError, match="is Secondary on node2"):
                await two.agent.monitor()
            with pytest.raises(AgentError, match="cannot be promoted: r0 is Primary on node1"):
                await two.agent.start(IN_ORDER)
            await one.agent.start(IN_ORDER)
            for giver, taker in ((one, two), (two, one)):
                await giver.agent.stop()
                await giver.agent.stop()
                await taker.agent.start(IN_ORDER)
                await taker.agent.monitor()
                await taker.until_ready(Readiness.YES)
                await giver.until_ready(Readiness.YES)

    run(work())
    assert pair.node1.status()["role"] == "Primary"


def test_a_dead_peer_is_not_waited_for(libnbd: Any, new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(timeout="300").up()

    async def work() -> None:
        async with agents(cluster.node2) as (two,):
            await two.until_ready(Readiness.YES)
            cluster.node1.freeze()  # its link looks well for another 300 s
            await two.agent.start(ALONE)
            await two.agent.monitor()

    run(work())
    cluster.node2.write(0, b"2" * MIB)


def test_a_peer_that_may_live_is_dead_when_its_link_is(libnbd: Any, new_cluster: Callable[..., Cluster]) -> None:
    """As `promote-without-fencing` has it: nobody says that the peer is dead, and it is still connected for a while."""
    cluster = new_cluster(timeout="2").up()

    async def work() -> None:
        async with agents(cluster.node2) as (two,):
            await two.until_ready(Readiness.YES)
            cluster.node1.freeze()
            await two.agent.start(IN_ORDER)
            await two.agent.monitor()

    run(work())
    cluster.node2.write(0, b"2" * MIB)


def test_readiness_follows_the_copies(libnbd: Any, pair: Cluster) -> None:
    async def work() -> None:
        async with agents(pair.node2) as (two,):
            await two.until_ready(Readiness.YES)
            pair.node1.kill9()
            assert "not in touch with that of node1" in await two.until_ready(Readiness.IF_ALONE)
            await two.agent.start(ALONE)
            await asyncio.to_thread(pair.node2.write, 0, b"2" * MIB)
            await two.agent.stop()
            await two.until_ready(Readiness.YES)  # node1 lacks what was written

    run(work())


def test_what_does_not_run_is_started(libnbd: Any, cluster: Cluster) -> None:
    cluster.up()
    cluster.node1.write(0, b"1" * MIB)
    for node in cluster.nodes:
        node.stop()

    async def work() -> None:
        async with agents(*cluster.nodes) as (one, two):
            assert not await one.agent.active()
            assert not await two.agent.active()
            await one.until_ready(Readiness.YES)
            await two.until_ready(Readiness.YES)
            await one.agent.start(IN_ORDER)
            one.agent.hold(clock.now() + 60)
            await one.agent.monitor()
            kill(cluster.node1)
            await one.agent.monitor()  # promotes it again
            assert cluster.node1.status()["role"] == "Primary"
            kill(cluster.node1)  # twice is too much
            assert await one.until_fails() == "is not served: its replicad has ended"
            await one.agent.stop()
            await one.agent.start(IN_ORDER)
            await one.agent.monitor()
            one.agent.let_go()
            await one.agent.stop()
            with pytest.raises(AgentError, match="is Secondary on node1"):
                await one.agent.monitor()
            await one.agent.start(IN_ORDER)
        assert pid_of(cluster.node1)  # it outlives its agent
        cluster.node1.wait_in_sync()
        assert cluster.node1.read(0, MIB) == b"1" * MIB

    run(work())


def test_one_that_hangs_is_killed(libnbd: Any, pair: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replica.heartbeat.agents.replicad.ANSWER_TIMEOUT_S", 0.2)
    process = pair.node1.process
    assert process is not None

    async def work() -> None:
        async with agents(pair.node1) as (one,):
            assert await one.agent.active()
            pair.node1.freeze()
            assert await one.agent.active(), "it may be Primary"
            await _while_it_ends(pair.node1, one.agent.stop())

    run(work())
    pair.node2.wait_alone()
    gone(process.pid)


def test_one_that_hangs_is_ended_and_promoted_again(
    libnbd: Any, pair: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replica.heartbeat.agents.replicad.ANSWER_TIMEOUT_S", 0.5)
    monkeypatch.setattr(replicated, "ANSWER_TIMEOUT_S", 0.5)

    async def work() -> None:
        async with agents(pair.node1) as (one,):
            await one.agent.start(IN_ORDER)
            one.agent.hold(clock.now() + 600)
            pair.node1.write(0, b"1" * MIB)
            hung = pid_of(pair.node1)
            pair.node1.freeze()
            await _while_it_ends(pair.node1, one.agent.monitor())
            assert pid_of(pair.node1) not in (None, hung)
            assert pair.node1.read(0, MIB) == b"1" * MIB
            one.agent.let_go()
            pid = pid_of(pair.node1)
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(AgentError, match=r"hung for 0\.5 s, and was killed"):
                await one.agent.monitor()

    run(work())


async def _while_it_ends(node: Node, work: Coroutine[Any, Any, None]) -> None:
    """Its process is this test's child: it is gone when the test has waited for it."""
    task = asyncio.create_task(work)
    assert node.process is not None
    await asyncio.to_thread(node.process.wait, PATIENCE_S)
    node.process = None
    await task


def test_what_cannot_be_started_says_why(cluster: Cluster) -> None:
    async def work() -> None:
        async with agents(cluster.node1) as (one,):
            why = ""
            one.agent.ready()
            while "create-md" not in why:
                one.news.clear()
                await one.news.wait()
                why = one.agent.ready().why
            assert "replicad r0 cannot be started" in why
        other = Agent(cluster.node1, "r7")
        with pytest.raises(AgentError, match=r"there is no \[resource.r7\]"):
            await other.agent.active()
        await other.agent.close()

    run(work())
    with pytest.raises(control.NotRunning):
        cluster.node1.status()
