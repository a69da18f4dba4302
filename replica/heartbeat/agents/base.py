"""What an agent does: one kind of resource, started, watched and stopped on this node.

An agent is told what to do by its group (`replica.heartbeat.group`), one thing at a time, each under a time limit:
when that is over, the call is cancelled. It decides nothing. Nothing in an agent may block the event loop.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from replica.errors import ReplicaError
from replica.heartbeat.node_state import Ready
from replica.heartbeat.settings import HeartbeatSettings, ResourceSettings


class AgentError(ReplicaError):
    """A start, stop or monitor has failed; the text is the end of a sentence about the resource."""


@dataclass(frozen=True, slots=True)
class Start:
    """What a start may rely on."""

    #: The other node is known not to run (fenced, or an operator vouches): nothing may wait for its answer.
    peer_is_dead: bool


class Agent(Protocol):
    """One resource. Every call may be repeated: starting what runs and stopping what is stopped succeed."""

    async def start(self, start: Start) -> None:
        """Returns when it runs. AgentError."""

    async def stop(self) -> None:
        """Returns when it is certain that nothing of it runs. AgentError."""

    async def monitor(self) -> None:
        """Returns when it runs as it should; AgentError otherwise."""

    async def active(self) -> bool:
        """Whether anything of it runs, as it should or not: asked when the daemon starts. AgentError when unknown."""

    def ready(self) -> Ready:
        """Whether it could be started here, from what is known: called often."""

    def hold(self, until_s: float) -> None:
        """It may be held until this time (`time.clock_gettime(CLOCK_BOOTTIME)`): what can be given a limit that works
        without this process (the lifetime of an address in the kernel) is given it. Called for each keepalive while the
        group is held here.
        """

    def let_go(self) -> None:
        """This node may not hold it any more: end at once, without waiting, what others could see of it (an address).
        `stop` follows.
        """

    async def close(self) -> None:
        """The daemon ends, whatever runs goes on."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What an agent gets besides its own settings."""

    settings: HeartbeatSettings
    #: To be called when `ready` would answer otherwise, or a monitor would fail: it is asked at once.
    changed: Callable[[], None]


REQUIRED: Final = object()


class Option(NamedTuple):
    """An option of a kind of resource: `parse` raises ValueError with the rest of a sentence, as those of
    `replica.config_values` do.
    """

    parse: Callable[[object], Any]
    default: Any = REQUIRED


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of resource: each agent module has its own in ``KINDS`` (listed in `replica.heartbeat.agents.kinds`)."""

    name: str
    #: As they stand in one table of a group's ``resources``, besides the times, which all kinds have. The option with
    #: the name of the kind says which kind it is: ``{ ip = "192.168.2.50/24", interface = "eth0" }``.
    options: Mapping[str, Option]
    #: The checked options → what the resource is called: "ip 192.168.2.50/24".
    title: Callable[[Mapping[str, Any]], str]
    make: Callable[[ResourceSettings, Surroundings], Agent]
    #: Raises ValueError for options that do not fit together.
    check: Callable[[Mapping[str, Any]], None] = lambda options: None
