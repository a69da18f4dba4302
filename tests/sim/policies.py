"""The policies after a split brain: what a seed draws, and whether a discard that happened was allowed by them.

Rule Policy: a copy that has acknowledged writes of its own is overwritten without the operator's word only if both
nodes have the same policies, it is Secondary, the other copy is complete, and the policy for that number of Primaries
says so. That is judged by what was seen from outside, not by the node's own rules:

roles           as the nodes showed them while they negotiated, and while they were last in touch
changes         of the loser: blocks with writes that it acknowledged while its superblock said that it is alone and
                that the other one had never applied, since the two last began a resync or were in sync. It has at
                least these dirty.
                Of the winner: what its durable activity log and bitmap cover. It has at most these dirty.

Who was Primary when the two parted may be unknown: when a node dies, fails or loses its link while that is being
recorded. Then either answer is right.
"""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from replica.split_brain import Policies
from replica.states import Connection, Replication

if TYPE_CHECKING:
    from tests.sim.node import Machine
    from tests.sim.oracle import Durable, Entry

IN_TOUCH = frozenset(
    (
        Replication.ESTABLISHED,
        Replication.SYNC_SOURCE,
        Replication.SYNC_TARGET,
        Replication.PAUSED_SYNC_S,
        Replication.PAUSED_SYNC_T,
    )
)


def draw_parting_rate(seed: int) -> float:
    """How often both nodes are told to serve without the other one, per second."""
    return random.Random(f"{seed}/parting").choice((0.0, 0.5, 1.5))


def draw_policies(seed: int) -> dict[str, Policies]:
    """What the configurations of the two nodes say: nearly always the same. A stream of its own, so that the draws of a
    seed that has no use for them stay as they are.
    """
    rng = random.Random(f"{seed}/policies")
    both = [_draw(rng), _draw(rng)]
    if rng.random() < 0.9:
        both[1] = both[0]
    return dict(zip(("node1", "node2"), both, strict=True))


def _draw(rng: random.Random) -> Policies:
    ages = ("discard-younger-primary", "discard-older-primary")
    changes = ("discard-zero-changes", "discard-least-changes")
    return Policies(
        no_primary=rng.choice(("disconnect", *changes, *ages)),
        one_primary=rng.choice(("disconnect", "discard-secondary", "consensus")),
    )


