"""What heartbeats show of the other node, whatever is lost, late, doubled, overtaken, forged or replayed."""

import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.heartbeat.membership import Membership, PathStatus, PeerView, Refusal, Verdict
from replica.heartbeat.node_state import NodeState, Phase
from replica.heartbeat.packet import NONCE_BYTES, NOTHING_YET, Number
from replica.heartbeat.settings import HeartbeatSettings
from tests.unit.heartbeat_settings import ETH0, OTHER_KEY, settings_of

HERE, THERE = settings_of(), settings_of("node2", "node1")
PEER_ADDRESS = ETH0.address
ETH0_PATH, ETH1_PATH = 0, 1
UP, LEFT = NodeState(Phase.UP), NodeState(Phase.LEFT)


def nonces() -> Callable[[], bytes]:
    counter = itertools.count(1)
    return lambda: next(counter).to_bytes(NONCE_BYTES, "big")


class Node:
    """One end, with a clock that the test sets."""

    def __init__(self, settings: HeartbeatSettings = HERE, start: int = 1000, seen: Number = NOTHING_YET) -> None:
        make = nonces()
        own = settings.node.encode()
        self.known = Membership(settings, 0.0, start, lambda: make()[len(own) :] + own, seen)
        self.known.peer_addresses = frozenset({PEER_ADDRESS})

    def sends(self, now: float, state: NodeState = UP) -> bytes:
        return self.known.pack_next(state, float(now))

    def hears(self, data: bytes, now: float, path: int | None = ETH0_PATH, source: str = PEER_ADDRESS) -> Verdict:
        return self.known.accept(data, now, source, path)

    @property
    def view(self) -> PeerView:
        return self.known.view()


def pair(now: float = 0.0) -> tuple[Node, Node]:
    """Two that have heard each other, and know it."""
    here, there = Node(), Node(THERE, start=2000)
    here.hears(there.sends(now), now)
    there.hears(here.sends(now), now)
    here.hears(there.sends(now), now)
    return here, there


def test_nobody_has_been_heard_yet() -> None:
    view = Node().view
    assert (view.heard_s, view.state, view.start_number, view.hears_us, view.left) == (None, None, 0, False, False)
    assert [path.status for path in view.paths] == [PathStatus.WAITING, PathStatus.WAITING]
    assert view.silent_for(3.5) == 3.5


def test_a_node_is_heard_at_once_and_its_state_counts_when_it_echoes() -> None:
    here, there = Node(), Node(THERE, start=2000)
    assert here.hears(there.sends(1.0), 1.0).newer
    assert (here.view.heard_s, here.view.state, here.view.hears_us) == (1.0, None, False)
    assert here.view.start_number == 2000
    there.hears(here.sends(2.0), 2.0)
    assert here.hears(there.sends(3.0), 3.25).newer
    assert (here.view.heard_s, here.view.state, here.view.hears_us) == (3.25, UP, True)
    assert here.view.round_trip_s == 0.25
    assert here.view.silent_for(4.0) == 0.75


def test_a_node_that_hears_us_no_more_says_so() -> None:
    here, there = pair()
    assert here.view.hears_us
    here.hears(there.sends(5.0), 5.0)
    assert here.view.hears_us  # for exactly deadtime
    here.hears(there.sends(5.1), 5.1)
    assert not here.view.hears_us
    assert here.view.state == UP


def test_the_same_packet_by_two_paths_is_one_for_the_node() -> None:
    here, there = pair()
    data = there.sends(1.0)
    assert here.hears(data, 1.0, ETH0_PATH).newer
    assert here.hears(data, 1.5, ETH1_PATH)._replace(events=()) == Verdict()
    first, second = here.view.paths
    assert (first.received, second.received, first.heard_s, second.heard_s) == (3, 1, 1.0, 1.5)
    assert (first.status, second.status) == (PathStatus.UP, PathStatus.UP)
    assert here.view.heard_s == 1.0
    assert here.hears(data, 2.0, ETH1_PATH).refusal is Refusal.OLD
    assert here.view.paths[1].heard_s == 1.5


