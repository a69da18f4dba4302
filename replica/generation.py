"""Which copy is newer: data generations and the one decision that sets the direction of a resync.

Pure.  Each copy durably keeps `current`, `base` (the generation its bitmap is relative to) and `history`; all
ids are 64-bit, 0 = none.  `decide` is the only place that says who may overwrite whom; its rows are asked in
the order of `_TABLE`.  The small functions at the end are the only ones that change generations.

The table relies on this order of durable records:

- Sync start: the source makes its bitmap durable (all bits, if the verdict says full) and, with it or after
  it, `sync_started_source`.  Only then does the target record `sync_started_target` and Inconsistent, in one
  update.
- Sync end: the target, flushed, records `sync_finished_target` and no longer Inconsistent, in one update.
  Only then does the source record `sync_finished_source`.

Cut anywhere in between, the next handshake gives the same direction and loses no dirty block.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from replica import split_brain
from replica.split_brain import Policies

HISTORY_LENGTH: Final = 32
MAX_ID: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Generations:
    """Generation ids of one copy; `history` is newest first and at most 32 long."""

    current: int = 0
    base: int = 0
    history: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Side:
    """What one node says about its copy at the handshake.

    ahead       crashed as Primary, or may for another reason hold writes that the peer lost
    promoted_alone  was promoted without the peer in this generation, after a flush: durably complete, and what its
                clients have read since must not be undone by a copy that may have lost some of it
    is_primary  Primary now
    attaching  its disk is just being attached while the node, as Primary, serves through the peer: this disk
    may
                become target, and must never become source
    unbroken    has run without a break since both copies were last in sync (protocol C): holds, in its page cache or
                better, everything that was acknowledged in this generation
    parted_as_primary  was Primary when the two were last in touch
    dirty       dirty blocks in its bitmap (AL included)
    discard     the operator allowed to discard this copy's own changes (`connect --discard-my-data`)
    policies    what its configuration lets happen to a split brain without an operator
    size_bytes  size of the volume as its metadata has it
    room_bytes  size of its backing, if that is known: so large the copy can become
    """

    node: str
    generations: Generations
    size_bytes: int
    just_created: bool = False
    inconsistent: bool = False
    ahead: bool = False
    promoted_alone: bool = False
    unbroken: bool = False
    is_primary: bool = False
    attaching: bool = False
    parted_as_primary: bool = False
    dirty: int = 0
    discard: bool = False
    policies: Policies = field(default_factory=Policies)
    room_bytes: int = 0

    @property
    def blank(self) -> bool:
        """Never held data."""
        return self.just_created or self.generations.current == 0

    @property
    def incomplete(self) -> bool:
        """No copy anyone may be synced from."""
        return self.inconsistent or self.blank

    @property
    def serving(self) -> bool:
        """Primary on this very disk."""
        return self.is_primary and not self.attaching


class Kind(StrEnum):
    BOTH_NEW = "both-new"  # connected, both Inconsistent, wait for promote --force
    IN_SYNC = "in-sync"
    SOURCE = "source"
    TARGET = "target"
    NO_GOOD_COPY = "no-good-copy"  # connected, both Inconsistent: nobody can be source
    SPLIT_BRAIN = "split-brain"  # StandAlone; `full` says how it could be resolved
    UNRELATED = "unrelated"  # StandAlone
    REFUSED = "refused"  # StandAlone


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do, seen from `mine`.

    full  resync everything (else: what both bitmaps, OR-ed, say); for SPLIT_BRAIN: what resolving would take
    rule  name of the table's row reason  one sentence for the log and for the user size_bytes  size both
    sides have from now on: the source's, without a source the smaller one
    policy  the `after-split-brain` policy that discards the target's own changes, if one does
    """

    kind: Kind
    full: bool
    rule: str
    reason: str
    size_bytes: int
    policy: str = ""


@dataclass(frozen=True, slots=True)
class _Finding:
    """A verdict without a point of view: the same object serves both sides, so they can't disagree."""

    kind: Kind
    rule: str
    reason: str
    full: bool = False
    source: Side | None = None
    policy: str = ""


def decide(mine: Side, peer: Side) -> Verdict:
    """Compare two copies at the handshake; decide(peer, mine) always gives the mirror image."""
    one, other = sorted((mine, peer), key=lambda side: side.node)
    if one.node == other.node:
        why = f"both nodes call themselves {one.node}: start one of them with another --node."
        finding = _refused("same-name", why)
    else:
        finding = _guard(one, other, _first_row(one, other))
    kind, size_bytes = finding.kind, min(mine.size_bytes, peer.size_bytes)
    if finding.source is not None:
        kind = Kind.SOURCE if finding.source is mine else Kind.TARGET
        size_bytes = finding.source.size_bytes
    return Verdict(kind, finding.full, finding.rule, finding.reason, size_bytes, finding.policy)


