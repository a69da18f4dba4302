"""What each node tells the other in every heartbeat: all of its state, so that a lost packet loses nothing. Pure.

The right to run a group is a `Claim`. It has one owner; a claim with a higher term replaces one with a lower term. Its
owner gives it away by stopping the group and publishing the next term in the other's name. A node that may take it
without being given it (its owner is dead, see `consent`) publishes the next term in its own name. Whoever sees a claim
that is newer than its own, in another's name, lets go. A term's owner never changes but by a tie: two nodes that did
not hear each other have used the same term, and then the group's preferred node keeps it. Terms outlive a reboot,
owners don't: a node that has just booted knows of the term only, with nobody as its owner.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Final, NamedTuple


class Claim(NamedTuple):
    """Who may run a group. No owner: nobody yet."""

    term: int = 0
    owner: str = ""
    #: An operator put it there: it does not fail back by itself while both nodes stay up.
    by_operator: bool = False

    def next(self, owner: str, *, by_operator: bool = False) -> "Claim":
        """The claim that replaces this one."""
        return Claim(self.term + 1, owner, by_operator)

    def yields_to(self, other: "Claim", preferred: str) -> bool:
        """Whether `other` is the one that holds."""
        return self._rank(preferred) < other._rank(preferred)

    def _rank(self, preferred: str) -> tuple[bool, int, bool, bool]:
        # A node that has booted since remembers a term and holds nothing: that is no reason for who holds it to let go.
        return bool(self.owner), self.term, self.owner == preferred, self.by_operator


class Status(StrEnum):
    """What a node does with a group."""

    STOPPED = "stopped"
    STARTING = "starting"
    STARTED = "started"
    STOPPING = "stopping"
    #: Runs, but for what others could see of it (its address), until it is certain that it may.
    SUSPENDED = "suspended"
    #: Stopped, after a failure that is not mended here.
    FAILED = "failed"
    #: A stop failed: nobody may start it before this node is fenced.
    STUCK = "stuck"

    @property
    def holds_nothing(self) -> bool:
        """Whether another node may start the group."""
        return self in (Status.STOPPED, Status.FAILED)


class Readiness(IntEnum):
    """Whether a group could run on a node, were it given to it."""

    NO = 0
    #: Only when the other node is dead: the copy is whole but not in touch with the other one.
    IF_ALONE = 1
    #: It has failed there: only where no node is better.
    RELUCTANT = 2
    YES = 3


class Ready(NamedTuple):
    """`why` is the end of a sentence about the group, "" for YES: "its copy of r0 is Inconsistent"."""

    readiness: Readiness = Readiness.YES
    why: str = ""


class Phase(StrEnum):
    """Where a node is in its life."""

    #: Just started, or woken from a pause: it listens, and holds only what it is certain of.
    LISTENING = "listening"
    UP = "up"
    #: Hands everything over, then stops.
    LEAVING = "leaving"
    #: Has handed everything over: its silence from now on is not a death.
    LEFT = "left"


_NO_CLAIM: Final = Claim()
_READY: Final = Ready()


@dataclass(frozen=True, slots=True)
class GroupState:
    """One group on one node."""

    claim: Claim = _NO_CLAIM
    status: Status = Status.STOPPED
    ready: Ready = _READY
    #: An operator asked this node to get the group (`takeover-node`).
    wanted: bool = False
    resource: str = ""  # the one it is busy with, or that failed
    problem: str = ""


@dataclass(frozen=True, slots=True)
class NodeState:
    """A node as it describes itself."""

    phase: Phase = Phase.LISTENING
    groups: Mapping[str, GroupState] = field(default_factory=dict)
    #: How many ping nodes and groups answer, and of how many.
    pings_alive: int = 0
    pings: int = 0
    #: Of the settings that must be the same on both nodes.
    settings_digest: str = ""


def state_to_wire(state: NodeState) -> dict[str, Any]:
    """As msgpack-ready values."""
    return {
        "phase": str(state.phase),
        "pings": [state.pings_alive, state.pings],
        "settings": state.settings_digest,
        "groups": {
            name: [
                group.claim.term,
                group.claim.owner,
                group.claim.by_operator,
                str(group.status),
                int(group.ready.readiness),
                group.ready.why,
                group.wanted,
                group.resource,
                group.problem,
            ]
            for name, group in state.groups.items()
        },
    }


def state_from_wire(document: object) -> NodeState:
    """The other way round; raises ValueError for anything that `state_to_wire` does not make."""
    match document:
        case {"phase": str(phase), "pings": [int(alive), int(pings)], "settings": str(digest), "groups": dict(groups)}:
            named = {_text(name): _group_from_wire(group) for name, group in groups.items()}
            return NodeState(Phase(phase), named, _count(alive), _count(pings), digest)
    raise ValueError("is not the state of a node")


def _group_from_wire(values: object) -> GroupState:
    match values:
        case [int(term), str(owner), bool(by_operator), str(status), int(level), str(why), bool(wanted), *texts]:
            resource, problem = map(_text, texts)
            return GroupState(
                Claim(_count(term), owner, by_operator),
                Status(status),
                Ready(Readiness(level), why),
                wanted,
                resource,
                problem,
            )
    raise ValueError("is not the state of a group")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("is not a text")
    return value


def _count(value: int) -> int:
    if isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise ValueError("is not a count")
    return value
