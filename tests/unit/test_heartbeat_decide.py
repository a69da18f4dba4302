"""The decision of the cluster manager, case by case: what is done, under which claim, and the sentence for it."""

from dataclasses import dataclass, replace

import pytest

from replica.heartbeat.decide import Action, Consent, Group, Peer, Snapshot, Verdict, decide
from replica.heartbeat.node_state import Claim, GroupState, NodeState, Phase, Readiness, Ready, Status

MINE = Claim(4, "node1")
THEIRS = Claim(4, "node2")
NO_CARRIER = Ready(Readiness.NO, "eth0 has no carrier")
NOT_IN_TOUCH = Ready(Readiness.IF_ALONE, "its copy of r0 is not in touch with the other one")
FAILED_HERE = Ready(Readiness.RELUCTANT, "apache has failed 3 times")


def state(claim: Claim, status: Status = Status.STOPPED, ready: Ready = Ready(), **more: object) -> GroupState:  # noqa: B008
    return GroupState(claim, status, ready, **more)  # type: ignore[arg-type]


def alive(group: GroupState | None, phase: Phase = Phase.UP, **more: object) -> Peer:
    groups = {} if group is None else {"web": group}
    return Peer("node2", alive=True, silent_s=0.4, state=NodeState(phase, groups), steady=True, **more)  # type: ignore[arg-type]


def dead(group: GroupState | None, **more: object) -> Peer:
    return replace(alive(group), alive=False, silent_s=5.2, steady=False, **more)


def verdict(mine: GroupState, peer: Peer, phase: Phase = Phase.UP, preferred: str = "node1", **more: object) -> Verdict:
    """The verdict of node1 on its group web. Keywords of `Group` and of `Snapshot`."""
    of_group = {
        name: more.pop(name) for name in ("consent", "consent_words", "unwanted", "long_unready") if name in more
    }
    group = Group("web", preferred, mine, **of_group)  # type: ignore[arg-type]
    return decide(Snapshot("node1", peer, phase, (group,), **more)).groups["web"]  # type: ignore[arg-type]


@dataclass
class Case:
    """`claim` None: as it was."""

    id: str
    got: Verdict
    action: Action | None
    words: str
    claim: Claim


STOPPED, STARTED, STARTING = Status.STOPPED, Status.STARTED, Status.STARTING
GRANTED = {"consent": Consent.GRANTED, "consent_words": "node2 was switched off"}