# ---- the table: each row gives a finding, or None when it does not apply.  Rows are asked once, with the
# nodes in the order of their names; a row that is not symmetrical looks at both orders itself.

_Row = Callable[[Side, Side], _Finding | None]


def _first_row(one: Side, other: Side) -> _Finding:
    for row in _TABLE:
        finding = row(one, other)
        if finding is not None:
            return finding
    return _Finding(
        Kind.UNRELATED,
        "unrelated",
        f"the data of {one.node} and {other.node} have nothing in common: if this is the right peer, run "
        "'replicactl create-md --force' on the node whose data are to be overwritten.",
        full=True,
    )


def _both_new(one: Side, other: Side) -> _Finding | None:
    """Both just created: connected, both Inconsistent, wait for `promote --force`."""
    if not (one.blank and other.blank):
        return None
    return _Finding(
        Kind.BOTH_NEW,
        "both-new",
        f"{one.node} and {other.node} are both new: run 'replicactl promote --force' once on one of them.",
    )


def _one_new(one: Side, other: Side) -> _Finding | None:
    """One just created: the other is source, full sync."""
    if one.blank == other.blank:
        return None
    new, source = (one, other) if one.blank else (other, one)
    return _sync("one-new", source, new, f"{new.node} is new", full=True)


def _same_current_inconsistent(one: Side, other: Side) -> _Finding | None:
    """Same current, one Inconsistent (invalidated: all its bits are set): the other is source, by bitmap."""
    if one.generations.current != other.generations.current or one.incomplete == other.incomplete:
        return None
    bad, good = (one, other) if one.incomplete else (other, one)
    why = f"both have the same generation and {bad.node} is Inconsistent"
    return _sync("same-current-inconsistent", good, bad, why)


def _same_current(one: Side, other: Side) -> _Finding | None:
    """Same current: the first of these that holds for one side only makes it source, by AL ∪ bitmap.

    Not being attached, Primary now, promoted without the peer (not crashed since, or even so), crashed as Primary,
    having a base, having dirty blocks; when something holds for both, the lower node name.  None of it: in sync.
    Two current Primaries are a split brain.

    A copy that ran on unbroken since both were in sync comes before a crashed Primary's (DRBD: after): the crash may
    have been a power cut and have cost what was acknowledged and not flushed, and the survivor has all of it.

    Promoted without the peer comes before crashed: that copy was flushed before it served, so it has durably all that
    was ever acknowledged in this generation, while the crash may have cost the other one what it had not flushed.

    Primary and crashed Primary come before the base (in DRBD: after): with equal generations a base is only
    left over from a resync that the other side had already finished, so the other side's data are complete,
    and what a Primary did since then may exist on its side only.
    """
    if one.generations.current != other.generations.current:
        return None
    if one.serving and other.serving:
        why = f"{one.node} and {other.node} were both promoted while they were apart"
        return _split_brain("same-current-both-primary", one, other, why, full=False)
    if one.attaching != other.attaching:
        disk, source = (one, other) if one.attaching else (other, one)
        return _sync("same-current-attaching", source, disk, f"{disk.node} attaches its disk")
    if one.ahead != other.ahead:
        crashed, survivor = (one, other) if one.ahead else (other, one)
        if survivor.unbroken and not crashed.serving:
            why = f"{crashed.node} may have lost in its crash what {survivor.node}, which ran on, still has"
            return _sync("same-current-unbroken", survivor, crashed, why)
    tests: tuple[tuple[str, str, Callable[[Side], bool]], ...] = (
        ("same-current-primary", "is Primary", lambda side: side.serving),
        (
            "same-current-promoted-alone",
            "was promoted without its peer",
            lambda side: side.promoted_alone and not side.ahead,
        ),
        ("same-current-promoted-crashed", "was promoted without its peer", lambda side: side.promoted_alone),
        ("same-current-crashed-primary", "may hold writes the peer lost", lambda side: side.ahead),
        ("same-current-base", "has not closed its last resync", lambda side: side.generations.base != 0),
        ("same-current-dirty", "has dirty blocks", lambda side: side.dirty > 0),
    )
    for rule, what, holds in tests:
        if not holds(one) and not holds(other):
            continue
        source, target = (one, other) if holds(one) else (other, one)  # both: the lower name, which is `one`
        both = " (so does the other; the lower name wins)" if holds(target) else ""
        return _sync(rule, source, target, f"both have the same generation and {source.node} {what}{both}")
    why = f"{one.node} and {other.node} have the same generation and no dirty blocks."
    return _Finding(Kind.IN_SYNC, "same-current", why)


