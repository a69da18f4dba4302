"""A group's resources on this node: started in order, watched, mended, and stopped in the other order.

What is asked of a group (`start`, `stop`, `suspend`) is its target; one worker brings it there, and drops what it is
doing when the target changes. Nothing here decides who may run the group: that has been decided when it is asked.
"""

import asyncio
import collections
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from enum import Enum, auto
from typing import Final, TypeVar

from replica.errors import ReplicaError
from replica.heartbeat.agents.base import Agent, Start, Surroundings
from replica.heartbeat.agents.kinds import kind
from replica.heartbeat.node_state import Readiness, Ready, Status
from replica.heartbeat.settings import GroupSettings, HeartbeatSettings, ResourceSettings
from replica.tasks import spawn

log = logging.getLogger("replica.heartbeat")

T = TypeVar("T")

#: Between two attempts of a stop that fails.
STOP_PAUSE_S: Final = 1.0
_WHEN_DEAD: Final = Start(peer_is_dead=True)
_WHEN_ASKED: Final = Start(peer_is_dead=False)


class _Target(Enum):
    RUN = auto()
    STOP = auto()


class Resource:
    """One resource of a group, with what is known of it."""

    def __init__(self, settings: ResourceSettings, agent: Agent) -> None:
        self.settings = settings
        self.agent = agent
        self.running = False
        self.problem = ""
        #: What its agent has failed with unexpectedly, and the log knows by now.
        self.fault = ""
        #: A monitor is due: by its interval, or because the agent has noticed something.
        self.look = asyncio.Event()
        #: Held while it is looked at, which may also mend it.
        self.looking = asyncio.Lock()


