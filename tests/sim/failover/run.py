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
from tests.sim.failover.machine import Machine, Thing

FAULTS = 25
#: Until everything must run again in peace: the listening, the window of failures, a failback.
PEACE_S = 150.0
#: What is well for so long stays so.
WELL_S = 20.0
STEP_S = 5.0


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
        self.deadtime_s = cluster.timing.deadtime_s
        #: Until the next fault, at least.
        self.rest_s = 0.0
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
            self.die_at_work,
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
            self.calm,
            self.calm,
        ]

    def one(self) -> None:
        """Any of it."""
        kind = self.rng.choice(self.kinds)
        self.cluster.say(kind.__name__)
        kind()
        self.cluster.changed()

    def pass_time(self) -> None:
        """Until the next fault."""
        rest_s, self.rest_s = self.rest_s, 0.0
        span_s = self.rng.choice([0.01, 0.2, 1.0, self.deadtime_s, 3 * self.deadtime_s])
        world = self.cluster.world
        world.run(None, world.now_s + rest_s + span_s * self.rng.random())

    def calm(self) -> None:
        """All is well, for so long that groups are back where they belong."""
        self.cluster.fencing_fails = False
        self.mend()
        self.heal()
        self.resume()
        self.boot()
        self.start_daemon()
        self.rest_s = 5 * self.deadtime_s

    def machine(self) -> Machine:
        return self.cluster.machines[self.rng.choice(NODES)]

    def thing(self) -> Thing:
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

    def die_at_work(self) -> None:
        """A daemon dies in the midst of a start or stop, of which something is asked at once."""
        machine = self.machine()
        machine.dies_at_work = True
        self.ask(self.cluster.machines[machine.settings.peer], "takeover")

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
        thing = self.thing()
        thing.stuck = True
        if self.rng.random() < 0.5:
            self.ask(thing.machine, "standby", "all")

    def mend(self) -> None:
        for machine in self.cluster.machines.values():
            for things in machine.things.values():
                for thing in things:
                    thing.broken = thing.stuck = False

    def standby(self) -> None:
        self.ask(self.machine(), "standby", self.rng.choice(["all", "local", "foreign"]))

    def takeover(self) -> None:
        self.ask(self.machine(), "takeover")

    def fencing(self) -> None:
        self.cluster.fencing_fails = not self.cluster.fencing_fails

    def clear_failures(self) -> None:
        for machine in self.cluster.machines.values():
            if machine.manager is not None and machine.loop is not None:
                self.cluster.world.enter(machine.loop, machine.manager.clear_failures)

    def ask(self, machine: Machine, verb: str, *arguments: str) -> None:
        """As an operator does; a refusal is none of our business."""
        if machine.manager is None or machine.loop is None or machine.paused:
            return
        self.cluster.say(f"{machine.name}: {verb} {arguments}")

        async def tell(words: str) -> None:
            self.cluster.say(f"{machine.name}: {words}")

        async def ask() -> None:
            with contextlib.suppress(ReplicaError):
                await getattr(machine.manager, verb)(*arguments, tell)

        machine.loop.create_task(ask())


def _peace(chaos: Chaos, restarted: str = "") -> str:
    """Nothing is wrong any more, and all gets well: what does not."""
    cluster = chaos.cluster
    world = cluster.world
    chaos.calm()
    for machine in cluster.machines.values():
        machine.dies_at_work = False
    chaos.clear_failures()
    cluster.changed()
    end_s = world.now_s + PEACE_S
    well_s = 0.0
    cleared = False
    while world.now_s < end_s and well_s < WELL_S and not world.halted:
        world.run(None, world.now_s + STEP_S)
        chaos.boot()  # of one that has fenced itself
        chaos.start_daemon()
        if not cleared:
            chaos.clear_failures()  # of what was about to fail when the peace began
            cleared = True
        well_s = 0.0 if cluster.well(restarted) else well_s + STEP_S
    return cluster.well(restarted)


def _fails_back_after_restart(chaos: Chaos) -> str:
    """What an operator places stays there, until the preferred node is started anew."""
    cluster = chaos.cluster
    machine = chaos.machine()
    chaos.ask(machine, "standby", "local")
    problem = _peace(chaos)
    if not problem:
        cluster.say("REBOOT")
        machine.power_off("reboot")
        cluster.world.run(None, cluster.world.now_s + STEP_S)
        problem = _peace(chaos, machine.name)
    return problem


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
            chaos.pass_time()
            chaos.one()
            faults += 1
        cluster.say("PEACE")
        problem = _peace(chaos)
        if not problem and cluster.auto_failback and rng.random() < 0.3:
            problem = _fails_back_after_restart(chaos)
        if world.steps > world.most_steps:
            cluster.break_rule("there is no end of it")
        problem = "; ".join(cluster.broken_rules or world.complaints) or problem
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
