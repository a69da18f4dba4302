"""What one link is used for, from its handshake to its end.

A session begins when both ends have proven themselves. Both send their state, both run the same decision table
(`replica.generation.decide`), and then the copies are brought in step. Everything a session started ends with it;
`finished` tells when nothing that came over its link is still under way.

The order of durable records is what makes every crash in between safe; it is told step by step where it happens.
"""

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Final

from replica import split_brain, wire
from replica.errors import ReplicaError
from replica.generation import (
    Generations,
    Kind,
    Verdict,
    decide,
    sync_finished_source,
    sync_finished_target,
    sync_started_source,
    sync_started_target,
)
from replica.hooks import Event
from replica.link import LinkLost, PeerLink
from replica.mirror import Mirror
from replica.resize import Resize
from replica.resync import SyncSource, SyncTarget
from replica.side_message import pack_side, unpack_generations, unpack_side
from replica.stand_in import StandIn
from replica.states import Disk, Replication, Role
from replica.tasks import spawn
from replica.verify import Verification

if TYPE_CHECKING:
    from replica.resource import Resource

log = logging.getLogger("replica.session")

HANDSHAKE_TIMEOUT_S: Final = 60.0
#: How long the peer may take to see that the two copies do not fit together.
PARTING_TIMEOUT_S: Final = 2.0
#: Before it is compressed: to pack one, or to merge it, takes about a millisecond.
BITMAP_MESSAGE_BYTES: Final = 64 << 10


class Refusal(ReplicaError):
    """The two nodes cannot work together as they are; the link goes StandAlone until an operator decides."""

    def __init__(self, reason: str, *, split_brain: bool = False) -> None:
        super().__init__(reason)
        self.split_brain = split_brain


class DiskRejected(ReplicaError):
    """The disk that a Primary attached, while it works through its peer, does not fit: it goes on without it."""