class PolicyJudge:
    """Watches one run for the oracle."""

    def __init__(self, durable: "dict[str, Durable]", policies: dict[str, Policies]) -> None:
        self._durable = durable
        self._policies = policies
        self._replication = dict.fromkeys(durable, "")
        #: What each machine has acknowledged alone, by blocks.
        self._changed: dict[str, dict[int, None]] = {name: {} for name in durable}
        #: Whether it was Primary when the two were last in touch; None: unknown.
        self._parted_as_primary: dict[str, bool | None] = dict.fromkeys(durable, False)
        # Since one of the two last began to negotiate:
        self._roles: dict[str, set[bool]] = {name: {False} for name in durable}
        self._cover = dict.fromkeys(durable, 0)
        self._complete = dict.fromkeys(durable, True)
        #: Copies that have become Inconsistent while negotiating, and why they should not have.
        self._given_up: dict[str, str] = {}
        #: The same of those that died while negotiating, if it had been recorded then.
        self._last_verdict: dict[str, str] = {}
        #: Whether a verb that changes a role is under way.
        self.changing_roles: Callable[[], bool] = lambda: False

    # ── what happens ─────────────────────────────────────────────────────────────────────────────────────────

    def observe(self, machine: "Machine") -> None:
        """A state of this node has changed."""
        resource, name = machine.resource, machine.name
        if resource is None:
            return
        state, before = resource.state, self._replication[name]
        self._replication[name] = state.replication
        if state.replication in IN_TOUCH:
            self._parted_as_primary[name] = machine.is_primary
            if before not in IN_TOUCH:
                # A source goes on alone until the target is ready; those blocks are resynced as well.
                self._changed[name].clear()
        if state.replication is Replication.NEGOTIATING and before != Replication.NEGOTIATING:
            self._begin()
        if state.replication is Replication.OFF and before != Replication.OFF:
            refused = state.connection is Connection.STAND_ALONE and state.last_error
            if before == Replication.NEGOTIATING and not refused:
                self._may_be_recorded(machine)
            if self.changing_roles():
                self.roles_unknown()
        self._roles[name].add(machine.is_primary)

    def _begin(self) -> None:
        self._last_verdict.clear()
        for name, durable in self._durable.items():
            durable.refresh()
            self._roles[name] = {durable.machine.is_primary}
            self._cover[name] = durable.cover
            self._complete[name] = durable.is_complete

    def _may_be_recorded(self, machine: "Machine") -> None:
        """Its role may or may not have become the one in which it parted."""
        if self._parted_as_primary[machine.name] != machine.is_primary:
            self._parted_as_primary[machine.name] = None

    def gone(self, machine: "Machine") -> None:
        """Its process has died."""
        if self._replication[machine.name] == Replication.NEGOTIATING:
            self._parted_as_primary[machine.name] = None
            (other,) = (durable.machine for name, durable in self._durable.items() if name != machine.name)
            self._last_verdict[machine.name] = self._why_not_now(machine, other)
        if self.changing_roles():
            self.roles_unknown()
        self._replication[machine.name] = ""

    def roles_unknown(self) -> None:
        """A change of roles was cut short, on one node or on both."""
        self._parted_as_primary = dict.fromkeys(self._durable, None)

    def inconsistent(self, loser: "Machine", winner: "Machine") -> None:
        """It is durably Inconsistent now. If that is the first record of a resync, the decision is made."""
        failed = loser.resource is not None and loser.resource.failed  # then it is the record of that
        if self._complete[loser.name] and not failed:
            if self._replication[loser.name] == Replication.NEGOTIATING:
                self._given_up[loser.name] = self._why_not_now(loser, winner)
            elif not self._replication[loser.name] and loser.name in self._last_verdict:
                # Its process had died over this record; a power cut since has made it durable.
                self._given_up[loser.name] = self._last_verdict[loser.name]

    def acknowledged(self, machine: "Machine", entries: "list[Entry]", *, alone: bool) -> None:
        """These writes of its own were answered; `alone`: the superblock says that the other one is out of sync."""
        if alone and self._replication[machine.name] not in IN_TOUCH:
            self._changed[machine.name].update(dict.fromkeys(entry.sector >> 3 for entry in entries))

    def has_changes(self, machine: "Machine") -> bool:
        """Whether it has acknowledged anything alone."""
        return bool(self._changed[machine.name])

    def together(self) -> None:
        """A resync has begun, or both are in sync: bits go from now on."""
        for changed in self._changed.values():
            changed.clear()
        self._given_up.clear()

    # ── the judgement ────────────────────────────────────────────────────────────────────────────────────────

    def why_not(self, loser: "Machine", winner: "Machine") -> str:
        """Why no policy allows that this copy is overwritten; empty when one does, or did before a crash."""
        if not self._complete[loser.name] and loser.name in self._given_up:
            return self._given_up[loser.name]
        return self._why_not_now(loser, winner)

    def _why_not_now(self, loser: "Machine", winner: "Machine") -> str:
        policies = self._policies[loser.name]
        if policies != self._policies[winner.name]:
            return "the policies differ"
        if loser.is_primary:
            return f"{loser.name} is Primary"
        if not self._complete[winner.name]:
            return f"{winner.name} is Inconsistent"
        reasons = [self._by_role(loser, winner, policies, primary) for primary in sorted(self._roles[winner.name])]
        return "" if "" in reasons else "; ".join(reasons)

    def _by_role(self, loser: "Machine", winner: "Machine", policies: Policies, primary: bool) -> str:
        if not primary:
            return self._by_facts(loser, winner, policies.no_primary)
        if policies.one_primary == "discard-secondary":
            return ""
        if policies.one_primary == "consensus":
            return self._by_facts(loser, winner, policies.no_primary)
        return f"one-primary is {policies.one_primary}"

    def _by_facts(self, loser: "Machine", winner: "Machine", policy: str) -> str:
        lost = len(self._changed[loser.name])
        if policy == "discard-zero-changes":
            return f"{loser.name} has {lost} blocks of its own" if lost else ""
        if policy == "discard-least-changes":
            # By now the winner's bitmap has the loser's bits as well.
            cover = self._cover[winner.name] | self._durable[winner.name].cover & ~self._cover[loser.name]
            kept = cover.bit_count()
            return (
                f"{loser.name} has {lost} blocks of its own, {winner.name} at most {kept}" if lost >= kept > 0 else ""
            )
        if policy in ("discard-younger-primary", "discard-older-primary"):
            older = loser if policy == "discard-older-primary" else winner
            younger = winner if older is loser else loser
            if self._parted_as_primary[older.name] is False:
                return f"{older.name} was not Primary when they parted"
            if self._parted_as_primary[younger.name] is True:
                return f"{younger.name} was Primary when they parted"
            return ""
        return f"no-primary is {policy}"
