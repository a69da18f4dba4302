"""What the cluster manager is told, wherever that was read: the TOML file (`toml`) or Heartbeat's files (`ha_d`). Pure.

The same on both nodes, but for `node`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from replica.config_values import CLUSTER_MANAGER_STEM

DEFAULT_PORT: Final = 694  # Heartbeat's, registered as ha-cluster


class AuthMethod(StrEnum):
    """How heartbeats are signed: HMAC with one of these, or (no security) a checksum."""

    SHA256 = "sha256"
    SHA1 = "sha1"
    MD5 = "md5"
    CRC = "crc"


@dataclass(frozen=True, slots=True)
class Auth:
    """``key`` is empty for `AuthMethod.CRC` only."""

    method: AuthMethod
    key: bytes = field(repr=False)


class PathKind(StrEnum):
    """How heartbeats reach the other node."""

    UNICAST = "ucast"
    BROADCAST = "bcast"
    MULTICAST = "mcast"


@dataclass(frozen=True, slots=True)
class PathSettings:
    """One path of heartbeats."""

    kind: PathKind
    #: Of this node; "" lets the kernel choose by the route.
    interface: str
    #: The other node's address (unicast), the group (multicast), "" (broadcast: that of the interface).
    address: str
    port: int = DEFAULT_PORT
    ttl: int = 1  # multicast only
    #: This node's own address to send from and listen on (unicast); "" leaves it to the kernel. Only so can two nodes
    #: share a machine.
    local: str = ""

    @property
    def name(self) -> str:
        """As ha.cf has it, for logs and status: "ucast eth0 192.168.2.45"."""
        return " ".join(part for part in (self.kind, self.interface, self.address) if part)


@dataclass(frozen=True, slots=True)
class PingSettings:
    """A ping node (``name`` is its address), or a ping group: reachable while one of its addresses answers."""

    name: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Timing:
    """All in seconds."""

    keepalive_s: float = 1.0
    warntime_s: float = 2.5
    deadtime_s: float = 5.0
    initdead_s: float = 12.0
    deadping_s: float = 5.0
    #: How long a returning node must have been heard without a gap before it gets its groups back.
    failback_delay_s: float = 5.0


@dataclass(frozen=True, slots=True)
class ResourceSettings:
    """One resource of a group: ``kind`` names its agent (`replica.heartbeat.agents`), which has checked ``options``."""

    kind: str  # "replica", "map", "mount", "ip", "systemd", "lsb", "resource.d", "ocf", "exec"
    #: For logs, status and the administrator, unique in its group: "ip 192.168.2.50/24".
    name: str
    options: Mapping[str, Any]
    where: str  # "file:line"
    start_timeout_s: float = 60.0
    stop_timeout_s: float = 60.0
    monitor_timeout_s: float = 20.0
    monitor_interval_s: float = 5.0


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """Resources that are started in this order on one node, and stopped in the other."""

    name: str
    preferred: str
    resources: tuple[ResourceSettings, ...]
    #: How many failures, within `failure_window_s`, are mended on this node before the group moves.
    max_failures: int = 3
    failure_window_s: float = 60.0
    #: How often a failing stop is tried before this node is fenced by itself.
    stop_attempts: int = 3

    @property
    def replicated(self) -> bool:
        """Whether it promotes a replicated resource, which takes the peer's consent or its death."""
        return any(resource.kind == "replica" for resource in self.resources)


@dataclass(frozen=True, slots=True)
class FenceDevice:
    """One way of switching a node off; several are tried in order."""

    agent: str  # the program: a name in /usr/sbin or the PATH, or an absolute path
    #: As the agent reads them on its input, without ``action``; secrets are still names of files (``…-file``).
    options: Mapping[str, str] = field(repr=False)
    action: str = "reboot"  # or "off"
    timeout_s: float = 60.0
    retries: int = 2
    #: Waited before it is used: gives the node with the longer delay's target a head start when both would shoot.
    delay_s: float = 0.0
    where: str = ""


@dataclass(frozen=True, slots=True)
class Logging:
    """Files that are written besides standard error."""

    log_file: Path | None = None
    debug_file: Path | None = None
    facility: str | None = None  # of syslog


@dataclass(frozen=True, slots=True)
class Respawn:
    """A client program that is kept running (ha.cf: respawn)."""

    user: str
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HeartbeatSettings:
    """Everything, as the node `node` sees it."""

    cluster: str
    node: str
    peer: str
    auth: Auth = field(repr=False)
    paths: tuple[PathSettings, ...]
    groups: tuple[GroupSettings, ...]
    state_dir: Path  # of this node, kept over a reboot
    run_dir: Path  # of this node, empty after a reboot
    timing: Timing = Timing()
    pings: tuple[PingSettings, ...] = ()
    auto_failback: bool = True
    #: Node → how to fence it.
    fencing: Mapping[str, tuple[FenceDevice, ...]] = field(default_factory=dict)
    promote_without_fencing: bool = False
    logging: Logging = Logging()
    respawn: tuple[Respawn, ...] = ()
    watchdog: Path | None = None
    #: What a node does to itself when a group cannot be stopped: "reboot", or "nothing" (the group then stays where it
    #: is until somebody mends it, or the other node fences this one).
    on_stop_failure: str = "reboot"
    #: The TOML file, for what is named in it (replicated resources); None when there is none.
    config_path: Path | None = None
    #: The directory of ha.cf, whose ``resource.d`` is searched first; None without `--ha-dir`.
    ha_dir: Path | None = None
    #: Said once at the start: directives that have no effect, weak keys.
    warnings: tuple[str, ...] = ()

    @property
    def nodes(self) -> tuple[str, str]:
        """Both, in an order that both nodes agree on."""
        first, second = sorted((self.node, self.peer))
        return first, second

    @property
    def control_socket(self) -> Path:
        """Where `replicactl` reaches the daemon."""
        return self.run_dir / f"{CLUSTER_MANAGER_STEM}.sock"
