"""``make tutorial``: the whole of docs/tutorial.md, told step by step, on two hosts and a client made of namespaces.

    python -m tests.hosts.tutorial

First Heartbeat's three files as a well-known tutorial prints them, byte for byte, and both ways of testing a failover;
then the same with data: a replicated volume, a file system on it, Apache serving from that, and a fence device. What a
client sees is shown before and after each. The command lines are those of the document, and so is replica.toml.
"""

import hashlib
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from replica.demo.screen import Screen
from tests.cluster.mounted import need_mounts
from tests.hosts import apache
from tests.hosts.deposits import Deposits
from tests.hosts.fence import AGENT, FenceDevice
from tests.hosts.host import ROOT, Host, now
from tests.hosts.lab import CLUSTER_IP, Lab, need_hosts
from tests.hosts.namespace import LabError
from tests.hosts.probe import Probe
from tests.hosts.site import Site, install_web_server
from tests.processes import gone

DOCUMENT: Final = ROOT / "docs/tutorial.md"
FILES: Final = ROOT / "tests/unit/ha.d"
_HA_DIR: Final = Path("/etc/ha.d")
_CONFIG: Final = "/etc/replica/replica.toml"
#: What the package's entry points are when it is installed (pyproject.toml): here they run what is in this folder.
_PROGRAMS: Final = {
    "replicad": "replica.daemon:main",
    "replicactl": "replica.cli:main",
    "replica-heartbeat": "replica.heartbeat.daemon:main",
    "hb_standby": "replica.heartbeat.tools:standby",
    "hb_takeover": "replica.heartbeat.tools:takeover",
}
#: Starts it again when it dies, as systemd does.
_SUPERVISOR: Final = 'until "$@"; do sleep 0.1; done'
_LAST_LINES: Final = 40
_PAGE: Final = "The page of the cluster"


class Failed(Exception):
    """A check of the story failed: one sentence."""