def test_lost_packets_are_counted_for_their_path() -> None:
    here, there = pair()
    for number in range(10):
        data = there.sends(number)
        here.hears(data, number, ETH0_PATH)
        if number % 5 == 0:
            here.hears(data, number, ETH1_PATH)
    first, second = here.view.paths
    assert (first.lost, second.lost) == (0, 4)  # between the two that came by the second path


def test_a_packet_that_was_overtaken_is_refused() -> None:
    here, there = pair()
    early, late = there.sends(1.0, LEFT), there.sends(1.1, UP)
    assert here.hears(late, 1.2).newer
    assert here.hears(early, 1.3).refusal is Refusal.OLD
    assert (here.view.state, here.view.heard_s, here.view.rejected) == (UP, 1.2, {Refusal.OLD: 1})


def test_a_path_that_is_silent_is_dead_and_comes_back() -> None:
    here, there = pair()
    for now in range(1, 9):
        here.hears(there.sends(now), now, ETH1_PATH)
        events = here.known.check(now)
        assert [str(event) for event in events] == (
            [f"path {ETH0.name} is dead: nothing from node2 for 6.0 s."] if now == 6 else []
        )
    assert [path.status for path in here.view.paths] == [PathStatus.DEAD, PathStatus.UP]
    assert here.view.paths[0].since_s == 6
    (event,) = here.hears(there.sends(9.0), 9.0, ETH0_PATH).events
    assert str(event) == f"path {ETH0.name} is up."
    assert (here.view.paths[0].status, here.view.paths[0].since_s, here.view.paths[0].lost) == (PathStatus.UP, 9.0, 8)


def test_a_path_on_which_nothing_ever_came_is_dead_after_deadtime() -> None:
    here = Node()
    assert here.known.check(5.0) == ()
    assert len(here.known.check(5.1)) == 2
    assert here.known.check(5.2) == ()


def test_a_path_that_leads_to_this_node_itself_is_never_dead() -> None:
    here = Node()
    here.known.sending(ETH0_PATH, "", 0.0, unused=True)
    assert len(here.known.check(10.0)) == 1
    assert here.view.paths[0].status is PathStatus.UNUSED


def test_why_a_path_cannot_be_sent_on_is_said_once() -> None:
    here = Node()
    (event,) = here.known.sending(ETH0_PATH, "interface eth0: No such device", 1.0)
    assert str(event) == f"path {ETH0.name} cannot be sent on: interface eth0: No such device."
    assert here.known.sending(ETH0_PATH, "interface eth0: No such device", 2.0) == ()
    assert here.view.paths[0].problem == "interface eth0: No such device"
    (event,) = here.known.sending(ETH0_PATH, "", 3.0)
    assert str(event) == f"path {ETH0.name} can be sent on again."


def test_a_late_heartbeat_is_told_with_its_age_and_path() -> None:
    here, there = pair()
    assert here.hears(there.sends(2.5), 2.5).events == ()
    there.sends(4.0)
    (event,) = here.hears(there.sends(5.7), 5.7).events
    assert str(event) == f"late heartbeat from node2 on {ETH0.name}: 3.2 s after the one before; 1 were lost."


def test_after_a_restart_the_first_heartbeat_is_not_late() -> None:
    here, _ = pair()
    assert here.hears(Node(THERE, start=2001).sends(20.0), 20.0).events == ()


def test_a_node_that_restarts_begins_without_a_state() -> None:
    here, there = pair()
    here.hears(there.sends(1.0), 1.0)
    again = Node(THERE, start=2001)
    assert here.hears(again.sends(2.0), 2.0).newer
    assert (here.view.state, here.view.start_number, here.view.hears_us) == (None, 2001, False)
    (event,) = here.hears(there.sends(3.0), 3.0, ETH1_PATH).events
    assert str(event) == "refused an old heartbeat of node2: its start number is 2000, 2001 was there before."
    assert here.view.paths[1].status is PathStatus.WAITING
    again.hears(here.sends(3.0), 3.0)
    here.hears(again.sends(4.0), 4.0)
    assert (here.view.state, here.view.hears_us) == (UP, True)


