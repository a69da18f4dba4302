"""The activity log: which 4 MiB extents may be written to without telling the disk first.

Pure: no I/O.  A Primary writes only to extents that the durable log names, so after a crash the extents of
the log (and the bitmap) hold every block that may differ from the peer.  The caller does the disk part: it
asks for a `plan`, writes `plan.extents` durably, then calls `commit`.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import xxhash

EXTENT_SHIFT: Final = 22
EXTENT_SIZE: Final = 1 << EXTENT_SHIFT
DEFAULT_SLOTS: Final = 1237
MAX_EXTENT: Final = (1 << 32) - 1

_MAGIC = b"RplcaAL\n"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQ")
_DIGEST_BYTES = 16
HEADER_BYTES: Final = _HEADER.size + _DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class Plan:
    """One transaction: extents to insert, extents evicted for them, all extents of the new snapshot."""

    insert: tuple[int, ...]
    evict: tuple[int, ...]
    extents: tuple[int, ...]


class ActivityLog:
    """The extents that are hot now; at most `slots` of them (ValueError when that is not positive).

    `hot` maps extent -> flush epoch of the last write to it.  The write path reads and writes it directly:
    `if extent in hot: hot[extent] = epoch`.  An epoch counts as settled when every write of it is finished
    and flushed on this disk and (on the peer, or its bits are durable here): only then may the extent be
    evicted.
    """

    def __init__(self, slots: int = DEFAULT_SLOTS) -> None:
        if slots < 1:
            raise ValueError(f"an activity log needs at least one slot, not {slots}")
        self.slots = slots
        self.hot: dict[int, int] = {}
        self._open: Plan | None = None

    def plan(self, wanted: Iterable[int], settled_epoch: int) -> Plan | None:
        """Make room for the `wanted` extents that are not hot; None: a newer epoch has to settle first.

        The evicted extents leave `hot` at once: a write to one of them while the transaction is on its way to
        the disk is a miss and waits for the next one.  The inserted ones become hot with `commit` only.
        Oldest are evicted first, and some more than needed, so that the next misses need no search; extents
        in `wanted` stay. A plan with nothing to insert needs no transaction, but is to be committed too.
        ValueError: more extents wanted than there are slots, or one that is no u32. RuntimeError: the plan
        before this one was neither committed nor abandoned.
        """
        if self._open is not None:
            raise RuntimeError("the activity log has a transaction under way")
        wanted_set = set(wanted)
        if len(wanted_set) > self.slots:
            raise ValueError(f"{len(wanted_set)} extents at once, but the activity log has {self.slots} slots")
        if wanted_set and not (min(wanted_set) >= 0 and max(wanted_set) <= MAX_EXTENT):
            raise ValueError(f"an extent number outside 0 … {MAX_EXTENT}")
        hot = self.hot
        insert = sorted(extent for extent in wanted_set if extent not in hot)
        needed = len(hot) + len(insert) - self.slots
        evict: list[int] = []
        if needed > 0:
            settled = [
                (epoch, extent) for extent, epoch in hot.items() if epoch <= settled_epoch and extent not in wanted_set
            ]
            if len(settled) < needed:
                return None
            settled.sort()
            evict = [extent for _, extent in settled[: needed + self.slots // 16]]
            for extent in evict:
                del hot[extent]
        self._open = Plan(tuple(insert), tuple(evict), tuple(sorted([*hot, *insert])))
        return self._open

    def commit(self, plan: Plan, epoch: int) -> None:
        """The snapshot `plan.extents` is durable: its inserted extents are hot, last written in `epoch`."""
        self._close(plan)
        for extent in plan.insert:
            self.hot[extent] = epoch

    def abandon(self, plan: Plan) -> None:
        """The transaction failed: nothing becomes hot.  (The evicted extents stay out, they had settled.)"""
        self._close(plan)

    def _close(self, plan: Plan) -> None:
        if plan is not self._open:
            raise RuntimeError("this is not the activity log's transaction under way")
        self._open = None

    def clear(self) -> None:
        """Forget every extent (demote: all is flushed on both sides; or the disk is gone)."""
        self.hot.clear()

    @staticmethod
    def encode(extents: Iterable[int], sequence: int, slot_size_bytes: int) -> bytes:
        """One copy of a snapshot, zero-padded to `slot_size_bytes`; ValueError when it does not fit."""
        ordered = sorted(extents)
        size = HEADER_BYTES + 4 * len(ordered)
        if size > slot_size_bytes:
            raise ValueError(f"{len(ordered)} extents do not fit into a log copy of {slot_size_bytes} bytes")
        header = _HEADER.pack(_MAGIC, _VERSION, len(ordered), sequence)
        body = struct.pack(f"<{len(ordered)}I", *ordered)
        data = header + xxhash.xxh3_128_digest(header + body) + body
        return data + bytes(slot_size_bytes - size)

    @staticmethod
    def decode(data: bytes) -> tuple[int, list[int]] | None:
        """(sequence, extents) of one copy; None when it is empty, torn, damaged or of another version."""
        if len(data) < HEADER_BYTES:
            return None
        magic, version, count, sequence = _HEADER.unpack_from(data)
        end = HEADER_BYTES + 4 * count
        if magic != _MAGIC or version != _VERSION or end > len(data):
            return None
        body = data[HEADER_BYTES:end]
        if data[_HEADER.size : HEADER_BYTES] != xxhash.xxh3_128_digest(data[: _HEADER.size] + body):
            return None
        return sequence, list(struct.unpack(f"<{count}I", body))


def copy_bytes(slots: int) -> int:
    """Size of one copy of the log on disk: header and `slots` extents, rounded up to 4096."""
    return -(-(HEADER_BYTES + 4 * slots) // 4096) * 4096


@dataclass(frozen=True, slots=True)
class Recovered:
    """What the four copies on disk say: the newest sequence, the extents, and which copies are damaged."""

    sequence: int
    extents: frozenset[int] | None
    damaged: tuple[int, ...]


def recover(copies: list[bytes]) -> Recovered:
    """The extents that may have been written to, from the copies in disk order (pair 0 twice, pair 1 twice).

    Transaction n writes both copies of pair n & 1.  The newest valid snapshot is enough: a later transaction
    that is only partly on disk never completed, so no write relied on it.  Where some copy is damaged we
    can't tell a torn write from a disk that lost data, and take the union of all valid copies: too many
    extents only cost a longer resync.  `extents` None: no copy is valid (a new log has valid copies), so
    everything may have been written.
    """
    decoded = [ActivityLog.decode(copy) for copy in copies]
    valid = [snapshot for snapshot in decoded if snapshot is not None]
    blank = [not any(copy) for copy in copies]
    damaged = tuple(at for at, one in enumerate(decoded) if one is None and not blank[at])
    if not valid:
        return Recovered(0, None, damaged)
    newest = max(sequence for sequence, _ in valid)
    extents: set[int] = set()
    for sequence, listed in valid:
        if sequence == newest or damaged:
            extents.update(listed)
    return Recovered(newest, frozenset(extents), damaged)
