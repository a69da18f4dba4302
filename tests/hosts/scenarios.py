"""What can happen to a cluster, each the same for every product, in phases that are looked at one by one."""

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field, replace
from typing import Final

from tests.hosts import apache
from tests.hosts.host import Host, now
from tests.hosts.lab import Lab
from tests.hosts.namespace import LabError
from tests.hosts.probe import Probe, serve
from tests.hosts.products import HaFiles, Product
from tests.hosts.timeline import Timeline

HEARTBEAT_PORT: Final = "udp dport 694"


@dataclass(frozen=True)
class Phase:
    """What the client saw of one thing that was done."""

    name: str
    since: float
    until: float
    #: Nobody answered, in all.
    outage_s: float
    #: Both nodes had the address, in all.
    two_holders_s: float
    #: Who answered at the end, "" for nobody.
    holder: str


class Cluster:
    """Both nodes with a product that is installed and not yet started, and the client's probe."""

    def __init__(
        self, lab: Lab, probe: Probe, product: Product, files: HaFiles, pages: bool, quiet_s: float, patience_s: float
    ) -> None:
        self.lab = lab
        self.probe = probe
        self.product = product
        self.files = files
        #: Look at the web server's pages, which say who serves them, instead of plain answers.
        self.pages = pages
        #: So long nothing may change before a phase is over.
        self.quiet_s = quiet_s
        #: A phase is over then in any case.
        self.patience_s = patience_s
        self.node1, self.node2 = lab.nodes

    @property
    def while_s(self) -> float:
        """For how long what should not happen is waited for."""
        return 3 * self.files.deadtime_s

    def start(self, *nodes: Host) -> None:
        """Start the product on these nodes, or both, now and when they boot."""
        for node in nodes or self.lab.nodes:
            self.product.start(node)
            if self.product.start not in node.at_boot:
                node.at_boot.append(self.product.start)

    def phase(
        self,
        name: str,
        do: Callable[[], object],
        *holders: Host,
        at_least_s: float = 0.0,
        at_most_s: float | None = None,
    ) -> Phase:
        """Do something; over when one of `holders`, and only that one, has answered the client for `quiet_s`. Without
        any `holders`, and otherwise at the latest, over after `at_most_s`, in any case not before `at_least_s`.
        """
        at_most_s = at_most_s or self.patience_s
        since = now()
        do()
        if at_least_s:
            self.probe.watch(at_least_s)
        if holders:
            names = {host.name for host in holders}
            try:
                self.probe.wait(lambda seen: self._settled(seen, since, names), f"{name}: {names} hold", at_most_s)
            except LabError as error:
                self.lab.note(str(error))
        else:
            self.probe.watch(at_most_s)
        return self.look(name, since)

    def look(self, name: str, since: float) -> Phase:
        """What was seen up to now."""
        until, seen = now(), self.probe.timeline
        outage_s, two_s = seen.outage_s(since, until, self.pages), seen.two_holders_s(since, until)
        recent = seen.recent(until - 1, self.pages)
        return Phase(name, since, until, outage_s, two_s, recent[-1].who if recent else "")

    def _settled(self, seen: Timeline, since: float, holders: Set[str]) -> bool:
        quiet_since = now() - self.quiet_s
        if quiet_since < since or seen.last(self.pages) not in holders:
            return False
        return (
            len({who for _, who in seen.recent(quiet_since, self.pages)}) == 1
            and not seen.outages(quiet_since, now(), self.pages)
            and not seen.two_holders(quiet_since, now())
        )


@dataclass(frozen=True)
class Scenario:
    """`run` begins with nothing started; it yields each phase when that is over."""

    name: str
    run: Callable[[Cluster], Iterator[Phase]]
    files: HaFiles = field(default_factory=HaFiles)
    #: Its resources are the address and Apache, and the client looks at the pages.
    web: bool = False

    def missing(self) -> str:
        """Why it cannot be run here, "" when it can."""
        return apache.missing() if self.web else ""


