"""Two machines, the network between them, and the rules."""

import random
from pathlib import Path

from replica.heartbeat.node_state import Phase
from replica.heartbeat.settings import (
    Auth,
    AuthMethod,
    GroupSettings,
    HeartbeatSettings,
    PathKind,
    PathSettings,
    ResourceSettings,
    Timing,
)
from tests.sim.failover.machine import LEASE_FUZZ_S, Machine, Thing
from tests.sim.loop import World

NODES = ("node1", "node2")
PATHS = 2
#: What a packet takes, at most.
DELAY_S = 0.01
#: From when two nodes can hear each other until the loser must have let go.
GRACE_S = 0.5
CHECK_S = 0.05
#: Several times as many as a seed takes: more of them are two nodes that keep each other busy.
MOST_STEPS = 100_000
#: How often the answer to a question for an address is missed: nothing may rest on it alone.
MISSED = 0.3


class Cluster:
    """`fencing`: it is configured. `say` collects what happened, for a failed run."""

    def __init__(self, seed: int, timing: Timing, *, fencing: bool, auto_failback: bool) -> None:
        self.rng = random.Random(seed)
        self.world = World(MOST_STEPS)
        self.timing = timing
        self.fencing = fencing
        self.fencing_fails = False
        self.auto_failback = auto_failback
        self.story: list[str] = []
        self.broken_rules: list[str] = []
        self.cut: set[tuple[str, int]] = set()  # (sender, path)
        self.no_carrier: set[str] = set()
        self.loss = dict.fromkeys(range(PATHS), 0.0)
        self._well_since_s = 0.0
        self._double_since_s: dict[str, float] = {}
        self.machines = {name: Machine(self, self._settings(name)) for name in NODES}
        self.world.after(CHECK_S, self._tick)

    def _settings(self, node: str) -> HeartbeatSettings:
        def resource(kind: str, group: str) -> ResourceSettings:
            return ResourceSettings(kind, f"{kind} of {group}", {}, "", monitor_interval_s=1.0)

        groups = (
            GroupSettings("web", "node1", (resource("exec", "web"), resource("ip", "web"))),
            GroupSettings("data", "node2", tuple(resource(kind, "data") for kind in ("replica", "mount", "ip"))),
        )
        (peer,) = set(NODES) - {node}
        paths = tuple(PathSettings(PathKind.UNICAST, f"eth{path}", peer) for path in range(PATHS))
        auth = Auth(AuthMethod.SHA256, b"secret" * 4)
        nowhere = Path("/nonexistent")
        return HeartbeatSettings(
            "sim", node, peer, auth, paths, groups, nowhere, nowhere, self.timing, auto_failback=self.auto_failback
        )

    def say(self, words: str) -> None:
        self.story.append(f"{self.world.now_s:9.3f} {words}")

    # ── the network ──────────────────────────────────────────────────────────────────────────────────────────

    def sent(self, sender: Machine, data: bytes) -> None:
        receiver = self.machines[sender.settings.peer]
        for path in range(PATHS):
            if self._lost(sender.name, path):
                continue
            self.world.after(self.rng.uniform(0.0001, DELAY_S), self._arrive, sender.name, receiver, data, path)

    def _arrive(self, sender: str, receiver: Machine, data: bytes, path: int) -> None:
        # (A paused machine's switch port drops what comes.)
        if not self._is_cut(sender, path) and receiver.powered and not receiver.paused:
            receiver.receive(data, path)

    def _is_cut(self, sender: str, path: int) -> bool:
        return (sender, path) in self.cut or bool(self.no_carrier) or self.machines[sender].paused

    def _lost(self, sender: str, path: int) -> bool:
        return self._is_cut(sender, path) or self.rng.random() < self.loss[path]

    def carrier(self, node: str) -> bool:
        return node not in self.no_carrier

    def answered_elsewhere(self, thing: Thing) -> bool:
        """Whether the other machine answers for an address; clients and the first path share a network."""
        other = self.machines[thing.machine.settings.peer]
        if other.paused or self._is_cut(other.name, 0) or self._is_cut(thing.machine.name, 0):
            return False
        if self.rng.random() < MISSED:
            return False
        return any(theirs.up for theirs in other.things[thing.group] if theirs.kind == "ip")

    # ── the rules ────────────────────────────────────────────────────────────────────────────────────────────

    def changed(self) -> None:
        """The network or a daemon is another: from now on a node may need time to know."""
        self._well_since_s = self.world.now_s

    @property
    def _all_can_know(self) -> bool:
        """Both daemons run and hear each other."""
        if any(machine.loop is None or machine.paused for machine in self.machines.values()):
            return False
        return all(any(not self._is_cut(node, path) and not self.loss[path] for path in range(PATHS)) for node in NODES)

    def check(self) -> None:
        """After every change of a resource."""
        for machine in self.machines.values():
            if not machine.knows_nothing_yet:
                continue
            for things in machine.things.values():
                if any(thing.up and thing.kind == "ip" and thing.shown_s > machine.resumed_s for thing in things):
                    self.break_rule(f"{machine.name} shows an address after a pause without having heard anybody")
        for group in ("web", "data"):
            first, second = (self.machines[name].things[group] for name in NODES)
            for one, other in zip(first, second, strict=True):
                if one.kind == "replica" and one.up and other.up:
                    self.break_rule(f"{group} is promoted on both nodes")
            holders = [things for things in (first, second) if any(t.up and t.kind == "ip" for t in things)]
            if len(holders) < len(NODES):
                self._double_since_s.pop(group, None)
            else:
                self._double_since_s.setdefault(group, self.world.now_s)

    def _tick(self) -> None:
        now = self.world.now_s
        if not self._all_can_know:
            self._well_since_s = now
        self._check_leases()
        for group, since_s in self._double_since_s.items():
            known_s = max(since_s, self._well_since_s)
            limit_s = self.timing.deadtime_s + LEASE_FUZZ_S if self._daemon_is_dead() else GRACE_S
            if not self._daemon_is_dead() and not self._all_can_know:
                continue
            if now - (since_s if self._daemon_is_dead() else known_s) > limit_s + CHECK_S:
                self.break_rule(f"two nodes have had the address of {group} for {now - since_s:.2f} s")
        self.world.after(CHECK_S, self._tick)

    def _check_leases(self) -> None:
        for machine in self.machines.values():
            if (machine.loop is not None and not machine.paused) or not machine.powered:
                continue
            if self.world.now_s <= machine.ran_s + self.timing.deadtime_s + LEASE_FUZZ_S + CHECK_S:
                continue
            for group, things in machine.things.items():
                if any(thing.up and thing.kind == "ip" for thing in things):
                    self.break_rule(f"{machine.name} has the address of {group} long after its daemon")

    def check_stop(self, thing: Thing) -> None:
        """Before an agent stops it."""
        machine = thing.machine
        things = machine.things[thing.group]
        if any(above.up for above in things[thing.index + 1 :]):
            self.break_rule(f"{machine.name} stops {thing.kind} of {thing.group} under what stands on it")
        if all(other.up for other in things) and self._fails_back(thing.group, machine):
            rested_s = self.world.now_s - self.machines[machine.settings.peer].started_s
            if rested_s < self.timing.failback_delay_s:
                self.break_rule(f"{thing.group} fails back to a daemon that was started {rested_s:.2f} s ago")

    def _fails_back(self, group: str, holder: Machine) -> bool:
        """Whether there is no other reason to stop a group that runs."""
        manager, peer = holder.manager, self.machines[holder.settings.peer]
        if manager is None or manager.phase is not Phase.UP or manager.claims[group].owner != holder.name:
            return False
        asked = group in manager._unwanted or (peer.manager is not None and group in peer.manager._wanted)
        (preferred,) = (g.preferred for g in holder.settings.groups if g.name == group)
        return preferred == peer.name and not asked

    def _daemon_is_dead(self) -> bool:
        """(Of a machine that holds an address.)"""
        return any(machine.powered and machine.loop is None for machine in self.machines.values())

    def break_rule(self, rule: str) -> None:
        self.say(f"RULE BROKEN: {rule}")
        self.broken_rules.append(rule)
        self.world.halted = True

    def well(self, restarted: str = "") -> str:
        """What is not as it should be when nothing is wrong any more; "" for all is well. `restarted`: a node that was
        started anew since an operator placed anything.
        """
        for group in self.machines["node1"].settings.groups:
            up = [name for name in NODES if any(t.up for t in self.machines[name].things[group.name])]
            if len(up) != 1:
                return f"{group.name} runs on {up or 'no node'}"
            (holder,) = up
            things = self.machines[holder].things[group.name]
            if not all(thing.up for thing in things):
                return f"{group.name} runs on {holder} in part"
            manager = self.machines[holder].manager
            if manager is None:
                return f"{group.name} runs on {holder}, which has no daemon"
            pinned = manager.claims[group.name].by_operator and group.preferred != restarted
            if self.auto_failback and not pinned and holder != group.preferred:
                return f"{group.name} has not failed back from {holder}"
        return ""