def test_a_node_that_left_has_left_until_it_is_heard_again() -> None:
    here, there = pair()
    here.hears(there.sends(1.0, LEFT), 1.0)
    assert here.view.left
    here.known.renew(50.0)
    assert here.view.left
    verdict = here.hears(Node(THERE, start=2001).sends(60.0), 60.0)
    assert verdict.newer
    assert not here.view.left


def test_after_a_pause_only_what_was_sent_since_counts() -> None:
    here, there = pair()
    here.hears(there.sends(1.0), 1.0)
    waiting = there.sends(2.0)
    here.known.renew(30.0)
    view = here.view
    assert (view.heard_s, view.state, view.hears_us, view.listening_since_s) == (None, None, False, 30.0)
    assert here.hears(waiting, 30.0).newer
    assert (here.view.heard_s, here.view.state) == (30.0, None)
    there.hears(here.sends(30.1), 30.1)
    here.hears(there.sends(30.2), 30.2)
    assert (here.view.state, here.view.hears_us) == (UP, True)


def test_a_node_that_woke_tells_its_state_with_its_first_packet() -> None:
    here, there = pair()
    there.known.renew(30.0)
    here.hears(there.sends(30.0, NodeState(Phase.LISTENING)), 30.0)
    assert here.view.state == NodeState(Phase.LISTENING)
    assert not here.view.hears_us


@pytest.mark.parametrize(("path", "source"), [(ETH0_PATH, PEER_ADDRESS), (None, PEER_ADDRESS)])
def test_another_secret_from_the_address_of_the_other_node_is_told(path: int | None, source: str) -> None:
    here, there = Node(), Node(replace(THERE, auth=OTHER_KEY))
    (event,) = here.hears(there.sends(7.0), 7.0, path, source).events
    assert str(event) == (
        "node2 (192.168.2.45) sends heartbeats in vain: a heartbeat is signed with another secret: use the same one on "
        "both nodes."
    )
    assert (here.view.wrong_secret_s, here.view.heard_s) == (7.0, None)
    assert here.view.rejected == {Refusal.SIGNATURE: 1}


def test_another_secret_from_anywhere_else_is_a_stranger() -> None:
    here, there = Node(), Node(replace(THERE, auth=OTHER_KEY))
    assert here.hears(there.sends(7.0), 7.0, ETH1_PATH, "192.168.2.99").refusal is Refusal.SIGNATURE
    assert here.view.wrong_secret_s is None


def test_another_secret_where_no_address_is_known() -> None:
    here, there = Node(), Node(replace(THERE, auth=OTHER_KEY))
    here.known.peer_addresses = frozenset()
    here.hears(there.sends(7.0), 7.0, ETH1_PATH, "192.168.2.99")
    assert here.view.wrong_secret_s == 7.0


@pytest.mark.parametrize(
    ("sender", "refusal", "says"),
    [
        (settings_of("node2", "node1", cluster="db"), Refusal.CLUSTER, "heartbeats of another cluster ('db')"),
        (settings_of("node3\n", "node1"), Refusal.NODE, r"a node that is not configured ('node3\n')"),
        (settings_of("node1", "node2"), Refusal.OWN_NAME, "another machine (192.168.2.45) calls itself node1 as well"),
    ],
)
def test_who_is_refused(sender: HeartbeatSettings, refusal: Refusal, says: str) -> None:
    here, there = Node(), Node(sender)
    there.known.renew(0.0)
    there.known.renew(0.0)  # its nonces differ from those of `here`, as those of another process do
    verdict = here.hears(there.sends(1.0), 1.0)
    assert (verdict.newer, verdict.refusal) == (False, refusal)
    assert says in str(verdict.events[0])
    assert (here.view.heard_s, here.view.rejected) == (None, {refusal: 1})


def test_garbage_is_refused() -> None:
    here = Node()
    assert here.hears(b"garbage that is long enough", 1.0).refusal is Refusal.MALFORMED
    assert here.view.rejected == {Refusal.MALFORMED: 1}


