"""The policies after a split brain: each with none, one and two Primaries, what no policy may do, any input."""

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replica.generation import Generations, Kind, Side, Verdict, decide
from replica.split_brain import CASES, CHOICES, Policies, Policy

MIRROR = {Kind.SOURCE: Kind.TARGET, Kind.TARGET: Kind.SOURCE}

#: What tells the two copies apart: name of the fact -> flags of a, flags of b.
FACTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a has no changes": ({"dirty": 0}, {"dirty": 7}),
    "b has no changes": ({"dirty": 3}, {"dirty": 0}),
    "a has fewer changes": ({"dirty": 3}, {"dirty": 7}),
    "b has fewer changes": ({"dirty": 7}, {"dirty": 3}),
    "as many changes": ({"dirty": 7}, {"dirty": 7}),
    "no changes": ({"dirty": 0}, {"dirty": 0}),
    "a was Primary": ({"dirty": 5, "parted_as_primary": True}, {"dirty": 5}),
    "b was Primary": ({"dirty": 5}, {"dirty": 5, "parted_as_primary": True}),
    "both were Primary": ({"dirty": 5, "parted_as_primary": True}, {"dirty": 5, "parted_as_primary": True}),
}

#: Who loses when nobody is Primary; what is not here is left to the operator.
LOSERS = {
    (Policy.ZERO_CHANGES, "a has no changes"): "a",
    (Policy.ZERO_CHANGES, "b has no changes"): "b",
    (Policy.LEAST_CHANGES, "a has no changes"): "a",
    (Policy.LEAST_CHANGES, "b has no changes"): "b",
    (Policy.LEAST_CHANGES, "a has fewer changes"): "a",
    (Policy.LEAST_CHANGES, "b has fewer changes"): "b",
    (Policy.LEAST_CHANGES, "no changes"): "b",  # nothing is lost: it does not matter who
    (Policy.YOUNGER_PRIMARY, "a was Primary"): "b",
    (Policy.YOUNGER_PRIMARY, "b was Primary"): "a",
    (Policy.OLDER_PRIMARY, "a was Primary"): "a",
    (Policy.OLDER_PRIMARY, "b was Primary"): "b",
}

ALL = list(itertools.product(*(CHOICES[case] for case in CASES)))


def split(fact: str, policies: Policies, primaries: str = "") -> tuple[Side, Side]:
    """Two copies with changes of their own since they were in sync."""
    first, second = FACTS[fact]
    a = Side("a", Generations(5, 3), 1 << 30, policies=policies, is_primary="a" in primaries, **first)
    b = Side("b", Generations(6, 3), 1 << 30, policies=policies, is_primary="b" in primaries, **second)
    return a, b


def agreed(one: Side, other: Side) -> Verdict:
    """The verdict of `one`, after checking that `other` comes to the mirrored one."""
    mine, theirs = decide(one, other), decide(other, one)
    assert theirs == replace(mine, kind=MIRROR.get(mine.kind, mine.kind))
    assert re.fullmatch(r"[^\n]{15,}\.", mine.reason)
    return mine


def loser(one: Side, other: Side) -> str | None:
    """Whose changes are lost."""
    verdict = agreed(one, other)
    if verdict.kind is Kind.SPLIT_BRAIN:
        assert not verdict.policy
        assert verdict.reason.endswith("on the node whose changes are to be lost.")
        return None
    assert verdict.policy
    target = {Kind.TARGET: one, Kind.SOURCE: other}[verdict.kind].node
    assert f"discards those of {target} (" in verdict.reason
    assert f"{target} is synced from" in verdict.reason
    return target


@pytest.mark.parametrize("fact", FACTS)
@pytest.mark.parametrize("policy", CHOICES["no-primary"])
def test_no_primary(policy: Policy, fact: str) -> None:
    sides = split(fact, Policies(no_primary=policy, one_primary=Policy.SECONDARY))
    expected = LOSERS.get((policy, fact))
    assert loser(*sides) == expected
    verdict = agreed(*sides)
    if expected is not None:
        assert (verdict.rule, verdict.full, verdict.policy) == (f"same-base-{policy}", False, policy)
    named = f"after-split-brain no-primary = {policy} " in verdict.reason
    assert named == (policy is not Policy.DISCONNECT)


