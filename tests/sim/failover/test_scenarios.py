"""Situations of two simulated nodes that the seeds seldom come to, or that their rules do not tell apart."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest

from replica import tasks
from replica.heartbeat import clock
from replica.heartbeat.node_state import Phase, Status
from replica.heartbeat.settings import Timing
from tests.sim.failover.cluster import Cluster
from tests.sim.run import quiet

DEADTIME_S = 5.0
TIMING = Timing(1.0, 2.5, DEADTIME_S, 2 * DEADTIME_S, failback_delay_s=DEADTIME_S)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Both nodes are up, and each runs its group."""
    cluster = Cluster(1, TIMING, fencing=False, auto_failback=True)
    with quiet(), mock.patch.object(clock, "now", lambda: cluster.world.now_s):
        for machine in cluster.machines.values():
            machine.boot()
        _pass(cluster, 30.0)
        assert not cluster.well()
        yield cluster
    for machine in cluster.machines.values():
        machine.kill_daemon()
    cluster.world.close()
    tasks._running.clear()
    for coroutine in cluster.world.coroutines:
        with contextlib.suppress(BaseException):
            coroutine.close()


def _pass(cluster: Cluster, seconds: float) -> None:
    cluster.world.run(None, cluster.world.now_s + seconds)
    assert not cluster.broken_rules
    assert not cluster.world.complaints


def test_a_node_that_is_paused_again_while_it_listens_listens_anew(cluster: Cluster) -> None:
    """What it heard between the two pauses is forgotten with the second, and time alone must not stand in for it."""
    node = cluster.machines["node1"]
    for _ in range(2):
        node.pause()
        _pass(cluster, 3 * DEADTIME_S)
        cluster.cut.add(("node2", 0))
        cluster.cut.add(("node2", 1))
        node.resume()
        _pass(cluster, 0.5)
    assert node.manager is not None
    assert node.manager.phase is Phase.LISTENING
    assert node.manager.runners["web"].status is Status.SUSPENDED
    cluster.cut.clear()
    _pass(cluster, 30.0)
    assert not cluster.well()


def test_a_node_that_is_paused_before_it_has_heard_anybody_listens_anew(cluster: Cluster) -> None:
    node = cluster.machines["node1"]
    node.power_off("cut")
    _pass(cluster, 2 * DEADTIME_S)
    cluster.cut |= {("node2", 0), ("node2", 1)}
    node.boot()
    _pass(cluster, 1.0)
    node.pause()
    _pass(cluster, 5 * DEADTIME_S)
    node.resume()
    _pass(cluster, 0.5)
    assert node.manager is not None
    assert node.manager.phase is Phase.LISTENING


def test_a_node_fences_itself_once_and_an_operator_can_mend_it(cluster: Cluster) -> None:
    """Where that has no effect (it is not allowed to, or is not to) it goes on with its heartbeats."""
    node = cluster.machines["node1"]
    fenced: list[str] = []
    assert node.manager is not None
    node.manager._fence_self = fenced.append
    (thing, *_) = node.things["web"]
    thing.stuck = True
    cluster.world.enter(node.loop, node.manager.leave)  # type: ignore[arg-type]
    _pass(cluster, 3 * DEADTIME_S)
    assert fenced == ["exec of web does not stop"]


def test_what_is_stuck_is_stopped_again_when_an_operator_says_that_it_is_mended(cluster: Cluster) -> None:
    node = cluster.machines["node1"]
    manager = node.manager
    assert manager is not None
    manager._fence_self = lambda why: None
    (thing, *_) = node.things["web"]
    thing.stuck = True

    async def standby() -> None:
        async def tell(words: str) -> None:
            pass

        await manager.standby("all", tell)

    assert node.loop is not None
    node.loop.create_task(standby())
    _pass(cluster, 2 * DEADTIME_S)
    assert manager.runners["web"].status is Status.STUCK
    assert not any(thing.up for thing in cluster.machines["node2"].things["web"]), "half of it still runs on node1"
    thing.stuck = False
    cluster.world.enter(node.loop, manager.clear_failures)
    _pass(cluster, 30.0)
    assert not cluster.well()
