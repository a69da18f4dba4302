"""One simulated machine: its event loop, what runs on it, and its daemon, which can be killed, paused and started."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

from replica.heartbeat.agents.base import AgentError, Start
from replica.heartbeat.consent import Answer
from replica.heartbeat.group import GroupRunner, Resource
from replica.heartbeat.held import HeldGroup, Previous
from replica.heartbeat.manager import Manager
from replica.heartbeat.membership import Membership, PeerView
from replica.heartbeat.node_state import NodeState, Readiness, Ready
from replica.heartbeat.packet import Number
from replica.heartbeat.settings import GroupSettings, HeartbeatSettings
from tests.sim.loop import NodeLoop, World

#: What a resource takes to start or stop, at most.
BUSY_S = 0.3
#: What passes, at most, until a daemon that died is started again by its supervisor.
RESTART_S = 1.0
#: What the kernel is late by, at most, in dropping an address.
LEASE_FUZZ_S = 1.25


class Thing:
    """A resource of a machine: it outlives the daemon, not the power."""

    def __init__(self, machine: "Machine", group: str, index: int, kind: str) -> None:
        self.machine, self.group, self.index, self.kind = machine, group, index, kind
        self.up = False
        self.broken = False  # it fails when it is started, until it is mended
        self.stuck = False  # it fails when it is stopped
        self.until_s = 0.0  # of an address
        self.shown_s = 0.0  # since when it is up (or not)

    def set(self, up: bool) -> None:
        self.up = up
        self.shown_s = self.machine.cluster.world.now_s
        self.machine.cluster.check()

    def expire(self) -> None:
        if self.up and self.machine.cluster.world.now_s >= self.until_s:
            self.machine.cluster.say(f"{self.machine.name}: the kernel drops the address of {self.group}")
            self.set(False)


class SimAgent:
    """The agent of a `Thing`."""

    def __init__(self, thing: Thing, rng: random.Random) -> None:
        self._thing = thing
        self._rng = rng
        self._works = False

    @contextlib.asynccontextmanager
    async def _working(self) -> AsyncIterator[None]:
        """A program runs: half of its time before what is done here. To be cancelled takes time, too."""
        thing = self._thing
        thing.machine.begins_work()
        if self._works:
            thing.machine.cluster.break_rule(f"two programs work on {thing.kind} of {thing.group} at once")
        self._works = True
        try:
            await self._take_time()
            yield
            await self._take_time()
        except asyncio.CancelledError:
            await self._take_time()
            raise
        finally:
            self._works = False

    async def _take_time(self) -> None:
        await asyncio.sleep(self._rng.uniform(0.001, BUSY_S / 2))

    async def start(self, start: Start) -> None:
        thing = self._thing
        if thing.up:
            if thing.kind == "ip":
                self.hold(thing.machine.cluster.world.now_s + thing.machine.settings.timing.deadtime_s)
            return
        async with self._working():
            if thing.broken:
                raise AgentError("is broken")
            if thing.kind == "ip":
                if thing.machine.cluster.answered_elsewhere(thing):
                    raise AgentError("is held by somebody else")
                thing.up = True
                self.hold(thing.machine.cluster.world.now_s + thing.machine.settings.timing.deadtime_s)
                thing.up = False
            thing.set(True)

    async def stop(self) -> None:
        if not self._thing.up:
            return
        self._thing.machine.cluster.check_stop(self._thing)
        async with self._working():
            if self._thing.stuck:
                raise AgentError("does not stop")
            self._thing.set(False)

    async def monitor(self) -> None:
        if not self._thing.up:
            raise AgentError("does not run")

    async def active(self) -> bool:
        return self._thing.up

    def ready(self) -> Ready:
        machine = self._thing.machine
        if self._thing.kind == "ip" and not machine.cluster.carrier(machine.name):
            return Ready(Readiness.NO, "its interface has no carrier")
        return Ready()

    def hold(self, until_s: float) -> None:
        thing = self._thing
        if thing.kind != "ip" or not thing.up or until_s <= thing.until_s:
            return
        thing.until_s = until_s
        world = thing.machine.cluster.world
        world.at(until_s + self._rng.uniform(0.0, LEASE_FUZZ_S), thing.expire)

    def let_go(self) -> None:
        if self._thing.kind == "ip" and self._thing.up:
            self._thing.set(False)

    async def close(self) -> None:
        pass


class SimHeld:
    """What the daemon remembers: `terms` on the disk, the rest until the next boot."""

    def __init__(self) -> None:
        self.terms: dict[str, int] = {}
        self._groups: dict[str, HeldGroup] = {}
        self._peer_was_dead = False
        self._alive_s: float | None = None

    def load(self, now: float) -> Previous:
        if self._alive_s is None:
            return Previous()
        return Previous(dict(self._groups), self._peer_was_dead, now - self._alive_s)

    def save(self, groups: Any, *, peer_is_dead: bool) -> None:
        self._groups, self._peer_was_dead = dict(groups), peer_is_dead
        self.terms = {name: group.claim.term for name, group in groups.items()}

    def stamp(self, now: float) -> None:
        self._alive_s = now

    def rebooted(self) -> None:
        self._groups, self._alive_s = {}, None


class SimPings:
    alive = total = 0
    settled = True

    def restart(self) -> None:
        pass


class SimLinks:
    """Heartbeats over the cluster's simulated paths, in real packets."""

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self._cluster = machine.cluster
        self._membership = Membership(
            machine.settings,
            self._cluster.world.now_s,
            machine.starts,
            lambda: self._cluster.rng.randbytes(16),
            machine.seen,
        )

    def send(self, state: NodeState) -> None:
        data = self._membership.pack_next(state, self._cluster.world.now_s)
        self._cluster.sent(self._machine, data)

    def renew(self) -> None:
        self._membership.renew(self._cluster.world.now_s)

    def peer(self) -> PeerView:
        return self._membership.view()

    def receive(self, data: bytes, path: int) -> None:
        verdict = self._membership.accept(data, self._cluster.world.now_s, "", path)
        self._machine.seen = self._membership.seen
        if verdict.newer and self._machine.manager is not None:
            self._machine.manager.heard()


