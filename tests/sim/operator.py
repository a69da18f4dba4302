"""The operator and the forces of nature: faults and verbs at random moments, and what brings things up again.

Shaped like an arbiter: it knows what both nodes have recorded durably, and promotes only what is as new as that.
"""

import random
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from replica.generation import Kind, Side, decide
from replica.states import Connection, Disk, Replication, Role
from tests.sim.oracle import Durable

if TYPE_CHECKING:
    from replica.resource import Resource
    from tests.sim.node import Machine
    from tests.sim.run import Run

TICK_S = 0.05


class Operator:
    """Acts on a run."""

    def __init__(self, run: "Run", rng: random.Random) -> None:
        self.run = run
        self.rng = rng
        self.world = run.world
        self.scenario = run.scenario
        self.machines = run.machines
        self.oracle = run.oracle
        self.trace = run.trace
        self.over = False
        #: Verbs that change a role, under way; one at a time where two Primaries are forbidden.
        self._changing: dict[int, Machine] = {}
        #: The same of those that declare a copy bad: who was asked, and whose copy it is.
        self._invalidating: list[tuple[Machine, Machine]] = []
        self.oracle.judge.changing_roles = lambda: bool(self._changing)
        self._numbers = 0
        self._records = {machine.name: Durable(machine, cached=True) for machine in run.machines}

    def start(self) -> None:
        rates = [(name, rate, self._fault) for name, rate in self.scenario.fault_rates.items()]
        rates += [(name, rate, self._verb) for name, rate in self.scenario.verb_rates.items()]
        for name, rate, act in rates:
            if rate:
                self._next(name, rate, act)
        self.world.after(TICK_S, self._tick)

    def _next(self, name: str, rate: float, act: Callable[[str], None]) -> None:
        def happen() -> None:
            if not self.over:
                act(name)
                self._next(name, rate, act)

        self.world.after(self.rng.expovariate(rate), happen)

    def other(self, machine: "Machine") -> "Machine":
        return self.oracle.other(machine)

    # ── faults ───────────────────────────────────────────────────────────────────────────────────────────────

    def _fault(self, name: str) -> None:
        getattr(self, f"_fault_{name}")(self.rng.choice(self.machines))

    def _fault_kill(self, machine: "Machine") -> None:
        if machine.alive:
            machine.die(power=False, why="killed")

    def _fault_power(self, machine: "Machine") -> None:
        machine.die(power=True, why="power cut")

    def _fault_kill_both(self, machine: "Machine") -> None:
        for one in (machine, self.other(machine)):
            self._fault_kill(one)

    def _fault_power_both(self, machine: "Machine") -> None:
        for one in (machine, self.other(machine)):
            one.die(power=True, why="power cut of both")

    def _fault_power_other_soon(self, machine: "Machine") -> None:
        """One after the other: the classical double fault."""
        self._fault_power(machine)
        delay_s = self.rng.random() * self.scenario.restart_s * 2
        self.world.after(delay_s, lambda: None if self.over else self._fault_power(self.other(machine)))

    def _fuse(self, machine: "Machine", power: bool) -> None:
        if machine.incarnation is not None and not machine.incarnation.fuse:
            machine.incarnation.fuse = self.rng.randint(1, 30)
            machine.incarnation.fuse_power = power

    def _fault_fuse_kill(self, machine: "Machine") -> None:
        self._fuse(machine, False)

    def _fault_fuse_power(self, machine: "Machine") -> None:
        self._fuse(machine, True)

    def _fault_cut(self, machine: "Machine") -> None:
        other = self.other(machine)
        self.run.network.cut(machine.name, other.name)
        self.run.network.cut(other.name, machine.name)
        self.trace.fault("cut", "both ways")
        self._heal_later()

    def _fault_kill_cut(self, machine: "Machine") -> None:
        """What the dead process had sent is still on its way when it is back."""
        self._fault_cut(machine)
        self.world.after(self.rng.random() * 0.1, lambda: None if self.over else self._fault_kill(machine))

    def _fault_half_cut(self, machine: "Machine") -> None:
        self.run.network.cut(machine.name, self.other(machine).name)
        self.trace.fault("half-cut", f"nothing from {machine.name} arrives")
        self._heal_later()

    def _heal_later(self) -> None:
        self.world.after(self.rng.expovariate(1 / self.scenario.heal_s), self._heal)

    def _heal(self) -> None:
        if not self.run.network.healthy:
            self.trace.note("the network is whole again")
            self.run.network.heal()

    def _fault_reset(self, machine: "Machine") -> None:
        self.trace.fault("reset", "all connections")
        self.run.network.reset_all()

    def _fault_slow(self, machine: "Machine") -> None:
        disk = self.rng.choice((machine.data, machine.metadata))
        disk.faults.slowness = self.rng.choice((5.0, 20.0, 100.0))
        self.trace.fault("slow", f"{machine.name} {'data' if disk is machine.data else 'metadata'}")

        def well() -> None:
            disk.faults.slowness = 1.0

        self.world.after(self.rng.random() * 0.5, well)

    def _fault_stop(self, machine: "Machine") -> None:
        machine.stop()

    # ── verbs ────────────────────────────────────────────────────────────────────────────────────────────────

    def _verb(self, name: str) -> None:
        machine = self.rng.choice(self.machines)
        if machine.resource is not None:
            getattr(self, f"verb_{name}")(machine)

    def _do(
        self,
        machine: "Machine",
        words: str,
        work: "Callable[[Resource], Coroutine[Any, Any, Any]]",
        done: Callable[[Exception | None], None] | None = None,
        *,
        role: bool = False,
    ) -> None:
        self._numbers += 1
        number = self._numbers
        if role:
            self._changing[number] = machine

        def finished(error: Exception | None) -> None:
            self._changing.pop(number, None)
            if role and error is not None:
                self.oracle.judge.roles_unknown()
            self.trace.note(f"{machine.name} {words}: {'done' if error is None else str(error)[:100]}")
            if done is not None:
                done(error)

        self.trace.fault("verb", f"{machine.name} {words}")
        machine.run(work, finished)

    def node_died(self, machine: "Machine") -> None:
        """Its verbs are never answered."""
        if self.oracle.accepted_fork.pop(machine.name, False):
            side = self._record(machine)
            if side is not None and not side.incomplete:
                self.oracle.adopt(machine)  # it died as a Primary by force, if only on record
        for number in [number for number, one in self._changing.items() if one is machine]:
            del self._changing[number]
        for asked in [asked for asked in self._invalidating if asked[0] is machine]:
            self._invalidating.remove(asked)
            self.oracle.given_up[asked[1].name] = None  # or will be: the peer may carry it out all the same
        if not self.over:
            self.world.after(self.rng.expovariate(1 / self.scenario.restart_s), self._boot, machine)

    def _boot(self, machine: "Machine") -> None:
        if machine.alive:
            return
        if not machine.powered and self.rng.random() < self.scenario.rot:
            machine.rot()
        machine.boot()

    def _record(self, machine: "Machine") -> Side | None:
        """What this node would say of its copy if it were started now."""
        records = self._records[machine.name]
        records.refresh()
        return records.side()

    def eligible(self, machine: "Machine") -> bool:
        """Whether the records of both say that nothing acknowledged is missing on this one."""
        mine, theirs = self._record(machine), self._record(self.other(machine))
        if mine is None or theirs is None or mine.incomplete:
            return False
        if mine.generations.current == theirs.generations.current:
            if mine.promoted_alone and theirs.promoted_alone:
                return decide(mine, theirs).kind in (Kind.SOURCE, Kind.IN_SYNC)
            return mine.promoted_alone or not theirs.promoted_alone
        return decide(mine, theirs).kind is Kind.SOURCE

    def _through_peer(self, machine: "Machine") -> bool:
        """Whether this node has no good disk, and is connected to the other one, whose copy is the newest."""
        resource = machine.resource
        return resource is not None and resource.verbs._needs_peer() and self.eligible(self.other(machine))

    def verb_promote(self, machine: "Machine") -> None:
        resource, other = machine.resource, self.other(machine)
        if resource is None or resource.state.role is Role.PRIMARY:
            return
        allowed = not other.is_primary and not self._changing
        if allowed and ((resource.attached and self.eligible(machine)) or self._through_peer(machine)):
            dead = not other.alive
            self._do(machine, "promote", lambda node: node.verbs.promote(peer_is_dead=dead), role=True)
        elif self.scenario.split_brain and self.rng.random() < 0.4:
            self._promote_whatever(machine, force=self.rng.random() < 0.5)

    def _promote_whatever(self, machine: "Machine", *, force: bool) -> None:
        resource = machine.resource
        if resource is None or not resource.attached or resource.superblock.just_created:
            return
        if force and self._restarted(machine):
            return
        fork = self.oracle.accepted_fork
        if machine.name in fork:  # one at a time: what the operator accepts is the copy as this promotion finds it
            return
        fork[machine.name] = force and resource.superblock.inconsistent
        if force and resource.superblock.inconsistent:
            self.oracle.discarding[self.other(machine).name] = None
        self._do(
            machine,
            f"promote{' --force' if force else ''} whatever the other is",
            lambda node: node.verbs.promote(force=force, peer_is_dead=not force),
            lambda error: None if machine.is_primary else fork.pop(machine.name, None),
            role=True,
        )

    def verb_part(self, machine: "Machine") -> None:
        """Both serve on their own for a while; whoever is still Primary when they meet again is one."""
        if self.scenario.split_brain:
            self.verb_disconnect(machine)
            self.world.after(self.rng.random() * 0.1, self._serve_apart)
            self.world.after(self.rng.expovariate(1 / 0.3), self._meet, machine)

    def _serve_apart(self) -> None:
        for machine in self.machines:
            if not self.over and not machine.is_primary:
                self._promote_whatever(machine, force=False)

    def _meet(self, machine: "Machine") -> None:
        for one in self.machines:
            if self.rng.random() < 0.6:
                self.verb_demote(one)
        if machine.resource is not None:
            self.verb_connect(machine)

    def _initial_promote(self, machine: "Machine") -> None:
        if not self._changing:
            self.oracle.accepted_fork[machine.name] = False
            self._do(machine, "promote --force", lambda node: node.verbs.promote(force=True), role=True)

    def verb_demote(self, machine: "Machine") -> None:
        if machine.is_primary and (not self._changing or self.scenario.split_brain):
            self._do(machine, "demote --force", lambda node: node.verbs.demote(force=True), role=True)

    def verb_takeover(self, machine: "Machine") -> None:
        resource = machine.resource
        if resource is None or resource.state.role is Role.PRIMARY or self._changing:
            return
        established = resource.state.replication is Replication.ESTABLISHED or resource.serving_peer
        if (established and self.eligible(machine)) or self._through_peer(machine):
            self._do(machine, "takeover", lambda node: node.verbs.takeover(), role=True)

    def verb_connect(self, machine: "Machine", *, discard: bool = False) -> None:
        words = "connect --discard-my-data" if discard else "connect"
        self._do(machine, words, lambda node: node.verbs.connect(discard_my_data=discard))

    def verb_disconnect(self, machine: "Machine") -> None:
        self._do(machine, "disconnect", lambda node: node.verbs.disconnect())

    def verb_invalidate(self, machine: "Machine") -> None:
        self._invalidate(machine, "invalidate", machine, lambda node: node.verbs.invalidate())

    def verb_invalidate_remote(self, machine: "Machine") -> None:
        self._invalidate(machine, "invalidate-remote", self.other(machine), lambda node: node.verbs.invalidate_remote())

    def _invalidate(
        self, machine: "Machine", words: str, bad: "Machine", work: "Callable[[Resource], Coroutine[Any, Any, Any]]"
    ) -> None:
        given_up = self.oracle.given_up
        was_bad = bad.name in given_up
        given_up[bad.name] = None
        asked = (machine, bad)
        self._invalidating.append(asked)

        def done(error: Exception | None) -> None:
            if asked not in self._invalidating:
                return  # it ended with its node
            self._invalidating.remove(asked)
            if error is None:
                given_up[bad.name] = None  # anew: a resync may have been completed before
            elif not was_bad:
                given_up.pop(bad.name, None)

        self._do(machine, words, work, done)

    def verb_outdate(self, machine: "Machine") -> None:
        other = self.other(machine)
        if other.alive and other.resource is not None and other.resource.attached:
            self._do(machine, "outdate", lambda node: node.verbs.outdate())

    def verb_detach(self, machine: "Machine") -> None:
        self._do(machine, "detach", lambda node: node.verbs.detach())

    def verb_pause(self, machine: "Machine") -> None:
        self._do(machine, "pause-sync", lambda node: node.verbs.pause_sync(paused=True))
        self.world.after(self.rng.random() * 0.3, self._resume, machine)

    def _resume(self, machine: "Machine") -> None:
        if machine.resource is not None and machine.resource.paused:
            self._do(machine, "resume-sync", lambda node: node.verbs.pause_sync(paused=False))

    def verb_verify(self, machine: "Machine") -> None:
        if self.rng.random() < 0.1:
            self._do(machine, "verify --stop", lambda node: node.verbs.stop_verify())
            return
        repair = self.rng.random() < 0.3
        words = "verify --repair" if repair else "verify"
        self._do(machine, words, lambda node: node.verbs.verify(repair=repair))

    def verb_resize(self, machine: "Machine") -> None:
        self._do(machine, "resize", lambda node: node.verbs.resize())

    # ── what keeps the pair going ────────────────────────────────────────────────────────────────────────────

    def _tick(self) -> None:
        if self.over:
            return
        self.world.after(TICK_S, self._tick)
        self.oracle.check_verifications()
        if self.rng.random() < 0.5:
            self.care()

    def care(self) -> None:
        """What a good operator does: one thing at a time."""
        machines = [machine for machine in self.machines if machine.resource is not None]
        self.rng.shuffle(machines)
        for machine in machines:
            resource = machine.resource
            assert resource is not None
            if self.over and resource.paused:
                self._resume(machine)
            if not resource.attached and (self.over or self.rng.random() < 0.2) and not self._changing:
                told_to = "let the clients go" in resource.state.last_error or resource.peer_volume is None
                if resource.state.role is Role.PRIMARY and (told_to or self.rng.random() < 0.2):
                    # It has no disk to serve from, and it may be that nobody stands in: it hands over.
                    self._do(machine, "demote --force", lambda node: node.verbs.demote(force=True), role=True)
                else:
                    self._do(machine, "attach", lambda node: node.verbs.attach(), role=True)
                return
        if len(machines) == len(self.machines) and (self._mend(machines) or self._resync_dirty(machines)):
            return
        if not any(machine.is_primary for machine in self.machines) and not self._changing:
            self._find_primary(machines)

    def _mend(self, machines: "list[Machine]") -> bool:
        """Both run: end a StandAlone. True when something was done."""
        states = [machine.resource.state for machine in machines if machine.resource is not None]
        alone = [state.connection is Connection.STAND_ALONE for state in states]
        if not any(alone) or self._changing:
            return False
        if self.over and self._give_up_incomplete(machines):
            return True
        accepted = self.scenario.split_brain or len(self.oracle._lineages()) > 1
        split = len(self.oracle._lineages()) > 1 or sum(machine.is_primary for machine in machines) > 1
        reasons = " ".join(state.last_error for state in states)
        if "changes of their own" in reasons or "have both changed" in reasons:
            if not accepted:
                self.oracle.fail("Direction", f"split brain without an operator who accepted it: {reasons}")
            split = True
        if not split and not self.over and self.rng.random() < 0.7:
            return False
        if not split:
            for machine, is_alone in zip(machines, alone, strict=True):
                if is_alone:
                    self.verb_connect(machine)
            return True
        return self._resolve(machines)

    def _resync_dirty(self, machines: "list[Machine]") -> bool:
        """Blocks that became dirty while both were in sync (only one disk took a write) are copied by a new link."""
        resources = [machine.resource for machine in machines if machine.resource is not None]
        established = all(one.state.replication is Replication.ESTABLISHED and one.attached for one in resources)
        if not self.over or not established or not any(one.disk.bitmap.count for one in resources):
            return False
        if any(one.verify_progress is not None or one.serving_peer for one in resources):
            return False
        self.verb_disconnect(machines[0])
        return True

    def _give_up_incomplete(self, machines: "list[Machine]") -> bool:
        """The newer data have no complete copy left: the operator falls back to the older ones."""
        for machine in machines:
            other = self.other(machine)
            resource, better = machine.resource, other.resource
            if resource is None or better is None or not (resource.attached and better.attached):
                continue
            reason = f"{machine.name} has newer data than {other.name} but is Inconsistent"
            if reason not in resource.state.last_error + better.state.last_error:
                continue
            if machine.is_primary:
                self._do(machine, "demote --force", lambda node: node.verbs.demote(force=True), role=True)
            elif not other.is_primary:
                self._promote_by_force(other, "promote --force for want of newer complete data")
            else:
                self.oracle.discarding[machine.name] = None
                self.verb_connect(machine, discard=True)
                self.verb_connect(other)
            return True
        return False

    @staticmethod
    def _restarted(machine: "Machine") -> bool:
        """If its page cache holds what its disk has lost, nobody takes such a machine without a new start."""
        if machine.data.has_unwritten:
            machine.die(power=True, why="restarted after a failed flush")
            return True
        return False

    def _promote_by_force(self, machine: "Machine", words: str) -> None:
        if self._restarted(machine):
            return
        self.oracle.accepted_fork[machine.name] = self._incomplete(machine)
        self.oracle.discarding[self.other(machine).name] = None
        self._do(
            machine,
            words,
            lambda node: node.verbs.promote(force=True),
            lambda error: None if machine.is_primary else self.oracle.accepted_fork.pop(machine.name, None),
            role=True,
        )

    def _resolve(self, machines: "list[Machine]") -> bool:
        """A split brain: one side gives up its data."""
        loser, winner = machines
        if winner.resource is None or loser.resource is None:
            return False
        if winner.resource.disk_state is Disk.INCONSISTENT or not winner.resource.attached:
            loser, winner = winner, loser
        if loser.is_primary:
            self._do(loser, "demote --force", lambda node: node.verbs.demote(force=True), role=True)
            return True
        self.oracle.discarding[loser.name] = None
        if loser.resource is not None and loser.resource.state.connection is not Connection.CONNECTED:
            self.verb_connect(loser, discard=True)
        self.verb_connect(winner)
        return True

    def _find_primary(self, machines: "list[Machine]") -> None:
        """Nobody serves."""
        if not self.over and self.rng.random() < 0.5:
            return
        sides = [self._record(machine) for machine in self.machines]
        if all(side is not None and side.blank for side in sides):
            if len(machines) == len(self.machines):
                self._initial_promote(machines[0])
            return
        for machine in machines:
            if machine.resource is not None and machine.resource.attached and self.eligible(machine):
                self.verb_promote(machine)
                return
        if self.over and len(machines) == len(self.machines):
            self._last_resort(machines)

    def _last_resort(self, machines: "list[Machine]") -> None:
        """No complete copy is left (its disk failed, and the other one is older or half copied): accept one."""
        connected = all(m.resource is not None and m.resource.attached for m in machines)
        if not connected or self.rng.random() < 0.8:
            return
        # The one with a generation of its own is better than one that is half copied.
        machine = max(machines, key=lambda m: (not self._blank(m), not self._incomplete(m), self._newer(m), m.name))
        self._promote_by_force(machine, "promote --force for want of a complete copy")

    def _blank(self, machine: "Machine") -> bool:
        side = self._record(machine)
        return side is None or side.blank

    def _incomplete(self, machine: "Machine") -> bool:
        side = self._record(machine)
        return side is None or side.incomplete

    def _newer(self, machine: "Machine") -> bool:
        mine, theirs = self._record(machine), self._record(self.other(machine))
        if mine is None or theirs is None:
            return mine is not None
        return theirs.generations.current in (mine.generations.base, *mine.generations.history)
