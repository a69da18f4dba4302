"""The direction of a resync: the table row by row, named crash scenarios, properties for any input."""

import re
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replica.generation import (
    HISTORY_LENGTH,
    Generations,
    Kind,
    Side,
    Verdict,
    decide,
    started_alone,
    sync_finished_source,
    sync_finished_target,
    sync_started_source,
    sync_started_target,
)
from replica.split_brain import Policies

GIB = 1 << 30
MIRROR = {Kind.SOURCE: Kind.TARGET, Kind.TARGET: Kind.SOURCE}


def side(node: str, current: int, base: int = 0, history: tuple[int, ...] = (), **flags: Any) -> Side:
    return replace(Side(node, Generations(current, base, history), GIB), **flags)


def a(current: int, base: int = 0, history: tuple[int, ...] = (), **flags: Any) -> Side:
    return side("a", current, base, history, **flags)


def b(current: int, base: int = 0, history: tuple[int, ...] = (), **flags: Any) -> Side:
    return side("b", current, base, history, **flags)


def agreed(one: Side, other: Side) -> Verdict:
    """The verdict of `one`, after checking that `other` comes to the mirrored one."""
    mine, theirs = decide(one, other), decide(other, one)
    assert theirs == replace(mine, kind=MIRROR.get(mine.kind, mine.kind))
    assert re.fullmatch(r"[^\n]{15,}\.", mine.reason)
    return mine


NEW: dict[str, Any] = {"just_created": True, "inconsistent": True}
BAD: dict[str, Any] = {"inconsistent": True}
PRI: dict[str, Any] = {"is_primary": True}
ATTACH: dict[str, Any] = {"is_primary": True, "attaching": True}
AHEAD: dict[str, Any] = {"ahead": True}
RAN_ON: dict[str, Any] = {"unbroken": True}
ALONE: dict[str, Any] = {"promoted_alone": True}
DISCARD: dict[str, Any] = {"discard": True}