def block(heading: str, language: str = "toml") -> str:
    """The first block of code of the document behind this heading."""
    text = DOCUMENT.read_text().partition(f"\n{heading}\n")[2]
    found = re.search(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, f"{DOCUMENT.name} has no {language} behind {heading!r}"
    return found[1]


class Tutorial:
    """The steps, in order. `ran` has each command line that was run, as the document has it."""

    def __init__(self, lab: Lab, screen: Screen) -> None:
        self.lab = lab
        self.screen = screen
        self.node1, self.node2 = lab.nodes
        self.ran: set[str] = set()

    def tell(self) -> None:
        """All of it."""
        with Probe(self.lab, http=True) as probe:
            self._probe = probe
            self._install()
            self._heartbeat_files()
            self._brutal()
            self._gentle()
            self._never_two()
        with FenceDevice(self.lab) as fence, Deposits(self.lab) as deposits, Probe(self.lab, http=True) as probe:
            self._probe, self._fence, self._deposits = probe, fence, deposits
            self._make_data()
            self._longer_line()
            self._gentle_with_data()
            self._brutal_with_data()
            self._toml()
            self._finish()

    # ── what the steps are made of ───────────────────────────────────────────────────────────────────────────────

    def _run(self, command: str, *nodes: Host, show: bool = True) -> str:
        """On these nodes, or both, as root types it; what the last one printed."""
        said = ""
        for node in nodes or self.lab.nodes:
            self.screen.command(f"root@{node.name}# {command}")
            said = node.run("sh", "-c", command)
            if show:
                self.screen.output(said)
        self.ran.add(command)
        return said

    def _start(self, *nodes: Host, options: str) -> None:
        """The cluster manager, now and at every boot: what `systemctl enable --now replica-heartbeat` does."""

        def start(node: Host) -> None:
            node.spawn(
                "replica-heartbeat", "sh", "-c", _SUPERVISOR, "supervisor", "replica-heartbeat", *options.split()
            )

        for node in nodes:
            self.screen.command(f"root@{node.name}# replica-heartbeat {options}".rstrip())
            node.at_boot = [start]
            start(node)

    def _page(self) -> str:
        """What the client gets, shown."""
        self.screen.command(f"client$ curl http://{CLUSTER_IP}/")
        page = self.lab.client.run("curl", "-s", "-m", "5", f"http://{CLUSTER_IP}/").strip()
        self.screen.output(page)
        return page

    def _sees(self, page: str, since: float | None = None) -> None:
        self._probe.wait_page(page, since)
        if (found := self._page()) != page:
            raise Failed(f"the client sees {found!r} in place of {page!r}")

    def _moves(self, what: str, do: Callable[[], object], node: Host) -> None:
        """Do something, after which the client sees the page of this node."""
        before, since = self._probe.timeline.last(pages=True), now()
        do()
        self._sees(node.name, since)
        outage_s = self._probe.timeline.outage_s(since, now(), pages=True)
        self.screen.tick(f"{what}: the client saw {before}, then for {outage_s:.1f} s nothing, and now {node.name}")

    # ── the address alone ────────────────────────────────────────────────────────────────────────────────────────

    def _install(self) -> None:
        screen = self.screen
        screen.step("Two servers with Apache, each with a page that says which one it is")
        for node in self.lab.nodes:
            for name, place in _PROGRAMS.items():
                module, function = place.split(":")
                line = f"import sys; from {module} import {function}; sys.exit({function}())"
                node.write(f"/usr/local/bin/{name}", f"#!{sys.executable}\n{line}\n", 0o755)
            apache.install(node)
            node.run("/etc/init.d/apache2", "start")
            node.at_boot = [lambda node: node.run("/etc/init.d/apache2", "start")]
            page = self.lab.client.run("curl", "-s", f"http://{node.address}/").strip()
            if page != node.name:
                raise Failed(f"Apache on {node.name} says {page!r}")
        screen.tick("Replica is installed on both, Apache runs on both")

    def _heartbeat_files(self) -> None:
        screen = self.screen
        screen.step("Heartbeat's three files, as the tutorial prints them, byte for byte")
        for name in ("ha.cf", "haresources", "authkeys"):
            screen.line(f"   {_HA_DIR / name}:")
            screen.output((FILES / name).read_text())
            for node in self.lab.nodes:
                node.write(_HA_DIR / name, (FILES / name).read_text())
                if node.run("sha256sum", _HA_DIR / name).split()[0] != _sha256(FILES / name):
                    raise Failed(f"{name} is not on {node.name} as it is here")
        refused = self.node1.try_run("replica-heartbeat", "--ha-dir", _HA_DIR)
        screen.command(f"root@node1# replica-heartbeat --ha-dir {_HA_DIR}")
        screen.output(refused.stderr.strip())
        if refused.returncode != 1 or "authkeys" not in refused.stderr:
            raise Failed("authkeys that others may read were not refused")
        screen.tick("with authkeys that others may read it does not start, and says why")
        self._run("chmod 600 /etc/ha.d/authkeys")
        since = now()
        apache_first = self.node1.at_boot
        self._start(*self.lab.nodes, options=f"--ha-dir {_HA_DIR}")
        for node in self.lab.nodes:
            node.at_boot = [*apache_first, *node.at_boot]
        self._sees("node1", since)
        self._run("replicactl cluster", self.node2)
        screen.tick(f"node1 has {CLUSTER_IP}, {self._probe.timeline.pages[0].received - since:.1f} s after the start")

    def _brutal(self) -> None:
        screen, node1, node2 = self.screen, self.node1, self.node2
        screen.step("Failover, the brutal way: node1 loses its power, is paused, loses its cable (deadtime 5)")
        for what, bad, good in (
            ("power cut", node1.power_cut, node1.boot),
            ("paused", node1.freeze, node1.thaw),
            ("cable pulled", node1.pull, node1.plug),
        ):
            screen.line(f"   {what}")
            self._moves(what, bad, node2)
            screen.line("   … and the way back (auto_failback is on where ha.cf does not say it)")
            self._moves(f"after “{what}”", good, node1)

    def _gentle(self) -> None:
        self.screen.step(
            "Switchover: hb_takeover on the node that shall get everything, hb_standby on the one that gives"
        )
        node1, node2 = self.node1, self.node2
        for command, where, node in (
            ("hb_takeover", node2, node2),
            ("hb_takeover", node1, node1),
            ("hb_standby", node1, node2),
            ("hb_takeover", node1, node1),
        ):
            self._moves(f"{command} on {where.name}", lambda: self._run(command, where), node)  # noqa: B023

    def _never_two(self) -> None:
        both = self._probe.timeline.two_holders(0.0, float("inf"))
        if both:
            raise Failed(f"both nodes had the address, {len(both)} times")
        self.screen.tick("at no moment did both nodes have the address (asked by ARP, 50 times a second)")

    # ── with data ────────────────────────────────────────────────────────────────────────────────────────────────

    def _make_data(self) -> None:
        screen, node1 = self.screen, self.node1
        screen.step("Data: a replicated volume, with a file system for Apache")
        for node in reversed(self.lab.nodes):
            self._end_manager(node)
            node.run("/etc/init.d/apache2", "stop")
            node.at_boot = []
        self._site = Site(self.lab, self._deposits, self._probe)
        screen.line(f"   {_CONFIG}, on both (the fence device is the lab's):")
        text = block("### The volume") + _fencing()
        screen.output(text)
        for node in self.lab.nodes:
            node.write(_CONFIG, text)
        self._run("(umask 077; replicactl secret > /etc/replica/cluster.key)", node1)
        self.node2.write("/etc/replica/cluster.key", node1.read("/etc/replica/cluster.key"), 0o600)
        self._run("replicactl create-md r0 --size 256M")
        for node in self.lab.nodes:
            screen.command(f"root@{node.name}# replicad r0")
            node.spawn("replicad", "replicad", "r0")
        for node in self.lab.nodes:
            self._site.wait_resource(node, lambda status: status["connection"] == "Connected")
        self._run("replicactl promote --force r0", node1)
        self._run("replicactl wait-sync r0", node1)
        self._run("replicactl status r0", node1)
        self._file_system(node1)
        self._run("replicactl demote r0", node1)
        screen.tick("both copies are UpToDate, with ext4 and a page on them")

    def _file_system(self, node: Host) -> None:
        """By nbdfuse: a host of namespaces has no /dev/nbd0 of its own."""
        node.run("mkdir", "-p", "/run/volume", "/data")
        node.spawn("nbdfuse", "nbdfuse", "/run/volume/r0", "nbd://127.0.0.1:10809/r0")
        self._until(node, "test -e /run/volume/r0")
        self._run("mkfs.ext4 -q /run/volume/r0", node)
        node.run("mount", "-o", "loop", "/run/volume/r0", "/data")
        node.write("/data/www/index.html", f"{_PAGE}\n")
        node.run("install", "-d", "-o", "www-data", "/data/www/documents")
        node.run("umount", "/data")
        self._until(node, "! losetup -n -O BACK-FILE | grep -q /run/volume")
        node.run("umount", "/run/volume")
        for each in self.lab.nodes:
            install_web_server(each, "/data")

    @staticmethod
    def _until(node: Host, condition: str) -> None:
        node.run("timeout", "20", "sh", "-c", f"until {condition}; do sleep 0.05; done")

    def _end_manager(self, node: Host) -> None:
        """What `systemctl stop replica-heartbeat` does."""
        (pid,) = node.signal(signal.SIGTERM, f"{sys.executable} /usr/local/bin/replica-heartbeat")
        gone(pid)

    def _longer_line(self) -> None:
        screen = self.screen
        screen.step("The same three files, with a longer line in haresources")
        line = block("### Its line in haresources", "text").replace("/dev/nbd0", "nbd:r0")
        screen.output(line)
        for node in self.lab.nodes:
            node.write(_HA_DIR / "haresources", line)
        since = now()
        self._start(*self.lab.nodes, options=f"--ha-dir {_HA_DIR}")
        self._sees(_PAGE, since)
        self._deposits.wait(self.node1)
        self._run("replicactl cluster --ha-dir /etc/ha.d", self.node2)
        self._run("replicactl fence-test --ha-dir /etc/ha.d", self.node2)
        screen.tick("node1 serves the page from the volume; a client begins to store documents there")

    def _serves(self, what: str, do: Callable[[], object], node: Host) -> None:
        """Do something, after which this node stores what the client sends."""
        before, since = len(self._deposits.accepted), now()
        do()
        first = self._deposits.wait(node, since)
        self._sees(_PAGE)
        last = self._deposits.accepted[before - 1][0]
        outage_s = max(0.0, first - max(last, since))
        if missing := self._deposits.missing():
            raise Failed(f"{len(missing)} documents that were accepted are missing: {', '.join(missing)}")
        self.screen.tick(
            f"{what}: {node.name} serves, {outage_s:.1f} s later; all {len(self._deposits.accepted)} documents that "
            "were accepted are there"
        )

    def _gentle_with_data(self) -> None:
        self.screen.step("Switchover with data, while a client goes on storing documents")
        self._serves("hb_standby", lambda: self._ha("hb_standby", self.node1), self.node2)
        self._serves("hb_takeover", lambda: self._ha("hb_takeover", self.node1), self.node1)

    def _ha(self, command: str, node: Host) -> None:
        self._run(f"REPLICA_HA_DIR=/etc/ha.d {command}", node)

    def _brutal_with_data(self) -> None:
        node1, node2 = self.node1, self.node2
        self.screen.step("Failover with data: node1 is paused, and must be switched off before node2 may write")
        self._serves("paused", node1.freeze, node2)
        if "off node1" not in self._fence.asked:
            raise Failed("node1 was not fenced")
        self.screen.tick("node1 was fenced first: it cannot thaw and write on")
        self.screen.line(
            "   node1 was switched on again by the device; it gets its group back when its copy is UpToDate"
        )
        self._serves("returned", lambda: None, node1)

        self.screen.step("Without a verdict on the other node: the fence device fails, node1 loses its power")
        self._fence.broken = True
        node1.power_cut()
        self.screen.output(self._site.wait_refused(node2, "replicactl fence node1 --done"))
        self.screen.tick("node2 does not take the data, and says what to do")
        command = "replicactl fence node1 --done --ha-dir /etc/ha.d"
        self._serves("an operator says that node1 is off", lambda: self._run(command, node2), node2)
        self._fence.broken = False
        self._serves("node1 is back", node1.boot, node1)

    def _toml(self) -> None:
        screen = self.screen
        screen.step("The same in the TOML file: `replicactl import-ha` writes it")
        said = self._run("replicactl import-ha /etc/ha.d >> /etc/replica/replica.toml")
        assert said == ""
        screen.output(self.node1.run("sed", "-n", "/^# From/,$p", _CONFIG))
        for node, other in ((self.node2, self.node1), (self.node1, self.node2)):
            self._end_manager(node)
            if node is self.node1:
                self._deposits.wait(other)
            self._start(node, options="")
        self._deposits.wait(self.node1)
        self._run("replicactl cluster", self.node2)
        self._serves("standby", lambda: self._run("replicactl standby", self.node1), self.node2)
        self._serves("takeover-node", lambda: self._run("replicactl takeover-node", self.node1), self.node1)

    def _finish(self) -> None:
        self.screen.step("Everything is stopped in order, and looked at")
        self._never_two()
        for node in (self.node2, self.node1):
            self._end_manager(node)
        self._site.check_copies()
        self.screen.tick("both copies are the same, byte for byte, and e2fsck finds nothing to mend")


def _last_lines(lab: Lab) -> str:
    """What was done, and what the cluster managers say about it."""
    lines = [f"{moment:.3f} {event}" for moment, event in lab.events]
    for host in lab.nodes:
        for name, text in host.logs():
            if name.startswith(("replica", "r0")):
                lines += [f"── {host.name}: {name}", *text.splitlines()[-_LAST_LINES:]]
    return "\n".join(lines)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _fencing() -> str:
    devices = (
        f'\n[fencing.{node}]\nagent = "{AGENT}"\nplug = "{node}"\naction = "reboot"\n' for node in ("node1", "node2")
    )
    return "".join(devices)


def main() -> int:
    """Tell it; the exit status: 0 all is well, 1 a check failed, 130 interrupted."""
    screen, began_s = Screen(), time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        need_hosts()
        need_mounts()
        if missing := apache.missing():
            pytest.skip(missing)
    except pytest.skip.Exception as reason:
        screen.cross(str(reason))
        return 1
    screen.line(
        "The tutorial, on hosts made of namespaces: node1 192.168.2.44, node2 192.168.2.45, a client; the cluster"
    )
    screen.line(f"is to be found at {CLUSTER_IP}. Nothing leaves this machine, and nothing is left on it.")
    with Lab() as lab:
        try:
            Tutorial(lab, screen).tell()
        except KeyboardInterrupt:
            screen.line("Interrupted: everything is taken down.")
            return 130
        except (Failed, LabError, AssertionError) as error:
            screen.cross(str(error))
            screen.line(_last_lines(lab), "dim")
            return 1
    screen.line()
    screen.line(f"All {len(screen.ticks)} checks passed in {time.monotonic() - began_s:.0f} s.", "bold green")
    return 0


if __name__ == "__main__":
    sys.exit(main())
