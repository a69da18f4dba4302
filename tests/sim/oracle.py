"""What must be true. The oracle knows every write, sees both disks, and decodes the durable metadata with a reader of
its own (`tests.sim.on_disk`); it never asks the node's memory what is safe.

Each 512-byte sector has a log of writes, which ends at the newest one that is known to be flushed:

    pending   asked for, not answered
    maybe     failed, or its node died before the answer: may be there or not, until a later write is acknowledged
    acked     acknowledged; `holders` are the machines whose cache or disk has it and that may lose it in a power cut
    flushed   covered by a later FLUSH that was answered, or written with FUA

A write is *superseded* by one that was issued after its end and is acknowledged. Then:

Ack         when a write is acknowledged (protocol C), both machines have applied it, or one whose durable superblock
            says that the other is out of sync: the Primary, or the other one when it stands in for the Primary's disk.
Flush       when a FLUSH or FUA is answered, what it covers is durable on the machine that leads and, unless its
            superblock says that the other is out of sync or that it was promoted without it, on the other one.
Reads       show a value that is not superseded. So does the whole image of a node that becomes Primary.
Loss        an acked write may only go when every holder has lost its cache (power cut, or a failed flush that dropped
            the pages) before it was durable there; a flushed one never. While one in-sync machine runs on, all that it
            holds stays (unless the operator has called it bad): a crashed Primary that comes back does not
            overwrite it.
Cover       whenever anything durable changes: the sectors that may differ between the copies after a power cut of both
            lie inside the durable activity logs and bitmaps of the two, or the verdict of the real decision table over
            the durable superblocks asks for a full resync.
Direction   whenever a superblock changes: the copy that would be source after a power cut of both has every flushed
            write. A copy that has acknowledged writes of its own is not overwritten unless the operator said so.
Half copied a node that begins to take resync data is durably Inconsistent.
Hooks       before-resync-target is asked while the copy is not Inconsistent, on record and by the node's own account
            (the record of its completion can still be under way); when it refuses, that link's resync does not begin.
Policy      (tests.sim.policies) after a split brain nothing is discarded but by the operator's word or by what the
            seed's policies allow; a Primary is never overwritten.
One Primary where the operator forbids two, and no split brain there.
Copies      are byte-identical once both are Established and quiet.
Verify      finds no difference, whatever clients do meanwhile, as long as no disk has failed in any way.
"""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING

from replica import bitmap
from replica.generation import Generations, Kind, Side, Verdict, decide
from replica.hooks import Event
from replica.split_brain import Policies
from replica.states import Replication
from tests.sim.disk import SECTOR
from tests.sim.on_disk import Reader, Unreadable
from tests.sim.policies import IN_TOUCH, PolicyJudge
from tests.sim.trace import Trace, Violation

if TYPE_CHECKING:
    from tests.sim.node import Machine

PENDING, MAYBE, ACKED, FLUSHED = range(4)


class Entry:
    """One write to one sector."""

    __slots__ = ("applied", "end", "holders", "issue", "level", "lost", "ran", "sector", "term", "value")

    def __init__(self, sector: int, value: int, issue: int) -> None:
        self.sector = sector
        self.value = value
        self.issue = issue
        self.end: int | None = None
        self.level = PENDING
        self.applied = 0  # bits of the machines in whose cache it has been
        self.holders = 0
        self.lost = 0
        self.ran: tuple[int, ...] = ()  # which incarnation of each machine ran when it was acknowledged
        self.term = 0  # the time as Primary of the node that acknowledged it