TABLE: dict[str, tuple[Side, Side, Kind, bool, str]] = {
    "both just created": (a(0, **NEW), b(0, **NEW), Kind.BOTH_NEW, False, "both-new"),
    "one just created": (a(5), b(0, **NEW), Kind.SOURCE, True, "one-new"),
    "no current counts as just created": (a(5), b(0), Kind.SOURCE, True, "one-new"),
    "new against incomplete": (a(5, **BAD), b(0, **NEW), Kind.NO_GOOD_COPY, False, "no-good-copy"),
    "new Primary being attached": (a(0, **NEW, **ATTACH), b(5), Kind.TARGET, True, "one-new"),
    "in sync": (a(5, 0, (3,)), b(5, 0, (4,)), Kind.IN_SYNC, False, "same-current"),
    "base": (a(5, 3), b(5), Kind.SOURCE, False, "same-current-base"),
    "base on both": (a(5, 3), b(5, 4), Kind.SOURCE, False, "same-current-base"),
    "crashed Primary": (a(5), b(5, **AHEAD), Kind.TARGET, False, "same-current-crashed-primary"),
    "ran on, and the Primary crashed": (a(5, **AHEAD), b(5, **RAN_ON), Kind.TARGET, False, "same-current-unbroken"),
    "ran on, both": (a(5, **RAN_ON), b(5, **RAN_ON), Kind.IN_SYNC, False, "same-current"),
    "ran on, but the crashed one is Primary again": (
        a(5, **AHEAD, **PRI),
        b(5, **RAN_ON),
        Kind.SOURCE,
        False,
        "same-current-primary",
    ),
    "ran on, the link was cut": (a(5, **AHEAD, **RAN_ON), b(5, **RAN_ON), Kind.TARGET, False, "same-current-unbroken"),
    "promoted alone": (a(5), b(5, **ALONE), Kind.TARGET, False, "same-current-promoted-alone"),
    "promoted alone before crashed": (a(5, **AHEAD), b(5, **ALONE), Kind.TARGET, False, "same-current-promoted-alone"),
    "promoted alone, both, one of them after a crash": (
        a(5, **AHEAD, **ALONE),
        b(5, **ALONE),
        Kind.TARGET,
        False,
        "same-current-promoted-alone",
    ),
    "promoted alone and crashed before crashed": (
        a(5, **AHEAD),
        b(5, **AHEAD, **ALONE),
        Kind.TARGET,
        False,
        "same-current-promoted-crashed",
    ),
    "Primary before promoted alone": (a(5, **PRI), b(5, **ALONE), Kind.SOURCE, False, "same-current-primary"),
    "both crashed": (a(5, **AHEAD), b(5, **AHEAD), Kind.SOURCE, False, "same-current-crashed-primary"),
    "Primary": (a(5), b(5, **PRI), Kind.TARGET, False, "same-current-primary"),
    "Primary before crashed": (a(5, **AHEAD), b(5, **PRI), Kind.TARGET, False, "same-current-primary"),
    "Primary before base": (a(5, 3), b(5, **PRI), Kind.TARGET, False, "same-current-primary"),
    "crashed before base": (a(5, 3), b(5, **AHEAD), Kind.TARGET, False, "same-current-crashed-primary"),
    "dirty blocks": (a(5), b(5, dirty=3), Kind.TARGET, False, "same-current-dirty"),
    "dirty blocks on both": (a(5, dirty=1), b(5, dirty=3), Kind.SOURCE, False, "same-current-dirty"),
    "two Primaries": (a(5, **PRI), b(5, **PRI), Kind.SPLIT_BRAIN, False, "same-current-both-primary"),
    "two Primaries, one may lose": (
        a(5, **PRI, **DISCARD),
        b(5, **PRI),
        Kind.SPLIT_BRAIN,
        False,
        "same-current-both-primary",
    ),
    "invalidated": (a(5, **BAD), b(5), Kind.TARGET, False, "same-current-inconsistent"),
    "invalidated, with base": (a(5, 3, **BAD), b(5), Kind.TARGET, False, "same-current-inconsistent"),
    "invalidated Primary": (a(5, **BAD, **PRI), b(5), Kind.TARGET, False, "same-current-inconsistent"),
    "both inconsistent": (a(5, **BAD), b(5, **BAD), Kind.NO_GOOD_COPY, False, "no-good-copy"),
    "both inconsistent, one behind": (a(5, 3, **BAD), b(3, **BAD), Kind.NO_GOOD_COPY, False, "no-good-copy"),
    "re-attached disk": (a(5, **ATTACH, **AHEAD), b(5), Kind.TARGET, False, "same-current-attaching"),
    "behind": (a(3), b(5, 3), Kind.TARGET, False, "current-is-base"),
    "behind, crashed": (a(3, 1, **AHEAD), b(5, 3), Kind.TARGET, False, "current-is-base"),
    "behind, inconsistent": (a(3, **BAD), b(5, 3), Kind.TARGET, False, "current-is-base"),
    "behind but Primary": (a(3, **PRI), b(5, 3), Kind.REFUSED, False, "primary-would-be-target"),
    "behind, Primary and incomplete": (a(3, **PRI, **BAD), b(5, 3), Kind.TARGET, False, "current-is-base"),
    "behind, being attached": (a(3, **ATTACH), b(5, 3), Kind.TARGET, False, "current-is-base"),
    "attached disk is newer": (a(5, 3, **ATTACH), b(3), Kind.REFUSED, False, "attached-disk-is-newer"),
    "newer but incomplete": (a(5, 3, **BAD), b(3), Kind.REFUSED, False, "newer-is-inconsistent"),
    "newer, incomplete, given up": (
        a(5, 3, **BAD, **DISCARD),
        b(3),
        Kind.TARGET,
        True,
        "discard-inconsistent",
    ),
    "long behind": (a(2), b(5, 0, (3, 2)), Kind.TARGET, True, "current-in-history"),
    "long behind, other base": (a(2, 1), b(5, 4, (3, 2)), Kind.TARGET, True, "current-in-history"),
    "long behind but Primary": (a(2, **PRI), b(5, 0, (2,)), Kind.REFUSED, False, "primary-would-be-target"),
    "behind, both Primary": (a(3, **PRI), b(5, 3, **PRI), Kind.REFUSED, False, "two-primaries"),
    "contradiction of bases": (a(3, 5), b(5, 3), Kind.SPLIT_BRAIN, True, "contradiction"),
    "contradiction of histories": (a(3, 0, (5,)), b(5, 0, (3,)), Kind.SPLIT_BRAIN, True, "contradiction"),
    "split brain": (a(5, 3), b(6, 3), Kind.SPLIT_BRAIN, False, "same-base"),
    "split brain, Primaries": (a(5, 3, **PRI), b(6, 3, **PRI), Kind.SPLIT_BRAIN, False, "same-base"),
    "split brain, one gives up": (a(5, 3, **DISCARD), b(6, 3), Kind.TARGET, False, "same-base-discard"),
    "split brain, Primary stays": (
        a(5, 3, **PRI),
        b(6, 3, **DISCARD),
        Kind.SOURCE,
        False,
        "same-base-discard",
    ),
    "split brain, a Primary can't": (
        a(5, 3, **PRI, **DISCARD),
        b(6, 3),
        Kind.SPLIT_BRAIN,
        False,
        "same-base",
    ),
    "split brain, both give up": (
        a(5, 3, **DISCARD),
        b(6, 3, **DISCARD),
        Kind.SPLIT_BRAIN,
        False,
        "same-base",
    ),
    "split brain, only good copy": (
        a(5, 3, **DISCARD),
        b(6, 3, **BAD),
        Kind.SPLIT_BRAIN,
        False,
        "same-base",
    ),
    "old split brain": (a(5, 4, (3,)), b(6, 0, (3,)), Kind.SPLIT_BRAIN, True, "shared-history"),
    "old split brain, base in history": (a(5, 3), b(6, 4, (3,)), Kind.SPLIT_BRAIN, True, "shared-history"),
    "old split brain, one gives up": (
        a(5, 4, (3,)),
        b(6, 0, (3,), **DISCARD),
        Kind.SOURCE,
        True,
        "shared-history-discard",
    ),
    "unrelated": (a(5, 4, (3,)), b(6, 7, (8,)), Kind.UNRELATED, True, "unrelated"),
    "unrelated, nothing to discard": (a(5, **DISCARD), b(6), Kind.UNRELATED, True, "unrelated"),
}