def _behind_by_base(one: Side, other: Side) -> _Finding | None:
    """My current = peer's base, or the mirror: the one behind is target, by bitmap."""
    one_behind = one.generations.current == other.generations.base
    other_behind = other.generations.current == one.generations.base
    return _behind("current-is-base", one, other, one_behind, other_behind, full=False)


def _behind_by_history(one: Side, other: Side) -> _Finding | None:
    """My current in peer's history, or the mirror: the one behind is target, full sync."""
    one_behind = one.generations.current in other.generations.history
    other_behind = other.generations.current in one.generations.history
    return _behind("current-in-history", one, other, one_behind, other_behind, full=True)


def _same_base(one: Side, other: Side) -> _Finding | None:
    """Same non-zero base, different current: split brain, resolvable by both bitmaps OR-ed."""
    if one.generations.base == 0 or one.generations.base != other.generations.base:
        return None
    why = f"{one.node} and {other.node} both have changes of their own since they were last in sync"
    return _split_brain("same-base", one, other, why, full=False)


def _shared_history(one: Side, other: Side) -> _Finding | None:
    """Only history in common: split brain, resolvable by full sync."""
    if not _past(one.generations) & _past(other.generations):
        return None
    why = f"{one.node} and {other.node} have both changed since the last generation they share"
    return _split_brain("shared-history", one, other, why, full=True)


_TABLE: Final[tuple[_Row, ...]] = (
    _both_new,
    _one_new,
    _same_current_inconsistent,
    _same_current,
    _behind_by_base,
    _behind_by_history,
    _same_base,
    _shared_history,
)


# ---- what the rows share


def _past(generations: Generations) -> set[int]:
    return {generations.base, *generations.history} - {0}


def _refused(rule: str, reason: str) -> _Finding:
    return _Finding(Kind.REFUSED, rule, reason)


def _sync(rule: str, source: Side, target: Side, why: str, full: bool = False, policy: str = "") -> _Finding:
    extent = "in full" if full else "by bitmap"
    reason = f"{why}: {target.node} is synced from {source.node}, {extent}."
    return _Finding(Kind.SOURCE, rule, reason, full, source, policy)


def _behind(rule: str, one: Side, other: Side, one_behind: bool, other_behind: bool, full: bool) -> _Finding | None:
    if one_behind and other_behind:  # no history of ours leads there: metadata was copied or restored
        why = f"{one.node} and {other.node} each look older than the other"
        return _split_brain("contradiction", one, other, why, full=True, doubt="their metadata contradict each other")
    if not one_behind and not other_behind:
        return None
    old, new = (one, other) if one_behind else (other, one)
    return _sync(rule, new, old, f"the data of {old.node} are older", full)


def _newer_is_inconsistent(new: Side, old: Side) -> _Finding:
    """The newer data have no complete copy: only an operator may give them up for older, complete ones."""
    if new.discard and not new.serving:
        return _sync("discard-inconsistent", old, new, f"{new.node} discards its newer, incomplete data", True)
    return _refused(
        "newer-is-inconsistent",
        f"{new.node} has newer data than {old.node} but is Inconsistent: to give them up, make {new.node} "
        "Secondary and run 'replicactl connect --discard-my-data' on it.",
    )


def _split_brain(rule: str, one: Side, other: Side, why: str, full: bool, doubt: str = "") -> _Finding:
    """A split brain; or a resync, when exactly one side may be discarded and is no Primary.

    What the operator has said comes before what the configuration says (`replica.split_brain`; `doubt`: see there).
    """
    if one.discard != other.discard:
        loser, winner = (one, other) if one.discard else (other, one)
        if not loser.serving and (loser.incomplete or not winner.incomplete):
            return _sync(f"{rule}-discard", winner, loser, f"{why} and {loser.node} discards its own", full)
        advice = "make it Secondary first" if loser.serving else f"{winner.node} is Inconsistent"
        return _Finding(Kind.SPLIT_BRAIN, rule, f"{why}, and {loser.node} can't discard its own: {advice}.", full)
    if one.discard:
        return _Finding(Kind.SPLIT_BRAIN, rule, f"{why}: both discard of which only one may.", full)
    ruling = split_brain.ruling(one, other, full=full, doubt=doubt)
    if ruling.words:
        why = f"{why}, and {ruling.words}"
    if ruling.loser is not None:
        winner = other if ruling.loser is one else one
        return _sync(f"{rule}-{ruling.policy}", winner, ruling.loser, why, full, ruling.policy)
    advice = "run 'replicactl connect --discard-my-data' on the node whose changes are to be lost"
    return _Finding(Kind.SPLIT_BRAIN, rule, f"{why}: {advice}.", full)


