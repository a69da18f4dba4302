"""Heartbeat's commands `hb_standby`, `hb_takeover` and `cl_status`, with their arguments and what they print.

They find the settings as `replica-heartbeat` does when it is started without options: `$REPLICA_HA_DIR`,
`$REPLICA_CONFIG` and `$REPLICA_NODE` say where.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

from replica.control import NotRunning
from replica.errors import ReplicaError
from replica.heartbeat import client
from replica.heartbeat.settings import HeartbeatSettings
from replica.heartbeat.source import load_settings

_WHICH: Final = ("all", "foreign", "local", "failback")
_EXIT_FAILED: Final = 1
_EXIT_USAGE: Final = 11  # of cl_status


def standby(argv: Sequence[str] | None = None) -> int:
    """`hb_standby [all|foreign|local|failback]`: the other node takes over. 0 when it has."""
    return _move("hb_standby", sys.argv[1:] if argv is None else argv)


def takeover(argv: Sequence[str] | None = None) -> int:
    """`hb_takeover [all]`: this node takes over. 0 when it has."""
    return _move("hb_takeover", sys.argv[1:] if argv is None else argv)


def _move(program: str, words: Sequence[str]) -> int:
    which = words[0] if words else "all"
    if len(words) > 1 or which not in _WHICH:
        print(f"usage: {program} [{'|'.join(_WHICH)}]", file=sys.stderr)
        return _EXIT_FAILED
    try:
        settings = load_settings(need_secret=False)
        if program == "hb_standby":
            client.move(settings, "standby", {"which": which})
        elif which == "all":
            client.move(settings, "takeover-node", {})
        else:
            raise ReplicaError(f"only all groups are taken over: run `hb_standby` on {settings.peer} for {which} ones")
    except ReplicaError as error:
        return _failed(program, error)
    return 0


def _failed(program: str, error: ReplicaError) -> int:
    print(f"{program}: {error}", file=sys.stderr)
    return _EXIT_FAILED


# ── cl_status ─────────────────────────────────────────────────────────────────────────────────────────────────────

_USAGE: Final = """\
Usage: cl_status <sub-command> [<options>] [<parameters>]

Sub-commands:
hbstatus
	Indicate if heartbeat is running on the local system.
listnodes [-n|-p|-v]
	List the nodes in the cluster: only 'normal' (-n) or 'ping' (-p) ones; -v: with type and status.
nodestatus <node-name>
	List the node status.
nodetype <node-name>
	List the type of a node.
listhblinks [-v] <node-name>
	List the network interfaces used as heartbeat links; -v: with their status.
hblinkstatus <node-name> <link-name>
	Show the status of a heartbeat link.
rscstatus
	Show the status of cluster resources: local, foreign, all or none.
hbparameter -p <parameter-name>
	Retrieve the value of a cluster parameter.