class Durable:
    """The durable metadata of one machine, decoded when they have changed."""

    def __init__(self, machine: "Machine", policies: Policies | None = None, *, cached: bool = False) -> None:
        """`cached`: as a process that is started now would read them (for the operator)."""
        self.machine = machine
        self._policies = policies or Policies()
        self._cached = cached
        image = machine.metadata.cache if cached else machine.metadata.durable
        self._reader = Reader(image, sector_bits=bitmap.SECTOR_BITS)
        self._version = -1
        self._covers: tuple[object, ...] = ()
        self.superblock: SimpleNamespace | None = None
        self.raw_superblock = b""
        self.cover = 0  # one bit for each block: the activity log's and the bitmap's
        self._side: Side | None = None
        self._side_of: tuple[bytes, int] = (b"", 0)

    def refresh(self) -> bool:
        """True when something may be different now."""
        disk = self.machine.metadata
        if not self._cached:
            if disk.durable_changes == self._version:
                return False
            self._version = disk.durable_changes
        reader = self._reader
        try:
            reader.read()
        except Unreadable:
            self.superblock, self.cover, self._covers = None, 0, ()
            return True
        superblock = self.superblock = reader.superblock
        self.raw_superblock = reader.raw
        covers = (reader.extents, reader.bits, superblock.blocks)
        if covers != self._covers:
            self._covers = covers
            self.cover = reader.bits | _blocks_of(reader.extents, superblock.blocks)
        return True

    @property
    def is_complete(self) -> bool:
        """Whether the superblock can be read and does not say Inconsistent."""
        return self.superblock is not None and not self.superblock.inconsistent

    def side(self) -> Side | None:
        """This copy as it would introduce itself after a power cut now."""
        superblock = self.superblock
        if superblock is None:
            return None
        if self._side is None or self._side_of != (self.raw_superblock, self.cover):
            self._side_of = (self.raw_superblock, self.cover)
            self._side = self._introduce(superblock)
        return self._side

    def _introduce(self, superblock: SimpleNamespace) -> Side:
        return Side(
            node=self.machine.name,
            generations=_generations(superblock),
            size_bytes=superblock.size_bytes,
            just_created=superblock.just_created,
            inconsistent=superblock.inconsistent,
            ahead=superblock.ahead or superblock.primary,
            promoted_alone=superblock.promoted_alone,
            parted_as_primary=superblock.parted_as_primary,
            dirty=self.cover.bit_count(),
            policies=self._policies,
            room_bytes=self.machine.data.size_bytes,
        )


def _generations(superblock: SimpleNamespace) -> Generations:
    ids = superblock.generations
    return Generations(ids.current, ids.base, tuple(ids.history))


def _blocks_of(extents: Iterable[int] | None, blocks: int) -> int:
    """One bit for each of a volume's blocks that lies in these extents (None: in any)."""
    full = (1 << blocks) - 1
    if extents is None:
        return full
    shift = _extent_blocks()
    mask = 0
    for extent in extents:
        mask |= ((1 << shift) - 1) << (extent * shift)
    return mask & full


def _extent_blocks() -> int:
    from replica import activity_log

    return activity_log.EXTENT_SIZE >> 12


_WHOLE_BLOCK = bytes.maketrans(b"01", b"\0\xff")


def _sectors_of(blocks: int) -> int:
    """One bit for each sector of these blocks: eight for one."""
    return int.from_bytes(f"{blocks:b}".encode().translate(_WHOLE_BLOCK), "big")


class Lineage:
    """The history of the data as one node's clients see it; shared unless a split brain was accepted."""

    def __init__(self) -> None:
        self.log: dict[int, list[Entry]] = {}
        self.acked: dict[Entry, None] = {}
        self.acks = 0

    def add(self, entry: Entry) -> None:
        entries = self.log.get(entry.sector)
        if entries is None:
            zeroes = Entry(entry.sector, 0, -1)
            zeroes.level, zeroes.end = FLUSHED, 0
            entries = self.log[entry.sector] = [zeroes]
        entries.append(entry)

    def holds(self, entry: Entry, value: int) -> bool:
        """Whether a sector of this value has the write or one that is not older."""
        entries = self.log[entry.sector]
        if entries[-1].value == value:
            return True
        issue = entry.issue
        return any(e.value == value and (e.end is None or e.end > issue) for e in entries)

    def allowed(self, sector: int, *, level: int = ACKED, before: int | None = None, term: int = -1) -> set[int]:
        """Values the sector may have, as far as writes of at least `level`, or acknowledged in `term`, that ended by
        `before` force it.
        """
        entries = self.log.get(sector)
        if entries is None:
            return {0}
        newest = max(
            (
                e.issue
                for e in entries
                if (e.level >= level or e.term == term) and (before is None or (e.end or 0) <= before)
            ),
            default=-1,
        )
        return {e.value for e in entries if e.end is None or e.end > newest}  # the last one's is among them

    def newest(self, sector: int) -> int:
        """The value of the newest write, which is always allowed."""
        entries = self.log.get(sector)
        return 0 if entries is None else entries[-1].value

    def prune(self, sector: int) -> None:
        entries = self.log[sector]
        if len(entries) == 1:
            return
        newest = max((e.issue for e in entries if e.level == FLUSHED), default=-1)
        self.log[sector] = [e for e in entries if e.end is None or e.end > newest or e.issue >= newest]