@pytest.mark.parametrize(("one", "other", "kind", "full", "rule"), TABLE.values(), ids=TABLE.keys())
def test_table(one: Side, other: Side, kind: Kind, full: bool, rule: str) -> None:
    verdict = agreed(one, other)
    assert (verdict.kind, verdict.full, verdict.rule) == (kind, full, rule)
    assert verdict.size_bytes == GIB


def test_sizes() -> None:
    small, large = replace(a(5), size_bytes=GIB), replace(b(5), size_bytes=2 * GIB)
    assert agreed(small, large) == Verdict(
        Kind.IN_SYNC, False, "same-current", "a and b have the same generation and no dirty blocks.", GIB
    )
    assert agreed(small, replace(large, is_primary=True)).rule == "size"
    assert agreed(replace(small, is_primary=True), large).size_bytes == GIB
    newer = replace(large, generations=Generations(6, 5))
    assert agreed(small, newer).kind is Kind.REFUSED
    assert "create-md --force" in agreed(small, newer).reason
    older = replace(large, generations=Generations(4))
    verdict = agreed(replace(small, generations=Generations(5, 4)), older)
    assert (verdict.kind, verdict.size_bytes) == (Kind.SOURCE, GIB)


def test_a_target_whose_backing_has_room_grows() -> None:
    small, large = replace(a(5), size_bytes=GIB), replace(b(6, 5), size_bytes=2 * GIB)
    assert agreed(small, large).rule == "size"
    assert agreed(replace(small, room_bytes=2 * GIB - 1), large).rule == "size"
    verdict = agreed(replace(small, room_bytes=2 * GIB), large)
    assert (verdict.kind, verdict.rule, verdict.size_bytes) == (Kind.TARGET, "current-is-base", 2 * GIB)
    # A source never does: nobody would know what is behind its end.
    assert agreed(replace(small, generations=Generations(7, 6), room_bytes=3 * GIB), large).size_bytes == GIB


def test_nodes_of_the_same_name_are_refused() -> None:
    assert agreed(a(5), a(5)).rule == "same-name"


# ---- named scenarios: nodes with durable state go through events, and may be cut between any two records


@dataclass
class Node:
    """The durable generation state of a node, and the steps that change it."""

    name: str
    gens: Generations = field(default_factory=Generations)
    flags: dict[str, Any] = field(default_factory=dict)
    all_dirty: bool = False

    def side(self) -> Side:
        return replace(Side(self.name, self.gens, GIB), **self.flags)

    def alone(self, new_id: int) -> None:
        self.gens = started_alone(self.gens, new_id)


def pair(current: int = 10) -> tuple[Node, Node]:
    """Two nodes in sync."""
    return Node("a", Generations(current)), Node("b", Generations(current))


