"""One seed from its first event to its last check."""

import asyncio
import contextlib
import gc
import logging
import random
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import replica.tasks
from replica.link import PeerLink
from replica.states import Replication
from tests.sim.client import Workload
from tests.sim.disk import BLOCK, SECTOR
from tests.sim.loop import MOST_STEPS, World
from tests.sim.network import Network
from tests.sim.node import Incarnation, Machine
from tests.sim.operator import TICK_S, Operator
from tests.sim.oracle import Oracle
from tests.sim.scenario import Scenario, configuration, draw, patched
from tests.sim.trace import Trace

#: Virtual time that two whole machines have to become Established again when all faults have ended.
RECOVERY_S = 60.0


@dataclass
class Outcome:
    """What a run found."""

    seed: int
    violation: str | None
    checksum: int
    virtual_s: float
    steps: int
    requests: int
    answers: int
    errors: int
    checks: int
    faults: dict[str, int] = field(default_factory=dict)
    trace: list[str] = field(default_factory=list)


class Run:
    """The world of one seed."""

    def __init__(self, scenario: Scenario, *, echo: bool = False) -> None:
        self.scenario = scenario
        self.world = World()
        self.trace = Trace(self.world, echo=echo)
        self.network = Network(self.world, scenario.rng("network"), scenario.network)
        one, two = (
            Machine(
                self.world,
                self.trace,
                self.network,
                configuration(scenario, name),
                scenario.rng,
                scenario.disk[name],
                scenario.size_bytes + scenario.extra_bytes.get(name, 0),
                scenario.room_bytes,
            )
            for name in ("node1", "node2")
        )
        self.machines = (one, two)
        generation = 0 if scenario.fresh else scenario.rng("generation").getrandbits(64) | 1
        for machine in self.machines:
            # A copy that is larger than the data is a new one.
            machine.format(0 if machine.name in scenario.extra_bytes else generation)
        self.oracle = Oracle(
            self.machines,
            self.trace,
            protocol=scenario.protocol,
            split_brain=scenario.split_brain,
            policies={machine.name: scenario.policies_of(machine.name) for machine in self.machines},
        )
        for machine in self.machines:
            if machine.name == scenario.leftovers:
                self.oracle.leave(machine, scenario.size_bytes, scenario.room_bytes)
        self.workload = Workload(scenario, self.oracle, scenario.rng("clients"))
        self.operator = Operator(self, scenario.rng("operator"))
        self.requesting = True
        for machine in self.machines:
            machine.observe = self._observe
            machine.died = self._died
            machine.hook_begins = self.oracle.hook_begins
            machine.hook_ended = self.oracle.hook_ended
        self._last_words: dict[str, Any] = {}

    def _observe(self, machine: Machine) -> None:
        resource = machine.resource
        if resource is not None:
            state = resource.state
            words = (state.role, state.connection, state.replication, resource.disk_state)
            if words != self._last_words.get(machine.name):
                self._last_words[machine.name] = words
                self.trace.note(f"{machine.name} {' '.join(words)} {state.last_error[:90]}")
        self.oracle.observe(machine)

    def _died(self, machine: Machine, incarnation: Incarnation | None) -> None:
        self.oracle.gone(machine)
        if incarnation is not None:
            self.workload.died(incarnation)
        self.operator.node_died(machine)

    # ── the course of a run ──────────────────────────────────────────────────────────────────────────────────

    def execute(self) -> None:
        """Chaos, then recovery, then the last checks."""
        world = self.world
        self.trace.note(f"seed {self.scenario.seed}: {self.scenario.summary()}")
        for machine in self.machines:
            machine.boot()
        self._request()
        self.operator.start()
        world.run(None, self.scenario.duration_s)
        if not world.halted:
            self._recover()
        if self.world.complaints:
            self.oracle.fail("Fault of the node", "; ".join(self.world.complaints[:3]))
        elif self.world.steps > MOST_STEPS:
            self.oracle.fail("Liveness", f"{MOST_STEPS} steps and no end")

    def _request(self) -> None:
        if not self.requesting:
            return
        rng = self.workload.rng
        self.world.after(rng.expovariate(1 / self.scenario.request_every_s), self._request)
        machine = rng.choice(self.machines)
        if machine.alive:
            self.workload.step(machine)

    def _recover(self) -> None:
        self.trace.note("--- no more faults")
        self.requesting = False
        self.operator.over = True
        self._heal_all()
        if not self._wait(lambda: self.workload.idle and self.in_sync(), "become Established again"):
            return
        # The asynchronous protocols answer before the other copy has it; a FLUSH comes behind everything.
        if not self._flush() or not self._wait(self.in_sync, "become Established again"):
            return
        self._compare("after the last resync")
        if self.oracle.violation is None and self.scenario.verb_rates["verify"] and not self._verify():
            return
        if self.oracle.violation is None and self.scenario.final_power_cut:
            self._cut_both()

    def _heal_all(self) -> None:
        self.network.heal()
        for machine in self.machines:
            machine.faults_off = True
            machine.data.faults.slowness = machine.metadata.faults.slowness = 1.0
            if machine.incarnation is not None:
                machine.incarnation.fuse = 0
            machine.boot()

    def _wait(self, done: Callable[[], bool], what: str) -> bool:
        """Care for the pair until `done()`; a violation of liveness when that takes too long."""
        limit_s = self.world.now_s + RECOVERY_S
        while self.world.now_s < limit_s:
            if self.world.run(done, self.world.now_s + TICK_S):
                return not self.world.halted
            for machine in self.machines:
                machine.boot()
            self.operator.care()
        words = "; ".join(self._state_of(machine) for machine in self.machines)
        busy = "" if self.workload.idle else f"; {len(self.workload._busy)} sectors still wait for an answer"
        self.oracle.fail("Liveness", f"the nodes did not {what} within {RECOVERY_S:.0f} s: {words}{busy}")
        return False

    @staticmethod
    def _state_of(machine: Machine) -> str:
        resource = machine.resource
        if resource is None:
            return f"{machine.name} is down"
        state = resource.state
        return (
            f"{machine.name} {state.role} {state.connection} {state.replication} {resource.disk_state} "
            f"{state.last_error}"
        )

    def in_sync(self) -> bool:
        """Both Established, the Primary serving, nothing dirty on either, no verb under way."""
        for machine in self.machines:
            resource = machine.resource
            if resource is None or not resource.attached or machine.incarnation is None:
                return False
            if resource.peer_volume is not None:
                return False
            if resource.state.replication is not Replication.ESTABLISHED or machine.incarnation.stopping:
                return False
            if resource.disk.bitmap.count or resource.admin.locked():  # a resize has grown one copy, say
                return False
            session = resource.session
            if session is None or not session._task.done():
                return False
        return any(machine.is_primary for machine in self.machines)

    def _compare(self, when: str) -> None:
        self.trace.note(f"--- comparing {when}")
        self.oracle.check_copies()

    def _verify(self) -> bool:
        """Both copies are the same: a verification says so, to its end. Then one rots, and is repaired."""
        if not self._wait(lambda: not self._verifying(), "end their verifications"):
            return False
        if not self._verified(0, repair=False):
            return False
        rng = self.scenario.rng("rotten")
        machine = rng.choice(self.machines)
        size_bytes = machine.resource.disk.size_bytes if machine.resource is not None else self.scenario.size_bytes
        rotten = rng.sample(range(-(-size_bytes // BLOCK)), rng.randint(1, 12))
        for block in rotten:
            machine.data.leave(block * BLOCK + SECTOR - 1, bytes([rng.randint(1, 255)]))  # behind what names the write
        lengths = sum(min(size_bytes - block * BLOCK, BLOCK) for block in rotten)
        if rng.random() < 0.3:
            if not self._cut_while_verifying(rng) or not self._verified(None, repair=True):
                return False
        elif not self._verified(lengths, repair=True):
            return False
        if not self._wait(self.in_sync, "become clean"):
            return False
        self._compare("after the repair")
        return self.oracle.violation is None

    def _cut_while_verifying(self, rng: random.Random) -> bool:
        """Power cuts in the middle of a repair. What was not known by then is found by the next one."""
        self.machines[0].run(lambda node: node.verbs.verify(repair=True), lambda error: None)
        self.world.run(None, self.world.now_s + rng.expovariate(10))
        for machine in rng.choice((self.machines[:1], self.machines[1:], self.machines)):
            machine.die(power=True, why="power cut while copies are verified")
        return self._wait(self.in_sync, "become Established after a power cut of a verification")

    def _verified(self, differ_bytes: int | None, *, repair: bool) -> bool:
        """A run to its end, on either node, finds so much (None: whatever), and repairs it, too."""
        machine = self.workload.rng.choice(self.machines)
        begun: list[Exception | None] = []
        limit_s = self.world.now_s + RECOVERY_S
        while self.world.now_s < limit_s and (not begun or begun[-1] is not None):
            # It may be refused where it is not known yet what the other node has become, or a verb that waited for an
            # earlier run has taken a disk away.
            begun.clear()
            if not self._wait(self.in_sync, "become Established before a verification"):
                return False
            machine.run(lambda node: node.verbs.verify(repair=repair), begun.append)
            if not self._wait(lambda: bool(begun) and not self._verifying(), "verify their copies"):
                return False
            self.world.run(None, self.world.now_s + TICK_S)
        result = machine.resource.verify_result if machine.resource is not None else None
        found = (differ_bytes, differ_bytes if repair else 0)
        as_found = result is not None and (differ_bytes is None or (result.found_bytes, result.repaired_bytes) == found)
        if result is None or not result.complete or not as_found:
            what = f"{differ_bytes} bytes differ, and {machine.name} says: {begun[-1]}, {result}"
            self.oracle.fail("Verify", what)
        return self.oracle.violation is None

    def _verifying(self) -> bool:
        return any(one.resource is not None and one.resource.verify_progress is not None for one in self.machines)

    def _flush(self) -> bool:
        primary = next(machine for machine in self.machines if machine.is_primary)
        covered = self.oracle.flush_issued(primary)
        results: list[Exception | None] = []
        primary.run(lambda node: node.export.flush(), results.append)
        if not self._wait(lambda: bool(results), "answer the last FLUSH"):
            return False
        if results[0] is None:
            self.oracle.flush_done(primary, covered)
        return self.oracle.violation is None

    def _cut_both(self) -> None:
        for machine in self.machines:
            machine.die(power=True, why="the last power cut of both")
        for machine in self.machines:
            machine.boot()
        if self._wait(self.in_sync, "become Established after the last power cut"):
            self._compare("after the last power cut")

    def end(self) -> None:
        """Nothing happens any more."""
        self.world.close()
        for machine in self.machines:
            if machine.incarnation is not None:
                machine.incarnation.dead = machine.incarnation.loop.dead = True
        replica.tasks._running.clear()
        # One by one, before the collector does: Python 3.11 can crash when that ends suspended coroutines.
        for coroutine in self.world.coroutines:
            with contextlib.suppress(BaseException):
                coroutine.close()
        self.world.coroutines.clear()

    def _checksum(self) -> int:
        """Over everything that happened."""
        checksum = self.trace.checksum
        for machine in self.machines:
            for disk in (machine.data, machine.metadata):
                checksum = zlib.crc32(disk.cache, zlib.crc32(disk.durable, checksum))
        return zlib.crc32(f"{self.world.steps} {self.world.now_s!r} {self.workload.answers}".encode(), checksum)

    def outcome(self, *, checksum: bool = False) -> Outcome:
        """The result; its checksum takes a while for large volumes, and is 0 when nobody asks for it."""
        violation = self.oracle.violation
        return Outcome(
            self.scenario.seed,
            None if violation is None else str(violation),
            self._checksum() if checksum else 0,
            self.world.now_s,
            self.world.steps,
            self.workload.requests,
            self.workload.answers,
            self.workload.errors,
            self.oracle.checks,
            self.trace.counts,
            [] if violation is None else list(self.trace.lines),
        )


class Listen(logging.Handler):
    """What the node logs: a background task that failed unexpectedly is a fault; the rest goes to an echoed trace."""

    def __init__(self) -> None:
        super().__init__()
        self.run: Run | None = None
        self.echo = False

    def emit(self, record: logging.LogRecord) -> None:
        if self.run is None:
            return
        if record.exc_info is not None and record.exc_info[1] is not None:
            error = record.exc_info[1]
            loop = self.run.world._current
            if loop is not None and not loop.dead:
                self.run.world.complain(loop, error)
        elif self.echo:
            self.run.trace.lines.append(f"{'':10} {record.getMessage()}")
            print(f"{self.run.world.now_s:10.6f}   log {record.getMessage()}")


def _link_hash(link: PeerLink) -> int:
    """Sets of links must not be ordered by addresses."""
    return zlib.crc32(link._hello)


@contextlib.contextmanager
def quiet(*, echo: bool = False) -> Iterator[Listen]:
    """The process as the simulator needs it: no log output, no garbage collection in the middle of a run."""
    logger = logging.getLogger("replica")
    listen = Listen()
    listen.echo = echo
    before = (logger.level, logger.propagate, sys.unraisablehook, PeerLink.__hash__)
    logger.addHandler(listen)
    logger.setLevel(logging.INFO if echo else logging.ERROR)
    logger.propagate = False
    # Coroutines of dead incarnations complain when they are collected; that is what being dead means.
    sys.unraisablehook = lambda _: None
    PeerLink.__hash__ = _link_hash  # type: ignore[method-assign, assignment]
    # asyncio lists all tasks for debuggers, in a set of weak references: much work for each task, and nobody asks.
    every_task = vars(getattr(asyncio.tasks, "_all_tasks", SimpleNamespace()))
    every_task["add"] = id
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield listen
    finally:
        logger.removeHandler(listen)
        logger.setLevel(before[0])
        logger.propagate, sys.unraisablehook = before[1], before[2]
        PeerLink.__hash__ = before[3]  # type: ignore[method-assign]
        del every_task["add"]
        gc.unfreeze()
        if collecting:
            gc.enable()


def run_seed(
    seed: int,
    listen: Listen,
    *,
    bias: Callable[[Scenario, random.Random], None] | None = None,
    echo: bool = False,
    checksum: bool = False,
) -> Outcome:
    """Run one seed inside `quiet()`."""
    scenario = draw(seed, bias)
    with patched(scenario):
        run = Run(scenario, echo=echo)
        listen.run = run
        try:
            run.execute()
            return run.outcome(checksum=checksum)
        finally:
            listen.run = None
            run.end()
            # Nothing of it must be left to be collected outside `quiet()`, where its coroutines would be heard.
            del run
            gc.collect()