class Oracle:
    """Watches one run."""

    def __init__(
        self,
        machines: "tuple[Machine, Machine]",
        trace: Trace,
        *,
        protocol: str,
        split_brain: bool,
        policies: dict[str, Policies],
    ) -> None:
        self.machines = machines
        self.trace = trace
        self.protocol = protocol
        self.split_brain = split_brain
        self.violation: Violation | None = None
        self.clock = 0
        self.active_reads = 0
        self.checks = 0
        self.discarding: dict[str, None] = {}
        #: Nodes that the operator promotes whatever they are; True: by force, because they are incomplete.
        self.accepted_fork: dict[str, bool] = {}
        #: Machines whose disk has failed, or whose copy the operator has declared bad.
        self.given_up: dict[str, None] = {}
        shared = Lineage()
        self.lineage = {machine.name: shared for machine in machines}
        self.durable = {machine.name: Durable(machine, policies[machine.name]) for machine in machines}
        self.judge = PolicyJudge(self.durable, policies)
        self._primary: dict[str, bool] = {machine.name: False for machine in machines}
        self._terms = {machine.name: 0 for machine in machines}
        self._replication: dict[str, str] = {}
        self._refused: dict[str, int] = {}  # the session in which a hook said no to the resync
        self._pending: dict[int, list[Entry]] = {}  # value -> entries of the write, in order of sectors
        self._asked_of: dict[Entry, Machine] = {}  # pending writes
        self._zeroes: dict[int, list[Entry]] = {}  # sector -> pending writes of zeroes
        self._differ = 0  # one bit for each sector
        #: The sectors that must not differ: one bit each; 0 while the verdict would be a full resync.
        self._uncovered = 0
        self._judged: tuple[object, ...] = ()
        self._verdict: Verdict | None = None
        for machine in machines:
            machine.data.wrote = self._wrote_by(machine)
            machine.data.persisted = self._persisted
            machine.data.lost = self._lost_by(machine)
            machine.metadata.persisted = self._metadata_persisted
        self._metadata_persisted(())

    def fail(self, rule: str, text: str) -> None:
        """A rule is broken: the run ends here."""
        if self.violation is None:
            self.trace.note(f"VIOLATION {rule}: {text}")
            self.violation = Violation(f"{rule}: {text}")
            self.trace.world.halted = True

    def other(self, machine: "Machine") -> "Machine":
        return self.machines[1] if machine is self.machines[0] else self.machines[0]

    # ── what the disks do ────────────────────────────────────────────────────────────────────────────────────

    def _wrote_by(self, machine: "Machine"):  # type: ignore[no-untyped-def]
        bit, values, pending, zeroes = machine.bit, machine.data.values, self._pending, self._zeroes

        def wrote(first: int, count: int) -> None:
            for sector, value in enumerate(values[first : first + count].tolist(), first):
                if value:
                    entries = pending.get(value)
                    if entries is not None:
                        entries[sector - entries[0].sector].applied |= bit
                elif sector in zeroes:
                    for entry in zeroes[sector]:
                        entry.applied |= bit
            self._may_differ(((1 << count) - 1) << first)

        return wrote

    def _lost_by(self, machine: "Machine"):  # type: ignore[no-untyped-def]
        def lost(sectors: list[int]) -> None:
            gone = dict.fromkeys(sectors)
            for lineage in self._lineages():
                for entry in list(lineage.acked):
                    if (
                        entry.holders & machine.bit
                        and entry.sector in gone
                        and not self._holds(lineage, machine, entry)
                    ):
                        entry.holders &= ~machine.bit
                        entry.lost |= machine.bit
                        if not entry.holders:
                            self._demote(lineage, entry)

        return lost

    def _holds(self, lineage: Lineage, machine: "Machine", entry: Entry) -> bool:
        """Whether this machine's image has this write or one that is not older."""
        return lineage.holds(entry, machine.data.values[entry.sector])

    @staticmethod
    def _demote(lineage: Lineage, entry: Entry) -> None:
        """It was acknowledged, but has been lost in a way that is allowed."""
        if entry.level == ACKED:
            entry.level = MAYBE
            lineage.acked.pop(entry, None)

    def _persisted(self, sectors: Iterable[int]) -> None:
        one, two = (machine.data for machine in self.machines)
        same = different = 0
        for sector in sectors:
            start = sector * SECTOR
            stop = start + SECTOR
            if sector in one.dirty or sector in two.dirty or one.durable[start:stop] != two.durable[start:stop]:
                different |= 1 << sector
            else:
                same |= 1 << sector
        self._differ &= ~same
        self._may_differ(different)

    # ── Cover and Direction ──────────────────────────────────────────────────────────────────────────────────

    def _metadata_persisted(self, _sectors: Iterable[int]) -> None:
        one, two = (self.durable[machine.name] for machine in self.machines)
        raw = (one.raw_superblock, two.raw_superblock)
        complete = [one.is_complete, two.is_complete]
        if not (one.refresh() | two.refresh()) or self.violation is not None:
            return
        for machine, durable, before in zip(self.machines, (one, two), complete, strict=True):
            if before and not durable.is_complete:
                self.judge.inconsistent(machine, self.other(machine))
        mine, peer = one.side(), two.side()
        if mine is None or peer is None:
            # A new copy being made, or damage that the fault model keeps to one copy.
            self._uncovered, self._judged = 0, ()
            return
        self.checks += 1
        found = (mine, peer, one.cover, two.cover)
        verdict = self._verdict
        if verdict is None or found != self._judged:
            self._judged = found
            verdict = self._verdict = decide(mine, peer)
            by_bitmap = verdict.kind in (Kind.SOURCE, Kind.TARGET) and not verdict.full
            every = (1 << max(mine.size_bytes, peer.size_bytes) // SECTOR) - 1
            limited = by_bitmap or verdict.kind is Kind.IN_SYNC
            self._uncovered = every & ~_sectors_of(one.cover | two.cover) if limited else 0
        if self._differ & self._uncovered:
            self._fail_cover(self._differ & self._uncovered, f"would be {verdict.kind} ({verdict.rule})")
            return
        if (one.raw_superblock, two.raw_superblock) != raw:
            self._check_direction(verdict.kind, verdict.rule)

    def leave(self, machine: "Machine", offset: int, length: int) -> None:
        """Behind the volume's end this machine's disk has something that the other's has not. (Of write number 0, which
        is nobody's; only that both copies must become the same tells it from zeroes.)
        """
        machine.data.leave(offset, (bytes(8) + b"\xee" * 8) * (length // 16))
        self._differ |= ((1 << length // SECTOR) - 1) << offset // SECTOR

    def _may_differ(self, sectors: int) -> None:
        """These (one bit for each) may differ from here on."""
        self._differ |= sectors
        if sectors & self._uncovered:
            self._fail_cover(sectors & self._uncovered, "changed")

    def _fail_cover(self, sectors: int, why: str) -> None:
        sector = (sectors & -sectors).bit_length() - 1
        words = "; ".join(
            f"{m.name} durable {self.value_of(m.data.durable, sector):x} cache {self.value_of(m.data.cache, sector):x}"
            f"{' dirty' if sector in m.data.dirty else ''}"
            for m in self.machines
        )
        self.fail("Cover", f"sector {sector} may differ and is in no durable log or bitmap ({why}): {words}")

    def _check_direction(self, kind: Kind, rule: str) -> None:
        if kind not in (Kind.SOURCE, Kind.TARGET, Kind.IN_SYNC) or len(self._lineages()) > 1 or self.accepted_fork:
            return
        for machine, sources in ((self.machines[0], Kind.SOURCE), (self.machines[1], Kind.TARGET)):
            if kind is Kind.IN_SYNC or kind is sources:
                lineage = self.lineage[machine.name]
                values = machine.data.durable_values
                for sector, entries in lineage.log.items():
                    value = values[sector]
                    # The newest write is always allowed.
                    if entries[-1].value != value and value not in lineage.allowed(sector, level=FLUSHED):
                        self.fail(
                            "Direction",
                            f"{machine.name} would be source after a power cut of both ({rule}) and lacks a flushed "
                            f"write to sector {sector}: it has {value:x}",
                        )
                        return

    # ── what clients do ──────────────────────────────────────────────────────────────────────────────────────

    @staticmethod
    def value_of(image: bytes | bytearray, sector: int) -> int:
        place = sector * SECTOR
        return int.from_bytes(image[place : place + 8], "little")

    def issue(self, machine: "Machine", first: int, count: int, value: int) -> list[Entry]:
        """A write (value 0: zeroes) is about to be asked of this machine."""
        self.clock += 1
        entries = [Entry(sector, value, self.clock) for sector in range(first, first + count)]
        lineage = self.lineage[machine.name]
        for entry in entries:
            lineage.add(entry)
            self._asked_of[entry] = machine
            if value == 0:
                self._zeroes.setdefault(entry.sector, []).append(entry)
        if value:
            self._pending[value] = entries
        return entries

    def _ended(self, entries: list[Entry]) -> None:
        self.clock += 1
        for entry in entries:
            entry.end = self.clock
            self._asked_of.pop(entry, None)
            if not entry.value:
                self._zeroes[entry.sector].remove(entry)
                if not self._zeroes[entry.sector]:
                    del self._zeroes[entry.sector]
        if entries[0].value:
            self._pending.pop(entries[0].value, None)

    def failed(self, entries: list[Entry]) -> None:
        """It was answered with an error, or never."""
        self._ended(entries)
        for entry in entries:
            entry.level = MAYBE

    def acknowledged(self, machine: "Machine", entries: list[Entry], *, durable: bool = False) -> None:
        """It was answered with success."""
        peer = self.other(machine)
        lineage = self.lineage[machine.name]
        for entry in entries:
            if entry.sector not in lineage.log:  # its history has been replaced since it was asked
                lineage.add(entry)
        # (What both have is nobody's own, however late the answer is.)
        lineage.acks += not all(self._holds(lineage, peer, entry) for entry in entries)
        if not machine.is_primary:
            self.fail("One Primary", f"{machine.name} answered a write and is not Primary")
        if not self.split_brain and peer.is_primary:
            self.fail("One Primary", f"{machine.name} answered a write while {peer.name} is Primary as well")
        self._ended(entries)
        leader, follower, alone = self._who_leads(machine)
        # What the other one has applied before the two parted may be settled, and is not the leader's own then.
        own = [entry for entry in entries if not entry.applied & follower.bit]
        self.judge.acknowledged(leader, own, alone=alone)
        for entry in entries:
            entry.level, entry.term = ACKED, self._terms[machine.name]
            # Applied, or what overlaps it was applied instead, in an order that was never promised.
            kept = {one.bit: self._holds(lineage, one, entry) for one in self.machines}
            if not (entry.applied & leader.bit or kept[leader.bit]):
                self.fail(
                    "Ack",
                    f"{machine.name} answered write {entry.value:x} to sector {entry.sector} and {leader.name} has "
                    "not applied it",
                )
            with_follower = not alone and (entry.applied & follower.bit or kept[follower.bit])
            if not alone and not with_follower and self.protocol == "C":
                self.fail(
                    "Ack",
                    f"{machine.name} answered write {entry.value:x} to sector {entry.sector}: {follower.name} "
                    "has not applied it and is not on record as out of sync",
                )
            # A half-copied one is none to rely on, even if all that is missing is the record that it is complete.
            kept_by_follower = with_follower and self.durable[follower.name].is_complete
            applied = leader.bit | (follower.bit if kept_by_follower else 0)
            # A machine may have lost it again before the answer.
            entry.holders = sum(bit for bit, keeps in kept.items() if keeps and applied & bit)
            uncounted = (entry.applied | (follower.bit if kept[follower.bit] else 0)) & follower.bit & ~applied
            entry.lost = applied & ~entry.holders | uncounted
            entry.ran = tuple(one.incarnations for one in self.machines)
            lineage.acked[entry] = None
            if not entry.holders:
                self._demote(lineage, entry)
        if durable:
            self._check_durable(machine, entries, "FUA")

    def _who_leads(self, machine: "Machine") -> "tuple[Machine, Machine, bool]":
        """(whose copy answers for the clients of this Primary, the other, whether that one is on record as out of
        sync): its own, unless the other one has recorded that it goes on without the Primary's.
        """
        peer = self.other(machine)
        alone = self._recorded_alone(machine)
        through = self._works_through_peer(machine)
        if peer.is_primary or self.lineage[machine.name] is not self.lineage[peer.name]:
            return machine, peer, alone
        if through and not self.durable[machine.name].is_complete:
            return peer, machine, True
        # Half copied, it leads nobody; unless it led, and its disk has failed since.
        if not alone and self._recorded_alone(peer) and (self.durable[peer.name].is_complete or through):
            return peer, machine, True
        return machine, peer, alone

    def _recorded_alone(self, machine: "Machine") -> bool:
        durable = self.durable[machine.name]
        durable.refresh()
        return durable.superblock is not None and durable.superblock.peers[0].outdated

    def flush_issued(self, machine: "Machine") -> list[Entry]:
        return list(self.lineage[machine.name].acked)

    def flush_done(self, machine: "Machine", covered: list[Entry]) -> None:
        self._check_durable(machine, [entry for entry in covered if entry.level == ACKED], "FLUSH")

    def _check_durable(self, machine: "Machine", entries: list[Entry], what: str) -> None:
        lineage = self.lineage[machine.name]
        leader, follower, alone = self._who_leads(machine)
        required = [leader] if leader is not machine or (machine.resource and machine.resource.attached) else []
        superblock = self.durable[leader.name].superblock
        # Promoted without the other one: it outranks the other one, should that come back with less.
        outranks = superblock is not None and superblock.promoted_alone
        # In a split brain the other one's clients may have overwritten it since.
        if not alone and not outranks and len(self._lineages()) == 1:
            required.append(follower)
        for entry in entries:
            for one in required:
                value = one.data.durable_values[entry.sector]
                if not lineage.holds(entry, value):
                    self.fail(
                        "Flush",
                        f"{machine.name} answered a {what}, but {one.name} has {value:x} durable at sector "
                        f"{entry.sector} instead of {entry.value:x}",
                    )
                    return
            entry.level = FLUSHED
            lineage.acked.pop(entry, None)
        if not self.active_reads:
            for entry in entries:
                lineage.prune(entry.sector)

    def read_done(self, machine: "Machine", began: int, first: int, data: bytes) -> None:
        """A read that was asked for at clock `began` has shown these sectors."""
        lineage = self.lineage[machine.name]
        for index in range(len(data) // SECTOR):
            piece = data[index * SECTOR : (index + 1) * SECTOR]
            value = int.from_bytes(piece[:8], "little")
            if piece != piece[:16] * (SECTOR // 16) or (value and piece[8:12] != (first + index).to_bytes(4, "little")):
                self.fail("Reads", f"sector {first + index} on {machine.name} holds garbage: {piece[:16].hex()}")
            if value != lineage.newest(first + index):
                # Without a disk of its own it has lost nothing, and must not show what the other one has lost.
                term = self._terms[machine.name] if self._works_through_peer(machine) else -1
                allowed = lineage.allowed(first + index, before=began, term=term)
                if value not in allowed:
                    self._wrong("Reads", machine, first + index, value, allowed)
                    return

    def _wrong(self, rule: str, machine: "Machine", sector: int, value: int, allowed: set[int]) -> None:
        words = ", ".join(f"{one:x}" for one in sorted(allowed))
        self.fail(rule, f"sector {sector} on {machine.name} holds {value:x}, allowed are {words}")

    # ── what the nodes become ────────────────────────────────────────────────────────────────────────────────

    def _lineages(self) -> list[Lineage]:
        one, two = (self.lineage[machine.name] for machine in self.machines)
        return [one] if one is two else [one, two]

    def observe(self, machine: "Machine") -> None:
        """A state of this node has changed."""
        resource = machine.resource
        primary = machine.is_primary
        if resource is not None and resource.failed:
            self.given_up[machine.name] = None
        if primary and not self._primary[machine.name]:
            self._promoted(machine)
        self._primary[machine.name] = primary
        replication = str(resource.state.replication) if resource is not None else ""
        if replication != self._replication.get(machine.name):
            before = self._replication.get(machine.name)
            self._replication[machine.name] = replication
            # Going on after a pause is no beginning: it may even be complete, and only not be said so yet.
            if replication == Replication.SYNC_TARGET and before != Replication.PAUSED_SYNC_T:
                self._overwritten(machine)
            elif replication == Replication.ESTABLISHED:
                self.given_up.pop(machine.name, None)
                if before in (Replication.SYNC_TARGET, Replication.PAUSED_SYNC_T):
                    self._complete(machine)
                self._established()
        self.judge.observe(machine)  # last: a new state must not change the facts that led to it

    def gone(self, machine: "Machine") -> None:
        """The node's process has died."""
        self._primary[machine.name] = False
        self._replication[machine.name] = ""
        self.judge.gone(machine)

    def _promoted(self, machine: "Machine") -> None:
        self.trace.note(f"{machine.name} is Primary")
        self._terms[machine.name] = max(self._terms.values()) + 1
        peer = self.other(machine)
        if machine.name in self.accepted_fork and not self._works_through_peer(machine):
            del self.accepted_fork[machine.name]
            if self._replication.get(machine.name) not in IN_TOUCH:  # else it forks from nobody
                self.adopt(machine)
                return
        if peer.is_primary and not self.split_brain:
            self.fail("One Primary", f"{machine.name} became Primary while {peer.name} is Primary")
        copy = machine
        if self._works_through_peer(machine):
            # Without a good disk it serves the other one's copy, and goes on with the history of that.
            copy = peer
            self.lineage[machine.name] = self.lineage[peer.name]
        lineage = self.lineage[machine.name]
        for entry in list(lineage.acked):
            # Asynchronous protocols may lose what the old Primary had acknowledged. With C only what was lost here,
            # and the operator chose this node all the same.
            if not entry.holders & copy.bit and (self.protocol != "C" or entry.lost & copy.bit):
                self._demote(lineage, entry)
        self.check_image(copy, "Promotion")

    def adopt(self, machine: "Machine") -> None:
        """The operator accepts what this copy is, whatever the other has: a history of its own begins."""
        old = self.lineage[machine.name]
        peer = self.other(machine)
        if self.lineage[peer.name] is old and any(
            self.value_of(peer.data.durable, sector) not in old.allowed(sector, level=FLUSHED)
            or self.value_of(peer.data.cache, sector) not in old.allowed(sector)
            for sector in old.log
        ):
            # The one they shared is nobody's any more: the other one never had all of it.
            self.lineage[peer.name] = self._as_it_is(peer, old)
        self.lineage[machine.name] = self._as_it_is(machine, old)
        # Pending writes of its own clients: none, it was Secondary.
        old.acks = 0  # what the other one acknowledges from here on is lost if this copy overwrites it
        self.trace.note(f"{machine.name} has a history of its own from here on")

    def _as_it_is(self, machine: "Machine", old: Lineage) -> Lineage:
        """A history that begins with what this machine has now."""
        lineage = Lineage()
        for sector in range(machine.data.size_bytes // SECTOR):
            value = self.value_of(machine.data.cache, sector)
            if sector not in old.log and not value and not self.value_of(machine.data.durable, sector):
                continue
            base = Entry(sector, self.value_of(machine.data.durable, sector), -3)
            base.end, base.level = -2, FLUSHED
            entry = Entry(sector, value, -2)
            entry.end, entry.level, entry.holders = 0, ACKED, machine.bit
            entry.ran = tuple(one.incarnations for one in self.machines)
            lineage.log[sector] = [base, entry]
            lineage.acked[entry] = None
        for entries in old.log.values():
            for entry in entries:
                if entry.end is None and self._asked_of.get(entry) is machine:
                    lineage.add(entry)
        return lineage

    def _overwritten(self, machine: "Machine") -> None:
        """This node has become the target of a resync."""
        source = self.other(machine)
        superblock = self.durable[machine.name].superblock
        if superblock is None or not superblock.inconsistent:
            self.fail("Half copied", f"{machine.name} takes resync data and is not durably Inconsistent")
        if self._session(machine) == self._refused.get(machine.name):
            self.fail("Hooks", f"{machine.name} takes resync data although its hook has refused")
        if machine.is_primary and not self._works_through_peer(machine):
            self.fail("Policy", f"{machine.name} is Primary and is overwritten by {source.name}")
        mine, theirs = self.lineage[machine.name], self.lineage[source.name]
        own = mine is not theirs and (mine.acks or self.judge.has_changes(machine))
        if own and machine.name not in self.discarding:
            self._discarded(machine, source)
        self.judge.together()
        if mine is not theirs:
            self.discarding.pop(machine.name, None)
            self.lineage[machine.name] = theirs
            for entry, asked in self._asked_of.items():
                if asked is machine:  # a Primary that works through the other one
                    theirs.add(entry)
            self._metadata_persisted(())
            return
        for entry in list(mine.acked):
            if not entry.holders & source.bit:
                if self._holds(mine, source, entry):  # it came back with a resync
                    entry.holders |= source.bit
                    continue
                same_life = machine.incarnations == entry.ran[self.machines.index(machine)]
                ran_on = entry.holders & machine.bit and same_life and machine.name not in self.given_up
                if self.protocol != "C" or (entry.lost & source.bit and not ran_on):
                    self._demote(mine, entry)
                elif ran_on:
                    self.fail(
                        "Loss",
                        f"{machine.name} holds the acknowledged write {entry.value:x} to sector "
                        f"{entry.sector} and is overwritten by {source.name}, which has lost it",
                    )
                    return
        # From here on it is half copied, and no copy that anything could be taken from.
        for entry in mine.acked:
            if entry.holders & source.bit:
                entry.holders &= ~machine.bit
                entry.lost |= machine.bit

    def _complete(self, machine: "Machine") -> None:
        """A resync of this machine is over."""
        lineage = self.lineage[machine.name]
        for entry in lineage.acked:
            if self._holds(lineage, machine, entry):
                entry.holders |= machine.bit
                entry.lost &= ~machine.bit
        self.judge.together()  # it has everything of the source's, whether that one knows it yet or not

    @staticmethod
    def _works_through_peer(machine: "Machine") -> bool:
        return machine.resource is not None and machine.resource.peer_volume is not None

    @staticmethod
    def _session(machine: "Machine") -> int:
        link = machine.resource.link if machine.resource is not None else None
        return link.session if link is not None else 0

    def hook_begins(self, machine: "Machine", event: Event) -> None:
        """The node runs a hook."""
        resource, record = machine.resource, self.durable[machine.name].superblock
        if event is not Event.BEFORE_RESYNC_TARGET or resource is None:
            return
        if resource.superblock.inconsistent and (record is None or record.inconsistent):
            self.fail("Hooks", f"{machine.name} asks about a resync when its copy is Inconsistent already")

    def hook_ended(self, machine: "Machine", event: Event, problem: str) -> None:
        """A hook has ended, well or not."""
        if event is Event.BEFORE_RESYNC_TARGET and problem:
            self._refused[machine.name] = self._session(machine)

    def _discarded(self, loser: "Machine", winner: "Machine") -> None:
        """It has writes of its own that go, and the operator has not said so."""
        why_not = self.judge.why_not(loser, winner)
        if why_not:
            what = f"{loser.name} has writes of its own and is overwritten by {winner.name}"
            self.fail("Policy" if self.split_brain else "Direction", f"{what}, although {why_not}")
        self.trace.fault("policy", f"the changes of {loser.name} are discarded for those of {winner.name}")

    def _established(self) -> None:
        if any(self._replication.get(machine.name) != Replication.ESTABLISHED for machine in self.machines):
            return
        self.judge.together()
        one, two = (self.lineage[machine.name] for machine in self.machines)
        if one is two:
            return
        if one.acks and two.acks and not self.discarding:
            self.fail("Direction", "both copies have writes of their own and count as in sync")
        # With no answer on either, the Primary's: it has those that are still to come.
        winner = two if two.acks or (not one.acks and self.machines[1].is_primary) else one
        if self.discarding:
            winner = next((self.lineage[m.name] for m in self.machines if m.name not in self.discarding), winner)
            self.discarding.clear()
        for machine in self.machines:
            self.lineage[machine.name] = winner

    def check_image(self, machine: "Machine", rule: str) -> None:
        """Every sector that was ever written shows an allowed value on this machine."""
        lineage = self.lineage[machine.name]
        values = machine.data.values
        for sector, entries in lineage.log.items():
            value = values[sector]
            # The newest write is always allowed.
            if entries[-1].value != value and value not in (allowed := lineage.allowed(sector)):
                self._wrong(rule, machine, sector, value, allowed)
                return

    def check_verifications(self) -> None:
        """What the runs that are under way, or were the last, have found."""
        counts = self.trace.counts
        if counts.get("flush-error") or counts.get("write-error"):
            return  # then one copy may really lack something
        for machine in self.machines:
            resource = machine.resource
            for run in () if resource is None else (resource.verify_progress, resource.verify_result):
                if run is not None and run.found_bytes:
                    self.fail("Verify", f"{machine.name} finds {run.found_bytes} bytes that differ")

    def check_copies(self) -> None:
        """Both are Established and quiet."""
        one, two = self.machines
        size_bytes, *other = {machine.resource.disk.size_bytes for machine in self.machines if machine.resource}
        if other:
            self.fail("Copies", f"both are in sync, and have {size_bytes} and {other[0]} bytes")
            return
        if one.data.cache[:size_bytes] != two.data.cache[:size_bytes]:
            sector = next(
                s
                for s in range(size_bytes // SECTOR)
                if one.data.cache[s * SECTOR : (s + 1) * SECTOR] != two.data.cache[s * SECTOR : (s + 1) * SECTOR]
            )
            self.fail(
                "Copies",
                f"sector {sector} is {self.value_of(one.data.cache, sector):x} on {one.name} and "
                f"{self.value_of(two.data.cache, sector):x} on {two.name}",
            )
            return
        for machine in self.machines:
            self.check_image(machine, "Copies")
            if machine.size_bytes == machine.data.size_bytes and any(machine.data.cache[size_bytes:]):
                self.fail("Copies", f"{machine.name} was written to behind the end of the volume")
