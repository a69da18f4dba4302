"""One node of the cluster: everything that is known goes into a snapshot, the decision on it is carried out.

Whatever happens (a packet, a change of a resource, the clock) only wakes `Manager.think`. Before anything else is done
with it, the node looks whether it was asleep for so long that the other one may have taken over: then it withholds what
others could see of it, and holds only what it can confirm.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Protocol

from replica.errors import Refused
from replica.heartbeat import clock
from replica.heartbeat.consent import Consents, Judge
from replica.heartbeat.decide import Action, Decision, Group, Peer, Snapshot, decide
from replica.heartbeat.group import GroupRunner
from replica.heartbeat.held import Held, HeldGroup
from replica.heartbeat.membership import PeerView
from replica.heartbeat.node_state import Claim, GroupState, NodeState, Phase, Readiness, Status
from replica.heartbeat.settings import HeartbeatSettings

log = logging.getLogger("replica.heartbeat")

#: The part of deadtime that counts as one: by the time it was asleep for longer, the other node may have acted.
_PAUSE_PART: Final = 0.9
#: Between two heartbeats while the other node is silent: a cable that is plugged in again is to be noticed at once.
_SEARCH_S: Final = 0.2
#: So long a group that runs may be not ready before it is handed over for that: a server that is started again, a cable
#: that is put into another socket.
_UNREADY_S: Final = 2.0
#: How often the goodbye is said; it is not answered, and only spares the other node the doubt.
_GOODBYES: Final = 3
_GOODBYE_PAUSE_S: Final = 0.02


class Network(Protocol):
    """Heartbeats to and from the other node (`replica.heartbeat.links.Links`)."""

    def send(self, state: NodeState) -> None:
        """At once, on all paths."""

    def renew(self) -> None:
        """Forget what was heard, and what has arrived and was not read yet: from before a pause."""

    def peer(self) -> PeerView:
        """The other node, as it was heard."""


class Pings(Protocol):
    """Ping nodes and groups (`replica.heartbeat.ping.Pinger`)."""

    @property
    def alive(self) -> int: ...

    @property
    def total(self) -> int: ...

    @property
    def settled(self) -> bool: ...

    def restart(self) -> None: ...


class Manager:
    """`begin`, then `run` until it has left the cluster. `fence_self` does not return where it works."""

    def __init__(
        self,
        settings: HeartbeatSettings,
        runners: Callable[[Callable[[], None]], Mapping[str, GroupRunner]],
        judge: Judge,
        held: Held,
        fence_self: Callable[[str], None],
        digest: str = "",
    ) -> None:
        self.settings = settings
        self.runners = runners(self.wake)
        self.consents = Consents(judge, settings.peer, self.wake)
        self.decision = Decision("Starting.", Phase.LISTENING)
        self._waiters: list[asyncio.Future[None]] = []
        self._held = held
        self._fence_self = fence_self
        self._digest = digest
        self._network: Network
        self._pings: Pings
        self.phase = Phase.LISTENING
        self.claims = {name: Claim(held.terms.get(name, 0)) for name in self.runners}
        self._wanted: set[str] = set()
        self._unwanted: set[str] = set()
        self._fenced_self: set[str] = set()
        self.began_s = self._sent_s = clock.now()
        self._listen_until_s = self.began_s + settings.timing.initdead_s
        self._unready_since_s: dict[str, float] = {}
        self._peer_start = 0
        self._peer_session: bytes | None = None
        self._peer_restarted = False
        self._steady_since_s: float | None = None
        self._sent = NodeState()
        self._thought = False
        self._timer: asyncio.TimerHandle | None = None
        self._said = ""
        self.left = asyncio.Event()

    @property
    def peer_alive(self) -> bool:
        """Whether the other node counts as alive."""
        return self._steady_since_s is not None

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, network: Network, pings: Pings) -> None:
        """Find out what an earlier daemon of this node has left behind, and take part."""
        self._network, self._pings = network, pings
        now = clock.now()
        self._sent_s = now
        previous = self._held.load(now)
        for name, runner in self.runners.items():
            group = previous.groups.get(name)
            if group is not None:
                self.claims[name] = group.claim
            held = group is not None and group.running and group.claim.owner == self.settings.node
            runner.begin(held=held)
        for name, group in previous.groups.items():
            if group.running and name not in self.runners:
                log.warning(
                    "%s runs here, and is not configured any more: what it has started goes on unwatched.", name
                )
        if any(group.running for group in previous.groups.values()):
            # Nobody can have taken over in so short a time, whoever lives.
            quick = previous.peer_was_dead and previous.age_s < self.settings.timing.deadtime_s * _PAUSE_PART
            self._listen_until_s = now if quick else now + self.settings.timing.deadtime_s
        self.wake()

    async def run(self) -> None:
        """Send, and look at the clock, until this node has left."""
        loop = asyncio.get_running_loop()
        keepalive_s = self.settings.timing.keepalive_s
        search_s = min(keepalive_s, _SEARCH_S)
        due_s = loop.time()
        while not self.left.is_set():
            self.think()
            self._publish(always=True)
            due_s = max(due_s + (keepalive_s if self.peer_alive else search_s), loop.time())
            try:
                async with asyncio.timeout_at(due_s):
                    await self.left.wait()
            except TimeoutError:
                pass
        for _ in range(_GOODBYES):
            self._network.send(self._state())
            await asyncio.sleep(_GOODBYE_PAUSE_S)

    def leave(self) -> None:
        """Hand everything over; `left` is set when that is done."""
        self.phase = Phase.LEAVING
        self.wake()

    async def close(self) -> None:
        """The daemon ends; what has not been handed over goes on."""
        if self._timer is not None:
            self._timer.cancel()
        self._remember()
        for runner in self.runners.values():
            await runner.close()

    # ── what happens ─────────────────────────────────────────────────────────────────────────────────────────

    def wake(self) -> None:
        """Something has changed: think about it, once for all that happens at the same time."""
        if not self._thought:
            self._thought = True
            asyncio.get_running_loop().call_soon(self.think)

    def heard(self) -> None:
        """The other node was heard."""
        self._after_pause()
        peer = self._network.peer()
        if peer.session != self._peer_session or not (peer.hears_us or peer.left):
            # One of the two does not know the other's session yet: answering at once spares a keepalive.
            self._peer_session = peer.session
            self._publish(always=True)
        self.think()

    def _after_pause(self) -> None:
        """Before anything else: was this process (or the machine) stopped for too long?"""
        now = clock.now()
        asleep_s = now - self._sent_s
        if asleep_s < self.settings.timing.deadtime_s * _PAUSE_PART or self.phase is Phase.LEFT:
            return
        self._sent_s = now
        for runner in self.runners.values():
            if runner.status in (Status.STARTED, Status.STARTING):
                runner.suspend()
            else:
                runner.let_go()
        self._network.renew()
        self._pings.restart()
        self.consents.forget()
        log.warning("This node was paused for %.1f s: it holds nothing until it knows what has happened.", asleep_s)
        if self.phase in (Phase.UP, Phase.LISTENING):
            # Also when it listened already: what it has heard so far was forgotten just now.
            self.phase = Phase.LISTENING
            self._listen_until_s = max(self._listen_until_s, now + self.settings.timing.deadtime_s)

    def think(self) -> None:
        """Decide, and do it."""
        self._thought = False
        if self.left.is_set():
            return
        self._after_pause()
        now = clock.now()
        peer = self._look_at_peer(now)
        decision = decide(self._snapshot(now, peer))
        self.decision = decision
        self.phase = decision.phase
        sentence = _without_figures(decision.sentence)
        if sentence != self._said:
            self._said = sentence
            log.info("%s", decision.sentence)
        for name, verdict in decision.groups.items():
            self._carry_out(name, verdict.claim, verdict.action, peer)
        self._hold(now)
        self._publish(always=False)
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._set_timer(now, peer)
        if self.phase is Phase.LEFT:
            self.left.set()

    def _look_at_peer(self, now: float) -> PeerView:
        peer = self._network.peer()
        if not self._is_alive(now, peer.heard_s):
            if self._steady_since_s is not None:
                self._steady_since_s = None
                self._remember()
            return peer
        if peer.start_number != self._peer_start:
            self._peer_restarted = self._peer_start != 0
            self._peer_start = peer.start_number
            self._steady_since_s = None
        if self._steady_since_s is None:
            self._steady_since_s = now
            self.consents.forget()
            self._remember()
        return peer

    @property
    def _pings_alive(self) -> int:
        """(Those that have had no time yet to answer are believed to.)"""
        return self._pings.alive if self._pings.settled else self._pings.total

    def _is_alive(self, now: float, heard_s: float | None) -> bool:
        if heard_s is None or now - heard_s >= self.settings.timing.deadtime_s:
            return False
        fenced_s = self.consents.fenced_s
        return fenced_s is None or heard_s > fenced_s

    def _snapshot(self, now: float, view: PeerView) -> Snapshot:
        timing = self.settings.timing
        steady_since_s = self._steady_since_s
        heard_s = view.heard_s
        peer = Peer(
            self.settings.peer,
            alive=steady_since_s is not None,
            silent_s=None if heard_s is None else now - heard_s,
            state=view.state,
            steady=steady_since_s is not None and now - steady_since_s >= timing.failback_delay_s,
            fenced=self.consents.fenced_s is not None,
            restarted=self._peer_restarted,
            wrong_secret=view.wrong_secret_s is not None and now - view.wrong_secret_s < timing.deadtime_s,
        )
        return Snapshot(
            self.settings.node,
            peer,
            self.phase,
            tuple(self._group(runner, now) for runner in self.runners.values()),
            listened=now >= self._listen_until_s,
            young=now - self.began_s < timing.initdead_s,
            auto_failback=self.settings.auto_failback,
            pings_alive=self._pings_alive,
            pings=self._pings.total,
        )

    def _group(self, runner: GroupRunner, now: float) -> Group:
        name = runner.name
        consent, words = self.consents.of(name)
        state = self.group_state(runner)
        if state.ready.readiness is not Readiness.NO:
            self._unready_since_s.pop(name, None)
        unready_s = now - self._unready_since_s.setdefault(name, now) if state.ready.readiness is Readiness.NO else 0.0
        return Group(
            name,
            runner.settings.preferred,
            state,
            consent,
            words,
            ask_again=self.consents.due(name),
            unwanted=name in self._unwanted,
            long_unready=unready_s >= _UNREADY_S,
        )

    def group_state(self, runner: GroupRunner) -> GroupState:
        """What this node says of a group."""
        name = runner.name
        return GroupState(
            self.claims[name],
            runner.status,
            runner.ready(),
            name in self._wanted,
            runner.resource,
            runner.problem,
        )

    # ── what is done ─────────────────────────────────────────────────────────────────────────────────────────

    def _carry_out(self, name: str, claim: Claim, action: Action | None, peer: PeerView) -> None:
        runner = self.runners[name]
        if claim != self.claims[name]:
            log.info("%s: is %s's now (term %d).", name, claim.owner or "nobody", claim.term)
            self.claims[name] = claim
            self._unwanted.discard(name)
            self._wanted.discard(name)
            if claim.by_operator:
                self._peer_restarted = False
            # Before anything is done under it: others are to know whose it is by now.
            self._publish(always=True)
            self._remember()
        match action:
            case Action.START | Action.START_ALONE:
                runner.start(peer_is_dead=action is Action.START_ALONE)
            case Action.STOP:
                runner.stop()
            case Action.LET_GO:
                runner.stop(let_go=True)
            case Action.SUSPEND:
                runner.suspend()
            case Action.ASK_CONSENT:
                self.consents.ask(runner.settings)
            case Action.FENCE_SELF if name not in self._fenced_self:
                # Once: where it cannot be done, doing it again and again would only hold up the heartbeats.
                self._fenced_self.add(name)
                self._publish(always=True)
                self._fence_self(runner.problem)

    def _hold(self, now: float) -> None:
        if self.phase is Phase.LISTENING:
            return
        for name, runner in self.runners.items():
            if self.claims[name].owner == self.settings.node:
                runner.hold(now + self.settings.timing.deadtime_s)

    def _state(self) -> NodeState:
        groups = {name: self.group_state(runner) for name, runner in self.runners.items()}
        return NodeState(self.phase, groups, self._pings_alive, self._pings.total, self._digest)

    def _publish(self, *, always: bool) -> None:
        state = self._state()
        if not always and state == self._sent:
            return
        if state.groups != self._sent.groups:
            self._remember(state)
        self._sent = state
        self._sent_s = clock.now()
        self._network.send(state)
        self._held.stamp(self._sent_s)

    def _remember(self, state: NodeState | None = None) -> None:
        groups = {
            name: HeldGroup(group.claim, group.status in (Status.STARTING, Status.STARTED, Status.SUSPENDED))
            for name, group in (state or self._state()).groups.items()
        }
        self._held.save(groups, peer_is_dead=self._steady_since_s is None)

    def _set_timer(self, now: float, peer: PeerView) -> None:
        """For what time alone will change, and a keepalive is too coarse for."""
        timing = self.settings.timing
        moments = [self._listen_until_s, *(since_s + _UNREADY_S for since_s in self._unready_since_s.values())]
        if self._steady_since_s is not None:
            moments.append(self._steady_since_s + timing.failback_delay_s)
            if peer.heard_s is not None:
                moments.append(peer.heard_s + timing.deadtime_s)
        moments = [moment for moment in moments if moment > now]
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if moments:
            self._timer = asyncio.get_running_loop().call_later(min(moments) - now + 0.001, self.think)

    # ── what an operator asks ────────────────────────────────────────────────────────────────────────────────

    async def standby(self, which: str, tell: Callable[[str], Awaitable[None]]) -> None:
        """Give groups to the other node: "all" that are here, "local" (preferred here) or "foreign" ("failback")."""
        here = [r for name, r in self.runners.items() if self.claims[name].owner == self.settings.node]
        node = self.settings.node
        groups = [r.name for r in here if which == "all" or (r.settings.preferred == node) == (which == "local")]
        for name in groups:
            self._refuse_unless_peer_ready(name)
        self._unwanted.update(groups)
        await self._moved(groups, self.settings.peer, self._unwanted, tell)

    async def takeover(self, tell: Callable[[str], Awaitable[None]]) -> None:
        """Get all groups of the other node."""
        peer = self._network.peer()
        if self._steady_since_s is None or peer.state is None:
            raise Refused(f"{self.settings.peer} does not answer: what it holds is taken over without being asked for.")
        groups = [name for name, claim in self.claims.items() if claim.owner != self.settings.node]
        for name in groups:
            ready = self.runners[name].ready()
            if ready.readiness is not Readiness.YES:
                raise Refused(f"{name} cannot run on {self.settings.node}: {ready.why}.")
        self._wanted.update(groups)
        await self._moved(groups, self.settings.node, self._wanted, tell)

    def _refuse_unless_peer_ready(self, name: str) -> None:
        peer = self._network.peer()
        state = None if peer.state is None else peer.state.groups.get(name)
        if self._steady_since_s is None or peer.state is None or peer.state.phase is not Phase.UP or state is None:
            raise Refused(f"{self.settings.peer} is not there to take {name}.")
        if state.ready.readiness is not Readiness.YES:
            raise Refused(f"{self.settings.peer} cannot take {name}: {state.ready.why or 'it is not ready'}.")

    async def _moved(self, groups: list[str], to: str, asked: set[str], tell: Callable[[str], Awaitable[None]]) -> None:
        """Return when they run there. Refused, when that has come to nothing."""
        self.wake()
        released: set[str] = set()
        try:
            async with asyncio.timeout(sum(map(self._patience_s, groups))):
                for name in groups:
                    while (status := self._status_at(name, to)) is not Status.STARTED:
                        if self.claims[name].owner == to and name not in released:
                            released.add(name)
                            await tell(f"{name}: released")
                        elif self.claims[name].owner == to and status is Status.FAILED:
                            raise Refused(f"{name} has failed on {to}: {self.decision.groups[name].words}.")
                        elif self.claims[name].owner != to and name in released:
                            raise Refused(f"{name} has come back from {to}: {self.decision.groups[name].words}.")
                        await self.next_change()
                    await tell(f"{name}: acquired by {to}")
        except TimeoutError:
            raise Refused(f"not everything runs on {to} yet: {self.decision.sentence}") from None
        finally:
            asked.difference_update(groups)

    def _patience_s(self, name: str) -> float:
        resources = self.runners[name].settings.resources
        return 10.0 + sum(resource.start_timeout_s + resource.stop_timeout_s for resource in resources)

    def _status_at(self, name: str, node: str) -> Status | None:
        if node == self.settings.node:
            return self.runners[name].status
        state = self._network.peer().state
        group = None if state is None else state.groups.get(name)
        return None if group is None else group.status

    async def next_change(self) -> None:
        """Return after the next decision."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def clear_failures(self) -> None:
        """An operator has mended what failed."""
        self._fenced_self.clear()
        for runner in self.runners.values():
            runner.forget_failures()
        self.wake()

    def vouch_dead(self) -> None:
        """An operator says that the other node is off."""
        if self._steady_since_s is not None:
            raise Refused(f"{self.settings.peer} was heard a moment ago: it is not off.")
        self.consents.vouch(f"an operator says that {self.settings.peer} is off")

    def settings_differ(self) -> bool:
        """Whether the other node has other groups or times."""
        state = self._network.peer().state
        return state is not None and bool(self._digest) and state.settings_digest not in ("", self._digest)


def _without_figures(sentence: str) -> str:
    """What tells whether it is another sentence: the seconds in it do not."""
    return "".join(letter for letter in sentence if not letter.isdigit())