class SimJudge:
    """Fencing that really cuts the power of a machine, or none at all."""

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine

    async def ask(self, group: GroupSettings, peer: str) -> Answer:
        cluster = self._machine.cluster
        if not cluster.fencing:
            await asyncio.sleep(cluster.rng.uniform(0.01, 0.15))
            if group.replicated:
                return Answer(False, "it has replicated data")
            thing = next(thing for thing in self._machine.things[group.name] if thing.kind == "ip")
            held = cluster.answered_elsewhere(thing)
            return Answer(not held, "its address is answered for" if held else "without fencing")
        await asyncio.sleep(cluster.rng.uniform(0.05, 2.0))
        if cluster.fencing_fails:
            return Answer(False, "fencing failed", retry_s=5.0)
        cluster.machines[peer].power_off("fenced")
        await asyncio.sleep(cluster.rng.uniform(0.05, 1.0))
        return Answer(True, "fenced", True)


class Machine:
    """`things` outlive the daemon, `seen`, `starts` and `held.terms` the power."""

    def __init__(self, cluster: Any, settings: HeartbeatSettings) -> None:
        self.cluster = cluster
        self.settings = settings
        self.name = settings.node
        self.things = {
            group.name: [
                Thing(self, group.name, index, resource.kind) for index, resource in enumerate(group.resources)
            ]
            for group in settings.groups
        }
        self.held = SimHeld()
        self.seen = Number()
        self.starts = 0
        self.powered = False
        #: When the daemon was last known to run, while it does not.
        self.ran_s = 0.0
        #: Since when it runs again, after it did not for longer than deadtime.
        self.resumed_s: float | None = None
        self.started_s = 0.0
        #: The daemon is to die in the midst of the next start or stop of anything.
        self.dies_at_work = False
        self.loop: NodeLoop | None = None
        self.manager: Manager | None = None
        self.links: SimLinks | None = None

    @property
    def paused(self) -> bool:
        return self.loop is not None and self.loop.frozen is not None

    @property
    def knows_nothing_yet(self) -> bool:
        """It did not run for a while, has heard nobody since then, and has not listened for long enough."""
        if self.resumed_s is None or self.paused or self.links is None or self.links.peer().heard_s is not None:
            return False
        return bool(self.cluster.world.now_s - self.resumed_s < self.settings.timing.deadtime_s)

    def boot(self) -> None:
        """Power on, and start the daemon."""
        self.powered = True
        self.start_daemon()

    def start_daemon(self) -> None:
        if self.loop is not None:
            return
        world: World = self.cluster.world
        self.cluster.say(f"{self.name}: the daemon starts")
        self.starts += 1
        self.started_s = world.now_s
        self._runs_again()
        self.loop = NodeLoop(world, f"{self.name}.{self.starts}")
        world.enter(self.loop, self._begin)

    def _begin(self) -> None:
        self.links = SimLinks(self)
        self.manager = Manager(
            self.settings,
            self._runners,
            SimJudge(self),
            self.held,
            self._fence_self,  # type: ignore[arg-type]
        )
        assert self.loop is not None
        self.loop.create_task(self._live(self.manager, self.links))

    async def _live(self, manager: Manager, links: SimLinks) -> None:
        manager.begin(links, SimPings())
        await manager.run()
        self.cluster.say(f"{self.name}: the daemon has left")
        await manager.close()
        self.kill_daemon()

    def _runners(self, changed: Callable[[], None]) -> dict[str, GroupRunner]:
        return {
            group.name: GroupRunner(
                group,
                [
                    Resource(settings, SimAgent(thing, self.cluster.rng))
                    for settings, thing in zip(group.resources, self.things[group.name], strict=True)
                ],
                lambda: self.cluster.world.now_s,
                changed,
            )
            for group in self.settings.groups
        }

    def _fence_self(self, why: str) -> None:
        self.power_off(f"fences itself: {why}")

    def receive(self, data: bytes, path: int) -> None:
        """A packet has come through the wire."""
        if self.loop is None or self.links is None:
            return
        loop, links = self.loop, self.links
        loop.call_soon(links.receive, data, path)

    def carrier_changed(self) -> None:
        """The kernel tells of it."""
        if self.loop is not None and self.manager is not None:
            self.loop.call_soon(self.manager.wake)

    def kill_daemon(self) -> None:
        if self.loop is not None:
            self.cluster.say(f"{self.name}: the daemon is dead")
            self.loop.dead = True
            if not self.paused:
                self.ran_s = self.cluster.world.now_s
            self.loop = self.manager = self.links = None

    def _runs_again(self) -> None:
        now = self.cluster.world.now_s
        self.resumed_s = now if now - self.ran_s >= self.settings.timing.deadtime_s else None

    def begins_work(self) -> None:
        """A resource is being started or stopped."""
        if self.dies_at_work:
            self.dies_at_work = False
            world: World = self.cluster.world
            world.after(0.0, self.kill_daemon)
            world.after(self.cluster.rng.uniform(0.0, RESTART_S), self._restart_daemon)

    def _restart_daemon(self) -> None:
        if self.powered:
            self.start_daemon()

    def power_off(self, why: str) -> None:
        if not self.powered:
            return
        self.cluster.say(f"{self.name}: power off ({why})")
        self.powered = False
        self.kill_daemon()
        self.held.rebooted()
        for things in self.things.values():
            for thing in things:
                thing.up = False
        self.cluster.check()

    def pause(self) -> None:
        if self.loop is not None and self.loop.frozen is None:
            self.cluster.say(f"{self.name}: paused")
            self.loop.frozen = []
            self.ran_s = self.cluster.world.now_s

    def resume(self) -> None:
        loop = self.loop
        if loop is not None and loop.frozen is not None:
            self.cluster.say(f"{self.name}: resumed")
            waiting, loop.frozen = loop.frozen, None
            self._runs_again()
            # What has come in and what has become due meanwhile: in no order that could be relied on.
            self.cluster.rng.shuffle(waiting)
            for callback, arguments in waiting:
                loop.call_soon(callback, *arguments)
