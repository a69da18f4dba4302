"""Planted bugs of the cluster manager: the simulator of failovers is believed only as far as it finds these."""

from dataclasses import dataclass
from typing import Final

from tests.sim.canaries import Canary

_DECIDE: Final = "replica.heartbeat.decide"
_MANAGER: Final = "replica.heartbeat.manager:Manager"

#: Each planted bug has to be found within so many seeds from its `start` on.
MOST_SEEDS: Final = 40


@dataclass(frozen=True)
class FailoverCanary(Canary):
    """`start`: a seed that is known to find it. When the simulator or the manager has changed, and the seed does
    something else, the next ones are tried.
    """

    start: int = 1


CANARIES: Final = (
    FailoverCanary(
        "no-release",
        "a group is given away before it is stopped, and started before the other node has let go",
        f"{_DECIDE}:_Case._start",
        "if self._released:",
        "if True:",
        more=(
            (
                f"{_DECIDE}:_Case._as_owner",
                'return self._do("is being stopped")',
                'return self._hand_over("is being stopped") if self._peer_could else self._do("is being stopped")',
            ),
        ),
        start=2,
    ),
    FailoverCanary(
        "no-consent",
        "a silent node's group is taken without making sure that it is dead",
        f"{_DECIDE}:_Case._take",
        "case Consent.NOT_ASKED:",
        "case Consent.NOT_ASKED if False:",
        more=((f"{_DECIDE}:_Case._take", "case Consent.PENDING:", "case Consent.PENDING if False:"),),
        start=3,
    ),
    FailoverCanary(
        "same-term",
        "who takes a group does not replace the claim by a newer one",
        f"{_DECIDE}:_Case._take",
        'return self._do(f"is taken: {self.group.consent_words}", start, self.claim.next(self.node))',
        'return self._do(f"is taken: {self.group.consent_words}", start, self.claim._replace(owner=self.node))',
        start=6,
    ),
    FailoverCanary(
        "keeps",
        "a node that sees a newer claim of the other one goes on",
        f"{_DECIDE}:_Case._lose",
        'return self._do(f"{whose}: letting go", Action.LET_GO)',
        'return self._do(f"{whose}: letting go")',
        start=32,
    ),
    FailoverCanary(
        "no-pause",
        "a node that was paused goes on as if nothing had happened",
        f"{_MANAGER}._after_pause",
        "runner.suspend()",
        "pass",
        more=((f"{_MANAGER}._after_pause", "self.phase = Phase.LISTENING", "pass"),),
        start=15,
    ),
    FailoverCanary(
        "stale-consent",
        "what was granted while a node was silent still holds when it is back",
        f"{_MANAGER}._look_at_peer",
        "self.consents.forget()",
        "pass",
        start=31,
    ),
    FailoverCanary(
        "holds-at-start",
        "a daemon that starts anew goes on with what it held without hearing the other node",
        f"{_MANAGER}.begin",
        "quick = previous.peer_was_dead and",
        "quick = True or",
        start=11,
    ),
    FailoverCanary(
        "leftovers",
        "a daemon that starts says that it holds nothing without having looked",
        "replica.heartbeat.group:GroupRunner._stop_what_runs",
        "if running:",
        "if False:",
        start=10,
    ),
    FailoverCanary(
        "wrong-order",
        "a group is stopped from its first resource on",
        "replica.heartbeat.group:GroupRunner._stop_down_to",
        "for resource in reversed(self.resources[first:]):",
        "for resource in self.resources[first:]:",
    ),
    FailoverCanary(
        "stuck-is-stopped",
        "a stop that fails is taken for one that has succeeded",
        "replica.heartbeat.group:GroupRunner._stop_down_to",
        "self._become(Status.STUCK)",
        "self._become(Status.STOPPED)",
        start=12,
    ),
    FailoverCanary(
        "two-workers",
        "a group is worked on again before what was cancelled has ended",
        "replica.heartbeat.group:GroupRunner._stop",
        "await self._previous_ended()",
        "pass",
        more=(("replica.heartbeat.group:GroupRunner._run", "await self._previous_ended()", "pass"),),
        start=12,
    ),
    FailoverCanary(
        "no-lease",
        "an address is held without a limit in the kernel",
        f"{_MANAGER}._hold",
        "now + self.settings.timing.deadtime_s",
        "now + 3600.0",
    ),
    FailoverCanary(
        "eager-failback",
        "a group fails back to a node that has only just been heard",
        f"{_DECIDE}:_Case._fails_back",
        "and self.peer.steady",
        "and self.peer.alive",
        start=2,
    ),
    FailoverCanary(
        "no-failback",
        "a group does not fail back",
        f"{_DECIDE}:_Case._fails_back",
        "self.all.auto_failback",
        "False",
        start=2,
    ),
    FailoverCanary(
        "pinned-for-ever",
        "what an operator placed stays there though the preferred node was started anew",
        f"{_MANAGER}._look_at_peer",
        "self._peer_restarted = self._peer_start != 0",
        "pass",
        start=2,
    ),
)
