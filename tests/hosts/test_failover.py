"""The cluster manager on hosts of its own, configured by Heartbeat's files: who has the address, whatever happens.

Of every phase: the right node answers at the end, and at no moment both nodes have the address. No times.
"""

import os
from collections.abc import Callable, Iterator

import pytest

from tests.hosts.host import ROOT, Host
from tests.hosts.lab import CLUSTER_IP, Lab
from tests.hosts.probe import Probe, serve
from tests.hosts.products import HaFiles, Ours
from tests.hosts.scenarios import HEARTBEAT_PORT, SCENARIOS, Cluster, Phase, Scenario, play
from tests.hosts.switch import some

pytestmark = pytest.mark.root

_TUTORIAL = ROOT / "tests/unit/ha.d"
_DEADTIME_S = 1.0
_QUIET_S = 1.0
_PATIENCE_S = 25.0
_TIMES = ("keepalive 200ms", "initdead 2")
_PREFERRED, _OTHER, _EITHER = ["node1"], ["node2"], ["node1", "node2"]
_ENDS_ON = {
    **dict.fromkeys(("standby", "power cut", "cable pulled", "frozen"), _OTHER),
    # The address has failed on node1, which may or may not count against it for a while.
    **dict.fromkeys(("cable plugged in", "thawed"), _EITHER),
}

Play = Callable[..., list[Phase]]


@pytest.fixture
def run(new_lab: Callable[..., Lab]) -> Play:
    """``run(scenario, second_network=…)``: the phases of a scenario, none of which had two holders."""

    def run(scenario: Scenario, second_network: bool = False) -> list[Phase]:
        if missing := scenario.missing():
            pytest.skip(missing)
        lab = new_lab(second_network=second_network)
        phases, _ = play(lab, Ours(), scenario, _DEADTIME_S, _QUIET_S, _PATIENCE_S)
        for phase in phases:
            print(phase)
        for phase in phases:
            assert phase.two_holders_s == 0, f"{phase.name}: two had the address"
        return phases

    return run


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_the_right_node_answers_and_never_two(run: Play, scenario: Scenario) -> None:
    for phase in run(_with(scenario)):
        assert phase.holder in _ENDS_ON.get(phase.name, _PREFERRED), phase.name


def _with(scenario: Scenario, **files: object) -> Scenario:
    return Scenario(scenario.name, scenario.run, HaFiles(more=_TIMES, **files), scenario.web)  # type: ignore[arg-type]


def test_without_failback_a_returning_node_gets_nothing(run: Play) -> None:
    (power,) = (scenario for scenario in SCENARIOS if scenario.name == "power")
    phases = run(_with(power, auto_failback="off"))
    assert [phase.holder for phase in phases] == ["node1", "node2", "node2"]
    assert phases[-1].outage_s == 0


def _both_power_cut(cluster: Cluster) -> Iterator[Phase]:
    yield cluster.phase("start", cluster.start, cluster.node1)

    def power_cut() -> None:
        for node in cluster.lab.nodes:
            node.power_cut()
        for node in cluster.lab.nodes:
            node.boot()

    yield cluster.phase("both rebooted", power_cut, cluster.node1)


def _alone(cluster: Cluster) -> Iterator[Phase]:
    cluster.node1.power_cut()
    yield cluster.phase("start of one", lambda: cluster.start(cluster.node2), cluster.node2)


def _one_way(cluster: Cluster) -> Iterator[Phase]:
    """node1 is not heard any more, but hears."""
    yield cluster.phase("start", cluster.start, cluster.node1)
    cut = cluster.lab.cut, cluster.lab.mend
    for change, name in zip(cut, ("cut", "mended"), strict=True):
        do = lambda change=change: change(cluster.node1, cluster.node2, HEARTBEAT_PORT)  # noqa: E731
        yield cluster.phase(name, do, cluster.node1)


def _clean_stop(cluster: Cluster) -> Iterator[Phase]:
    yield cluster.phase("start", cluster.start, cluster.node1)
    yield cluster.phase("stop", lambda: cluster.product.stop(cluster.node1), cluster.node2)


def _flapping(cluster: Cluster) -> Iterator[Phase]:
    """node1's cable has a loose contact."""
    yield cluster.phase("start", cluster.start, cluster.node1)

    def flap() -> None:
        for _ in range(_FLAPS):
            cluster.node1.pull()
            cluster.probe.watch(0.7)
            cluster.node1.plug()
            cluster.probe.watch(0.8)

    yield cluster.phase("flapping", flap, cluster.node1)


def _disk_full(cluster: Cluster) -> Iterator[Phase]:
    """Nothing can be written any more, on both nodes: neither logs nor what is to be kept."""
    folders = ("/var/lib/replica", "/var/log")
    for node in cluster.lab.nodes:
        for folder in folders:
            node.run("install", "-d", folder)
            node.run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder)
    yield cluster.phase("start", cluster.start, cluster.node1)
    for node in cluster.lab.nodes:
        for folder in folders:
            full = node.try_run("dd", "if=/dev/zero", f"of={folder}/filler", "bs=4k")
            assert "No space left" in full.stderr
    yield cluster.phase("standby", lambda: cluster.product.standby(cluster.node1), cluster.node2)
    yield cluster.phase("power cut", cluster.node2.power_cut, cluster.node1)


