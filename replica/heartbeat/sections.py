"""The sections `[heartbeat]`, `[[group]]` and `[fencing]`, from a TOML file or from what was read from /etc/ha.d.

Every error is a ConfigError with file and line. Nothing outside of the tables is looked at.
"""

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, NamedTuple

from replica import config_values as values
from replica.config_file import Table
from replica.heartbeat.fencing_sections import read_fencing
from replica.heartbeat.group_sections import cluster_addresses, read_groups
from replica.heartbeat.settings import (
    DEFAULT_PORT,
    FenceDevice,
    GroupSettings,
    Logging,
    PathKind,
    PathSettings,
    PingSettings,
    Respawn,
    Timing,
)
from replica.heartbeat.values import interface as interface_name
from replica.heartbeat.values import ip_address, ip_addresses, tables
from replica.heartbeat.values import table as a_table

SECTIONS: Final = ("heartbeat", "group", "fencing")
FACILITIES: Final = (
    *("auth", "authpriv", "cron", "daemon", "ftp", "kern", "lpr", "mail", "news", "syslog", "user", "uucp"),
    *(f"local{number}" for number in range(8)),
)
_INITDEAD_FACTOR: Final = 2
_INITDEAD_MIN_S: Final = 12.0
_INITDEAD_IS_DEADTIME_FROM_S: Final = 10.0
_KEEPALIVE_S: Final = 1.0
_BEATS: Final = 5  # in deadtime, where keepalive is not given
_MIN_BEATS: Final = 2


class Key(NamedTuple):
    """A key of `[heartbeat]`: its parser, and its default (None: none, or it follows from others)."""

    parse: Callable[[object], Any]
    default: Any = None
    per_node: bool = False  # may stand in [heartbeat.on.NODE]


_TIME: Final = values.seconds(0.01, 3600)
HEARTBEAT_KEYS: Final[Mapping[str, Key]] = {
    "keepalive": Key(_TIME),
    "warntime": Key(_TIME),
    "deadtime": Key(_TIME, 5.0),
    "initdead": Key(_TIME),
    "deadping": Key(_TIME),
    "failback-delay": Key(values.seconds(0, 3600), 5.0),
    "auto-failback": Key(values.boolean, True),
    "promote-without-fencing": Key(values.boolean, False),
    "on-stop-failure": Key(values.one_of("reboot", "nothing"), "reboot"),
    "port": Key(values.integer(1, 65535), DEFAULT_PORT),
    "paths": Key(tables, per_node=True),
    "ping": Key(ip_addresses),
    "ping-groups": Key(a_table),
    "authkeys": Key(values.text),
    "log-file": Key(values.text, per_node=True),
    "debug-file": Key(values.text, per_node=True),
    "log-facility": Key(values.one_of(*FACILITIES), per_node=True),
    "watchdog": Key(values.text, per_node=True),
    "respawn": Key(tables),
}
_PATH_KEYS: Final = ("kind", "interface", "address", "local", "port", "ttl")


class Members(NamedTuple):
    """Who the sections are about, and what they may name."""

    node: str
    peer: str
    #: Between these heartbeats go when no path is given.
    address: str
    peer_address: str | None
    #: Whether an address is this node's own: heartbeats are not sent there.
    is_own: Callable[[str], bool]
    #: The replicated resources that are configured, and where.
    replicas: frozenset[str]
    replicas_file: Path | None


