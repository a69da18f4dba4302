"""What the agents of services share: other people's programs start, stop and look at one, each kind in its own way.

A service counts as started when its status says so, not when the program that starts it ends well, and likewise as
stopped. A daemon that a program leaves in the background is in a session of its own and goes on when replica-heartbeat
ends.
"""

import abc
import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Final, NamedTuple

from replica import programs
from replica.heartbeat.agents.base import AgentError, Start, Surroundings
from replica.heartbeat.agents.threads import in_thread
from replica.heartbeat.node_state import Readiness, Ready
from replica.heartbeat.settings import ResourceSettings
from replica.hooks import one_line
from replica.tasks import spawn

log = logging.getLogger("replica.heartbeat.agents")

#: How long after its start (stop) has ended well a service may take until its status agrees.
SETTLE_S: Final = 5.0
_LOOK_AGAIN_S: Final = 0.2
#: How old the answer to "is it installed?" may be.
_RECHECK_S: Final = 10.0
_MAX_SAID: Final = 300


class State(StrEnum):
    """What a status can say."""

    RUNNING = "running"
    #: Something of it runs, and not as it should.
    BROKEN = "broken"
    STOPPED = "stopped"
    UNKNOWN = "unknown"


class Seen(NamedTuple):
    """`said` is the end of a sentence about the resource: "is not running"."""

    state: State
    said: str = ""


class Result(NamedTuple):
    """How a program ended, and what it printed."""

    status: int | None
    problem: str  # as in `programs.Ended`
    lines: list[str]

    @property
    def last_line(self) -> str:
        """What it said last: usually the reason."""
        lines = [line.strip() for line in self.lines if line.strip() and line != programs.NOT_LOGGED]
        return lines[-1][:_MAX_SAID] if lines else ""

    @property
    def said(self) -> str:
        """ "returned 1: cannot bind to port 80"."""
        return ": ".join(part for part in (self.problem, self.last_line) if part)


class Service(abc.ABC):
    """A resource that programs start, stop and look at."""

    def __init__(self, settings: ResourceSettings, surroundings: Surroundings) -> None:
        self.settings = settings
        self.surroundings = surroundings
        #: It was started here, or seen to run: from then on nothing less than its own status says that it is stopped.
        #: Before that, what is misconfigured or not installed must not look like a stop that fails: that is the end of
        #: a node.
        self.ran = False
        self._presence = Presence(self.missing, surroundings.changed)

    # ── what each kind has of its own ────────────────────────────────────────────────────────────────────────────

    @abc.abstractmethod
    async def look(self, *, probe: bool) -> Seen:
        """Whether it runs; with `probe`, asked of a node where it need not run."""

    async def check_start(self) -> None:  # noqa: B027
        """Refuse a start that cannot succeed; AgentError."""

    @abc.abstractmethod
    async def run_start(self) -> None:
        """Start it; AgentError."""

    @abc.abstractmethod
    async def run_stop(self) -> None:
        """Stop it; AgentError. What has no effect may still end well: `look` is asked afterwards."""

    @abc.abstractmethod
    def missing(self) -> str:
        """What this node lacks to get the resource, as the end of a sentence; "" if nothing. May block (a thread)."""

    @abc.abstractmethod
    def absent(self) -> str:
        """Without what it can neither be started nor stopped, as the end of a sentence: more than `missing`, since it
        is asked when everything before the resource runs. May block (a thread).
        """

    # ── the agent ────────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self, start: Start) -> None:
        absent = await in_thread(self.absent)
        if absent:
            raise AgentError(f"cannot be started: {absent}")
        seen = await self._look()
        if seen.state is State.RUNNING:
            return
        if seen.state is State.UNKNOWN:
            raise AgentError(seen.said)  # nobody would know whether its start or its stop had an effect
        await self.check_start()
        self.ran = True
        await self.run_start()
        seen = await self._settled(State.RUNNING)
        if seen.state is not State.RUNNING:
            raise AgentError(f"{seen.said or 'does not run'}, although its start ended well")

    async def stop(self) -> None:
        absent = await in_thread(self.absent)
        if absent and not self.ran:
            return
        await self.run_stop()
        seen = await self._settled(State.STOPPED)
        if seen.state is State.UNKNOWN and not self.ran:
            log.warning("%s: taken for stopped, since its stop ended well: %s.", self.settings.name, seen.said)
        elif seen.state is not State.STOPPED:
            raise AgentError(f"{seen.said or 'still runs'}, although its stop ended well")
        self.ran = False

    async def monitor(self) -> None:
        seen = await self.look(probe=False)
        if seen.state is not State.RUNNING:
            raise AgentError(seen.said)

    async def active(self) -> bool:
        if await in_thread(self.absent):
            return False
        seen = await self._look()
        if seen.state is State.UNKNOWN:
            raise AgentError(seen.said)
        return seen.state is not State.STOPPED

    def ready(self) -> Ready:
        why = self._presence.problem()
        return Ready(Readiness.NO, why) if why else Ready()

    # Nothing to do is what these do.
    def hold(self, until_s: float) -> None:  # noqa: B027
        """Nothing that a kernel could end by itself."""

    def let_go(self) -> None:  # noqa: B027
        """Nothing that others see: a service is reached by an address, which is a resource of its own."""

    async def close(self) -> None:  # noqa: B027
        """It goes on."""

    # ── for the kinds ────────────────────────────────────────────────────────────────────────────────────────────

    async def execute(
        self, what: str, command: Sequence[str], variables: Mapping[str, str] | None = None, *, quiet: bool = False
    ) -> Result:
        """Run a program to its end. What it prints is logged (`quiet`: for debugging only, it runs all the time)."""
        name, level = self.settings.name, logging.DEBUG if quiet else logging.INFO
        lines: list[str] = []

        def on_line(line: str) -> None:
            line = one_line(line)
            lines.append(line)
            log.log(level, "%s: %s: %s", name, what, line)

        log.log(level, "%s: %s: runs %s", name, what, " ".join(command))
        ended = await programs.run(command, variables or {}, None, on_line)
        result = Result(ended.status, ended.problem, lines)
        if ended.problem:
            log.log(level, "%s: its %s %s.", name, what, ended.problem)
        return result

    async def _look(self) -> Seen:
        seen = await self.look(probe=True)
        self.ran = self.ran or seen.state in (State.RUNNING, State.BROKEN)
        return seen

    async def _settled(self, wanted: State) -> Seen:
        """What a status says once it is `wanted`, or after `SETTLE_S`."""
        loop = asyncio.get_running_loop()
        limit_s = loop.time() + SETTLE_S
        while True:
            seen = await self.look(probe=wanted is State.STOPPED)
            if seen.state is wanted or loop.time() > limit_s:
                return seen
            await asyncio.sleep(_LOOK_AGAIN_S)


class Presence:
    """Whether this node has what a resource takes. Known without waiting: looked up in a thread when it is old."""

    def __init__(self, missing: Callable[[], str], changed: Callable[[], None]) -> None:
        self._missing = missing
        self._changed = changed
        self._known = missing()
        self._looked_s = time.monotonic()
        self._looking: asyncio.Task[None] | None = None

    def problem(self) -> str:
        """What is missing, as the end of a sentence; "" if nothing."""
        if self._looking is None and time.monotonic() - self._looked_s > _RECHECK_S:
            self._looking = spawn(self._look(), "look for a resource's program")
        return self._known

    async def _look(self) -> None:
        try:
            found = await in_thread(self._missing)
        finally:
            self._looked_s = time.monotonic()
            self._looking = None
        if found != self._known:
            self._known = found
            self._changed()