_FLAPS = 40


#: When the kernel was given the address, in hundredths of a second: another moment once it was gone meanwhile.
_CREATED = """
import sys
from pyroute2 import IPRoute
for one in IPRoute().get_addr(address=sys.argv[1]):
    print(one.get_attr("IFA_CACHEINFO")["cstamp"])
"""


def _created(node: Host) -> str:
    return node.run(Host.interpreter, "-c", _CREATED, CLUSTER_IP).strip()


def _losing(cluster: Cluster) -> Iterator[Phase]:
    """A third of all heartbeats is lost on one of two paths, while all processors are busy."""
    yield cluster.phase("start", cluster.start, cluster.node1)

    def lose() -> None:
        for number in range(os.cpu_count() or 1):
            cluster.lab.nodes[number % 2].spawn("busy", "sh", "-c", "while :; do :; done")
        for node in cluster.lab.nodes:
            cluster.lab.cut(node, cluster.lab.peer(node), f"{HEARTBEAT_PORT} {some(30)}")

    created = _created(cluster.node1)
    yield cluster.phase("losses", lose, at_most_s=_LOSSES_S)
    assert _created(cluster.node1) == created != ""


#: `make test-cluster` sets ten minutes.
_LOSSES_S = float(os.environ.get("REPLICA_LOSSES_S", "30"))


@pytest.mark.parametrize(
    "story, holders",
    [
        (_both_power_cut, ["node1", "node1"]),
        (_alone, ["node2"]),
        (_one_way, ["node1", "node1", "node1"]),
        (_clean_stop, ["node1", "node2"]),
        (_flapping, ["node1", "node1"]),
        (_disk_full, ["node1", "node2", "node1"]),
    ],
)
def test_more_that_can_happen(run: Play, story: Callable[[Cluster], Iterator[Phase]], holders: list[str]) -> None:
    phases = run(_with(Scenario(story.__name__, story)))
    assert [phase.holder for phase in phases] == holders


_SECOND_PATH = ("ucast eth1 10.0.0.1", "ucast eth1 10.0.0.2")


def test_losses_on_one_of_two_paths_move_nothing(run: Play) -> None:
    scenario = Scenario("losses", _losing, HaFiles(more=(*_TIMES, *_SECOND_PATH)))
    _, losses = run(scenario, second_network=True)
    assert losses.holder == "node1"


def _out_of_reach(cluster: Cluster) -> Iterator[Phase]:
    """node1 is cut off from the clients, but not from node2."""
    yield cluster.phase("start", cluster.start, cluster.node1)
    yield cluster.phase("pulled", lambda: cluster.node1.pull("eth0"), cluster.node2)
    yield cluster.phase("plugged in", lambda: cluster.node1.plug("eth0"), *cluster.lab.nodes)


def test_a_node_that_clients_cannot_reach_hands_over(run: Play) -> None:
    scenario = Scenario("out of reach", _out_of_reach, HaFiles(more=(*_TIMES, *_SECOND_PATH)))
    assert [phase.holder for phase in run(scenario, second_network=True)][:2] == ["node1", "node2"]


def _bad_switch(cluster: Cluster) -> Iterator[Phase]:
    """The same with a cable that looks whole: only the ping node does not answer node1 any more."""
    yield cluster.phase("start", cluster.start, cluster.node1)

    def cut() -> None:
        for source, target in ((cluster.node1, cluster.lab.client), (cluster.lab.client, cluster.node1)):
            cluster.lab.cut(source, target)

    yield cluster.phase("cut", cut, cluster.node2)


def test_a_node_that_reaches_fewer_ping_nodes_hands_over(run: Play) -> None:
    files = HaFiles(more=(*_TIMES, "deadping 1", "ping 192.168.2.10", *_SECOND_PATH))
    phases = run(Scenario("bad switch", _bad_switch, files), second_network=True)
    assert [phase.holder for phase in phases] == ["node1", "node2"]


def test_the_files_of_the_tutorial_as_they_are_printed(lab: Lab) -> None:
    """Comments behind directives, no-break spaces, the key `crc`, a ping to the address of the cluster itself."""
    for node in lab.nodes:
        serve(node)
        for file in ("ha.cf", "haresources", "authkeys"):
            node.write(f"/etc/ha.d/{file}", (_TUTORIAL / file).read_text(), mode=0o600)
    with Probe(lab) as probe:
        cluster = Cluster(lab, probe, Ours(), HaFiles(auto_failback=None), False, _QUIET_S, _PATIENCE_S)
        phases = [
            cluster.phase("start", cluster.start, cluster.node1),
            cluster.phase("power cut", cluster.node1.power_cut, cluster.node2),
            cluster.phase("return", cluster.node1.boot, cluster.node1),
            cluster.phase("standby", lambda: cluster.product.standby(cluster.node1), cluster.node2),
        ]
    assert [phase.holder for phase in phases] == ["node1", "node2", "node1", "node2"]
    assert not any(phase.two_holders_s for phase in phases)