@dataclass(frozen=True, slots=True)
class Sections:
    """What they say; but for ``authkeys``, the fields are those of `HeartbeatSettings`."""

    timing: Timing
    paths: tuple[PathSettings, ...]
    pings: tuple[PingSettings, ...]
    groups: tuple[GroupSettings, ...]
    fencing: Mapping[str, tuple[FenceDevice, ...]]
    auto_failback: bool
    promote_without_fencing: bool
    logging: Logging
    respawn: tuple[Respawn, ...]
    watchdog: Path | None
    on_stop_failure: str
    authkeys: Path | None  # a file of Heartbeat's, in place of the cluster's secret
    warnings: list[str] = field(default_factory=list)

    def as_settings(self) -> dict[str, Any]:
        """The fields of `HeartbeatSettings` that follow from them alone."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("authkeys", "warnings")}


def read_sections(top: Table, members: Members) -> Sections:
    """Check them and fill in the defaults; ConfigError."""
    heartbeat = top.subtable("heartbeat") if "heartbeat" in top.items else Table(top.file, ("heartbeat",), {})
    nodes = (members.node, members.peer)
    heartbeat.check_keys((*HEARTBEAT_KEYS, "on"))
    own = _own_table(heartbeat, nodes, members.node)
    for table in (heartbeat, own, _own_table(heartbeat, nodes, members.peer)):
        _read_path_list(table, DEFAULT_PORT)  # what is wrong for one node is wrong on both

    def get(key: str) -> Any:
        table = own if key in own.items else heartbeat
        setting = HEARTBEAT_KEYS[key]
        return table.value(key, setting.parse) if key in table.items else setting.default

    def path(key: str) -> Path | None:
        name = get(key)
        return None if name is None else top.file.resolve(name)

    groups = read_groups(top, nodes, members.replicas, members.replicas_file)
    warnings: list[str] = []
    if not groups:
        nothing = f"no group is described: {members.node} hears whether {members.peer} is alive, and starts nothing"
        warnings.append(f"{top.file.where(('group',))}: {nothing}")
    return Sections(
        timing=_read_timing(heartbeat, get),
        paths=_read_paths(own if "paths" in own.items else heartbeat, members, get("port")),
        pings=_read_pings(heartbeat, cluster_addresses(top), warnings),
        groups=groups,
        fencing=read_fencing(top, nodes),
        auto_failback=get("auto-failback"),
        promote_without_fencing=get("promote-without-fencing"),
        logging=Logging(path("log-file"), path("debug-file"), get("log-facility")),
        respawn=tuple(map(_read_respawn, heartbeat.tables("respawn"))),
        watchdog=path("watchdog"),
        on_stop_failure=get("on-stop-failure"),
        authkeys=path("authkeys"),
        warnings=warnings,
    )


def _own_table(heartbeat: Table, nodes: Sequence[str], node: str) -> Table:
    """`[heartbeat.on.NODE]`, whose values are checked on both nodes."""
    none = Table(heartbeat.file, heartbeat.key, {})
    if "on" not in heartbeat.items:
        return none
    on = heartbeat.subtable("on")
    on.check_keys(tuple(nodes))
    if node not in on.items:
        return none
    own = on.subtable(node)
    for key in own.items:
        if key in HEARTBEAT_KEYS and not HEARTBEAT_KEYS[key].per_node:
            raise own.file.error((*own.key, key), "must be the same on both nodes: set it in [heartbeat]")
    own.check_keys(tuple(key for key, setting in HEARTBEAT_KEYS.items() if setting.per_node))
    for key in own.items:
        own.value(key, HEARTBEAT_KEYS[key].parse)
    return own


def _read_timing(table: Table, get: Callable[[str], Any]) -> Timing:
    deadtime_s: float = get("deadtime")
    keepalive_s: float = get("keepalive") or min(_KEEPALIVE_S, deadtime_s / _BEATS)
    warntime_s: float = get("warntime") or deadtime_s / 2
    initdead_s: float = get("initdead") or initdead_default_s(deadtime_s)
    deadping_s: float = get("deadping") or deadtime_s

    def refuse(key: str, problem: str) -> None:
        raise table.file.error((*table.key, key), problem)

    for key, limit_s in (("deadtime", deadtime_s), ("deadping", deadping_s)):
        if limit_s <= _MIN_BEATS * keepalive_s:
            why = "one lost packet must not look like a death"
            if key in table.items:
                refuse(key, f"must be more than twice keepalive ({keepalive_s:g} s), not {limit_s:g} s: {why}")
            refuse("keepalive", f"must be less than half of {key} ({limit_s:g} s), not {keepalive_s:g} s: {why}")
    if not keepalive_s < warntime_s < deadtime_s:
        between = f"keepalive ({keepalive_s:g} s) and deadtime ({deadtime_s:g} s)"
        refuse("warntime", f"must be between {between}, not {warntime_s:g} s")
    if initdead_s < deadtime_s:
        refuse("initdead", f"must be at least deadtime ({deadtime_s:g} s), not {initdead_s:g} s")
    return Timing(keepalive_s, warntime_s, deadtime_s, initdead_s, deadping_s, get("failback-delay"))


def initdead_default_s(deadtime_s: float) -> float:
    """As Heartbeat has it: a network that has just been started needs its time."""
    if deadtime_s > _INITDEAD_IS_DEADTIME_FROM_S:
        return deadtime_s
    return max(_INITDEAD_FACTOR * deadtime_s, _INITDEAD_MIN_S)


def _read_paths(table: Table, members: Members, port: int) -> tuple[PathSettings, ...]:
    if "paths" not in table.items:
        if members.peer_address is None:
            return ()
        local = members.address if _is_in_numbers(members.address) else ""
        return (PathSettings(PathKind.UNICAST, "", members.peer_address, port, local=local),)
    # Both nodes' addresses may stand there, so that the file is the same on both.
    paths = [
        path
        for path in _read_path_list(table, port)
        if path.kind is not PathKind.UNICAST or not members.is_own(path.address)
    ]
    if not paths:
        problem = f"leads nowhere from {members.node}: name a path to {members.peer}"
        raise table.file.error((*table.key, "paths"), problem)
    return tuple(paths)


def _read_path_list(table: Table, port: int) -> list[PathSettings]:
    paths = [_read_path(entry, port) for entry in table.tables("paths")]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise table.file.error((*table.key, "paths"), f"has {path.name} twice: remove one")
    return paths


def _read_path(entry: Table, port: int) -> PathSettings:
    entry.check_keys(_PATH_KEYS)
    kind = PathKind(entry.value("kind", values.one_of(*PathKind)) if "kind" in entry.items else PathKind.UNICAST)
    interface = entry.value("interface", interface_name) if "interface" in entry.items else ""
    if kind is not PathKind.UNICAST and not interface:
        raise entry.error(f"needs interface, through which {kind} goes")
    address = ""
    if kind is PathKind.BROADCAST:
        if "address" in entry.items:
            raise entry.file.error((*entry.key, "address"), "has no meaning for bcast, which has that of the interface")
    else:
        whose = "the other node's" if kind is PathKind.UNICAST else "that of the multicast group"
        address = entry.value("address", values.address, f"name an address, {whose}")
        if (kind is PathKind.MULTICAST) != _is_multicast(address):
            raise entry.file.error((*entry.key, "address"), f"must be {whose} address for {kind}, not {address!r}")
    ttl = entry.value("ttl", values.integer(1, 255)) if "ttl" in entry.items else 1
    local = entry.value("local", ip_address) if "local" in entry.items else ""
    if local and kind is not PathKind.UNICAST:
        raise entry.file.error((*entry.key, "local"), f"has no meaning for {kind}: name an interface")
    own_port = entry.value("port", values.integer(1, 65535)) if "port" in entry.items else port
    return PathSettings(kind, interface, address, own_port, ttl, local)


def _is_multicast(address: str) -> bool:
    return _is_in_numbers(address) and ipaddress.ip_address(address).is_multicast


def _is_in_numbers(address: str) -> bool:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True


def _read_pings(table: Table, taken: frozenset[str], warnings: list[str]) -> tuple[PingSettings, ...]:
    """Without addresses that the cluster itself moves about: those tell nothing about the network."""
    named = {address: [address] for address in _ping_addresses(table, "ping")}
    if "ping-groups" in table.items:
        groups = table.subtable("ping-groups")
        for name in groups.items:
            if name in named:
                raise groups.file.error((*groups.key, name), "is the name of another ping node: choose another one")
            named[name] = _ping_addresses(groups, name)
    for name, addresses in named.items():
        for address in [address for address in addresses if address in taken]:
            place = (*table.key, "ping" if name == address else "ping-groups", *([] if name == address else [name]))
            warnings.append(
                f"{table.file.where(place)}: ping {address} is an address that the cluster itself holds, and is not "
                "counted: name a router instead"
            )
            addresses.remove(address)
    return tuple(PingSettings(name, tuple(addresses)) for name, addresses in named.items() if addresses)


def _ping_addresses(table: Table, key: str) -> list[str]:
    return table.value(key, ip_addresses) if key in table.items else []


def _read_respawn(entry: Table) -> Respawn:
    entry.check_keys(("user", "command"))
    user = entry.value("user", values.text, "name the user that the program runs as")
    return Respawn(user, tuple(entry.value("command", values.command, "name the program")))
