"""The decision of the cluster manager: from all that is known, what to do, and the sentence that says why. Pure.

What it must keep, whatever is lost, cut or late, is written down with the claims (`replica.heartbeat.node_state`): a
node starts a group only as the owner of its newest claim, and only when the other node has shown that it holds
nothing of the group under that very claim, or when a `Consent` stands in for its word.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from replica.heartbeat.node_state import Claim, GroupState, NodeState, Phase, Readiness, Status


class Consent(StrEnum):
    """Whether a group may be taken although the other node does not say that it has let go."""

    NOT_ASKED = "not asked"
    PENDING = "pending"
    GRANTED = "granted"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Peer:
    """The other node as it is seen from here."""

    name: str
    #: It was heard within deadtime.
    alive: bool = False
    #: None: not once since this node listens.
    silent_s: float | None = None
    #: The last that it said of itself, knowing of this node's present session; also of a node that is dead by now.
    state: NodeState | None = None
    #: Heard without a gap for so long that it may be given its groups back.
    steady: bool = False
    #: It is known not to run since it was last heard.
    fenced: bool = False
    #: It has been started anew since an operator placed the groups.
    restarted: bool = False
    #: Something at its address sends heartbeats that are signed with another secret.
    wrong_secret: bool = False

    @property
    def left(self) -> bool:
        """It went with a goodbye: its silence is no death."""
        return self.state is not None and self.state.phase is Phase.LEFT

    @property
    def words(self) -> str:
        """How it is, as the begin of a sentence."""
        if self.alive and not self.left:
            return f"{self.name} is up"
        if self.left:
            return f"{self.name} has left the cluster"
        silent = "was not heard yet" if self.silent_s is None else f"is silent for {self.silent_s:.1f} s"
        return f"{self.name} {silent}{' and fenced' if self.fenced else ''}"


@dataclass(frozen=True, slots=True)
class Group:
    """A group as this node has it."""

    name: str
    preferred: str
    state: GroupState
    consent: Consent = Consent.NOT_ASKED
    #: Why the consent is as it is, as the end of a sentence.
    consent_words: str = ""
    #: It was refused so long ago that it is to be asked for again.
    ask_again: bool = False
    #: An operator asked this node to give it away.
    unwanted: bool = False
    #: What makes it not ready here has lasted, so that starting something again does not mend it.
    long_unready: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a decision depends on."""

    node: str
    peer: Peer
    phase: Phase
    groups: tuple[Group, ...]
    #: This node has listened for as long as it must before it decides without the other one.
    listened: bool = False
    #: It is up for so short a time that the preferred node of a group may still become ready for it.
    young: bool = False
    auto_failback: bool = True
    pings_alive: int = 0
    pings: int = 0

    @property
    def cut_off(self) -> bool:
        """Nothing outside answers: it is this node that is alone."""
        return self.pings > 0 and self.pings_alive == 0


