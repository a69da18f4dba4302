"""Heartbeat's file `ha.cf`: nodes, paths, times, logs. What it says becomes the keys of `[heartbeat]`."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from replica.config_file import ConfigError, suggestion
from replica.heartbeat.ha_lines import Line, read_lines

DEFAULT_DEADTIME_S: Final = 30.0  # Heartbeat's
_TIME: Final = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([a-z]*)", re.ASCII)
_UNITS_S: Final = {
    **dict.fromkeys(("", "s", "sec"), 1.0),
    **dict.fromkeys(("ms", "msec"), 1e-3),
    **dict.fromkeys(("us", "usec"), 1e-6),
    **dict.fromkeys(("m", "min"), 60.0),
}
_TRUE: Final = ("on", "true", "yes", "y", "1")
_FALSE: Final = ("off", "false", "no", "n", "0")
_NO_FACILITY: Final = "none"
_BUILT_IN: Final = ("ipfail", "dopd", "ccm", "pingd")


class Stonith(NamedTuple):
    """`stonith_host FROM TYPE PARAMETERS…`."""

    where: str
    host_from: str  # "*": every node
    kind: str
    parameters: tuple[str, ...]


@dataclass
class HaCf:
    """What the file says."""

    nodes: list[str] = field(default_factory=list)
    #: As keys of `[heartbeat]`; paths apart.
    heartbeat: dict[str, Any] = field(default_factory=dict)
    #: As tables of ``paths``, in the order of the file, with those to both nodes.
    paths: list[dict[str, Any]] = field(default_factory=list)
    stonith: list[Stonith] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    #: Key, or number of a path → (file:line, the directive).
    places: dict[str | int, tuple[str, str]] = field(default_factory=dict)


def read_ha_cf(path: Path) -> HaCf:
    """ConfigError with file and line for what is wrong, unknown, or not supported."""
    settings = HaCf()
    for line in read_lines(path):
        name, *words = line.words
        directive = DIRECTIVES.get(name)
        if directive is None:
            hint = suggestion(name, DIRECTIVES) or ": remove it"
            raise ConfigError(f"{line.where}: {name}: unknown directive{hint}")
        if directive.refused:
            if words[:1] and words[0].lower() in directive.harmless:
                continue
            raise ConfigError(f"{line.where}: {name}: {directive.refused}")
        if directive.ignored:
            settings.warnings.append(f"{line.where}: {name} has no effect: {directive.ignored}")
        if directive.read is not None:
            if len(words) < directive.words:
                raise ConfigError(f'{line.where}: {name}: says too little: write "{name} {directive.usage}"')
            directive.read(settings, line, words)
    if len(settings.nodes) != 2:
        shown = ", ".join(settings.nodes) or "none"
        place = settings.places.get("nodes", (str(path), ""))[0]
        raise ConfigError(f"{place}: node: exactly two nodes are supported, not {len(settings.nodes)} ({shown})")
    if not settings.paths:
        raise ConfigError(f"{path}: names no path of heartbeats: add ucast, bcast or mcast")
    return settings


# ── one directive each ────────────────────────────────────────────────────────────────────────────────────────────


def _set(settings: HaCf, line: Line, key: str, value: Any) -> None:
    if key in settings.heartbeat:
        raise ConfigError(
            f"{line.where}: {line.words[0]}: is there already ({settings.places[key][0]}): keep one of them"
        )
    settings.heartbeat[key] = value
    settings.places[key] = line.where, line.words[0]


def _node(settings: HaCf, line: Line, words: Sequence[str]) -> None:
    for word in words:
        if word in settings.nodes:
            raise ConfigError(f"{line.where}: node: {word} is there twice: remove one")
        settings.nodes.append(word)
    settings.places["nodes"] = line.where, "node"


def _time(key: str) -> Callable[[HaCf, Line, Sequence[str]], None]:
    def read(settings: HaCf, line: Line, words: Sequence[str]) -> None:
        match = _TIME.fullmatch(words[0].lower())
        if match is None or match[2] not in _UNITS_S:
            problem = f'must be seconds such as "5", or milliseconds such as "500ms", not {words[0]!r}'
            raise ConfigError(f"{line.where}: {line.words[0]}: {problem}")
        _set(settings, line, key, round(float(match[1]) * _UNITS_S[match[2]], 6))

    return read


def _text(key: str) -> Callable[[HaCf, Line, Sequence[str]], None]:
    return lambda settings, line, words: _set(settings, line, key, words[0])


def _boolean(line: Line, word: str) -> bool:
    if word.lower() in (*_TRUE, *_FALSE):
        return word.lower() in _TRUE
    raise ConfigError(f"{line.where}: {line.words[0]}: must be on or off, not {word!r}")


def _auto_failback(settings: HaCf, line: Line, words: Sequence[str]) -> None:
    _set(settings, line, "auto-failback", words[0].lower() == "legacy" or _boolean(line, words[0]))


def _nice_failback(settings: HaCf, line: Line, words: Sequence[str]) -> None:
    _set(settings, line, "auto-failback", not _boolean(line, words[0]))


def _number(line: Line, word: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", word):
        raise ConfigError(f"{line.where}: {line.words[0]}: must be a number, not {word!r}")
    return int(word)


def _udpport(settings: HaCf, line: Line, words: Sequence[str]) -> None:
    _set(settings, line, "port", _number(line, words[0]))


def _logfacility(settings: HaCf, line: Line, words: Sequence[str]) -> None:
    if words[0].lower() != _NO_FACILITY:
        _set(settings, line, "log-facility", words[0].lower())


def _add_path(settings: HaCf, line: Line, path: dict[str, Any]) -> None:
    settings.places[len(settings.paths)] = line.where, " ".join(line.words)
    settings.paths.append(path)


def _ucast(settings: HaCf, line: Line, words: Sequence[str]) -> None:
    _add_path(settings, line, {"kind": "ucast", "interface": words[0], "address": words[1]})


def _bcast(settings: HaCf, line: Line, words: Sequence[str]) -> None:
    for word in words:
        _add_path(settings, line, {"kind": "bcast", "interface": word})


def _mcast(settings: HaCf, line: Line, words: Sequence[str]) -> None:
    """Group, port, ttl; the last one, loop, is always as if it were 0."""
    path: dict[str, Any] = {"kind": "mcast", "interface": words[0], "address": words[1]}
    for key, word in zip(("port", "ttl"), words[2:4], strict=False):
        path[key] = _number(line, word)
    _add_path(settings, line, path)


def _ping(settings: HaCf, line: Line, words: Sequence[str]) -> None:
    settings.heartbeat.setdefault("ping", []).extend(words)
    settings.places.setdefault("ping", (line.where, "ping"))


def _ping_group(settings: HaCf, line: Line, words: Sequence[str]) -> None:
    name, *addresses = words
    groups = settings.heartbeat.setdefault("ping-groups", {})
    if name in groups:
        raise ConfigError(f"{line.where}: ping_group: {name} is there already: choose another name")
    groups[name] = addresses
    settings.places.setdefault("ping-groups", (line.where, "ping_group"))


def _respawn(settings: HaCf, line: Line, words: Sequence[str]) -> None:
    user, *command = words
    if Path(command[0]).name in _BUILT_IN:
        built_in = f"{line.where}: respawn {command[0]} has no effect: what it does is part of replica-heartbeat"
        settings.warnings.append(built_in)
        return
    clients = settings.heartbeat.setdefault("respawn", [])
    settings.places.setdefault("respawn", (line.where, "respawn"))
    clients.append({"user": user, "command": command})


def _stonith_host(settings: HaCf, line: Line, words: Sequence[str]) -> None:
    host_from, kind, *parameters = words
    settings.stonith.append(Stonith(line.where, host_from, kind, tuple(parameters)))


class Directive(NamedTuple):
    """A directive of ha.cf, and what becomes of it."""

    read: Callable[[HaCf, Line, Sequence[str]], None] | None = None
    words: int = 0  # at least
    usage: str = ""
    ignored: str = ""  # why, said in a warning
    refused: str = ""  # what to do instead
    harmless: Sequence[str] = ()  # values with which it is not refused


_LOGD: Final = "replica-heartbeat writes its log itself"
_PACEMAKER: Final = "Pacemaker has a cluster manager of its own: describe groups in haresources, or use Pacemaker alone"
_SERIAL: Final = "serial lines are not supported: name a second network path with ucast"
_COMPRESSION: Final = "heartbeats are small enough as they are"
DIRECTIVES: Final = {
    "node": Directive(_node, 1, "NODE NODE"),
    "ucast": Directive(_ucast, 2, "INTERFACE ADDRESS"),
    "ucast6": Directive(_ucast, 2, "INTERFACE ADDRESS"),
    "bcast": Directive(_bcast, 1, "INTERFACE"),
    "mcast": Directive(_mcast, 2, "INTERFACE GROUP PORT TTL 0"),
    "mcast6": Directive(_mcast, 2, "INTERFACE GROUP PORT HOPS 0"),
    "ping": Directive(_ping, 1, "ADDRESS"),
    "ping6": Directive(_ping, 1, "ADDRESS"),
    "ping_group": Directive(_ping_group, 2, "NAME ADDRESS ADDRESS"),
    "keepalive": Directive(_time("keepalive"), 1, "1"),
    "warntime": Directive(_time("warntime"), 1, "3"),
    "deadtime": Directive(_time("deadtime"), 1, "5"),
    "initdead": Directive(_time("initdead"), 1, "12"),
    "deadping": Directive(_time("deadping"), 1, "5"),
    "udpport": Directive(_udpport, 1, "694"),
    "auto_failback": Directive(_auto_failback, 1, "on"),
    "nice_failback": Directive(_nice_failback, 1, "on"),
    "debugfile": Directive(_text("debug-file"), 1, "FILE"),
    "logfile": Directive(_text("log-file"), 1, "FILE"),
    "logfacility": Directive(_logfacility, 1, "FACILITY"),
    "respawn": Directive(_respawn, 2, "USER PROGRAM"),
    "watchdog": Directive(_text("watchdog"), 1, "/dev/watchdog"),
    "stonith_host": Directive(_stonith_host, 2, "* TYPE PARAMETERS"),
    "apiauth": Directive(ignored="the control socket is for root only"),
    "use_logd": Directive(ignored=_LOGD),
    "conn_logd_time": Directive(ignored=_LOGD),
    "debug": Directive(ignored="say `--log-level DEBUG`"),
    "baud": Directive(ignored="serial lines are not supported"),
    "hopfudge": Directive(ignored="heartbeats are not forwarded"),
    "hbgenmethod": Directive(ignored="the number of each start is always kept on the disk"),
    "msgfmt": Directive(ignored="heartbeats have one form"),
    "compression": Directive(ignored=_COMPRESSION),
    "compression_threshold": Directive(ignored=_COMPRESSION),
    "traditional_compression": Directive(ignored=_COMPRESSION),
    "coredumps": Directive(ignored="it is set where the service is started"),
    "realtime": Directive(ignored="the daemon asks for the priority that it needs"),
    "rtprio": Directive(ignored="the daemon asks for the priority that it needs"),
    "memreserve": Directive(ignored="the daemon asks for the memory that it needs"),
    "normalpoll": Directive(ignored="nothing is polled"),
    "env": Directive(ignored="resources get the environment of the daemon's service"),
    "crm_daemon_dir": Directive(ignored="Pacemaker's daemons are not started"),
    "crmd_spawns_pengine": Directive(ignored="Pacemaker's daemons are not started"),
    "crm": Directive(refused=_PACEMAKER, harmless=_FALSE),
    "pacemaker": Directive(refused=_PACEMAKER, harmless=_FALSE),
    "autojoin": Directive(refused="nodes do not join by themselves: name both with node", harmless=("none",)),
    "serial": Directive(refused=_SERIAL),
    "stonith": Directive(refused="configuration files of devices are not read: write stonith_host, or [fencing.NODE]"),
    "hbaping": Directive(refused="Fibre Channel is not pinged: name a router with ping"),
    "cluster": Directive(ignored="the cluster is called after its nodes"),
    "uuidfrom": Directive(ignored="nodes are known by their names"),
}