def sync(source: Node, target: Node, new_id: int, steps: int = 4) -> None:
    """The first `steps` of the four durable records of a whole resync."""
    verdict = agreed(source.side(), target.side())
    assert verdict.kind is Kind.SOURCE, verdict
    if steps >= 1:
        source.all_dirty = source.all_dirty or verdict.full
        source.gens = sync_started_source(source.gens, new_id)
    if steps >= 2:
        target.gens = sync_started_target(target.gens, source.gens.base)
        target.flags = {**target.flags, "inconsistent": True, "just_created": False, "ahead": False}
    if steps >= 3:
        target.gens = sync_finished_target(target.gens, source.gens.current, source.gens.history)
        target.flags["inconsistent"] = False
    if steps >= 4:
        source.gens = sync_finished_source(source.gens)
        source.all_dirty = False
        source.flags["ahead"] = False


def direction(one: Node, other: Node) -> tuple[Kind, bool]:
    verdict = agreed(one.side(), other.side())
    return verdict.kind, verdict.full


def new_pair_started() -> tuple[Node, Node]:
    one, other = Node("a", flags=dict(NEW)), Node("b", flags=dict(NEW))
    one.alone(10)
    one.flags = {}
    return one, other


def after_outage() -> tuple[Node, Node]:
    one, other = pair()
    one.alone(11)
    return one, other


def long_apart() -> tuple[Node, Node]:
    one, other = pair(12)
    one.gens = Generations(12, 0, (11, 10))
    other.gens = Generations(10)
    return one, other


def split_and_given_up() -> tuple[Node, Node]:
    one, other = pair()
    one.alone(11)
    other.alone(12)
    other.flags["discard"] = True
    return one, other


def invalidated() -> tuple[Node, Node]:
    one, other = pair()
    other.flags["inconsistent"] = True
    return one, other


STARTS = {
    "new pair": new_pair_started,
    "after an outage": after_outage,
    "long apart": long_apart,
    "split brain given up": split_and_given_up,
    "invalidated": invalidated,
}


@pytest.mark.parametrize("steps", range(5))
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS.keys())
@pytest.mark.parametrize("event", ["reconnect", "source crashed", "source goes on alone"])
def test_an_interrupted_resync_resumes_in_the_same_direction(start: object, steps: int, event: str) -> None:
    assert callable(start)
    source, target = start()
    _, needs_all = direction(source, target)
    sync(source, target, new_id=100, steps=steps)
    if event == "source crashed":
        source.flags["ahead"] = True
    if event == "source goes on alone":
        source.alone(200)
    kind, full = direction(source, target)
    if steps == 4 and event == "reconnect":
        assert kind is Kind.IN_SYNC
        return
    assert kind is Kind.SOURCE
    if needs_all and steps < 3:  # by bitmap only when the source's bitmap names every block
        assert full or source.all_dirty
    sync(source, target, new_id=300)
    assert direction(source, target) == (Kind.IN_SYNC, False)
    assert source.gens.current == target.gens.current
    assert source.gens.base == target.gens.base == 0


@pytest.mark.parametrize("start", [new_pair_started, long_apart])
def test_a_full_sync_resumes_by_bitmap_only_with_all_bits_set_before(start: object) -> None:
    assert callable(start)
    source, target = start()
    assert direction(source, target) == (Kind.SOURCE, True)
    sync(source, target, new_id=100, steps=1)
    assert direction(source, target) == (Kind.SOURCE, True)  # the target does not know the base yet
    sync(source, target, new_id=101, steps=2)
    assert source.all_dirty
    assert direction(source, target) == (Kind.SOURCE, False)


def test_an_interrupted_target_is_inconsistent_and_never_source() -> None:
    source, target = after_outage()
    sync(source, target, new_id=100, steps=2)
    assert target.gens == Generations(10)
    target.flags["ahead"] = True  # it was Primary while it was synced, and crashed
    assert direction(target, source) == (Kind.TARGET, False)
    target.flags["is_primary"] = True  # and it still is: a Primary on an incomplete disk may be target
    assert direction(target, source) == (Kind.TARGET, False)


def test_a_primary_that_crashed_with_its_peer_in_sync_is_source() -> None:
    one, other = pair()
    other.flags["ahead"] = True
    assert direction(one, other) == (Kind.TARGET, False)


def test_a_crashed_primary_is_overwritten_by_a_successor_that_wrote() -> None:
    one, other = pair()
    one.flags["ahead"] = True
    other.alone(11)
    other.flags["is_primary"] = True
    assert direction(one, other) == (Kind.TARGET, False)


