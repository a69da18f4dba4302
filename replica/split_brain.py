"""What may be discarded after a split brain without an operator: the policies of `after-split-brain`.

Pure.  `ruling` is asked by `replica.generation.decide` alone, when it has found a split brain and no operator has
said which side discards its own.  It goes by what both nodes told of their copies, so both come to the same ruling.
Whatever a policy cannot tell for sure stays a matter for the operator, and so does everything that no policy may do:

- A Primary never loses its data, so with two Primaries there is nothing to choose from.
- A copy that is not complete never wins.
- Nodes whose policies differ discard nothing: neither of them knows what the other one's operator wants.
- Where the copies have only history in common, the counts of dirty blocks are not compared: the bitmaps are relative to
  different generations, and a resync may have cleared bits since the last one that both had. The copy with the fewer
  bits, or with none, can then be the one with more changes.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from replica.generation import Side


class Policy(StrEnum):
    """By DRBD's names."""

    DISCONNECT = "disconnect"
    ZERO_CHANGES = "discard-zero-changes"
    LEAST_CHANGES = "discard-least-changes"
    YOUNGER_PRIMARY = "discard-younger-primary"
    OLDER_PRIMARY = "discard-older-primary"
    SECONDARY = "discard-secondary"
    CONSENSUS = "consensus"


#: The cases, by the number of nodes that are Primary when they meet, and what may be chosen for each.
CASES: Final = ("no-primary", "one-primary", "two-primaries")
CHOICES: Final[dict[str, tuple[Policy, ...]]] = {
    "no-primary": (
        Policy.DISCONNECT,
        Policy.ZERO_CHANGES,
        Policy.LEAST_CHANGES,
        Policy.YOUNGER_PRIMARY,
        Policy.OLDER_PRIMARY,
    ),
    "one-primary": (Policy.DISCONNECT, Policy.SECONDARY, Policy.CONSENSUS),
    "two-primaries": (Policy.DISCONNECT,),
}


@dataclass(frozen=True, slots=True)
class Policies:
    """A resource's policies. Plain texts, because the peer's may be of a newer version: they differ then."""

    no_primary: str = Policy.DISCONNECT
    one_primary: str = Policy.DISCONNECT
    two_primaries: str = Policy.DISCONNECT

    def __str__(self) -> str:
        chosen = zip(CASES, (self.no_primary, self.one_primary, self.two_primaries), strict=True)
        return ", ".join(f"{case} = {policy}" for case, policy in chosen)


@dataclass(frozen=True, slots=True)
class Ruling:
    """Whose changes are discarded, by which policy; no loser: an operator has to say.

    words  a clause for the verdict's sentence: what was discarded and by what rule, or why nothing was; empty when no
           policy but `disconnect` is configured
    """

    loser: "Side | None" = None
    policy: str = ""
    words: str = ""


def difference(one: "Side", other: "Side") -> str:
    """The clause that says how the policies of the two differ, the same on both nodes."""
    first, second = sorted((one, other), key=lambda side: side.node)
    return f"after-split-brain differs ({first.node}: {first.policies}; {second.node}: {second.policies})"


def ruling(one: "Side", other: "Side", *, full: bool, doubt: str = "") -> Ruling:
    """What the policies make of a split brain; `one` and `other` in the order of their names.

    full   only history is in common
    doubt  why no policy may decide, whatever it is; empty: it may
    """
    if one.policies != other.policies:
        return Ruling(words=f"nothing is discarded because {difference(one, other)}")
    policies = one.policies
    primaries = one.is_primary + other.is_primary
    policy = (policies.no_primary, policies.one_primary, policies.two_primaries)[primaries]
    if policy == Policy.DISCONNECT:
        return Ruling()
    name = f"after-split-brain {CASES[primaries]} = {policy}"
    if policy == Policy.CONSENSUS:
        policy = policies.no_primary
        name += f" (no-primary = {policy})"
    if one.attaching or other.attaching:
        doubt = "a disk is being attached"
    loser, why = (None, doubt) if doubt else _loser(policy, one, other, full)
    if loser is not None:
        winner = other if loser is one else one
        if not loser.is_primary and not winner.incomplete:
            return Ruling(loser, policy, f"{name} discards those of {loser.node} ({why})")
        obstacle = f"{loser.node} is Primary" if loser.is_primary else f"{winner.node} is Inconsistent"
        why = f"it would discard those of {loser.node}, but {obstacle}"
    return Ruling(words=f"{name} does not decide ({why})")


def _loser(policy: str, one: "Side", other: "Side", full: bool) -> tuple["Side | None", str]:
    """Who loses by this policy, and why; or nobody, and why not."""
    if policy == Policy.SECONDARY:
        # Asked with one Primary only.
        return (other, f"{one.node} is Primary") if one.is_primary else (one, f"{other.node} is Primary")
    if policy in (Policy.YOUNGER_PRIMARY, Policy.OLDER_PRIMARY):
        return _by_age(policy, one, other)
    if policy in (Policy.ZERO_CHANGES, Policy.LEAST_CHANGES):
        if full:
            return None, "they have only history in common, so that their changed blocks cannot be compared"
        return _by_changes(policy, one, other)
    return None, "it leaves that to the operator"


def _by_age(policy: str, one: "Side", other: "Side") -> tuple["Side | None", str]:
    """The older Primary was Primary when the two parted, the younger one was promoted while they were apart."""
    if one.parted_as_primary == other.parted_as_primary:
        who = "both nodes were" if one.parted_as_primary else "neither node was"
        return None, f"{who} Primary when they parted"
    older, younger = (one, other) if one.parted_as_primary else (other, one)
    why = f"{older.node} was Primary when they parted, {younger.node} was promoted later"
    return (younger if policy == Policy.YOUNGER_PRIMARY else older), why


def _by_changes(policy: str, one: "Side", other: "Side") -> tuple["Side | None", str]:
    """By the number of dirty blocks: an upper bound of what was changed, relative to the same base on both."""
    why = f"dirty blocks: {one.dirty} on {one.node}, {other.dirty} on {other.node}"
    fewer, more = (one, other) if one.dirty < other.dirty else (other, one)
    if policy == Policy.ZERO_CHANGES:
        return (fewer if fewer.dirty == 0 < more.dirty else None), why
    if fewer.dirty < more.dirty:
        return fewer, why
    if fewer.dirty:
        return None, why
    # The same number is no reason to lose data, unless there are none to lose: then the copies do not differ at all.
    return (one if other.is_primary else other), why