CASES = (
    # both up
    Case("it runs here", verdict(state(MINE, STARTED), alive(state(MINE))), None, "runs here", MINE),
    Case("it runs there", verdict(state(THEIRS), alive(state(THEIRS, STARTED))), None, "runs on node2", THEIRS),
    Case("released to this node", verdict(state(MINE), alive(state(MINE))), Action.START, "is started", MINE),
    Case(
        "not released yet",
        verdict(state(MINE), alive(state(THEIRS, Status.STOPPING))),
        None,
        "waits until node2 has let go",
        MINE,
    ),
    Case(
        "stopped under an older claim",
        verdict(state(MINE), alive(state(Claim(3, "node2")))),
        None,
        "waits until node2 has let go",
        MINE,
    ),
    Case(
        "given to this node",
        verdict(state(MINE), alive(state(Claim(5, "node1")))),
        Action.START,
        "is started",
        Claim(5, "node1"),
    ),
    Case(
        "a newer claim of the other node",
        verdict(state(MINE, STARTED), alive(state(Claim(5, "node2"), STARTING))),
        Action.LET_GO,
        "belongs to node2 by now: letting go",
        Claim(5, "node2"),
    ),
    Case(
        "a tie is the preferred node's",
        verdict(state(MINE, STARTED), alive(state(THEIRS, STARTED))),
        None,
        "runs here",
        MINE,
    ),
    Case(
        "a tie is lost by the other one",
        verdict(state(MINE, STARTED), alive(state(THEIRS, STARTED)), preferred="node2"),
        Action.LET_GO,
        "belongs to node2 by now: letting go",
        THEIRS,
    ),
    Case(
        "the other one remembers a higher term, and holds nothing",
        verdict(state(MINE, STARTED), alive(state(Claim(7)))),
        None,
        "runs here",
        MINE,
    ),
    # nobody's yet
    Case(
        "the first node gives it to the preferred one",
        verdict(state(Claim(7)), alive(state(Claim(7)))),
        None,
        "is for node1",
        Claim(8, "node1"),
    ),
    Case(
        "the preferred one is not ready, and young",
        verdict(state(Claim(), ready=NO_CARRIER), alive(state(Claim())), young=True),
        None,
        "waits: eth0 has no carrier on node1",
        Claim(),
    ),
    Case(
        "the preferred one is not ready, and has had its time",
        verdict(state(Claim(), ready=NO_CARRIER), alive(state(Claim()))),
        None,
        "is for node2, for now",
        Claim(1, "node2"),
    ),
    Case(
        "the other one is heard but does not hear",
        verdict(state(Claim()), replace(alive(None), state=None), listened=True),
        None,
        "waits for node2 to tell its state",
        Claim(),
    ),
    Case(
        "alone from the start",
        verdict(state(Claim()), Peer("node2"), Phase.LISTENING, listened=True),
        Action.ASK_CONSENT,
        "is to be taken",
        Claim(),
    ),
    Case("alone, and listening", verdict(state(Claim()), Peer("node2"), Phase.LISTENING), None, "waits", Claim()),
    # the other one is silent
    Case(
        "silent: asking",
        verdict(state(THEIRS), dead(state(THEIRS, STARTED))),
        Action.ASK_CONSENT,
        "is to be taken",
        THEIRS,
    ),
    Case(
        "silent: refused",
        verdict(
            state(THEIRS), dead(state(THEIRS, STARTED)), consent=Consent.REFUSED, consent_words="fencing node2 failed"
        ),
        None,
        "is not taken: fencing node2 failed",
        THEIRS,
    ),
    Case(
        "silent: granted by fencing",
        verdict(state(THEIRS), dead(state(THEIRS, STARTED), fenced=True), **GRANTED),
        Action.START_ALONE,
        "is taken: node2 was switched off",
        Claim(5, "node1"),
    ),
    Case(
        "silent: granted without fencing",
        verdict(state(THEIRS), dead(state(THEIRS, STARTED)), **GRANTED),
        Action.START,
        "is taken: node2 was switched off",
        Claim(5, "node1"),
    ),
    Case(
        "silent, and this node cannot",
        verdict(state(THEIRS, ready=NO_CARRIER), dead(state(THEIRS, STARTED)), **GRANTED),
        None,
        "is not taken: eth0 has no carrier",
        THEIRS,
    ),
    Case(
        "silent, and so is everything",
        verdict(state(THEIRS), dead(state(THEIRS, STARTED)), pings=2, pings_alive=0, **GRANTED),
        None,
        "is not taken: no ping node answers, so it may be this node that is cut off",
        THEIRS,
    ),
    Case(
        "it had released it before it died",
        verdict(state(MINE, ready=NOT_IN_TOUCH), dead(state(MINE))),
        Action.START,
        "is started",
        MINE,
    ),
    Case(
        "it has left in good order",
        verdict(state(THEIRS, ready=NOT_IN_TOUCH), alive(state(THEIRS), Phase.LEFT)),
        Action.START,
        "is taken",
        Claim(5, "node1"),
    ),
    Case(
        "it cannot stop it",
        verdict(state(THEIRS), alive(state(THEIRS, Status.STUCK))),
        Action.ASK_CONSENT,
        "is to be taken",
        THEIRS,
    ),
    Case(
        "cut off while it runs here",
        verdict(state(MINE, STARTED, NO_CARRIER), dead(state(MINE))),
        Action.SUSPEND,
        "is withheld: eth0 has no carrier, and node2 is silent for 5.2 s",
        MINE,
    ),
    Case("alone, and it runs here", verdict(state(MINE, STARTED), dead(state(MINE))), None, "runs here", MINE),
    # after a pause
    Case(
        "just woken",
        verdict(state(MINE, STARTED), dead(None), Phase.LISTENING),
        Action.SUSPEND,
        "is withheld until it is certain whose it is",
        MINE,
    ),
    Case(
        "woken, and the other one agrees",
        verdict(state(MINE, Status.SUSPENDED), alive(state(MINE)), Phase.LISTENING),
        Action.START,
        "runs here",
        MINE,
    ),
    Case(
        "woken, and the other one has taken it",
        verdict(state(MINE, Status.SUSPENDED), alive(state(Claim(5, "node2"), STARTED)), Phase.LISTENING),
        Action.LET_GO,
        "belongs to node2 by now: letting go",
        Claim(5, "node2"),
    ),
    Case(
        "woken, and nobody is there",
        verdict(state(MINE, Status.SUSPENDED), dead(None), Phase.LISTENING, listened=True),
        Action.START,
        "runs here",
        MINE,
    ),
    # it moves
    Case(
        "asked for by the other one's operator",
        verdict(state(MINE, STARTED), alive(state(MINE, wanted=True))),
        Action.STOP,
        "is given to node2 on request",
        MINE,
    ),
    Case(
        "given away on request",
        verdict(state(MINE), alive(state(MINE)), unwanted=True),
        None,
        "is given to node2 on request",
        Claim(5, "node2", True),
    ),
    Case(
        "not given to one that cannot",
        verdict(state(MINE, STARTED), alive(state(MINE, ready=NO_CARRIER)), unwanted=True),
        None,
        "runs here",
        MINE,
    ),
    Case(
        "failback",
        verdict(state(MINE, STARTED), alive(state(MINE)), preferred="node2"),
        Action.STOP,
        "is given to node2, where it belongs",
        MINE,
    ),
    Case(
        "failback is off",
        verdict(state(MINE, STARTED), alive(state(MINE)), preferred="node2", auto_failback=False),
        None,
        "runs here",
        MINE,
    ),
    Case(
        "failback has to wait",
        verdict(state(MINE, STARTED), replace(alive(state(MINE)), steady=False), preferred="node2"),
        None,
        "runs here",
        MINE,
    ),
    Case(
        "failback has to wait for the copy",
        verdict(state(MINE, STARTED), alive(state(MINE, ready=NOT_IN_TOUCH)), preferred="node2"),
        None,
        "runs here",
        MINE,
    ),
    Case(
        "no failback of what an operator has placed",
        verdict(state(Claim(4, "node1", True), STARTED), alive(state(Claim(4, "node1", True))), preferred="node2"),
        None,
        "runs here",
        Claim(4, "node1", True),
    ),
    Case(
        "failback of what an operator has placed, after a restart of the other one",
        verdict(
            state(Claim(4, "node1", True), STARTED),
            alive(state(Claim(4, "node1", True)), restarted=True),
            preferred="node2",
        ),
        Action.STOP,
        "is given to node2, where it belongs",
        Claim(4, "node1", True),
    ),
    Case(
        "no failback of what an operator places just now, after a restart of the other one",
        verdict(state(MINE), alive(state(Claim(5, "node1", True)), restarted=True), preferred="node2"),
        Action.START,
        "is started",
        Claim(5, "node1", True),
    ),
    Case(
        "failed here",
        verdict(state(MINE, Status.FAILED, FAILED_HERE), alive(state(MINE))),
        None,
        "is given to node2: apache has failed 3 times here",
        Claim(5, "node2"),
    ),
    Case(
        "failed on both",
        verdict(state(MINE, Status.FAILED, FAILED_HERE), alive(state(MINE, ready=FAILED_HERE))),
        Action.START,
        "is started",
        MINE,
    ),
    Case(
        "the other one reaches more",
        verdict(
            state(MINE, STARTED),
            replace(alive(None), state=NodeState(Phase.UP, {"web": state(MINE)}, 2, 2)),
            pings=2,
            pings_alive=1,
        ),
        Action.STOP,
        "is given to node2: it reaches 2 ping nodes, node1 only 1",
        MINE,
    ),
    Case(
        "not ready for a moment",
        verdict(state(MINE, STARTED, NO_CARRIER), alive(state(MINE))),
        None,
        "runs here",
        MINE,
    ),
    Case(
        "not ready for long",
        verdict(state(MINE, STARTED, NO_CARRIER), alive(state(MINE)), long_unready=True),
        Action.STOP,
        "is given to node2: eth0 has no carrier here",
        MINE,
    ),
    Case(
        "leaving",
        verdict(state(MINE, STARTED), alive(state(MINE)), Phase.LEAVING),
        Action.STOP,
        "is given up",
        MINE,
    ),
    Case(
        "leaving, and it is stopped",
        verdict(state(MINE), alive(state(MINE)), Phase.LEAVING),
        None,
        "is given up",
        Claim(5, "node2"),
    ),
    Case(
        "leaving, with nobody there",
        verdict(state(MINE), dead(state(MINE)), Phase.LEAVING),
        None,
        "is stopped",
        MINE,
    ),
    Case(
        "it cannot be stopped",
        verdict(state(MINE, Status.STUCK, problem="mount /data is busy"), alive(state(MINE))),
        Action.FENCE_SELF,
        "cannot be stopped (mount /data is busy): fencing this node",
        MINE,
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_verdict(case: Case) -> None:
    assert (case.got.action, case.got.words, case.got.claim) == (case.action, case.words, case.claim)


def test_a_node_that_has_handed_over_has_left() -> None:
    group = Group("web", "node1", state(MINE))
    decision = decide(Snapshot("node1", alive(state(MINE)), Phase.LEAVING, (group,)))
    assert decision.phase is Phase.LEFT
    assert decision.groups["web"].claim == Claim(5, "node2")


def test_a_node_that_still_stops_has_not_left() -> None:
    group = Group("web", "node1", state(MINE, Status.STOPPING))
    assert decide(Snapshot("node1", alive(state(MINE)), Phase.LEAVING, (group,))).phase is Phase.LEAVING


def test_the_sentence_says_everything() -> None:
    group = Group("web", "node1", state(THEIRS), Consent.GRANTED, "node2 was switched off by fence_ipmilan")
    decision = decide(Snapshot("node1", dead(state(THEIRS, STARTED), fenced=True), Phase.UP, (group,)))
    expected = "node2 is silent for 5.2 s and fenced; web is taken: node2 was switched off by fence_ipmilan."
    assert decision.sentence == expected


def test_another_secret_is_named() -> None:
    group = Group("web", "node1", state(THEIRS))
    decision = decide(Snapshot("node1", dead(state(THEIRS, STARTED), wrong_secret=True), Phase.UP, (group,)))
    assert "signs with another secret: compare the keys" in decision.sentence


STUCK_THERE = state(MINE, Status.STUCK, problem="apache cannot be stopped")


@pytest.mark.parametrize("mine", [state(MINE), state(MINE, Status.SUSPENDED)])
def test_a_node_that_cannot_let_go_is_not_waited_for_but_fenced(mine: GroupState) -> None:
    """Also when the claim has come to this node meanwhile."""
    assert verdict(mine, alive(STUCK_THERE)).action is Action.ASK_CONSENT
    without = verdict(mine, alive(STUCK_THERE), **GRANTED)
    assert (without.action, without.words) == (None, "is not taken: node2 cannot stop it, and is not fenced")
    fenced = verdict(mine, alive(STUCK_THERE, fenced=True), **GRANTED)
    assert fenced.action is Action.START_ALONE


def test_what_is_half_stopped_there_is_not_started_here_without_fencing() -> None:
    stuck = state(THEIRS, Status.STUCK)
    assert verdict(state(THEIRS), alive(stuck), **GRANTED).action is None
    assert verdict(state(THEIRS), alive(stuck, fenced=True), **GRANTED).claim == Claim(5, "node1")


def test_a_refusal_is_asked_about_again_under_the_same_words() -> None:
    refused = {"consent": Consent.REFUSED, "consent_words": "fencing failed"}
    silent = dead(state(THEIRS, STARTED))
    first, again = (
        decide(Snapshot("node1", silent, Phase.UP, (Group("web", "node1", state(THEIRS), ask_again=due, **refused),)))  # type: ignore[arg-type]
        for due in (False, True)
    )
    assert first.sentence == again.sentence
    assert (first.groups["web"].action, again.groups["web"].action) == (None, Action.ASK_CONSENT)


def test_a_group_that_the_other_node_does_not_know() -> None:
    stranger = Peer("node2", alive=True, silent_s=0.1, state=NodeState(Phase.UP, {}), steady=True)
    words = "node2 knows the group: make the settings the same"
    assert verdict(state(Claim(4)), stranger).words == f"waits until {words}"
    assert verdict(state(MINE, Status.SUSPENDED), stranger).words == f"is withheld until {words}"
    assert verdict(state(MINE, STARTED), stranger).action is None


def test_a_node_can_leave_with_a_group_that_it_cannot_stop() -> None:
    """It does not say that it has let go of it."""
    group = Group("web", "node1", state(MINE, Status.STUCK, problem="apache cannot be stopped"))
    decision = decide(Snapshot("node1", alive(state(MINE)), Phase.LEAVING, (group,)))
    assert decision.phase is Phase.LEFT
    left = alive(state(THEIRS, Status.STUCK), Phase.LEFT)
    assert verdict(state(THEIRS), left).action is Action.ASK_CONSENT