class Session:
    """One link's handshake, replication and resync."""

    def __init__(self, resource: "Resource", link: PeerLink) -> None:
        self._resource = resource
        self._link = link
        self._mirror: Mirror | None = None
        self._source: SyncSource | None = None
        self.target: SyncTarget | None = None
        #: As target: every block that differs is dirty here, too. A source that is Primary goes on writing while the
        #: bitmaps are exchanged, and marks that in its own only (found by the simulator).
        self.bitmap_is_exact = False
        self._stand_in = StandIn(resource, self, link)
        self.verification = Verification(resource, link)
        self.resize = Resize(resource, link)
        self._peer_paused = False
        self._updated = False
        self._parting: Refusal | None = None
        #: The handshake is over, and its verdict in one sentence.
        self.in_use = False
        self._verdict = ""
        self._discards = False
        #: The peer can be asked which blocks differ; an older program does not say so.
        self._peer_compares = False
        link.expect(wire.STATE, wire.BITMAP, wire.SYNC_START, wire.SYNC_READY, wire.SYNC_FINISH, wire.SYNC_DONE)
        link.handlers[wire.UPDATE] = self._on_update
        link.handlers[wire.REQUEST] = self._on_request
        self._task = spawn(self._run(), f"session {link.session:016x}")

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────

    def end(self) -> None:
        """The link is gone: stop what depends on it."""
        if self._parting is not None:
            self._resource.stand_alone(str(self._parting), split_brain=self._parting.split_brain)
        self._task.cancel()
        self._stand_in.end()
        self.verification.end(self._link.close_reason)

    async def finished(self) -> None:
        """Return when nothing this session started can change the disk or its records any more."""
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([self._task])
        await self._stand_in.finished()
        await self.verification.finished()
        await self.mirror_finished()
        if self.target is not None:
            await self.target.finished()

    async def _run(self) -> None:
        try:
            async with self._resource.admin, asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                await self._handshake()
            self.in_use = True
            self._resource.hooks.fire(Event.PEER_CONNECTED, self._verdict)
            if self._source is not None:
                await self._run_source(self._source)
            elif self.target is not None:
                await self._run_target(self.target)
            if self._resource.peer_volume is not None and self._resource.state.replication is Replication.ESTABLISHED:
                await self._stand_in.take_lead()
        except LinkLost:
            pass
        except DiskRejected as rejection:
            if self._resource.peer_volume is not None and self._resource.attached:
                self._resource.reject_disk(str(rejection))
            self._link.refuse(str(rejection))
        except Refusal as refusal:
            await self._part(refusal)
        except TimeoutError:
            self._link.refuse("the handshake was not complete in time.")
        except OSError as error:
            self._resource.disk_failed(error)
            self._link.refuse(f"the disk of {self._resource.node_name} failed ({error.strerror or error}).")
        except (ReplicaError, ValueError) as error:
            self._link.refuse(str(error))
        except Exception:
            self._link.refuse(f"{self._resource.node_name} met a fault of its own; its log says more.")
            raise

    async def _part(self, refusal: Refusal) -> None:
        """Go StandAlone, and let the peer come to the same conclusion: were the link closed at once, the peer would
        see a lost connection before its own verdict, and dial again and again.
        """
        self._parting = refusal
        self._link.send_map(wire.STATE, {"refused": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PARTING_TIMEOUT_S):
                await self._link.receive(wire.STATE)
        self._parting = None
        self._resource.stand_alone(str(refusal), split_brain=refusal.split_brain)

    # ── handshake ────────────────────────────────────────────────────────────────────────────────────────────

    async def _handshake(self) -> None:
        resource, link = self._resource, self._link
        # What an earlier link brought may still be on its way to the disk in a thread: it must not land later.
        await resource.past_finished()
        mine = resource.side()
        link.send_map(
            wire.STATE,
            {
                **resource.facts(),
                "ran_on": resource.unbroken,
                "served": resource.served_generation,
                "sync_hashes": True,
                "side": pack_side(mine),
            },
        )
        _, _, _, payload = await link.receive(wire.STATE)
        message = wire.unpack_map(payload)
        if not self._updated:
            # An UPDATE is taken when it arrives, so it can be seen before the older STATE that waited for us.
            self._take_facts(message)
        peer = unpack_side(resource.peer_name, message.get("side"))
        self._peer_compares = message.get("sync_hashes") is True
        ran_on, served = wire.field(message, "ran_on", bool), wire.field(message, "served", int)
        if mine is None or peer is None:
            resource.state.change(replication=Replication.OFF)
            if peer is not None and self._stand_in.may_go_on(peer, ran_on, served):
                self.ask_to_serve()
            return
        if mine.attaching and not self._stand_in.may_go_on(peer, ran_on, served):
            raise DiskRejected(resource.state.last_error)
        if mine.policies != peer.policies:
            log.warning("%s: %s: both nodes need the same.", resource.name, split_brain.difference(mine, peer))
        verdict = decide(mine, peer)
        self._verdict, self._discards = verdict.reason, mine.discard
        log.info("%s: %s", resource.name, verdict.reason)
        if verdict.kind in (Kind.SPLIT_BRAIN, Kind.UNRELATED, Kind.REFUSED):
            if mine.attaching or peer.attaching:
                raise DiskRejected(verdict.reason)
            raise Refusal(verdict.reason, split_brain=verdict.kind is Kind.SPLIT_BRAIN)
        resource.discard_my_data = False
        if verdict.size_bytes != mine.size_bytes and verdict.kind is not Kind.NO_GOOD_COPY:
            await resource.adopt_size(verdict.size_bytes)
        if verdict.policy:
            # Changes are lost without an operator's word: the status says so until the link ends.
            resource.state.change(last_error=verdict.reason)
        if verdict.kind in (Kind.BOTH_NEW, Kind.NO_GOOD_COPY):
            resource.state.change(replication=Replication.OFF, last_error=verdict.reason)
        elif verdict.kind is Kind.IN_SYNC:
            await self._be_in_sync()
        elif verdict.kind is Kind.SOURCE:
            await self._be_source(verdict)
        else:
            await self._be_target(verdict)

    def _meet(self) -> bool:
        """The two are in touch: should they part, what counts is the role from here on. True when the superblock,
        which the caller saves at once, has said something else.
        """
        superblock = self._resource.superblock
        before, superblock.parted_as_primary = superblock.parted_as_primary, self._resource.state.role is Role.PRIMARY
        return superblock.parted_as_primary != before

    async def _be_in_sync(self) -> None:
        superblock = self._resource.superblock
        if self._meet() or superblock.outdated or superblock.peers[0].outdated:
            superblock.outdated = superblock.peers[0].outdated = False
            await self._resource.save()
        self._establish()

    def _establish(self) -> None:
        """Both copies are the same from here on; each node gets the other's writes."""
        self.start_mirror()
        self._resource.unbroken = True
        self._resource.lost_newer_disk = False
        self._resource.volume.alone_recorded = False
        if self._resource.peer_volume is None:  # else once this node leads again
            self._resource.volume.start_mirroring(self._link)
        self._resource.state.change(replication=Replication.ESTABLISHED, peer_disk=Disk.UP_TO_DATE)

    def ask_to_serve(self) -> None:
        """This node is Primary and has no good disk: the peer shall stand in."""
        self._stand_in.ask()

    async def leave_peer_volume(self) -> None:
        """This node is to be Primary no more: end the peer's standing in. LinkLost, OSError."""
        await self._stand_in.leave()

    async def mirror_finished(self) -> None:
        """Return when no change that the peer sent here is under way."""
        if self._mirror is not None:
            await self._mirror.finished()

    def start_mirror(self) -> None:
        """Take the peer's writes, from now on (unless they come through the volume)."""
        if self._stand_in.serving:
            return
        if self._mirror is None:
            protocol, failed = self._resource.settings.protocol, self._resource.disk_failed
            self._mirror = Mirror(self._link, self._resource.disk.store, protocol, failed)
        else:
            self._mirror.resume()

    async def _exchange_bitmaps(self) -> None:
        """Afterwards both nodes have both bitmaps OR-ed. (What the source's clients write meanwhile is marked only
        in the source's, which is the one that is walked.)
        """
        link, bitmap = self._link, self._resource.disk.bitmap
        packing = bitmap.pack(BITMAP_MESSAGE_BYTES)
        message, following = next(packing, b""), next(packing, None)
        while True:
            link.send(wire.BITMAP, message, flags=wire.FLAG_LAST if following is None else 0)
            # What is drained at once lets nobody else have a turn: a large bitmap must not hold up clients and PINGs.
            await asyncio.sleep(0)
            await link.drained()
            if following is None:
                break
            message, following = following, next(packing, None)
        while True:
            await asyncio.sleep(0)
            flags, _, _, payload = await link.receive(wire.BITMAP)
            if payload:
                try:
                    bitmap.merge_packed(payload)
                except ValueError as error:
                    raise wire.ProtocolError(f"a bitmap message could not be read ({error}).") from error
            if flags & wire.FLAG_LAST:
                break
        # Durable before either superblock says that this bitmap is what the copies differ by.
        await self._resource.disk.metadata.save_bitmap(bitmap)

    # ── source ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _be_source(self, verdict: Verdict) -> None:
        resource = self._resource
        if verdict.full:
            await resource.disk.metadata.set_all_bits(resource.disk.bitmap)
        else:
            await self._exchange_bitmaps()
        # What this node got as Secondary may be in its page cache only, and no log of its own covers it. The target
        # will have it durably when the bits are cleared, so this node must, too (rule "Cover"; found by the simulator).
        await resource.disk.store.flush()
        if resource.disk.bitmap.count == 0:
            await self._hand_over_in_step()
            return
        if resource.state.role is Role.PRIMARY:
            # The peer may still believe that it is in sync; before it can be told otherwise, our generation must
            # say that we went on without it.
            await resource.volume.ensure_alone_recorded()
        superblock = resource.superblock
        if superblock.generations.base == 0:
            superblock.generations = sync_started_source(superblock.generations, resource.new_generation())
            await resource.save()
        self._send_start()
        await self._link.receive(wire.SYNC_READY)
        # The peer has recorded that it is Inconsistent: from now on it is out of sync by its own word.
        superblock.peers[0].outdated = True
        self._meet()
        await resource.save()
        resource.volume.alone_recorded = True
        self._source = SyncSource(
            self._link,
            resource.disk.store,
            resource.disk.bitmap,
            resource.volume.admission.locks,
            resource.settings.resync_rate_bytes_s,
            resource.clock_s,
            # A copy that is new, or was declared bad, gets every block: its bitmap began as "all dirty".
            ask=self._peer_compares and not resource.disk.bitmap.default_ones,
        )
        resource.volume.start_mirroring(self._link)
        resource.volume.watch_clients(self._source.throttle, resource.clock_s)
        resource.begin_sync(Replication.SYNC_SOURCE)
        resource.hooks.fire(Event.BEFORE_RESYNC_SOURCE, self._verdict)
        self.apply_pause()

    async def _hand_over_in_step(self) -> None:
        """Nothing differs: the peer only has to take our generation. Clients wait for that one round trip, so that
        no write falls between its record and the first mirrored write.
        """
        resource = self._resource
        resource.volume.admission.close_gate("handshake")
        try:
            async with resource.volume.membership:
                await self._count_peer_in()
                self._send_start()
                await self._link.receive(wire.SYNC_READY)
                self._establish()
        finally:
            resource.volume.admission.open_gate("handshake")
        await self._close_generation()

    def _send_start(self) -> None:
        superblock = self._resource.superblock
        generations = superblock.generations
        self._link.send_map(
            wire.SYNC_START,
            {
                "base": generations.base,
                "current": generations.current,
                "history": list(generations.history),
                "dirty": self._resource.disk.bitmap.count,
            },
        )

    async def _count_peer_in(self) -> None:
        """Before the peer may call itself UpToDate: if we lose it now, we must make a new generation first."""
        self._resource.volume.alone_recorded = False
        self._resource.superblock.peers[0].outdated = False
        self._meet()
        await self._resource.save()

    async def _close_generation(self) -> None:
        """The peer has recorded that it is UpToDate: our bitmap is relative to nothing any more."""
        resource = self._resource
        superblock = resource.superblock
        superblock.generations = sync_finished_source(superblock.generations)
        superblock.ahead = superblock.promoted_alone = False
        await resource.save()

    async def _run_source(self, source: SyncSource) -> None:
        resource = self._resource
        try:
            await source.run()
        finally:
            if resource.attached:
                resource.volume.watch_no_clients()
        await self._count_peer_in()
        # From SYNC_DONE on the peer may be promoted, and then its writes come here.
        self.start_mirror()
        self._link.send_map(wire.SYNC_FINISH, {})
        await self._link.receive(wire.SYNC_DONE)
        await self._clear_bitmap()
        await self._close_generation()
        resource.end_sync()
        resource.unbroken = True
        resource.state.change(replication=Replication.ESTABLISHED, peer_disk=Disk.UP_TO_DATE)
        log.info(
            "%s: the resync is complete: %d bytes of data were sent, %d were equal",
            resource.name,
            source.data_bytes,
            source.equal_bytes,
        )
        resource.hooks.fire(Event.AFTER_RESYNC_SOURCE, "the resync is complete.")

    async def _clear_bitmap(self) -> None:
        """Both copies are equal and flushed. Writes since then are in the activity log, not in the bitmap."""
        disk = self._resource.disk
        if disk.bitmap.default_ones and not disk.bitmap.count:
            await disk.metadata.clear_all_bits(disk.bitmap)
        else:
            await disk.metadata.save_bitmap(disk.bitmap)

    # ── target ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _be_target(self, verdict: Verdict) -> None:
        resource = self._resource
        if resource.state.role is Role.PRIMARY and resource.peer_volume is None:
            raise Refusal(
                f"{resource.node_name} is Primary and its copy is older than {resource.peer_name}'s: demote it first."
            )
        if not verdict.full:
            await self._exchange_bitmaps()
        _, _, _, payload = await self._link.receive(wire.SYNC_START)
        start = wire.unpack_map(payload)
        offered = unpack_generations(start)
        if wire.field(start, "dirty", int) == 0:
            await self._take_generation(offered)
            self._link.send(wire.SYNC_READY)
            self._establish()
            return
        await self._ask_before_resync()
        superblock = resource.superblock
        superblock.generations = sync_started_target(superblock.generations, offered.base)
        resource.unbroken = False
        superblock.inconsistent = True
        self._meet()
        superblock.just_created = superblock.outdated = superblock.ahead = superblock.promoted_alone = False
        # Durable before the first block changes: a half-copied disk is marked.
        if verdict.full:
            await resource.disk.metadata.set_all_bits(resource.disk.bitmap)
        else:
            await resource.save()
        self.start_mirror()
        self.target = SyncTarget(self._link, resource.disk.store, resource.disk.bitmap, resource.disk_failed)
        self._offered = offered
        self.bitmap_is_exact = resource.peer_volume is not None
        resource.begin_sync(Replication.SYNC_TARGET)
        self.apply_pause()
        self._link.send(wire.SYNC_READY)
        if resource.peer_volume is not None:
            self.ask_to_serve()

    async def _ask_before_resync(self) -> None:
        """Nothing has changed yet: the hook can still save the copy as it is, or refuse. It is not asked about a copy
        that is Inconsistent already: there is nothing to save, and a resync that was interrupted has to go on.
        """
        resource = self._resource
        if resource.superblock.inconsistent:
            return
        problem = await resource.hooks.ask(Event.BEFORE_RESYNC_TARGET, self._verdict)
        if problem:
            connect = f"connect --discard-my-data {resource.name}" if self._discards else f"connect {resource.name}"
            refusal = Refusal if resource.peer_volume is None else DiskRejected
            raise refusal(
                f"the hook before-resync-target {problem} on {resource.node_name}, whose copy stays as it is: see to "
                f"what the hook is for, then run `replicactl {connect}` there."
            )

    async def _run_target(self, target: SyncTarget) -> None:
        resource = self._resource
        await self._link.receive(wire.SYNC_FINISH)
        # Nobody declares this copy bad while it is being recorded that it is good.
        async with resource.admin:
            await target.finished()
            await resource.disk.store.flush()
            await resource.disk.metadata.clear_all_bits(resource.disk.bitmap)
            await self._take_generation(self._offered)
            self._link.send(wire.SYNC_DONE)
            resource.end_sync()
            self._establish()
        resource.hooks.fire(Event.AFTER_RESYNC_TARGET, "the resync is complete.")

    async def _take_generation(self, offered: Generations) -> None:
        """Record that this copy is a full copy of the source's generation."""
        superblock = self._resource.superblock
        superblock.generations = sync_finished_target(superblock.generations, offered.current, offered.history)
        superblock.inconsistent = superblock.outdated = superblock.just_created = False
        superblock.ahead = superblock.promoted_alone = False
        superblock.peers[0].outdated = False
        self._meet()
        # Not only once Established: the source, which counts on us, may be lost before (found by the simulator).
        self._resource.unbroken = True
        await self._resource.save()

    # ── while it lasts ───────────────────────────────────────────────────────────────────────────────────────

    def apply_pause(self) -> None:
        """Pause or resume as this node and the peer want it."""
        state = self._resource.state
        paused = self._peer_paused or self._resource.paused
        if self._source is not None:
            self._source.pause(paused)
        for running, pausing in (
            (Replication.SYNC_SOURCE, Replication.PAUSED_SYNC_S),
            (Replication.SYNC_TARGET, Replication.PAUSED_SYNC_T),
        ):
            if state.replication in (running, pausing):
                if state.replication is pausing and not paused and self._resource.progress is not None:
                    now_s = asyncio.get_running_loop().time()
                    self._resource.progress.resumed(self._resource.disk.bitmap.count, now_s)
                state.change(replication=pausing if paused else running)

    def _on_update(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        self._updated = True
        self._take_facts(wire.unpack_map(payload))
        self.apply_pause()

    def _take_facts(self, message: dict[str, Any]) -> None:
        try:
            role, disk = Role(wire.field(message, "role", str)), Disk(wire.field(message, "disk", str))
        except ValueError as error:
            raise wire.ProtocolError(f"the peer is in a state this version does not know ({error}).") from error
        self._peer_paused = wire.field(message, "paused", bool)
        # An older program does not tell: then it is not known, and zeroing never counts as fast.
        self._link.peer_punches_fast = message.get("punches_fast") is True
        self._resource.state.change(peer_role=role, peer_disk=disk)
        if role is Role.PRIMARY:
            self._resource.lost_newer_disk = False  # its copy is what clients see: what it lacks was given up

    def _on_request(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        message = wire.unpack_map(payload)
        wire.field(message, "op", str)
        spawn(self._answer(sequence, message), "answer to the peer")

    async def _answer(self, sequence: int, message: dict[str, Any]) -> None:
        reply: dict[str, Any] = {"ok": True}
        try:
            more = await self.verification.asked(message)
            if more is None:
                more = await self.resize.asked(message)
            if more is None:
                await self._resource.verbs.asked_by_peer(message["op"])
            else:
                reply |= more
        except ReplicaError as error:
            reply = {"error": str(error)}
        except OSError as error:
            self._resource.disk_failed(error)
            reply = {"error": f"the disk of {self._resource.node_name} failed ({error.strerror or error})."}
        self._link.send(wire.REPLY, wire.pack_map(reply), sequence=sequence)