@pytest.mark.parametrize("primary", "ab")
@pytest.mark.parametrize("fact", FACTS)
@pytest.mark.parametrize("policy", CHOICES["one-primary"])
@pytest.mark.parametrize("no_primary", CHOICES["no-primary"])
def test_one_primary(no_primary: Policy, policy: Policy, fact: str, primary: str) -> None:
    sides = split(fact, Policies(no_primary=no_primary, one_primary=policy), primary)
    secondary = "b" if primary == "a" else "a"
    no_primarys = LOSERS.get((no_primary, fact))
    if (no_primary, fact) == (Policy.LEAST_CHANGES, "no changes"):
        no_primarys = secondary  # with nothing to lose it is never the Primary
    expected = {
        Policy.DISCONNECT: None,
        Policy.SECONDARY: secondary,
        Policy.CONSENSUS: secondary if no_primarys == secondary else None,
    }[policy]
    assert loser(*sides) == expected
    reason = agreed(*sides).reason
    assert (f"after-split-brain one-primary = {policy} " in reason) == (policy is not Policy.DISCONNECT)
    if policy is Policy.CONSENSUS:
        assert f"(no-primary = {no_primary})" in reason
        assert (f"but {primary} is Primary" in reason) == (no_primarys == primary)


@pytest.mark.parametrize("fact", FACTS)
@pytest.mark.parametrize("policies", ALL, ids=",".join)
def test_two_primaries_are_left_to_the_operator(policies: tuple[Policy, ...], fact: str) -> None:
    assert loser(*split(fact, Policies(*policies), "ab")) is None
    a, b = split(fact, Policies(*policies), "ab")
    same = replace(b, generations=a.generations)
    assert agreed(a, same).rule == "same-current-both-primary"
    assert agreed(a, same).kind is Kind.SPLIT_BRAIN


def test_without_policies_the_sentence_does_not_speak_of_them() -> None:
    assert agreed(*split("a was Primary", Policies())).reason == (
        "a and b both have changes of their own since they were last in sync: run 'replicactl connect "
        "--discard-my-data' on the node whose changes are to be lost."
    )


@pytest.mark.parametrize("policies", ALL, ids=",".join)
@pytest.mark.parametrize("primaries", ["", "a", "b", "ab"])
@pytest.mark.parametrize("fact", FACTS)
def test_the_operator_comes_first(fact: str, primaries: str, policies: tuple[Policy, ...]) -> None:
    a, b = split(fact, Policies(*policies), primaries)
    for one, other in ((replace(a, discard=True), b), (a, replace(b, discard=True))):
        verdict, plain = agreed(one, other), agreed(*(replace(s, policies=Policies()) for s in (one, other)))
        assert verdict == plain
    both = agreed(replace(a, discard=True), replace(b, discard=True))
    assert both.kind is Kind.SPLIT_BRAIN
    assert "only one may" in both.reason


@pytest.mark.parametrize("fact", FACTS)
@pytest.mark.parametrize("policy", [Policy.SECONDARY, *CHOICES["no-primary"]])
def test_an_incomplete_copy_never_wins(policy: Policy, fact: str) -> None:
    policies = Policies(no_primary=policy, one_primary=Policy.SECONDARY)
    a, b = split(fact, policies, "a" if policy is Policy.SECONDARY else "")
    complete = loser(a, b)
    assert complete != "a" or loser(a, replace(b, inconsistent=True)) is None
    if complete == "b":
        assert loser(replace(a, inconsistent=True), b) is None
        assert "but a is Inconsistent" in agreed(replace(a, inconsistent=True), b).reason
        assert loser(a, replace(b, inconsistent=True)) == "b"


def test_policies_that_differ_discard_nothing() -> None:
    a, b = split("a has fewer changes", Policies(no_primary=Policy.LEAST_CHANGES))
    assert loser(a, b) == "a"
    for other in (Policies(), Policies(no_primary=Policy.LEAST_CHANGES, one_primary=Policy.SECONDARY)):
        changed = replace(b, policies=other)
        assert loser(a, changed) is None
        assert (
            "nothing is discarded because after-split-brain differs (a: no-primary = discard-least-changes, "
            f"one-primary = disconnect, two-primaries = disconnect; b: {other})" in agreed(a, changed).reason
        )
    newer = replace(b, policies=Policies("discard-of-a-later-version"))
    assert loser(a, newer) is None


