"""The cluster managers that are driven through the same scenarios: ours, and Debian's `heartbeat` 3.0.6."""

import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from tests.hosts.host import Host
from tests.hosts.lab import CLUSTER_IP

_HA_DIR: Final = "/etc/ha.d"


@dataclass(frozen=True)
class HaFiles:
    """What a cluster is told, as Heartbeat's three files; by default that of the tutorial, with a secret."""

    deadtime_s: float = 5.0
    auto_failback: str | None = "on"  # None: the line is missing
    #: Behind the address in haresources.
    resources: Sequence[str] = ()
    #: More lines of ha.cf.
    more: Sequence[str] = ()
    authkeys: str = "auth 1\n1 sha1 one-secret-for-both-nodes\n"

    @property
    def ha_cf(self) -> str:
        """The text of ha.cf."""
        lines = ["node node1 node2", "ucast eth0 192.168.2.44", "ucast eth0 192.168.2.45", f"ping {CLUSTER_IP}"]
        lines += ["debugfile /var/log/ha-debug.log", "logfile /var/log/heartbeat.log"]
        lines += [f"deadtime {_seconds(self.deadtime_s)}", *self.more]
        if self.auto_failback is not None:
            lines.append(f"auto_failback {self.auto_failback}")
        return "\n".join(lines) + "\n"

    @property
    def haresources(self) -> str:
        """The text of haresources."""
        return " ".join(["node1", CLUSTER_IP, *self.resources]) + "\n"

    def install(self, host: Host, authkeys: str | None = None) -> None:
        """Write them; `authkeys`: another key on this host."""
        host.write(f"{_HA_DIR}/ha.cf", self.ha_cf)
        host.write(f"{_HA_DIR}/haresources", self.haresources)
        host.write(f"{_HA_DIR}/authkeys", authkeys or self.authkeys, mode=0o600)


def _seconds(value: float) -> str:
    return f"{value:g}" if value >= 1 else f"{value * 1000:.0f}ms"


def supervise(host: Host, name: str, module: str, *arguments: str) -> None:
    """Run a program of this project on a host, and start it again when it fails, as its systemd unit says."""
    again = 'until "$@"; do sleep 0.1; done'
    host.spawn(name, "sh", "-c", again, "supervisor", *host.python(module, *arguments))


class Product(Protocol):
    """How one is driven. It is configured by `HaFiles` before it is started."""

    name: str

    def missing(self) -> str:
        """Why it cannot be run here, "" when it can."""

    def start(self, host: Host) -> None:
        """Start it, as the init system does; returns at once."""

    def stop(self, host: Host) -> None:
        """Stop it in order; returns when it has ended."""

    def kill(self, host: Host) -> None:
        """SIGKILL for its main process only, and what the init system does then."""

    def standby(self, host: Host) -> None:
        """The host is to give everything away."""

    def takeover(self, host: Host) -> None:
        """The host is to get everything."""


class RealHeartbeat:
    """Debian's package."""

    name = "heartbeat 3.0.6"
    _MASTER = "/usr/libexec/heartbeat/heartbeat"

    def missing(self) -> str:
        return "" if Path(self._MASTER).exists() else "Debian's package heartbeat is not installed"

    def start(self, host: Host) -> None:
        # What the packages heartbeat and resource-agents want in /run, as a boot makes it.
        host.run("systemd-tmpfiles", "--create", "--prefix=/run", "heartbeat.conf", "resource-agents.conf")
        host.spawn("heartbeat-start", self._MASTER)

    def stop(self, host: Host) -> None:
        host.run(self._MASTER, "-k")

    def kill(self, host: Host) -> None:
        host.signal(signal.SIGKILL, "heartbeat: master control process")

    def standby(self, host: Host) -> None:
        host.run("/usr/share/heartbeat/hb_standby", "all")

    def takeover(self, host: Host) -> None:
        host.run("/usr/share/heartbeat/hb_takeover", "all")


class Ours:
    """`replica-heartbeat`, on the same files. When it is killed it is started again, as systemd would."""

    name = "replica-heartbeat"
    _MODULE = "replica.heartbeat.daemon"

    def __init__(self, *options: str) -> None:
        self._options = options or ("--ha-dir", _HA_DIR)

    def missing(self) -> str:
        return "" if shutil.which("ip") else "iproute2 is not installed"

    def start(self, host: Host) -> None:
        supervise(host, "replica-heartbeat", self._MODULE, *self._options)

    def stop(self, host: Host) -> None:
        host.signal(signal.SIGTERM, f"{Host.interpreter} -m {self._MODULE}")

    def kill(self, host: Host) -> None:
        host.signal(signal.SIGKILL, f"{Host.interpreter} -m {self._MODULE}")

    def standby(self, host: Host) -> None:
        host.run(*host.python("replica.cli", "standby", "all", *self._options))

    def takeover(self, host: Host) -> None:
        host.run(*host.python("replica.cli", "takeover-node", *self._options))
