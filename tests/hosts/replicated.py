"""A cluster with data: r0 with ext4 on it, served by Apache at the address of the cluster, with a fence device."""

import json
import os
import secrets
import shutil
from typing import Any, Final

import pytest

from tests.hosts import apache
from tests.hosts.fence import AGENT, FenceDevice
from tests.hosts.host import Host, now
from tests.hosts.lab import CLUSTER_IP, Lab
from tests.hosts.namespace import LabError
from tests.hosts.probe import Probe, serve
from tests.hosts.products import Ours, supervise

FOLDER: Final = "/data"
_CONFIG: Final = "/etc/replica/replica.toml"
_TOML: Final = f"""
[cluster]
name = "web"
secret-file = "cluster.key"
[node.node1]
address = "192.168.2.44"
[node.node2]
address = "192.168.2.45"
[resource.r0]
port = 7789
nbd = "unix:/run/replica/r0.nbd"
backing = "/srv/r0.img"
timeout-s = 2
connect-interval = 0.1
[heartbeat]
keepalive = 0.2
deadtime = 1
initdead = 5
failback-delay = 0.5
log-file = "/var/log/heartbeat.log"
[[group]]
name = "web"
preferred = "node1"
resources = [
  {{ replica = "r0", monitor-interval = 1 }},
  {{ mount = "{FOLDER}", device = "nbd:r0", type = "ext4", monitor-interval = 1 }},
  {{ lsb = "apache2", monitor-interval = 1 }},
  {{ ip = "{CLUSTER_IP}/24", interface = "eth0" }},
]
[fencing.node1]
agent = "{AGENT}"
action = "off"
retries = 0
plug = "node1"
[fencing.node2]
agent = "{AGENT}"
action = "off"
retries = 0
plug = "node2"
"""
_PROGRAMS: Final = {"nbdfuse": "libnbd-bin", "nbdcopy": "libnbd-bin", "mke2fs": "e2fsprogs", "fsck.ext4": "e2fsprogs"}
_SIZE: Final = "32M"


def need_data() -> None:
    """Skip the test, and say why, where such a cluster cannot be run."""
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not os.path.exists(device):
            pytest.skip(f"{device} is missing")
    for program, package in _PROGRAMS.items():
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian package {package})")
    if missing := apache.missing():
        pytest.skip(missing)


class Replicated:
    """Both nodes with data on them, started; a context manager. The page says what was written last."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.node1, self.node2 = lab.nodes
        self.manager = Ours("--config", _CONFIG)
        self.fence = FenceDevice(lab)
        self._version = 0
        key = secrets.token_hex(32)
        for node in lab.nodes:
            serve(node)
            apache.install(node, FOLDER)
            node.write(_CONFIG, _TOML)
            node.write("/etc/replica/cluster.key", key, mode=0o600)
            node.write(f"{FOLDER}/index.html", "the volume is not mounted\n")
            self.replicactl(node, "create-md", "r0", "--size", _SIZE)
            self._start_replicad(node)
        self._fill()
        for node in lab.nodes:
            node.at_boot += [self._start_replicad, self.manager.start]
            self.manager.start(node)
        self.probe = Probe(lab, http=True)

    def __enter__(self) -> "Replicated":
        return self

    def __exit__(self, *ignored: object) -> None:
        self.probe.__exit__()
        self.fence.__exit__()

    # ── operators ────────────────────────────────────────────────────────────────────────────────────────────

    def replicactl(self, node: Host, *command: str) -> str:
        """What the command printed; LabError when it failed."""
        return node.run(*node.python("replica.cli", *command, "--config", _CONFIG))

    def status(self, node: Host) -> dict[str, Any]:
        """Of the cluster, as this node sees it."""
        document: dict[str, Any] = json.loads(self.replicactl(node, "cluster", "--json"))
        return document

    @staticmethod
    def _start_replicad(node: Host) -> None:
        supervise(node, "replicad", "replica.daemon", "r0", "--config", _CONFIG)

    def _fill(self) -> None:
        """An ext4 with a page on both copies."""
        self.replicactl(self.node1, "wait-connect", "r0", "--timeout", "30")
        self.replicactl(self.node1, "promote", "r0", "--force")
        self.node1.write("/tmp/files/index.html", "version 0\n")
        self.node1.run("mke2fs", "-q", "-t", "ext4", "-d", "/tmp/files", "/tmp/r0.ext4", _SIZE)
        self.node1.run("nbdcopy", "--flush", "/tmp/r0.ext4", "nbd+unix:///r0?socket=/run/replica/r0.nbd")
        self.replicactl(self.node1, "wait-sync", "r0", "--timeout", "30")
        self.replicactl(self.node1, "demote", "r0")

    # ── a client ─────────────────────────────────────────────────────────────────────────────────────────────

    def write(self, node: Host) -> str:
        """Write a new page on the node that has the volume, safely; the page."""
        self._version += 1
        page = f"version {self._version}"
        node.run(
            "sh",
            "-c",
            'echo "$1" > "$2/new" && sync "$2/new" && mv "$2/new" "$2/index.html" && sync "$2"',
            "sh",
            page,
            FOLDER,
        )
        self.probe.wait_page(page)
        return page

    def served_by(self, node: Host, since: float | None = None) -> None:
        """Until this node serves what was written last; LabError when the page is another one, or does not come."""
        start = now() if since is None else since
        self.probe.wait_answer(node, start)
        self.probe.wait_page(f"version {self._version}", start)
        pages = {page for received, page in self.probe.timeline.pages if received > start}
        if pages != {f"version {self._version}"}:
            raise LabError(f"the client saw {pages}")