class Action(StrEnum):
    """What is done with a group."""

    START = "start"
    #: As START, knowing that the other node is dead.
    START_ALONE = "start alone"
    STOP = "stop"
    #: Withhold at once what others can see of it, then stop.
    LET_GO = "let go"
    #: Withhold at once what others can see of it, and keep the rest.
    SUSPEND = "suspend"
    ASK_CONSENT = "ask for consent"
    FENCE_SELF = "fence this node"


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one group: the claim from now on, what to do, and why, as a part of a sentence."""

    words: str
    claim: Claim
    action: Action | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """On everything. `phase` is the one from now on."""

    sentence: str
    phase: Phase
    groups: Mapping[str, Verdict] = field(default_factory=dict)


def decide(snapshot: Snapshot) -> Decision:
    """What to do now. Called again whenever anything of the snapshot changes."""
    phase = _phase(snapshot)
    snapshot = replace(snapshot, phase=phase)
    verdicts = {group.name: _Case(snapshot, group).verdict() for group in snapshot.groups}
    words = [snapshot.peer.words]
    if snapshot.peer.wrong_secret and not snapshot.peer.alive:
        words[0] += (
            f" (but something at its address signs with another secret: compare the keys of {snapshot.node} and it)"
        )
    if phase is Phase.LISTENING:
        words.append(f"{snapshot.node} listens")
    if phase is Phase.LEAVING:
        words.append(f"{snapshot.node} is leaving")
    words += [f"{name} {verdict.words}" for name, verdict in verdicts.items()]
    if phase is Phase.LEAVING and all(_done_with(group, verdicts[group.name]) for group in snapshot.groups):
        phase = Phase.LEFT
    return Decision("; ".join(words) + ".", phase, verdicts)


def _done_with(group: Group, verdict: Verdict) -> bool:
    """Whether a node that leaves need not wait for it. One that is stuck stays where it is, and is not said to be
    released: the other node does not take it for that.
    """
    if group.state.status is Status.STUCK:
        return True
    return group.state.status.holds_nothing and verdict.action is None


def _phase(snapshot: Snapshot) -> Phase:
    if snapshot.phase is not Phase.LISTENING:
        return snapshot.phase
    peer = snapshot.peer
    return Phase.UP if snapshot.listened or (peer.alive and peer.state is not None) else Phase.LISTENING


_BUSY = {Status.STARTING: "is being started", Status.STARTED: "runs", Status.STOPPING: "is being stopped"}


class _Case:
    """One group in one snapshot."""

    def __init__(self, snapshot: Snapshot, group: Group) -> None:
        self.all = snapshot
        self.node = snapshot.node
        self.peer = snapshot.peer
        self.group = group
        self.mine = group.state
        self.theirs = None if snapshot.peer.state is None else snapshot.peer.state.groups.get(group.name)
        self.claim = group.state.claim
        if self.theirs is not None and self.claim.yields_to(self.theirs.claim, group.preferred):
            self.claim = self.theirs.claim
        #: Not when that is how the group came here just now: it is from before then that the other node was restarted.
        self.peer_restarted = snapshot.peer.restarted and self.claim == group.state.claim

    def verdict(self) -> Verdict:
        """What to do with it."""
        if self.mine.status is Status.STUCK:
            return self._do(f"cannot be stopped ({self.mine.problem}): fencing this node", Action.FENCE_SELF)
        if self.claim.owner == self.node:
            return self._as_owner()
        if not self.mine.status.holds_nothing:
            return self._lose()
        if not self.claim.owner:
            return self._assign()
        return self._as_other()

    # ── what is known ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _peer_up(self) -> bool:
        """The other node talks, and takes part."""
        return self.peer.alive and self.theirs is not None and self._peer_phase is Phase.UP

    @property
    def _peer_phase(self) -> Phase | None:
        return None if self.peer.state is None else self.peer.state.phase

    @property
    def _released(self) -> bool:
        """The other node has shown that it holds nothing under this very claim: it starts nothing without a new one."""
        return self.theirs is not None and self.theirs.status.holds_nothing and self.theirs.claim == self.claim

    @property
    def _peer_stuck(self) -> bool:
        """The other node talks, and cannot stop it."""
        return self.peer.alive and not self.peer.left and self.theirs is not None and self.theirs.status is Status.STUCK

    @property
    def _peer_could(self) -> bool:
        return self._peer_up and self.theirs is not None and self.theirs.ready.readiness is Readiness.YES

    @property
    def _peer_why(self) -> str:
        if not self._peer_up:
            return f"{self.peer.words}"
        assert self.theirs is not None
        return (
            f"{self.theirs.ready.why} on {self.peer.name}"
            if self.theirs.ready.why
            else f"{self.peer.name} is not ready"
        )

    def _do(self, words: str, action: Action | None = None, claim: Claim | None = None) -> Verdict:
        return Verdict(words, claim or self.claim, action)

    # ── another's, or nobody's ───────────────────────────────────────────────────────────────────────────────

    def _lose(self) -> Verdict:
        whose = f"belongs to {self.claim.owner} by now" if self.claim.owner else "belongs to nobody"
        if self.mine.status is Status.STOPPING:
            return self._do(f"{whose}, and is being stopped")
        return self._do(f"{whose}: letting go", Action.LET_GO)

    def _assign(self) -> Verdict:
        """Both have just been started, or this node alone."""
        if self.all.phase is not Phase.UP:
            return self._do("waits")
        if not self.peer.alive or self.peer.left:
            return self._take()
        if self.theirs is None and self.peer.state is not None:
            return self._do(f"waits until {self.peer.name} knows the group: make the settings the same")
        if not self._peer_up or self.theirs is None:
            return self._do(f"waits for {self.peer.name} to tell its state")
        if self.node != min(self.node, self.peer.name):
            return self._do(f"waits for {self.peer.name} to say who gets it")
        ready = {self.node: self.mine.ready.readiness, self.peer.name: self.theirs.ready.readiness}
        preferred = self.group.preferred
        other = self.node if preferred == self.peer.name else self.peer.name
        if ready[preferred] is Readiness.YES:
            return self._do(f"is for {preferred}", claim=self.claim.next(preferred))
        if ready[other] is Readiness.YES and not self.all.young:
            return self._do(f"is for {other}, for now", claim=self.claim.next(other))
        why = self.mine.ready.why if preferred == self.node else self.theirs.ready.why
        return self._do(f"waits: {why or 'not ready'} on {preferred}")

    def _as_other(self) -> Verdict:
        """It belongs to the other node, and nothing of it runs here."""
        if self.all.phase is not Phase.UP:
            return self._do(f"belongs to {self.claim.owner}")
        if self.peer.alive and not self.peer.left:
            if self.theirs is None:
                return self._do(f"belongs to {self.claim.owner}, which has not told its state yet")
            if self._peer_stuck:
                return self._take()
            return self._do(f"{self._on_peer()}{', asked for it' if self.mine.wanted else ''}")
        return self._take()

    def _on_peer(self) -> str:
        assert self.theirs is not None
        if self.theirs.status is Status.FAILED:
            return f"has failed on {self.peer.name} ({self.theirs.problem}), and here {self._why_not()}"
        if self.theirs.status.holds_nothing:
            return f"is for {self.peer.name} ({self.theirs.ready.why or 'not started yet'})"
        return f"{_BUSY.get(self.theirs.status, str(self.theirs.status))} on {self.peer.name}"

    def _why_not(self) -> str:
        return f"it cannot run: {self.mine.ready.why}" if self.mine.ready.why else "it is not asked for"

    def _take(self) -> Verdict:
        """The other node is dead, gone, or cannot stop it."""
        if self.mine.ready.readiness is Readiness.NO:
            return self._do(f"is not taken: {self.mine.ready.why}")
        if self.peer.left and (self.theirs is None or self.theirs.status.holds_nothing):
            return self._do("is taken", Action.START, self.claim.next(self.node))
        if self.all.cut_off and not self.peer.fenced:
            return self._do("is not taken: no ping node answers, so it may be this node that is cut off")
        match self.group.consent:
            case Consent.NOT_ASKED:
                return self._do("is to be taken", Action.ASK_CONSENT)
            case Consent.PENDING:
                return self._do(f"is to be taken: {self.group.consent_words}")
            case Consent.REFUSED:
                again = Action.ASK_CONSENT if self.group.ask_again else None
                return self._do(f"is not taken: {self.group.consent_words}", again)
        if self._peer_stuck and not self.peer.fenced:
            # The consent is good for a silent node; this one has said that it still holds something of it.
            return self._do(f"is not taken: {self.peer.name} cannot stop it, and is not fenced")
        start = Action.START_ALONE if self.peer.fenced else Action.START
        return self._do(f"is taken: {self.group.consent_words}", start, self.claim.next(self.node))

    # ── this node's ──────────────────────────────────────────────────────────────────────────────────────────

    def _as_owner(self) -> Verdict:
        if self.all.phase is Phase.LISTENING:
            if self.mine.status is Status.STARTED or self.mine.status is Status.STARTING:
                return self._do("is withheld until it is certain whose it is", Action.SUSPEND)
            return self._do("waits")
        reason = self._reason_to_give()
        if self.mine.status is Status.STOPPING:
            return self._do("is being stopped")
        if self.mine.status.holds_nothing:
            if self.all.phase is not Phase.UP:
                return self._hand_over("is given up") if self._peer_could else self._do("is stopped")
            if reason:
                return self._hand_over(reason)
            return self._start()
        if self.all.phase is not Phase.UP:
            return self._do("is given up", Action.STOP)
        if reason:
            return self._do(reason, Action.STOP)
        if self.mine.status is Status.SUSPENDED:
            return self._resume()
        if not self.peer.alive and self.mine.ready.readiness is Readiness.NO and not self.peer.fenced:
            return self._do(f"is withheld: {self.mine.ready.why}, and {self.peer.words}", Action.SUSPEND)
        if self.claim.by_operator and self.peer_restarted:
            return self._do("runs here", claim=self.claim.next(self.node))
        return self._do(f"{_BUSY[self.mine.status]} here")

    def _hand_over(self, words: str) -> Verdict:
        by_operator = self.group.unwanted or (self.theirs is not None and self.theirs.wanted)
        return self._do(words, claim=self.claim.next(self.peer.name, by_operator=by_operator))

    def _reason_to_give(self) -> str:
        """Why the other node, which is able to, should have it; "" for: it should not."""
        if not self._peer_up:
            return ""
        assert self.theirs is not None and self.peer.state is not None
        ready, theirs = self.mine.ready, self.theirs.ready.readiness
        to = f"is given to {self.peer.name}"
        if (self.group.unwanted or self.theirs.wanted) and theirs >= Readiness.RELUCTANT:
            return f"{to} on request"
        if theirs is not Readiness.YES:
            return ""
        if ready.readiness is not Readiness.YES and self.mine.status.holds_nothing:
            return f"{to}: {ready.why} here"
        if self.group.long_unready and self.peer.steady:
            return f"{to}: {ready.why} here"
        if self.peer.steady and self.all.pings_alive < self.peer.state.pings_alive:
            return f"{to}: it reaches {self.peer.state.pings_alive} ping nodes, {self.node} only {self.all.pings_alive}"
        if self._fails_back():
            return f"{to}, where it belongs"
        return ""

    def _fails_back(self) -> bool:
        assert self.peer.state is not None
        return (
            self.all.auto_failback
            and self.group.preferred == self.peer.name
            and self.peer.steady
            and (not self.claim.by_operator or self.peer_restarted)
            and self.peer.state.pings_alive >= self.all.pings_alive
        )

    def _resume(self) -> Verdict:
        if self.mine.ready.readiness is Readiness.NO:
            return self._do(f"is withheld: {self.mine.ready.why}")
        if self._peer_stuck:
            return self._take()
        if self.peer.alive and not self._released:
            if self.theirs is None and self.peer.state is not None:
                return self._do(f"is withheld until {self.peer.name} knows the group: make the settings the same")
            return self._do(f"is withheld until {self.peer.name} agrees")
        return self._do("runs here", Action.START)

    def _start(self) -> Verdict:
        ready = self.mine.ready
        if ready.readiness is Readiness.NO:
            return self._do(f"is not started: {ready.why}")
        if self._released:
            if ready.readiness is Readiness.IF_ALONE and self.peer.alive:
                return self._do(f"is not started: {ready.why}")
            return self._do("is started", Action.START_ALONE if self.peer.fenced else Action.START)
        if self.peer.alive and not self.peer.left and not self._peer_stuck:
            return self._do(f"waits until {self.peer.name} has let go")
        return self._take()
