"""Hosts made of Linux namespaces on this machine: node1 and node2, and a client that looks at them.

    node1 192.168.2.44   node2 192.168.2.45   client 192.168.2.10      network 0, eth0
    node1 10.0.0.1       node2 10.0.0.2                                network 1, eth1 (on request)

Nothing is added to the machine's own network, no name is global, so several labs can run at once; no packet can leave.
All hosts are processes of one PID namespace, the ground, which also holds the switches and the disks (in memory): its
end is the end of everything.
"""

import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import Final

import pytest

from tests.hosts.host import ROOT, Card, Host, now
from tests.hosts.namespace import Namespace
from tests.hosts.switch import Switch, between

_PROGRAMS: Final = {
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "pivot_root": "util-linux",
    "ip": "iproute2",
    "nft": "nftables",
    "ping": "iputils-ping",
}
_CAP_SYS_ADMIN: Final = 1 << 21
_LAST_LINES: Final = 80
CLUSTER_IP: Final = "192.168.2.50"


def need_hosts() -> None:
    """Skip the test, and say why, where no hosts can be made."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    if not int(status["CapEff"], 16) & _CAP_SYS_ADMIN:
        pytest.skip("making hosts of namespaces takes root")
    for program, package in _PROGRAMS.items():
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian package {package})")
    if "overlay" not in Path("/proc/filesystems").read_text():
        pytest.skip("this kernel has no overlay file system")


class Lab:
    """Switches and hosts, all booted; a context manager."""

    def __init__(self, second_network: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rp-lab-", dir="/tmp"))
        #: A folder of all hosts, which they see as /lab.
        self.shared = self.folder / "shared"
        self.disks = self.folder / "disks"
        for folder in (self.shared, self.disks):
            folder.mkdir()
        self.lock = threading.RLock()  # power is also cut by the fence device, in a thread of its own
        #: What was done: when (`now`), what.
        self.events: list[tuple[float, str]] = []
        #: Loop devices that its hosts had mounted, and their files.
        self.loop_devices: set[tuple[str, str]] = set()
        self.ground = Namespace("ground", {"disks": str(self.disks)}, ["--net", "--mount", "--pid"], within=None)
        self.switch = Switch(self.ground, networks=2)
        second = (lambda last: [Card("eth1", 1, f"10.0.0.{last}/24")]) if second_network else lambda last: []
        self.node1 = Host(self, "node1", [Card("eth0", 0, "192.168.2.44/24"), *second(1)])
        self.node2 = Host(self, "node2", [Card("eth0", 0, "192.168.2.45/24"), *second(2)])
        #: Its second card listens to ARP without taking part in it: what is learnt from its questions must not mend
        #: the client's own table.
        self.client = Host(self, "client", [Card("eth0", 0, "192.168.2.10/24"), Card("spy0", 0)])
        self.hosts = {host.name: host for host in (self.node1, self.node2, self.client)}
        self.nodes = (self.node1, self.node2)

    def __enter__(self) -> "Lab":
        try:
            for host in self.hosts.values():
                host.boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *ignored: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything; returns when it is gone."""
        for host in self.hosts.values():
            if not host.off:
                host.power_cut()
        self.ground.kill()
        shutil.rmtree(self.folder)

    def peer(self, node: Host) -> Host:
        """The other node."""
        return self.node2 if node is self.node1 else self.node1

    # ── faults between hosts ─────────────────────────────────────────────────────────────────────────────────

    def cut(self, source: Host, target: Host, match: str = "", interface: str = "eth0") -> None:
        """Lose the frames from one host to another, one way; `match` says which: "udp dport 694"."""
        self.note(f"cut {source.name} → {target.name} {interface} {match}".strip())
        self.switch.drop(self._between(source, target, match, interface))

    def mend(self, source: Host, target: Host, match: str = "", interface: str = "eth0") -> None:
        """Undo `cut`."""
        self.switch.pass_on(self._between(source, target, match, interface))
        self.note(f"mend {source.name} → {target.name} {interface} {match}".strip())

    @staticmethod
    def _between(source: Host, target: Host, match: str, interface: str) -> str:
        return between(*source.ports(interface), *target.ports(interface), match)

    # ── for hosts ────────────────────────────────────────────────────────────────────────────────────────────

    def note(self, event: str) -> None:
        """Remember that something was done now."""
        self.events.append((now(), event))

    def hosts_file(self) -> str:
        """/etc/hosts, the same everywhere."""
        return "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in self.hosts.values())

    def shared_folders(self) -> dict[str, str]:
        """Out here → inside: /lab, and what Python and the tests take where that is not in the machine's root."""
        shared = {str(self.shared): "/lab"}
        root_device = os.stat("/").st_dev
        for folder in {ROOT, Path(sys.prefix), Path(sys.base_prefix)}:
            if folder.stat().st_dev != root_device or folder.is_relative_to("/tmp"):
                shared[str(folder)] = str(folder)
        return shared

    def ground_path(self, path: Path) -> Path:
        """Where a file on a disk of the lab lies as seen from the machine."""
        return Path(f"/proc/{self.ground.pid}/root{path}")

    def report(self) -> str:
        """What was done, and the logs of all hosts: for a test that has failed."""
        lines = [f"{moment:.3f} {event}" for moment, event in self.events]
        for host in self.hosts.values():
            for name, text in host.logs():
                lines += [f"── {host.name}: {name}", *text.splitlines()[-_LAST_LINES:]]
        return "\n".join(lines)
