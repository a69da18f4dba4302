"""Apache with its files on r0, on hosts of their own: what was written before is still there, wherever it runs."""

import signal
from collections.abc import Callable, Iterator

import pytest

from tests.hosts import apache
from tests.hosts.host import Host, now
from tests.hosts.lab import Lab
from tests.hosts.namespace import LabError
from tests.hosts.replicated import Replicated, need_data

#: Longer than it takes to find out that a volume is gone, and to begin mending it.
_MISSED_S = 5.0

pytestmark = pytest.mark.root


@pytest.fixture
def cluster(new_lab: Callable[..., Lab]) -> Iterator[Replicated]:
    """Its group runs on node1."""
    need_data()
    with Replicated(new_lab()) as cluster:
        since = now()
        try:
            cluster.served_by(cluster.node1, since)
        except LabError:
            print(cluster.lab.report())
            raise
        yield cluster
        assert cluster.probe.timeline.two_holders(since, now()) == []


def test_an_operator_moves_it_both_ways(cluster: Replicated) -> None:
    for holder, other in (cluster.lab.nodes, cluster.lab.nodes[::-1]):
        cluster.write(holder)
        cluster.manager.takeover(other)
        cluster.served_by(other)
    assert cluster.fence.asked == []


def test_a_dead_node_is_fenced_and_gets_its_group_back_with_the_data_of_the_other(cluster: Replicated) -> None:
    cluster.write(cluster.node1)
    cluster.node1.power_cut()
    cluster.served_by(cluster.node2)
    assert cluster.fence.asked == ["off node1"]
    cluster.write(cluster.node2)
    cluster.node1.boot()
    cluster.served_by(cluster.node1)


def test_a_frozen_node_is_switched_off_before_its_data_is_used(cluster: Replicated) -> None:
    cluster.write(cluster.node1)
    cluster.node1.freeze()
    cluster.served_by(cluster.node2)
    assert not cluster.node1.on


def test_without_a_fence_device_that_answers_nothing_is_promoted(cluster: Replicated) -> None:
    cluster.write(cluster.node1)
    cluster.fence.broken = True
    cluster.node1.power_cut()
    cluster.probe.wait(lambda seen: bool(cluster.fence.asked), "the fence device is asked")
    cluster.probe.watch(1)
    since = now()
    cluster.probe.watch(1)
    assert cluster.probe.timeline.recent(since) == []
    assert "could not be fenced" in cluster.status(cluster.node2)["sentence"]
    cluster.fence.broken = False
    cluster.served_by(cluster.node2)


def test_a_killed_apache_is_started_again_where_it_was(cluster: Replicated) -> None:
    page = cluster.write(cluster.node1)
    since = now()
    apache.kill(cluster.node1)
    cluster.probe.wait(lambda seen: bool(seen.outages(since, now(), pages=True)), "it is missed")
    cluster.probe.wait_page(page)
    assert {who for _, who in cluster.probe.timeline.recent(since)} == {"node1"}


def test_a_killed_replicad_costs_no_data(cluster: Replicated) -> None:
    page = cluster.write(cluster.node1)
    assert cluster.node1.signal(signal.SIGKILL, f"{Host.interpreter} -m replica.daemon")
    cluster.probe.watch(_MISSED_S)  # until then, writes may fail, and pages may come from memory
    cluster.probe.wait_page(page)
    cluster.write(cluster.node1 if cluster.probe.timeline.last() == "node1" else cluster.node2)