All take -m: for people instead of scripts."""


class _Question:
    """One call: its words, the settings, and what the daemon says."""

    def __init__(self, options: set[str], words: list[str]) -> None:
        self.options = options
        self.words = words
        self.settings: HeartbeatSettings = load_settings(need_secret=False)
        self.status: dict[str, Any] = client.status(self.settings)

    def say(self, plain: str, human: str) -> int:
        print(human if "m" in self.options else plain)
        return 0

    @property
    def node_states(self) -> dict[str, str]:
        """Every node, also those that are pinged."""
        peer = "active" if self.status["peer_alive"] else "dead"
        pings = {ping["name"]: "ping" if ping["alive"] else "dead" for ping in self.status["pings"]}
        return {self.settings.node: "active", self.settings.peer: peer, **pings}

    def node(self) -> str:
        """The node that is asked about. ReplicaError."""
        name = self.words[0]
        if name not in self.node_states:
            raise ReplicaError(f"there is no node {name!r}: maybe it is misspelt")
        return name

    def type_of(self, node: str) -> str:
        return "normal" if node in self.settings.nodes else "ping"

    def links(self, node: str) -> dict[str, str]:
        """Heartbeats go through these, by interface; a ping node is a link of its own."""
        if self.type_of(node) == "ping":
            return {node: "up" if self.node_states[node] != "dead" else "dead"}
        links: dict[str, str] = {}
        for path, seen in zip(self.settings.paths, self.status["paths"], strict=False):
            name = path.interface or path.address
            links[name] = "up" if seen["state"] == "up" or links.get(name) == "up" else "dead"
        return links


def _hbstatus(question: _Question) -> int:
    print("Heartbeat is running on this machine.")
    return _listnodes(question) if "v" in question.options else 0


def _listnodes(question: _Question) -> int:
    wanted = {"n": "normal", "p": "ping"}
    types = {wanted[option] for option in question.options & wanted.keys()} or set(wanted.values())
    if "m" in question.options:
        print("The nodes are as follow:")
    indent = "\t" if "m" in question.options else ""
    for node, state in question.node_states.items():
        if question.type_of(node) not in types:
            continue
        more = f"\t{state}\t(nodetype: {question.type_of(node)})" if "v" in question.options else ""
        print(f"{indent}{node}{more}")
        if more:
            for link, link_state in question.links(node).items():
                print(f"\t{link}\t{link_state}")
    return 0


def _nodestatus(question: _Question) -> int:
    node = question.node()
    state = question.node_states[node]
    return question.say(state, f"The cluster node {node} is {state}.")


def _nodetype(question: _Question) -> int:
    node = question.node()
    kind = question.type_of(node)
    return question.say(kind, f"The node {node}'s type: {kind}")


def _listhblinks(question: _Question) -> int:
    if "m" in question.options:
        print("\tthis node has the following heartbeat links:")
    indent = "\t" if "m" in question.options else ""
    for link, state in question.links(question.node()).items():
        print(f"{indent}{link}\t{state}" if "v" in question.options else f"{indent}{link}")
    return 0


def _hblinkstatus(question: _Question) -> int:
    node, link = question.node(), question.words[1]
    state = question.links(node).get(link)
    if state is None:
        raise ReplicaError(f"{node} has no heartbeat link {link!r}: see `cl_status listhblinks {node}`")
    return question.say(state, f"The node {node}'s heartbeat link {link} is {state}.")


def _rscstatus(question: _Question) -> int:
    node = question.settings.node
    here = [group["preferred"] == node for group in question.status["groups"] if group["holder"] == node]
    if not here:
        held = "none"
    elif len(here) == len(question.status["groups"]):
        held = "all"
    else:
        held = "local" if any(here) else "foreign"
    return question.say(held, f"This node is holding {held} resources.")


def _parameter(question: _Question) -> int:
    name, values = question.words[0], _parameters(question.settings)
    if name not in values:
        raise ReplicaError(f"Cannot get parameter {name}'s value")
    return question.say(values[name], f"Heartbeat parameter {name}'s value: {values[name]}")


def _parameters(settings: HeartbeatSettings) -> dict[str, str]:
    """Those of ha.cf that are set."""
    timing, logging = settings.timing, settings.logging
    values = {
        "node": " ".join(settings.nodes),
        "auto_failback": "on" if settings.auto_failback else "off",
        "keepalive": f"{timing.keepalive_s:g}",
        "warntime": f"{timing.warntime_s:g}",
        "deadtime": f"{timing.deadtime_s:g}",
        "initdead": f"{timing.initdead_s:g}",
        "deadping": f"{timing.deadping_s:g}",
        "udpport": str(settings.paths[0].port) if settings.paths else None,
        "logfile": logging.log_file,
        "debugfile": logging.debug_file,
        "logfacility": logging.facility,
        "watchdog": settings.watchdog,
    }
    return {name: str(value) for name, value in values.items() if value is not None}


#: Name → (what it does, how many words it takes).
SUB_COMMANDS: Final[dict[str, tuple[Callable[[_Question], int], int]]] = {
    "hbstatus": (_hbstatus, 0),
    "listnodes": (_listnodes, 0),
    "nodestatus": (_nodestatus, 1),
    "nodetype": (_nodetype, 1),
    "listhblinks": (_listhblinks, 1),
    "hblinkstatus": (_hblinkstatus, 2),
    "rscstatus": (_rscstatus, 0),
    "hbparameter": (_parameter, 1),
    "parameter": (_parameter, 1),  # as the manual calls it
}


def cl_status(argv: Sequence[str] | None = None) -> int:
    """`cl_status SUB-COMMAND`; 0, 1 for what cannot be told, 11 for wrong usage."""
    name, *given = [*(sys.argv[1:] if argv is None else argv)] or [""]
    if name in ("", "--help", "-h"):
        print(_USAGE)
        return 0
    if name not in SUB_COMMANDS:
        print(f"cl_status: {name}: invalid sub-command.", file=sys.stderr)
        return _EXIT_USAGE
    options = {letter for word in given if word.startswith("-") for letter in word[1:]}
    words = [word for word in given if not word.startswith("-")]
    run, count = SUB_COMMANDS[name]
    if len(words) < count:
        print(f"cl_status: {name}: Not enough parameters.", file=sys.stderr)
        return _EXIT_USAGE
    try:
        return run(_Question(options, words))
    except NotRunning as error:
        if name != "hbstatus":
            return _failed("cl_status", error)
        print("Heartbeat is stopped on this machine.")
        return _EXIT_FAILED
    except ReplicaError as error:
        return _failed("cl_status", error)
