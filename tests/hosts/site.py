"""A web site with data on two hosts: a replicated volume, ext4 on it by nbdfuse, Apache serving from that, an address.

The pair is made as an operator makes it, and then left to the cluster manager.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from replica import control
from replica.config_values import CLUSTER_MANAGER_STEM
from replica.errors import ReplicaError
from tests.cluster.mounted import need_mounts
from tests.hosts import apache
from tests.hosts.deposits import STORE, Deposits
from tests.hosts.fence import AGENT
from tests.hosts.host import Host
from tests.hosts.lab import CLUSTER_IP, Lab, need_hosts
from tests.hosts.namespace import LabError
from tests.hosts.probe import Probe, serve
from tests.hosts.products import Ours
from tests.processes import PATIENCE_S

CONFIG: Final = "/etc/replica/replica.toml"
BACKING: Final = "/srv/r0.img"
FOLDER: Final = "/srv/data"
#: What the web server shows first.
PAGE: Final = f"{FOLDER}/www/index.html"
#: Loop devices are the machine's, and known by the path of their file: two runs at a time must not meet there.
RUN: Final = f"/run/replica-{os.getpid()}"
_SECRET: Final = "a-secret-of-forty-eight-letters-for-both-nodes-00"
#: Between two looks at a daemon that does not answer: it is about to be started, or the host to be booted.
_LOOK_S: Final = 0.05


def need_site() -> None:
    """Skip the test, and say why, where such a site cannot be run."""
    need_hosts()
    need_mounts()
    if missing := apache.missing():
        pytest.skip(missing)


def toml(
    *,
    fencing: str = "off",
    heartbeat: str = "",
    resource: str = "",
    second_network: bool = False,
) -> str:
    """The configuration of both nodes. `fencing`: the action of the lab's device, "" for none. With a second network,
    the nodes replicate over that, and hear each other on both.
    """
    addresses = {"node1": "192.168.2.44", "node2": "192.168.2.45"}
    paths = ""
    if second_network:
        first, addresses = addresses, {"node1": "10.0.0.1", "node2": "10.0.0.2"}
        ways = [(way, address) for way, ends in (("eth0", first), ("eth1", addresses)) for address in ends.values()]
        listed = (f'{{ interface = "{way}", address = "{address}" }}' for way, address in ways)
        paths = f"paths = [{', '.join(listed)}]"
    devices = (f'[fencing.{node}]\nagent = "{AGENT}"\nplug = "{node}"\naction = "{fencing}"\n' for node in addresses)
    return f"""