def test_own_packets_that_come_back_are_nothing() -> None:
    here = Node()
    data = here.sends(1.0)
    assert here.hears(data, 1.0) == Verdict()
    here.known.renew(2.0)
    assert here.hears(data, 2.0) == Verdict()
    assert here.view.rejected == {}


@pytest.mark.parametrize(("start", "sent_before"), [(1000, 0), (999, 0), (5, 0), (1000, 7)])
def test_a_node_that_forgot_its_start_number_learns_it_from_the_other(start: int, sent_before: int) -> None:
    here, there = pair()
    for now in range(20):
        there.hears(here.sends(now), now)
    reborn = Node(HERE, start=start)
    for _ in range(sent_before):
        reborn.sends(20.0)
    assert there.hears(reborn.sends(20.0), 20.0).refusal is Refusal.OLD
    (_, event) = reborn.hears(there.sends(20.5), 20.5).events
    assert str(event) == (
        "node2 remembers start 1000 of this node, which has forgotten it: this is start 1001 from now on."
    )
    assert there.hears(reborn.sends(21.0), 21.0).newer
    assert there.view.start_number == 1001


def test_what_was_accepted_before_this_start_is_refused_after_it() -> None:
    here, there = pair()
    data = [there.sends(now) for now in range(1, 5)]
    for now, one in enumerate(data[:3], 1):
        here.hears(one, now)
    again = Node(start=1001, seen=here.known.seen)
    assert again.view.start_number == 2000
    assert [again.hears(one, 9.0).refusal for one in data[:3]] == [Refusal.OLD] * 3
    assert again.view.paths[0].received == 0
    assert again.hears(data[3], 9.0).newer


def test_what_was_recorded_after_the_last_that_was_kept_brings_no_state_back() -> None:
    here, there = pair()
    kept = here.known.seen
    data = [there.sends(now) for now in range(1, 5)]
    for now, one in enumerate(data, 1):
        here.hears(one, now)
    again = Node(start=1001, seen=kept)
    again.known.renew(8.0)  # unlike its predecessor's, its nonce is its own
    again.known.renew(8.0)
    assert all(again.hears(one, 9.0).newer for one in data)
    assert again.view.state is None
    assert not again.view.left


@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_replays_of_everything_never_bring_an_older_state_back(seed: int, steps: int) -> None:
    """Packets are lost, doubled, reordered over two paths and replayed; both restart, and `here` is paused, at any
    time. What counts is always news: the states that `here` sees are numbered in the order in which they were made, and
    none is from before its last start or pause.
    """
    rng = random.Random(seed)
    here, there = Node(), Node(THERE, start=2000)
    recorded: list[bytes] = []
    numbered, newest_seen, least = 0, -1, 0

    def send(now: float) -> bytes:
        nonlocal numbered
        numbered += 1
        data = there.sends(now, NodeState(Phase.UP, pings=numbered))
        recorded.append(data)
        return data

    make = nonces()
    for step in range(steps):
        now = float(step)
        match rng.randrange(10):
            case 0:
                there = Node(THERE, start=there.known.number.start + 1, seen=there.known.seen)
                there.known._make_nonce = make
                there.known.renew(now)
            case 1:
                kept = here.known.seen if rng.random() < 0.5 else NOTHING_YET
                here = Node(start=here.known.number.start + 1, seen=kept)
                here.known._make_nonce = lambda: bytes(8) + make()[8:]
                here.known.renew(now)
                least = numbered + 1
            case 2:
                here.known._make_nonce = lambda: bytes(8) + make()[8:]
                here.known.renew(now)
                least = numbered + 1
            case 3 | 4:
                send(now)
            case 5 | 6:
                there.hears(here.sends(now), now)
                here.hears(send(now), now, rng.choice((0, 1)))
            case _:
                for data in rng.sample(recorded, min(len(recorded), 5)):
                    here.hears(data, now, rng.choice((0, 1, None)))
        state = here.view.state
        if state is not None:
            assert state.pings >= max(newest_seen, least), f"seed {seed}"
            newest_seen = state.pings