@pytest.mark.parametrize("fact", FACTS)
@pytest.mark.parametrize("policy", CHOICES["no-primary"])
def test_counts_are_not_compared_when_only_history_is_in_common(policy: Policy, fact: str) -> None:
    a, b = split(fact, Policies(no_primary=policy, one_primary=Policy.SECONDARY))
    a, b = replace(a, generations=Generations(5, 4, (3,))), replace(b, generations=Generations(6, 0, (3,)))
    by_age = policy in (Policy.YOUNGER_PRIMARY, Policy.OLDER_PRIMARY)
    assert loser(a, b) == (LOSERS.get((policy, fact)) if by_age else None)
    assert agreed(a, b).full
    if policy in (Policy.ZERO_CHANGES, Policy.LEAST_CHANGES):
        assert "only history in common" in agreed(a, b).reason
    assert loser(replace(a, is_primary=True), b) == "b"


def test_no_policy_decides_on_metadata_that_contradict_each_other() -> None:
    a, b = split("a was Primary", Policies(no_primary=Policy.OLDER_PRIMARY, one_primary=Policy.SECONDARY))
    a, b = replace(a, generations=Generations(3, 5)), replace(b, generations=Generations(5, 3))
    for one in (a, replace(a, is_primary=True)):
        assert loser(one, b) is None
        assert "their metadata contradict each other" in agreed(one, b).reason


def test_no_policy_decides_while_a_disk_is_attached() -> None:
    a, b = split("a was Primary", Policies(one_primary=Policy.SECONDARY), "a")
    assert loser(a, b) == "b"
    attaching = replace(a, attaching=True)
    assert loser(attaching, b) is None
    assert "a disk is being attached" in agreed(attaching, b).reason


# ---- properties


@st.composite
def sides(draw: st.DrawFn, node: str) -> Side:
    flag, ids = st.booleans(), st.sampled_from([5, 5, 6, 7, 3])
    primary = draw(flag)
    return Side(
        node,
        Generations(
            draw(ids), draw(st.sampled_from([3, 3, 4, 0])), tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
        ),
        1 << 30,
        inconsistent=draw(st.sampled_from([False, False, True])),
        is_primary=primary,
        attaching=primary and draw(st.sampled_from([False, False, True])),
        parted_as_primary=draw(flag),
        dirty=draw(st.sampled_from([0, 0, 3, 7])),
        discard=draw(st.sampled_from([False, False, False, True])),
    )


@settings(deadline=None, max_examples=3000)
@given(sides("a"), sides("b"), st.sampled_from(ALL), st.sampled_from([*ALL, None, None, None]))
def test_whatever_the_two_sides_are(
    one: Side, other: Side, policies: tuple[Policy, ...], others: tuple[Policy, ...] | None
) -> None:
    one, other = replace(one, policies=Policies(*policies)), replace(other, policies=Policies(*(others or policies)))
    verdict = agreed(one, other)
    plain = agreed(replace(one, policies=Policies()), replace(other, policies=Policies()))
    if not verdict.policy:
        # But for the sentence, policies that do not decide change nothing.
        assert replace(verdict, reason="") == replace(plain, reason="")
        return
    assert plain.kind is Kind.SPLIT_BRAIN
    assert verdict.full == plain.full
    winner, lost = (one, other) if verdict.kind is Kind.SOURCE else (other, one)
    assert one.policies == other.policies
    assert verdict.policy in (one.policies.no_primary, one.policies.one_primary)
    assert not (one.discard or other.discard or one.attaching or other.attaching)
    assert not lost.is_primary
    assert not winner.incomplete
    if verdict.policy == Policy.ZERO_CHANGES:
        assert lost.dirty == 0 < winner.dirty
    if verdict.policy == Policy.LEAST_CHANGES:
        assert lost.dirty < winner.dirty or lost.dirty == winner.dirty == 0
    if verdict.policy in (Policy.YOUNGER_PRIMARY, Policy.OLDER_PRIMARY):
        assert lost.parted_as_primary != winner.parted_as_primary
        assert lost.parted_as_primary == (verdict.policy == Policy.OLDER_PRIMARY)
    if verdict.policy == Policy.SECONDARY:
        assert winner.is_primary