def test_a_crashed_primary_against_a_successor_that_has_not_written() -> None:
    one, other = pair()
    one.flags["ahead"] = True
    other.flags["is_primary"] = True  # reads were served from it: what it shows must stay
    assert direction(one, other) == (Kind.TARGET, False)
    # Promoted and demoted while apart, nothing written: it was flushed first, `one` may have lost writes by its crash.
    other.flags = {"promoted_alone": True}
    assert direction(one, other) == (Kind.TARGET, False)
    other.flags = {}  # never promoted
    assert direction(one, other) == (Kind.SOURCE, False)


def test_a_primary_that_lost_its_peer_and_has_not_written_since() -> None:
    one, other = pair()
    one.flags["is_primary"] = True  # no new generation yet; what was in flight is dirty
    assert direction(one, other) == (Kind.SOURCE, False)
    one.alone(11)
    assert direction(one, other) == (Kind.SOURCE, False)


def test_a_primary_that_has_not_written_against_a_peer_that_has() -> None:
    one, other = pair()
    one.flags["is_primary"] = True
    other.alone(11)
    assert agreed(one.side(), other.side()).rule == "primary-would-be-target"
    one.flags = {}
    assert direction(one, other) == (Kind.TARGET, False)


def test_both_promoted_while_apart() -> None:
    one, other = pair()
    one.flags["is_primary"] = other.flags["is_primary"] = True
    assert direction(one, other) == (Kind.SPLIT_BRAIN, False)
    one.alone(11)
    assert direction(one, other)[0] is Kind.REFUSED  # one has written: the other, still Primary, would be target
    other.alone(12)
    assert direction(one, other) == (Kind.SPLIT_BRAIN, False)
    one.flags = {"is_primary": False}
    other.flags = {"discard": True}
    assert direction(one, other) == (Kind.SOURCE, False)


def test_both_crashed() -> None:
    one, other = pair()
    one.flags["ahead"] = other.flags["ahead"] = True
    assert direction(one, other) == (Kind.SOURCE, False)  # the lower name
    other.alone(11)  # other had gone on alone before it crashed
    assert direction(one, other) == (Kind.TARGET, False)


def test_split_brain_after_the_target_was_promoted_in_the_last_gap() -> None:
    """The target has finished, the source has not recorded it; then both go on alone."""
    source, target = after_outage()
    sync(source, target, new_id=100, steps=3)
    source.alone(200)
    target.alone(201)
    assert direction(source, target) == (Kind.SPLIT_BRAIN, True)


def test_the_finished_target_takes_over_from_a_source_that_has_not_recorded_the_end() -> None:
    source, target = after_outage()
    sync(source, target, new_id=100, steps=3)
    source.flags["ahead"] = True
    target.flags["is_primary"] = True
    assert direction(source, target) == (Kind.TARGET, False)
    target.alone(201)
    assert direction(source, target) == (Kind.TARGET, False)


def test_a_lost_disk_comes_back_empty_while_its_node_is_primary() -> None:
    one, other = pair()
    other.alone(11)  # the peer goes on with the writes, one is Diskless
    one.gens, one.flags = Generations(), {**NEW, **ATTACH}
    assert direction(one, other) == (Kind.TARGET, True)
    one.gens, one.flags = Generations(10), dict(ATTACH)  # or the old disk comes back
    assert direction(one, other) == (Kind.TARGET, False)


def test_a_forced_promotion_of_an_interrupted_target_is_a_split_brain() -> None:
    source, target = after_outage()
    sync(source, target, new_id=100, steps=2)
    target.alone(55)
    target.flags = {}
    assert direction(source, target) == (Kind.SPLIT_BRAIN, False)


def test_a_replaced_node_that_served_another_pair_is_unrelated() -> None:
    one, _ = pair(10)
    other = Node("b", Generations(77, 0, (76,)))
    assert direction(one, other) == (Kind.UNRELATED, True)


# ---- properties

IDS = st.integers(0, 6)
POLICIES = (
    Policies(),
    Policies("discard-least-changes", "discard-secondary"),
    Policies("discard-younger-primary", "consensus"),
)


@st.composite
def sides(draw: st.DrawFn, node: str) -> Side:
    flag = st.booleans()
    primary = draw(flag)
    generations = Generations(draw(IDS), draw(IDS), tuple(draw(st.lists(st.integers(1, 6), max_size=3, unique=True))))
    return Side(
        node,
        generations,
        size_bytes := draw(st.sampled_from([GIB, 2 * GIB])),
        just_created=draw(st.sampled_from([False, False, True])),
        inconsistent=draw(flag),
        ahead=draw(flag),
        promoted_alone=draw(flag),
        unbroken=draw(flag),
        is_primary=primary,
        attaching=primary and draw(flag),
        parted_as_primary=draw(flag),
        dirty=draw(st.sampled_from([0, 0, 7])),
        discard=draw(flag),
        policies=draw(st.sampled_from(POLICIES)),
        room_bytes=draw(st.sampled_from([0, size_bytes, 2 * GIB])),
    )