class GroupRunner:
    """`resources` in the order of their start; `changed` is called whenever `status` or `ready` may be another."""

    def __init__(
        self,
        settings: GroupSettings,
        resources: Sequence[Resource],
        now: Callable[[], float],
        changed: Callable[[], None],
    ) -> None:
        self.settings = settings
        self.name = settings.name
        self.resources = resources
        self.status = Status.STOPPING  # until `begin` knows better
        #: The one that is being worked on, or that failed.
        self.resource = ""
        self.problem = ""
        self._now = now
        self._changed = changed
        self._target = _Target.STOP
        self._start = _WHEN_ASKED
        self._worker: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._failures: collections.deque[float] = collections.deque(maxlen=settings.max_failures)
        self._failed_out = False
        self._failed_words = ""

    # ── what the daemon asks ─────────────────────────────────────────────────────────────────────────────────

    def begin(self, *, held: bool) -> None:
        """When the daemon starts. `held`: an earlier daemon of this node has left the group running; it goes on, but is
        certain of nothing (SUSPENDED). Otherwise it is looked whether anything of it runs, which takes its time, and
        that is stopped; until that is known, the group is being stopped.
        """
        if held:
            self._become(Status.SUSPENDED)
        else:
            self._worker = spawn(self._stop_what_runs(), f"leftovers of {self.name}")

    async def _stop_what_runs(self) -> None:
        active = await asyncio.gather(*(self._active(resource) for resource in self.resources))
        running = [r.settings.name for r, is_active in zip(self.resources, active, strict=True) if is_active]
        unknown = [r.settings.name for r, is_active in zip(self.resources, active, strict=True) if is_active is None]
        if running:
            log.warning(
                "%s: runs although this node does not hold it (%s): stopping it.", self.name, ", ".join(running)
            )
            await self._stop()
        elif unknown:
            # Nothing says that this node has started it: stopping by force what may not be there mends nothing.
            self._give_up(f"whether {', '.join(unknown)} runs here is not known")
        else:
            self._worker = None
            self._become(Status.STOPPED)

    def start(self, *, peer_is_dead: bool) -> None:
        """Run it here; from SUSPENDED: show it again."""
        self._start = _WHEN_DEAD if peer_is_dead else _WHEN_ASKED
        if self._target is _Target.RUN and self._worker is not None and self.status is not Status.SUSPENDED:
            return
        self._become(Status.STARTING)
        self._work_towards(_Target.RUN)

    def stop(self, *, let_go: bool = False) -> None:
        """Stop it; with `let_go`, what others can see of it goes at once."""
        if let_go:
            self.let_go()
        if self._target is _Target.STOP and self._worker is not None:
            return
        self._become(Status.STOPPING)
        self._work_towards(_Target.STOP)

    def suspend(self) -> None:
        """Withhold what others can see of it, leave the rest as it is."""
        self.let_go()
        self._cancel()
        self._target = _Target.STOP
        self._become(Status.SUSPENDED)

    def let_go(self) -> None:
        """What others can see of it goes at once."""
        for resource in reversed(self.resources):
            self._guarded(resource, resource.agent.let_go)

    def hold(self, until_s: float) -> None:
        """It may be held until then (`Agent.hold`)."""
        if self.status in (Status.STARTING, Status.STARTED):
            for resource in self.resources:
                self._guarded(resource, functools.partial(resource.agent.hold, until_s))

    def look(self, resource: Resource) -> None:
        """An agent has noticed something."""
        resource.look.set()
        self._changed()

    def ready(self) -> Ready:
        """Whether it could run here."""
        worst = self._failed_too_often()
        for resource in self.resources:
            ready = self._guarded(resource, resource.agent.ready) or Ready(
                Readiness.NO, f"{resource.settings.name} has an agent that fails (see the log)"
            )
            if ready.readiness < worst.readiness:
                worst = ready
        return worst

    def forget_failures(self) -> None:
        """An operator has mended it."""
        self._failures.clear()
        self._failed_out = False
        if self.status is Status.FAILED:
            self._become(Status.STOPPED)
        if self.status is Status.STUCK:
            self.stop()

    async def close(self) -> None:
        """The daemon ends: whatever runs goes on."""
        self._cancel()
        for resource in self.resources:
            await resource.agent.close()

    # ── failures ─────────────────────────────────────────────────────────────────────────────────────────────

    def _failed_too_often(self) -> Ready:
        if self._failures_in_window() >= self.settings.max_failures:
            return Ready(Readiness.NO, self._failed_words or f"{self.resource} {self.problem}")
        if self._failed_out:
            # Until somebody has mended it: going back and failing again would be an outage each time.
            return Ready(Readiness.RELUCTANT, f"{self._failed_words}; `replicactl cluster --clear` forgets it")
        return Ready()

    def _failures_in_window(self) -> int:
        limit = self._now() - self.settings.failure_window_s
        while self._failures and self._failures[0] < limit:
            self._failures.popleft()
        return len(self._failures)

    def _failed(self, resource: Resource, problem: str) -> None:
        resource.problem = self.problem = problem
        self.resource = resource.settings.name
        self._failures.append(self._now())
        log.warning("%s: %s %s.", self.name, resource.settings.name, problem)

    def _give_up(self, words: str) -> None:
        """It is not tried here any more, unless no other node is better."""
        self._failed_out = True
        self._failed_words = words
        log.warning("%s: %s.", self.name, words)
        self._worker = None
        self._become(Status.FAILED)

    # ── the worker ───────────────────────────────────────────────────────────────────────────────────────────

    def _work_towards(self, target: _Target) -> None:
        self._cancel()
        self._target = target
        work = self._run() if target is _Target.RUN else self._stop()
        self._worker = spawn(work, f"group {self.name}")

    def _cancel(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.cancel()
            self._ending.add(worker)
            worker.add_done_callback(self._ending.discard)

    async def _previous_ended(self) -> None:
        """What was cancelled may take a moment to end its program: two must not work on one resource."""
        if self._ending:
            await asyncio.wait(list(self._ending))

    async def _run(self) -> None:
        await self._previous_ended()
        first = 0
        while True:
            failed = await self._look_below(first) or await self._start_from(first)
            if failed is None:
                self.problem = self.resource = ""
                self._become(Status.STARTED)
                failed = await self._watch()
            self._become(Status.STARTING)
            first = self.resources.index(failed)
            count = self._failures_in_window()
            given_up = count >= self.settings.max_failures
            if not await self._stop_down_to(0 if given_up else first):
                return
            if given_up:
                times = f"{count} times within {self.settings.failure_window_s:g} s"
                self._give_up(f"{self.resource} has failed {times} ({self.problem})")
                return

    async def _look_below(self, first: int) -> Resource | None:
        """What failed may have done so because of what it stands on; the one that has failed there."""
        for resource in self.resources[:first]:
            if problem := await self._look(resource):
                self._failed(resource, problem)
                return resource
        return None

    async def _start_from(self, first: int) -> Resource | None:
        """Start what is not known to run, from there on; the one that failed."""
        for resource in self.resources[first:]:
            settings = resource.settings
            self.resource = settings.name
            self._changed()
            problem = await self._limited(resource.agent.start(self._start), settings.start_timeout_s, "started")
            if problem:
                self._failed(resource, problem)
                return resource
            resource.running = True
            resource.problem = ""
            log.info("%s: %s is started.", self.name, settings.name)
        return None

    async def _watch(self) -> Resource:
        """Monitor them all until one fails."""
        monitors = [asyncio.create_task(self._monitor(resource)) for resource in self.resources]
        try:
            await asyncio.wait(monitors, return_when=asyncio.FIRST_COMPLETED)
            # What it stands on may be being mended just now, which is not to be interrupted.
            for resource in self.resources[: self.resources.index(self._first_failed(monitors))]:
                async with resource.looking:
                    pass
            return self._first_failed(monitors)
        finally:
            for task in monitors:
                task.cancel()
            await asyncio.gather(*monitors, return_exceptions=True)

    def _first_failed(self, monitors: Iterable[asyncio.Task[Resource]]) -> Resource:
        """Of several, the one that the others stand on."""
        return min((task.result() for task in monitors if task.done()), key=self.resources.index)

    async def _look(self, resource: Resource) -> str:
        async with resource.looking:
            return await self._limited(resource.agent.monitor(), resource.settings.monitor_timeout_s, "monitored")

    async def _monitor(self, resource: Resource) -> Resource:
        settings = resource.settings
        while True:
            noticed = resource.look.is_set()
            resource.look.clear()
            if problem := await self._look(resource):
                self._failed(resource, problem)
                return resource
            if noticed:
                # Whatever it was may have harmed what stands on it.
                for above in self.resources[self.resources.index(resource) + 1 :]:
                    above.look.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(settings.monitor_interval_s):
                    await resource.look.wait()

    async def _stop(self) -> None:
        await self._previous_ended()
        if await self._stop_down_to(0):
            self._worker = None
            self.resource = ""
            self._become(Status.STOPPED)

    async def _stop_down_to(self, first: int) -> bool:
        """Stop from the last to that one. False: one cannot be stopped, and this node must not go on."""
        for resource in reversed(self.resources[first:]):
            settings = resource.settings
            problem = ""
            for attempt in range(self.settings.stop_attempts):
                if attempt:
                    await asyncio.sleep(STOP_PAUSE_S)
                problem = await self._limited(resource.agent.stop(), settings.stop_timeout_s, "stopped")
                if not problem:
                    break
                log.warning("%s: %s %s.", self.name, settings.name, problem)
            else:
                self.resource, self.problem = settings.name, f"{settings.name} {problem}"
                self._worker = None
                self._become(Status.STUCK)
                return False
            resource.running = False
            log.info("%s: %s is stopped.", self.name, settings.name)
        return True

    async def _limited(self, call: Awaitable[None], timeout_s: float, done: str) -> str:
        """What was wrong, as the end of a sentence about the resource; "" for nothing."""
        try:
            async with asyncio.timeout(timeout_s):
                await call
        except TimeoutError:
            return f"was not {done} within {timeout_s:g} s"
        except ReplicaError as error:
            return str(error)
        except OSError as error:
            return f"failed ({error.strerror or error})"
        except Exception as error:
            log.exception("%s: an agent has failed", self.name)
            return f"was not {done}: its agent has failed ({error!r})"
        return ""

    def _guarded(self, resource: Resource, call: Callable[[], T]) -> T | None:
        """What an agent answers at once. None: it has failed, which is neither the end of this daemon nor that of what
        is asked of the other resources.
        """
        try:
            return call()
        except Exception as error:
            if repr(error) != resource.fault:
                resource.fault = repr(error)
                log.exception("%s: the agent of %s has failed", self.name, resource.settings.name)
            return None

    async def _active(self, resource: Resource) -> bool | None:
        """None: it is not known."""
        try:
            async with asyncio.timeout(resource.settings.monitor_timeout_s):
                return await resource.agent.active()
        except (TimeoutError, ReplicaError, OSError) as error:
            log.warning("%s: whether %s runs is not known (%s).", self.name, resource.settings.name, error)
        except Exception:
            log.exception("%s: whether %s runs is not known", self.name, resource.settings.name)
        return None

    def _become(self, status: Status) -> None:
        if status is not self.status:
            log.info("%s: %s.", self.name, status)
        self.status = status
        self._changed()


def build_group(
    settings: GroupSettings, everything: HeartbeatSettings, now: Callable[[], float], changed: Callable[[], None]
) -> GroupRunner:
    """The runner of a group with the agents of its resources."""
    resources: list[Resource] = []
    runner = GroupRunner(settings, resources, now, changed)
    for resource_settings in settings.resources:
        surroundings = Surroundings(everything, functools.partial(_look, runner, len(resources)))
        resources.append(
            Resource(resource_settings, kind(resource_settings.kind).make(resource_settings, surroundings))
        )
    return runner


def _look(runner: GroupRunner, index: int) -> None:
    runner.look(runner.resources[index])