def _guard(one: Side, other: Side, finding: _Finding) -> _Finding:
    """The rules no row may break: bad copies, Primaries, attached disks, sizes."""
    if finding.kind in (Kind.SPLIT_BRAIN, Kind.UNRELATED, Kind.REFUSED):
        return finding
    if one.is_primary and other.is_primary:
        return _refused("two-primaries", f"{one.node} and {other.node} are both Primary: demote one of them.")
    if one.incomplete and other.incomplete and finding.kind is not Kind.BOTH_NEW:
        why = f"{one.node} and {other.node} both have no complete copy"
        advice = "run 'replicactl promote --force' on the better one"
        return _Finding(Kind.NO_GOOD_COPY, "no-good-copy", f"{why}: {advice}.")
    source = finding.source
    if source is None:
        larger, smaller = sorted((one, other), key=lambda side: -side.size_bytes)
        return _too_small(larger, smaller) if larger.serving and _sizes_differ(one, other) else finding
    target = other if source is one else one
    if source.incomplete:
        return _guard(one, other, _newer_is_inconsistent(source, target))
    if source.attaching:
        return _refused(
            "attached-disk-is-newer",
            f"the disk attached on {source.node} has newer data than {target.node}, which serves now: "
            f"make {source.node} Secondary and connect again.",
        )
    if target.serving and not target.incomplete:
        return _refused(
            "primary-would-be-target",
            f"{target.node} is Primary but would be overwritten by {source.node} ({finding.rule}): make "
            f"{target.node} Secondary and connect again.",
        )
    if source.size_bytes > max(target.size_bytes, target.room_bytes):
        return _too_small(source, target)
    return finding


def _sizes_differ(one: Side, other: Side) -> bool:
    return one.size_bytes != other.size_bytes


def _too_small(larger: Side, smaller: Side) -> _Finding:
    return _refused(
        "size",
        f"the volume of {smaller.node} has {smaller.size_bytes} bytes but {larger.node}'s has "
        f"{larger.size_bytes}: give {smaller.node} a backing of that size and run 'replicactl create-md --force'.",
    )


# ---- changes


def _checked(new_id: int, generations: Generations) -> int:
    known = {generations.current, generations.base, *generations.history}
    if not 0 < new_id <= MAX_ID or new_id in known:
        raise ValueError(f"{new_id:#x} is not a new generation id")
    return new_id


def _history(ids: Iterable[int], *without: int) -> tuple[int, ...]:
    kept = [one for one in dict.fromkeys(ids) if one and one not in without]
    return tuple(kept[:HISTORY_LENGTH])


def started_alone(generations: Generations, new_id: int) -> Generations:
    """The first write without the peer is about to be acknowledged (or: first promotion of a new copy).

    The old current becomes the base unless there is one already (an unfinished resync, or a second new
    generation while apart): the bitmap still is relative to that one.  ValueError: `new_id` is 0 or not new.
    """
    new = _checked(new_id, generations)
    if generations.base == 0:
        return Generations(new, generations.current, generations.history)
    history = _history((generations.current, *generations.history), new, generations.base)
    return Generations(new, generations.base, history)


def sync_started_source(generations: Generations, new_id: int) -> Generations:
    """The source has a base from now on: its old one, or else `new_id` (ValueError if 0 or not new)."""
    if generations.base:
        return generations
    return replace(generations, base=_checked(new_id, generations))


def sync_started_target(generations: Generations, base_of_source: int) -> Generations:
    """The target takes the source's base for its current one; its own go into history.

    ValueError when the source has no base.
    """
    if not 0 < base_of_source <= MAX_ID:
        raise ValueError("a resync needs the source's base generation")
    old = (generations.current, generations.base, *generations.history)
    return Generations(base_of_source, 0, _history(old, base_of_source))


def sync_finished_source(generations: Generations) -> Generations:
    """The target has recorded the end of the resync: both copies are equal, the base is history."""
    history = _history((generations.base, *generations.history), generations.current)
    return Generations(generations.current, 0, history)


def sync_finished_target(generations: Generations, source_current: int, source_history: Iterable[int]) -> Generations:
    """The target is a full copy: the source's current one and its history, our own behind it.

    ValueError when the source has no current generation.
    """
    if not 0 < source_current <= MAX_ID:
        raise ValueError("a resync needs the source's current generation")
    own = (generations.current, generations.base)
    history = _history((*own, *source_history, *generations.history), source_current)
    return Generations(source_current, 0, history)