def play(
    lab: Lab, product: Product, scenario: Scenario, deadtime_s: float, quiet_s: float, patience_s: float = 90.0
) -> tuple[list[Phase], Timeline]:
    """Run a scenario in a new lab; its phases, and all that the client saw."""
    files = replace(scenario.files, deadtime_s=deadtime_s, resources=("apache2",) if scenario.web else ())
    for node in lab.nodes:
        serve(node)
        files.install(node)
        if scenario.web:
            apache.install(node)
    with Probe(lab, http=scenario.web) as probe:
        phases = list(scenario.run(Cluster(lab, probe, product, files, scenario.web, quiet_s, patience_s)))
        return phases, probe.timeline


def _switch_over(cluster: Cluster) -> Iterator[Phase]:
    """An operator moves everything, both ways."""
    yield cluster.phase("start", cluster.start, cluster.node1)
    yield cluster.phase("standby", lambda: cluster.product.standby(cluster.node1), cluster.node2)
    yield cluster.phase("takeover", lambda: cluster.product.takeover(cluster.node1), cluster.node1)


def _power(cluster: Cluster) -> Iterator[Phase]:
    """node1 loses its power, and comes back."""
    yield cluster.phase("start", cluster.start, cluster.node1)
    yield cluster.phase("power cut", cluster.node1.power_cut, cluster.node2)
    back = cluster.node1 if cluster.files.auto_failback != "off" else cluster.node2
    yield cluster.phase("return", cluster.node1.boot, back)


def _cable(cluster: Cluster) -> Iterator[Phase]:
    """node1's only cable is pulled, and plugged in again."""
    yield cluster.phase("start", cluster.start, cluster.node1)
    yield cluster.phase("cable pulled", cluster.node1.pull, cluster.node2)
    yield cluster.phase("cable plugged in", cluster.node1.plug, *cluster.lab.nodes, at_least_s=cluster.while_s)


def _frozen(cluster: Cluster) -> Iterator[Phase]:
    """node1 is frozen for longer than the deadtime, and thaws."""
    yield cluster.phase("start", cluster.start, cluster.node1)
    yield cluster.phase("frozen", cluster.node1.freeze, cluster.node2)
    yield cluster.phase("thawed", cluster.node1.thaw, *cluster.lab.nodes, at_least_s=cluster.while_s)


def _path_cut(cluster: Cluster) -> Iterator[Phase]:
    """The nodes do not hear each other any more, while the client reaches both."""
    yield cluster.phase("start", cluster.start, cluster.node1)

    def cut() -> None:
        for node in cluster.lab.nodes:
            cluster.lab.cut(node, cluster.lab.peer(node), HEARTBEAT_PORT)

    yield cluster.phase("heartbeats cut", cut, at_most_s=cluster.while_s)


def _wrong_secret(cluster: Cluster) -> Iterator[Phase]:
    """node2 has another key."""
    cluster.files.install(cluster.node2, authkeys="auth 1\n1 sha1 another-secret-of-node2\n")
    yield cluster.phase("wrong secret", cluster.start, at_most_s=2 * cluster.while_s)


def _killed(cluster: Cluster) -> Iterator[Phase]:
    """The main process of the cluster manager is killed on the node that holds the address."""
    yield cluster.phase("start", cluster.start, cluster.node1)
    kill = lambda: cluster.product.kill(cluster.node1)  # noqa: E731
    yield cluster.phase("manager killed", kill, at_most_s=cluster.while_s)


def _web(cluster: Cluster) -> Iterator[Phase]:
    """With Apache behind the address; it dies, is moved by an operator, and loses its host."""
    yield cluster.phase("start", cluster.start, cluster.node1)
    yield cluster.phase("Apache killed", lambda: apache.kill(cluster.node1), cluster.node1)
    yield cluster.phase("standby", lambda: cluster.product.standby(cluster.node1), cluster.node2)
    yield cluster.phase("takeover", lambda: cluster.product.takeover(cluster.node1), cluster.node1)
    yield cluster.phase("power cut", cluster.node1.power_cut, cluster.node2)


SCENARIOS: Final = (
    Scenario(
        "start",
        lambda cluster: iter([cluster.phase("start", cluster.start, cluster.node1)]),
        HaFiles(auto_failback=None),
    ),
    Scenario("switch-over", _switch_over),
    Scenario("power", _power),
    Scenario("cable", _cable),
    Scenario("frozen", _frozen),
    Scenario("heartbeats cut", _path_cut),
    Scenario("wrong secret", _wrong_secret),
    Scenario("manager killed", _killed),
    Scenario("web", _web, web=True),
)
