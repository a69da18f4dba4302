"""A cluster with data on hosts of its own: whatever happens to it, what a customer was told is stored is still there.

The group is a replicated volume with ext4, Apache that serves from it and stores on it, and an address. A customer
goes on storing documents all the time. Of each story: the right node serves at the end; no two were Primary at a time
(the two copies agree in the end, and no file system is damaged); at no moment two had the address; nothing that was
accepted is lost. No times.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.hosts import apache
from tests.hosts.deposits import Deposits
from tests.hosts.fence import FenceDevice
from tests.hosts.host import Host, now
from tests.hosts.lab import Lab
from tests.hosts.probe import Probe
from tests.hosts.site import FOLDER, Site, need_site, toml

pytestmark = pytest.mark.root

#: So long is looked for what must not happen: twice the deadtime.
_WHILE_S = 3.0


class Story:
    """A site that runs on node1, with the device that can switch its nodes off."""

    def __init__(self, site: Site, fence: FenceDevice) -> None:
        self.site = site
        self.fence = fence
        self.lab = site.lab
        self.node1, self.node2 = site.lab.nodes

    def accepts(self, node: Host, since: float | None = None) -> float:
        """Wait until this node has accepted documents from now on; since when."""
        return self.site.deposits.wait(node, since)

    def when(self, event: str) -> float:
        """When this was done the last time."""
        return next(moment for moment, what in reversed(self.lab.events) if what == event)

    def goes_on(self, node: Host) -> None:
        """For a while, only this node accepts documents, and it does."""
        since = now()
        self.site.probe.watch(_WHILE_S)
        self.accepts(node)
        assert {one[2] for one in self.site.deposits.accepted if one[0] > since} == {node.name}


@pytest.fixture
def begin(new_lab: Callable[..., Lab]) -> Iterator[Callable[..., Story]]:
    """``begin(**configuration)``: see `tests.hosts.site.toml`; the story has begun, and node1 serves."""
    need_site()
    with ExitStack() as stack:

        def make(*, second_network: bool = False, **configuration: str) -> Story:
            lab = new_lab(second_network=second_network)
            fence = stack.enter_context(FenceDevice(lab))
            site = Site(lab, stack.enter_context(Deposits(lab)), stack.enter_context(Probe(lab)))
            site.install(toml(second_network=second_network, **configuration))
            site.start()
            story = Story(site, fence)
            story.accepts(lab.node1)
            return story

        yield make


def test_switched_over_then_a_power_cut_and_the_way_back(begin: Callable[..., Story]) -> None:
    story = begin(resource='resync-rate = "2M"')
    node1, node2 = story.node1, story.node2
    story.site.ctl(node1, "standby")
    story.accepts(node2)
    story.site.ctl(node1, "takeover-node")
    story.accepts(node1)
    assert story.fence.asked == []

    node1.power_cut()
    story.accepts(node2)
    assert "off node1" in story.fence.asked

    # What it lacks takes a while to copy; until then nothing goes back.
    node2.run("dd", "if=/dev/urandom", f"of={FOLDER}/large", "bs=1M", "count=6", "conv=fsync")
    node1.boot()
    seen = story.site.wait(
        node2, lambda status: "is being resynced" in str(status["groups"][0]["ready"]["node1"]), "node1 is copied to"
    )
    assert seen["groups"][0]["holder"] == "node2"
    story.accepts(node1)
    assert story.site.copies(node1) == ["UpToDate", "UpToDate"]
    story.site.finish(node1)


def test_a_frozen_node_is_fenced_before_the_other_one_writes(begin: Callable[..., Story]) -> None:
    story = begin(fencing="reboot", heartbeat="failback-delay = 4")
    node1, node2 = story.node1, story.node2
    since = now()
    node1.freeze()
    first = story.accepts(node2)
    assert since < story.when("power cut node1") < first
    story.accepts(node1)  # it was switched on again, and has got its group back
    assert story.fence.asked == ["off node1", "on node1"]
    story.site.finish(node1)


def test_without_a_verdict_on_the_other_node_nothing_is_promoted(begin: Callable[..., Story]) -> None:
    story = begin()
    node1, node2 = story.node1, story.node2
    story.fence.broken = True
    node1.freeze()
    sentence = story.site.wait_refused(node2, "fence_lab", "replicactl fence node1 --done")
    assert "\n" not in sentence
    since = now()
    node1.thaw()
    story.accepts(node1, since)  # nobody has taken it
    assert all(one[2] == "node1" for one in story.site.deposits.accepted)

    node1.power_cut()
    story.site.wait_refused(node2, "replicactl fence node1 --done")
    story.site.ctl(node2, "fence", "node1", "--done")
    story.accepts(node2)
    story.fence.broken = False
    story.site.finish(node1)


def test_what_dies_on_a_node_is_mended_there(begin: Callable[..., Story]) -> None:
    story = begin()
    node1 = story.node1
    apache.kill(node1)
    story.accepts(node1)
    story.site.probe.watch(_WHILE_S)  # until that was noticed, and mended
    story.accepts(node1)
    story.site.kill(node1, "replica.daemon")
    story.site.probe.watch(_WHILE_S)
    story.accepts(node1)
    story.site.kill(node1, "replica.heartbeat.daemon")
    story.accepts(node1)

    # A full volume is its user's business: writes fail, and nothing moves.
    node1.try_run("dd", "if=/dev/zero", f"of={FOLDER}/large", "bs=64k")
    node1.run("sync", f"{FOLDER}/large")
    story.site.probe.watch(_WHILE_S)
    assert story.site.group(node1)["holder"] == "node1"
    node1.run("rm", f"{FOLDER}/large")
    story.accepts(node1)
    assert story.fence.asked == []
    story.site.finish(node1)


def test_a_daemon_that_stops_in_order_hands_over(begin: Callable[..., Story]) -> None:
    story = begin(heartbeat="auto-failback = false")
    story.site.stop(story.node1)
    story.accepts(story.node2)
    assert story.fence.asked == []
    story.site.start(story.node1)
    story.site.wait(story.node1, lambda status: status["phase"] == "up", "is up again")
    story.goes_on(story.node2)
    story.site.ctl(story.node1, "takeover-node")
    story.accepts(story.node1)
    story.site.finish(story.node1)


@pytest.mark.parametrize("fencing", ["off", "reboot"])
def test_without_failback_a_returning_node_gets_nothing(begin: Callable[..., Story], fencing: str) -> None:
    story = begin(heartbeat="auto-failback = false", fencing=fencing)
    story.node1.power_cut()
    story.accepts(story.node2)
    with story.lab.lock:
        if not story.node1.on:
            story.node1.boot()
    story.site.wait_ready(story.node2, story.node1)
    story.goes_on(story.node2)
    story.site.finish(story.node2)


def test_a_node_that_is_frozen_for_less_than_the_deadtime_goes_on(begin: Callable[..., Story]) -> None:
    story = begin(heartbeat="deadtime = 6")
    story.node1.freeze()
    story.site.probe.watch(1.0)
    story.node1.thaw()
    story.accepts(story.node1)
    assert story.fence.asked == []
    story.site.finish(story.node1)


def test_the_clients_network_fails_on_the_node_that_serves(begin: Callable[..., Story]) -> None:
    story = begin(second_network=True)
    story.node1.pull("eth0")
    story.accepts(story.node2)
    assert story.fence.asked == []  # they still hear each other
    story.node1.plug("eth0")
    story.site.finish(None)  # the address has failed on node1: where it is then depends on when


def test_the_network_between_the_nodes_fails(begin: Callable[..., Story]) -> None:
    story = begin(second_network=True)
    story.node1.pull("eth1")
    story.goes_on(story.node1)
    assert story.fence.asked == []  # they still hear each other
    story.node1.plug("eth1")
    story.site.finish(story.node1)


def test_both_nodes_lose_their_power(begin: Callable[..., Story]) -> None:
    story = begin()
    for node in story.lab.nodes:
        node.power_cut()
    for node in story.lab.nodes:
        node.boot()
    story.accepts(story.node1)
    story.site.finish(story.node1)


def test_without_fencing_nothing_is_promoted(begin: Callable[..., Story]) -> None:
    story = begin(fencing="")
    story.node1.power_cut()
    story.site.wait_refused(story.node2, "[fencing.node1]", "replicactl fence node1 --done")
    story.site.ctl(story.node2, "fence", "node1", "--done")
    story.accepts(story.node2)
    story.site.finish(story.node1)


def test_without_fencing_it_comes_back_where_it_was(begin: Callable[..., Story]) -> None:
    story = begin(fencing="")
    story.node1.power_cut()
    story.site.wait_refused(story.node2, "[fencing.node1]")
    story.node1.boot()
    story.accepts(story.node1)
    assert {one[2] for one in story.site.deposits.accepted} == {"node1"}
    story.site.finish(story.node1)


def test_promote_without_fencing_is_done_and_pointed_out(begin: Callable[..., Story]) -> None:
    story = begin(fencing="", heartbeat="promote-without-fencing = true")
    for node in story.lab.nodes:
        assert "promote-without-fencing is on" in story.site.ctl(node, "cluster")
    story.node1.power_cut()
    story.accepts(story.node2)
    story.site.finish(story.node1)


def test_the_secondary_dies_and_returns(begin: Callable[..., Story]) -> None:
    story = begin()
    story.node2.power_cut()
    story.goes_on(story.node1)
    story.node2.boot()
    story.site.wait_ready(story.node1, story.node2)
    story.site.ctl(story.node1, "standby")
    story.accepts(story.node2)
    story.site.finish(story.node2)


def test_an_operator_switches_the_node_that_serves_off(begin: Callable[..., Story]) -> None:
    story = begin()
    story.site.ctl(story.node2, "fence", "node1")
    story.accepts(story.node2)
    assert "off node1" in story.fence.asked and not story.node1.on
    story.site.finish(story.node1)


def test_a_replicad_that_hangs_is_ended_and_serves_again(begin: Callable[..., Story]) -> None:
    story = begin()
    assert story.node1.signal(signal.SIGSTOP, f"{Host.interpreter} -m replica.daemon")
    story.site.probe.watch(_WHILE_S)
    story.accepts(story.node1)
    assert story.fence.asked == []
    story.site.finish(story.node1)


def test_a_cluster_manager_that_is_stopped_by_a_debugger_loses_its_group(begin: Callable[..., Story]) -> None:
    story = begin()
    since = now()
    assert story.node1.signal(signal.SIGSTOP, f"{Host.interpreter} -m replica.heartbeat.daemon")
    story.accepts(story.node2, since)
    story.site.finish(story.node1)
