"""One seed: some minutes of faults, then peace."""

import contextlib
import random
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

from replica import tasks
from replica.errors import ReplicaError
from replica.heartbeat import clock
from replica.heartbeat.settings import Timing
from tests.sim.failover.cluster import NODES, PATHS, Cluster

FAULTS = 25
#: Until everything must run again in peace: the listening, the window of failures, a failback.
PEACE_S = 150.0


class Outcome(NamedTuple):
    seed: int
    problem: str
    story: list[str]
    faults: int


class Chaos:
    """What goes wrong."""

    def __init__(self, cluster: Cluster, rng: random.Random) -> None:
        self.cluster = cluster
        self.rng = rng
        self.kinds: list[Callable[[], None]] = [
            self.power_cut,
            self.boot,
            self.boot,
            self.pause,
            self.resume,
            self.resume,
            self.cut_way,
            self.cut_cable,
            self.heal,
            self.heal,
            self.heal,
            self.lossy,
            self.kill_daemon,
            self.start_daemon,
            self.start_daemon,
            self.leave,
            self.crash,
            self.break_thing,
            self.mend,
            self.stick,
            self.standby,
            self.takeover,
            self.fencing,
        ]

    def one(self) -> None:
        """Any of it."""
        kind = self.rng.choice(self.kinds)
        self.cluster.say(kind.__name__)
        kind()
        self.cluster.changed()

    def machine(self):  # type: ignore[no-untyped-def]
        return self.cluster.machines[self.rng.choice(NODES)]

    def thing(self):  # type: ignore[no-untyped-def]
        things = self.machine().things
        return self.rng.choice(things[self.rng.choice(sorted(things))])

    def power_cut(self) -> None:
        self.machine().power_off("cut")

    def boot(self) -> None:
        for machine in self.cluster.machines.values():
            if not machine.powered:
                machine.boot()

    def pause(self) -> None:
        self.machine().pause()

    def resume(self) -> None:
        for machine in self.cluster.machines.values():
            machine.resume()

    def cut_way(self) -> None:
        node = self.rng.choice(NODES)
        for path in range(PATHS):
            if self.rng.random() < 0.7:
                self.cluster.cut.add((node, path))

    def cut_cable(self) -> None:
        self.cluster.no_carrier.add(self.rng.choice(NODES))
        for machine in self.cluster.machines.values():
            machine.carrier_changed()

    def heal(self) -> None:
        self.cluster.cut.clear()
        self.cluster.no_carrier.clear()
        self.cluster.loss = dict.fromkeys(range(PATHS), 0.0)
        for machine in self.cluster.machines.values():
            machine.carrier_changed()

    def lossy(self) -> None:
        self.cluster.loss[self.rng.randrange(PATHS)] = 0.3

    def kill_daemon(self) -> None:
        machine = self.machine()
        machine.resume()
        machine.kill_daemon()

    def start_daemon(self) -> None:
        for machine in self.cluster.machines.values():
            if machine.powered:
                machine.start_daemon()

    def leave(self) -> None:
        machine = self.machine()
        if machine.manager is not None and not machine.paused:
            self.cluster.world.enter(machine.loop, machine.manager.leave)

    def crash(self) -> None:
        thing = self.thing()
        if thing.up and not thing.machine.paused:
            thing.set(False)

    def break_thing(self) -> None:
        thing = self.thing()
        thing.broken = True
        if thing.up:
            thing.set(False)

    def stick(self) -> None:
        self.thing().stuck = True

    def mend(self) -> None:
        for machine in self.cluster.machines.values():
            for things in machine.things.values():
                for thing in things:
                    thing.broken = thing.stuck = False

    def standby(self) -> None:
        self._ask("standby", self.rng.choice(["all", "local", "foreign"]))

    def takeover(self) -> None:
        self._ask("takeover")

    def fencing(self) -> None:
        self.cluster.fencing_fails = not self.cluster.fencing_fails

    def _ask(self, verb: str, *arguments: str) -> None:
        machine = self.machine()
        if machine.manager is None or machine.paused:
            return
        self.cluster.say(f"{machine.name}: {verb} {arguments}")

        async def tell(words: str) -> None:
            self.cluster.say(f"{machine.name}: {words}")

        async def ask() -> None:
            with contextlib.suppress(ReplicaError):
                await getattr(machine.manager, verb)(*arguments, tell)

        machine.loop.create_task(ask())


def run(seed: int) -> Outcome:
    """Run one seed; `problem` is "" when every rule was kept."""
    rng = random.Random(seed)
    deadtime_s = rng.choice([1.0, 5.0])
    timing = Timing(
        keepalive_s=deadtime_s / 5,
        warntime_s=deadtime_s / 2,
        deadtime_s=deadtime_s,
        initdead_s=2 * deadtime_s,
        failback_delay_s=deadtime_s,
    )
    cluster = Cluster(seed, timing, fencing=rng.random() < 0.6, auto_failback=rng.random() < 0.7)
    cluster.say(f"deadtime {deadtime_s}, fencing {cluster.fencing}, auto_failback {cluster.auto_failback}")
    world = cluster.world
    with mock.patch.object(clock, "now", lambda: world.now_s):
        for machine in cluster.machines.values():
            if rng.random() < 0.9:
                machine.boot()
        chaos = Chaos(cluster, rng)
        faults = 0
        while faults < FAULTS and not world.halted:
            world.run(None, world.now_s + rng.choice([0.01, 0.2, 1.0, deadtime_s, 3 * deadtime_s]) * rng.random())
            chaos.one()
            faults += 1
        if not world.halted:
            cluster.say("PEACE")
            cluster.fencing_fails = False
            chaos.mend()
            chaos.heal()
            chaos.resume()
            chaos.boot()
            chaos.start_daemon()
            for machine in cluster.machines.values():
                world.enter(machine.loop, machine.manager.clear_failures)
            cluster.changed()
            end_s = world.now_s + PEACE_S
            while world.now_s < end_s and not world.halted:
                world.run(None, min(end_s, world.now_s + 5.0))
                chaos.boot()  # of one that has fenced itself
                chaos.start_daemon()
    problem = "; ".join(cluster.broken_rules or world.complaints) or cluster.well()
    if problem:
        for machine in cluster.machines.values():
            if machine.manager is not None:
                cluster.say(f"{machine.name}: {machine.manager.decision.sentence}")
    for machine in cluster.machines.values():
        machine.kill_daemon()
    world.close()
    tasks._running.clear()
    # One by one, before the collector does: Python 3.11 can crash when that ends suspended coroutines.
    for coroutine in world.coroutines:
        with contextlib.suppress(BaseException):
            coroutine.close()
    world.coroutines.clear()
    return Outcome(seed, problem, cluster.story, faults)