[cluster]
name = "web"
secret-file = "cluster.key"
run-dir = "{RUN}"
[node.node1]
address = "{addresses["node1"]}"
[node.node2]
address = "{addresses["node2"]}"
[resource.r0]
port = 7789
nbd = "unix:{RUN}/r0.nbd"
backing = "{BACKING}"
{resource}
[heartbeat]
{_with_defaults(heartbeat)}
{paths}
[[group]]
name = "web"
preferred = "node1"
resources = [
  {{ replica = "r0" }},
  {{ mount = "{FOLDER}", device = "nbd:r0", type = "ext4" }},
  {{ lsb = "apache2", monitor-interval = 1 }},
  {{ ip = "{CLUSTER_IP}/24", interface = "eth0" }},
]
{"".join(devices) if fencing else ""}
"""


def _with_defaults(lines: str) -> str:
    """Times that do not make a test wait, but for those that are given."""
    given = {line.partition(" ")[0] for line in lines.splitlines()}
    times = {"deadtime": 1.5, "initdead": 6, "failback-delay": 0.5}
    return "\n".join([lines, *(f"{key} = {value}" for key, value in times.items() if key not in given)])


class _Reached(Exception):
    """Ends following a status."""


class Site:
    """`install` it, `start` it, do things, and `finish`: that is where it is looked what has become of the data."""

    product: Final = Ours("--config", CONFIG)

    def __init__(self, lab: Lab, deposits: Deposits, probe: Probe) -> None:
        self.lab = lab
        self.deposits = deposits
        self.probe = probe
        self.node1, self.node2 = lab.nodes

    def ctl(self, node: Host, *command: str) -> str:
        """`replicactl` on a node; LabError with its sentence."""
        return node.run(*node.python("replica.cli", *command, "--config", CONFIG))

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────

    def install(self, text: str, size: str = "32M") -> None:
        """Configuration, metadata, a first Primary, and a file system with the site on the volume."""
        self.configure(text)
        for node in self.lab.nodes:
            node.write("/etc/replica/cluster.key", _SECRET, 0o600)
            self.ctl(node, "create-md", "r0", "--size", size)
            install_web_server(node, FOLDER)
            node.spawn("replicad", *node.python("replica.daemon", "r0", "--config", CONFIG))
            serve(node)
        for node in self.lab.nodes:
            self.wait_resource(node, lambda status: status["connection"] == "Connected")
        self.ctl(self.node1, "promote", "--force", "r0")
        self.ctl(self.node1, "wait-sync", "r0", "--timeout", "30")
        self._make_file_system(size)
        self.ctl(self.node1, "demote", "r0")

    def _make_file_system(self, size: str) -> None:
        """The files are those of the web server's user."""
        node = self.node1
        node.run("mkdir", "-p", "/tmp/site/www/documents")
        node.write("/tmp/site/www/index.html", "The page of the cluster\n")
        node.run("mke2fs", "-q", "-t", "ext4", "-d", "/tmp/site", "/tmp/fs", size)
        node.run("debugfs", "-w", "-R", "sif /www/documents uid 33", "/tmp/fs")
        node.run("nbdcopy", "/tmp/fs", f"nbd+unix:///r0?socket={RUN}/r0.nbd")

    def configure(self, text: str) -> None:
        """On all nodes that are on; the cluster manager reads it when it starts, or by `reload`."""
        for node in self.lab.nodes:
            if node.on:
                node.write(CONFIG, text)

    def start(self, *nodes: Host) -> None:
        """Start the cluster manager, now and at every boot."""
        for node in nodes or self.lab.nodes:
            self.product.start(node)
            if self.product.start not in node.at_boot:
                node.at_boot.append(self.product.start)

    def finish(self, holder: Host | None) -> None:
        """All that can be said at the end, whatever was done, when this node has the group again: every document that
        was accepted is there; nobody saw two holders of the address; and two copies in sync, which are the same when
        everything is stopped in order, with a file system without faults. None: either node may have the group.
        """
        for node in self.lab.nodes:
            with self.lab.lock:  # the fence device may be about to switch it on
                if not node.on:
                    node.boot()
        for node in self.lab.nodes:
            self.wait_resource(node, _in_sync)
        holder = self.deposits.wait_settled() if holder is None else holder
        self.deposits.wait(holder)
        assert self.deposits.missing() == []
        assert self.probe.timeline.two_holders(0.0, float("inf")) == []
        for node in (self.lab.peer(holder), holder):  # the other one first, so that nothing has to move
            self.stop(node)
            self.wait_gone(node)
        self.check_copies()

    def check_copies(self) -> None:
        """Once everything is stopped in order."""
        for node in self.lab.nodes:
            self.wait_resource(
                node, lambda status: status["role"] == "Secondary" and status["connection"] == "Connected"
            )
            node.run("e2fsck", "-f", "-n", BACKING)
        first, second = (node.run("sha256sum", BACKING) for node in self.lab.nodes)
        assert first == second, "the two copies differ"

    def stop(self, node: Host) -> None:
        """Ask the cluster manager to end in order."""
        self.product.stop(node)

    def kill(self, node: Host, module: str) -> None:
        """SIGKILL for a daemon of ours on this node."""
        assert node.signal(signal.SIGKILL, f"{Host.interpreter} -m {module}"), f"{module} does not run on {node.name}"

    # ── looking ──────────────────────────────────────────────────────────────────────────────────────────────

    def wait(self, node: Host, reached: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Until the cluster manager of this node says so in its status; that status."""
        return self._follow(node, CLUSTER_MANAGER_STEM, reached, what)

    def wait_resource(self, node: Host, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The same of replicad."""
        return self._follow(node, "r0", reached, "the state of r0")

    def wait_held(self, node: Host) -> dict[str, Any]:
        """Until this node says that it has started the group."""
        return self.wait(node, lambda status: _group(status)[:2] == (node.name, "started"), "holds the group")

    def wait_refused(self, node: Host, *words: str) -> str:
        """Until this node says why it does not take the group, in one sentence that has these words; the sentence."""
        status = self.wait(
            node, lambda status: all(word in _group(status)[2] for word in words), f"says {' … '.join(words)}"
        )
        return _group(status)[2]

    def wait_ready(self, node: Host, other: Host) -> None:
        """Until this node says that the group could run on that one."""
        self.wait(node, lambda status: status["groups"][0]["ready"][other.name] == "yes", f"{other.name} is ready")

    def group(self, node: Host) -> dict[str, Any]:
        """What the cluster manager of this node says about the group, now."""
        (group,) = control.call(self._socket(node, CLUSTER_MANAGER_STEM), "status", timeout_s=PATIENCE_S)["groups"]
        return dict(group)

    def copies(self, node: Host) -> list[str]:
        """The states of both copies, as this node has them."""
        return self.ctl(node, "dstate", "r0").strip().split("/")

    def wait_gone(self, node: Host) -> None:
        """Until the cluster manager of this node has ended."""
        try:
            control.call(self._socket(node, CLUSTER_MANAGER_STEM), "watch", timeout_s=PATIENCE_S)
        except control.ControlTimeout:
            raise LabError(f"{node.name}: the cluster manager does not end") from None
        except ReplicaError:
            pass

    def _follow(self, node: Host, name: str, reached: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """The daemon's own status, as it changes, through its socket: no program has to run on the node for that."""
        deadline_s = time.monotonic() + PATIENCE_S
        last: object = None

        def look(status: dict[str, Any]) -> None:
            nonlocal last
            last = status
            if reached(status):
                raise _Reached

        while (left_s := deadline_s - time.monotonic()) > 0:
            try:
                control.call(self._socket(node, name), "watch", on_event=look, timeout_s=left_s)
            except _Reached:
                assert isinstance(last, dict)
                return last
            except ReplicaError as error:
                last = last or error
            time.sleep(_LOOK_S)
        raise LabError(f"{node.name}: {what}: not in time; the last was {last}")

    @staticmethod
    def _socket(node: Host, name: str) -> Path:
        runs = Path(f"/proc/{node.namespace.pid}/root")
        folder = next(
            (runs / folder for folder in (RUN[1:], "run/replica") if (runs / folder).exists()), runs / RUN[1:]
        )
        return folder / node.name / f"{name}.sock"


def _in_sync(status: dict[str, Any]) -> bool:
    (volume,) = status["volumes"]
    return volume["disk"] == volume["peer_disk"] == "UpToDate"


def install_web_server(node: Host, folder: str) -> None:
    """Apache with its pages and the documents of `Deposits` on the volume, which is mounted there. Not started."""
    apache.install(node, f"{folder}/www")
    node.write("/usr/lib/cgi-bin/store", STORE.format(documents=f"{folder}/www/documents"), 0o755)
    modules = (f"../mods-available/cgid.{end}" for end in ("load", "conf"))
    node.run("ln", "-s", *modules, "/etc/apache2/mods-enabled")


def _group(status: dict[str, Any]) -> tuple[str | None, str, str]:
    """Who holds the group, its state, and what is said about it."""
    (group,) = status["groups"]
    return group["holder"], group["status"], group["sentence"]