@settings(deadline=None, max_examples=1500)
@given(sides("a"), sides("b"))
def test_whatever_the_two_sides_are(one: Side, other: Side) -> None:
    verdict = agreed(one, other)
    if verdict.kind in (Kind.SPLIT_BRAIN, Kind.UNRELATED, Kind.REFUSED):
        return
    assert not (one.is_primary and other.is_primary)
    if verdict.kind not in MIRROR:
        assert verdict.size_bytes == min(one.size_bytes, other.size_bytes)
        assert verdict.kind is Kind.BOTH_NEW or one.incomplete == other.incomplete
        return
    source, target = (one, other) if verdict.kind is Kind.SOURCE else (other, one)
    assert not source.incomplete
    assert not source.attaching
    assert not (target.serving and not target.incomplete)
    assert verdict.size_bytes == source.size_bytes <= max(target.size_bytes, target.room_bytes)
    ours, theirs = source.generations, target.generations
    related = {ours.current, ours.base, *ours.history} & {theirs.current, theirs.base, *theirs.history}
    assert target.blank or related - {0}
    if not verdict.full:  # a bitmap is only good between copies that it is relative to
        same_base = ours.base == theirs.base != 0
        assert same_base or theirs.current in (ours.current, ours.base)
    if theirs.base == ours.current:  # newer data are given up on request only
        assert target.blank or target.discard or theirs.current in (ours.base, ours.current)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), max_size=12))
def test_one_writer_at_a_time_never_gives_a_split_brain(events: list[tuple[bool, int]]) -> None:
    """Either node writes alone after it was synced up to some step: data always flow from the last writer."""
    one, other = pair(1)
    fresh = iter(range(2, 1000))
    for swap, steps in events:
        if swap and not other.flags.get("inconsistent") and direction(one, other)[0] is Kind.IN_SYNC:
            one, other = other, one
        one.alone(next(fresh))
        sync(one, other, next(fresh), steps)
    kind, _ = direction(one, other)
    assert kind in (Kind.SOURCE, Kind.IN_SYNC)


# ---- the functions that change generations


def test_started_alone() -> None:
    assert started_alone(Generations(), 5) == Generations(5)
    assert started_alone(Generations(5, 0, (4,)), 6) == Generations(6, 5, (4,))
    assert started_alone(Generations(6, 5, (4,)), 7) == Generations(7, 5, (6, 4))


def test_a_resync_in_four_records() -> None:
    assert sync_started_source(Generations(6, 5), 9) == Generations(6, 5)
    assert sync_started_source(Generations(6), 9) == Generations(6, 9)
    assert sync_started_target(Generations(5, 0, (4,)), 5) == Generations(5, 0, (4,))
    assert sync_started_target(Generations(), 5) == Generations(5)
    assert sync_started_target(Generations(8, 7, (4,)), 5) == Generations(5, 0, (8, 7, 4))
    assert sync_finished_target(Generations(5, 0, (8,)), 6, (4, 8)) == Generations(6, 0, (5, 4, 8))
    assert sync_finished_source(Generations(6, 5, (4,))) == Generations(6, 0, (5, 4))
    assert sync_finished_source(Generations(6)) == Generations(6)


def test_history_keeps_the_newest_32() -> None:
    gens = Generations(1)
    for new_id in range(2, 100):
        gens = sync_finished_source(started_alone(gens, new_id))
    assert gens == Generations(99, 0, tuple(range(98, 98 - HISTORY_LENGTH, -1)))


@pytest.mark.parametrize("new_id", [0, -1, 1 << 64, 5, 4, 3])
def test_a_generation_id_must_be_new(new_id: int) -> None:
    with pytest.raises(ValueError, match="generation id"):
        started_alone(Generations(5, 4, (3,)), new_id)


def test_a_resync_needs_generations_of_the_source() -> None:
    with pytest.raises(ValueError, match="base"):
        sync_started_target(Generations(5), 0)
    with pytest.raises(ValueError, match="current"):
        sync_finished_target(Generations(5), 0, ())
    with pytest.raises(ValueError, match="generation id"):
        sync_started_source(Generations(5, 0, (3,)), 3)
