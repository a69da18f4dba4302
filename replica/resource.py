"""One resource on one node: its role, its local copy, its link to the peer, and what must be durable about them.

What an operator can ask of it is in `replica.verbs`; what a link does in `replica.session`.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from nbdserver.blockfile import LostWriteError
from nbdserver.log_limit import FewAlike
from replica import auth, wire
from replica import config as cfg
from replica.admission import ActivityLogLost
from replica.connector import Connector, Endpoints
from replica.disk import LocalDisk, open_disk
from replica.errors import Refused, ReplicaError
from replica.export import ResourceExport
from replica.generation import Side, started_alone
from replica.hooks import Event, Hooks
from replica.link import LinkSettings, PeerLink
from replica.metadata import Superblock
from replica.peer_volume import PeerVolume
from replica.progress import SyncProgress
from replica.runtime import Runtime
from replica.session import Session
from replica.states import SYNCING, Connection, Disk, Replication, Role, State, local_disk
from replica.status import status_document
from replica.tasks import spawn, to_its_end
from replica.verbs import Verbs
from replica.verify_report import VerifyProgress, VerifyResult
from replica.volume import Volume, VolumeSettings

log = logging.getLogger("replica.resource")
#: What anybody can cause who reaches the peer port.
_complaints = logging.getLogger("replica.resource.complaints")
_complaints.addFilter(FewAlike())


class Resource:
    """The whole of one resource on this node, from attaching its disk to serving its clients."""

    def __init__(self, config: cfg.Config, resource: cfg.Resource, runtime: Runtime) -> None:
        self.config = config
        self.settings = resource.local
        self.nbd_tls = resource.tls
        self.name = resource.name
        self.node_name = config.node.name
        self.peer_name = config.peer.name
        self.admin = asyncio.Lock()
        self.paused = False
        self.discard_my_data = False
        self.progress: SyncProgress | None = None
        self.state = State(on_change=self.changed)
        self._cfg = resource
        self._runtime = runtime
        self.clock_s = runtime.clock_s
        self._attached: tuple[LocalDisk, Volume] | None = None
        self.failed = False
        self.demoting = False
        self.link: PeerLink | None = None
        self._complaint = ""
        #: Both copies were in sync, or clients were served by this one, and this process has applied every write since:
        #: it lacks none that was answered.
        self.unbroken = False
        #: The disk that was detached last, if it was good; 0: none.
        self._released_device = 0
        self.session: Session | None = None
        self._past_sessions: set[asyncio.Task[None]] = set()
        self._told: dict[str, Any] = {}
        self._watchers: set[asyncio.Event] = set()
        self.connector = self._make_connector()
        self.verbs = Verbs(self)
        self.export = ResourceExport(self.name, 0, self._refuse_clients, self._read_failed)
        #: What a Primary without a good disk of its own serves its clients from.
        self.peer_volume: PeerVolume | None = None
        #: The disk that this node had last had writes that the peer's copy lacks, as far as is known here.
        self.lost_newer_disk = False
        #: The generation under which the peer, Primary without a disk, has worked through this copy; 0: none.
        self.served_generation = 0
        self.hooks = Hooks(self, resource.hooks, runtime)
        #: Runs of verification since this process began; the one under way, and how the last one ended.
        self.verifications = 0
        self.verify_progress: VerifyProgress | None = None
        self.verify_result: VerifyResult | None = None

    def _make_connector(self) -> Connector:
        local, peer = self._cfg.local, self._cfg.peer
        first = min((self.config.node, self.config.peer), key=lambda node: node.name)
        settings = LinkSettings(
            auth.Identity(
                self.config.cluster.name,
                self.name,
                self.node_name,
                self.peer_name,
                local.protocol,
                local.data_integrity,
            ),
            self.config.cluster.secret,
            local.timeout_s,
            local.ping_interval_s,
        )
        endpoints = Endpoints(
            local_host=local.node.address,
            peer_host=peer.node.address,
            port=local.port,
            peer_port=peer.port,
            dialer=first.name == self.node_name,
            connect_interval_s=local.connect_interval_s,
        )
        return Connector(self._runtime, endpoints, settings, self._link_opened, self._link_closed, self._link_failed)

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Attach the disk, listen or dial for the peer. Raises ReplicaError with everything as it was."""
        await self.attach_disk()
        try:
            await self.connector.start()
        except BaseException:
            self.release_disk()
            raise
        self.state.change(connection=Connection.CONNECTING)
        self.connector.connect()

    async def stop(self) -> None:
        """Hand over cleanly: demote, leave the peer, let go of the disk."""
        if self.state.role is Role.PRIMARY:
            with contextlib.suppress(ReplicaError, OSError):
                await self.verbs.demote(force=True)
        await self.connector.stop(f"replicad for {self.name} on {self.node_name} was stopped.")
        await self.past_finished()
        self.release_disk()
        await self.hooks.stop()

    async def attach_disk(self) -> None:
        disk = await open_disk(self.config, self._cfg, self._runtime)
        # A disk that was only detached for a while: what it missed is known by the peer's newer generation.
        self.unbroken = self.unbroken and disk.metadata.superblock.device_id == self._released_device
        settings = VolumeSettings(self.settings.protocol, self.settings.settle_interval_s, self.settings.settle_bytes)
        volume = Volume(
            settings,
            disk.store,
            disk.metadata,
            disk.bitmap,
            disk.activity_log,
            self._record_alone,
            self.disk_failed,
        )
        self._attached = (disk, volume)
        self.failed = False
        if self.peer_volume is None:
            self.export.size_bytes = disk.size_bytes
        for warning in disk.metadata.warnings:
            log.warning("%s: %s", self.name, warning)

    async def adopt_size(self, size_bytes: int) -> None:
        """The pair's volume is larger than this copy, whose backing has room: grow, and have the rest copied. Or it is
        smaller (DRBD, too, takes the smaller of two sizes): use no more, and leave what the backing has behind that.
        """
        disk, volume = self.disk, self.volume
        if size_bytes > disk.size_bytes:
            await self.grow(size_bytes, clean=False)
            return
        log.warning(
            "%s: the volume has %d bytes on %s and %d here: only so much of %s is used from now on",
            self.name,
            size_bytes,
            self.peer_name,
            disk.size_bytes,
            self.settings.backing,
        )
        superblock = disk.metadata.superblock
        superblock.size_bytes = disk.store.size_bytes = volume.size_bytes = size_bytes
        disk.bitmap.shrink(superblock.blocks)
        if self.peer_volume is None:
            self.export.size_bytes = size_bytes
        await self.save()
        await disk.metadata.save_bitmap(disk.bitmap)

    async def grow(self, size_bytes: int, *, clean: bool) -> None:
        """Use more of the backing, durably on return. `clean`: what is new is the same on both nodes (else dirty). A
        link that is lost in the middle of it must not leave the metadata with one size and the volume with the other.
        """
        await to_its_end(self._grow(size_bytes, clean=clean), "growing of a volume")

    async def _grow(self, size_bytes: int, *, clean: bool) -> None:
        disk, volume = self.disk, self.volume
        log.info("%s: grows from %d to %d bytes on %s", self.name, disk.size_bytes, size_bytes, self.node_name)
        await disk.metadata.grow(disk.bitmap, size_bytes, clean=clean)
        disk.store.size_bytes = volume.size_bytes = size_bytes
        if self.peer_volume is None:
            self.export.size_bytes = size_bytes
        self.changed()

    def release_disk(self) -> None:
        if self._attached is not None:
            disk, volume = self._attached
            if not self.failed:
                self._copy_ends()
            self._attached = None
            self._released_device = 0 if self.failed else disk.metadata.superblock.device_id
            self.failed = False
            if self.peer_volume is None:
                self.export.serve(None)
            volume.stop_timer()
            disk.close()
            self.changed()

    def _copy_ends(self) -> None:
        """The local copy is not used from here on: its disk is detached, or has failed."""
        superblock = self.superblock
        # A Primary that works through its peer has nothing that the peer lacks.
        if self.peer_volume is None:
            self.lost_newer_disk = superblock.peers[0].outdated and not superblock.inconsistent

    # ── what others need to know ─────────────────────────────────────────────────────────────────────────────

    @property
    def attached(self) -> bool:
        """Whether there is a local copy in use."""
        return self._attached is not None and not self.failed

    @property
    def has_disk(self) -> bool:
        """Whether there is a local copy, if only a failed one."""
        return self._attached is not None

    @property
    def disk(self) -> LocalDisk:
        """The attached copy; Refused when there is none."""
        if self._attached is None:
            raise Refused(f"{self.name} has no disk on {self.node_name}: run `replicactl attach {self.name}`.")
        return self._attached[0]

    @property
    def volume(self) -> Volume:
        """The data path over the attached copy."""
        if self._attached is None:
            raise Refused(f"{self.name} has no disk on {self.node_name}: run `replicactl attach {self.name}`.")
        return self._attached[1]

    @property
    def superblock(self) -> Superblock:
        """The durable facts about the attached copy (durable once `save` returns)."""
        return self.disk.metadata.superblock

    @property
    def disk_state(self) -> Disk:
        """The state of the local copy."""
        superblock = self._attached[0].metadata.superblock if self._attached else None
        in_touch = self.state.replication in (
            Replication.ESTABLISHED,
            Replication.SYNC_SOURCE,
            Replication.PAUSED_SYNC_S,
        )
        return local_disk(
            attached=superblock is not None,
            failed=self.failed,
            inconsistent=superblock is not None and superblock.inconsistent,
            outdated=superblock is not None and superblock.outdated,
            current=(self.state.role is Role.PRIMARY and self.peer_volume is None) or in_touch or self.serving_peer,
        )

    @property
    def serving_peer(self) -> bool:
        """Whether the peer, Primary without a good disk, works through this copy."""
        return self.link is not None and self._attached is not None and self._attached[1].serving_peer

    @property
    def both_in_sync(self) -> bool:
        """Whether both nodes work with their own disks, and have the same."""
        one_disk = self.peer_volume is not None or self.serving_peer
        return self.attached and self.state.replication is Replication.ESTABLISHED and not one_disk

    def need_both_in_sync(self, done: str) -> None:
        """Refused, unless they do: what is to be `done` ("verified") takes both copies."""
        if not self.both_in_sync:
            raise Refused(
                f"{self.name} can be {done} only while both nodes work with their own disks and are in sync, and "
                f"{self.node_name} is {self.state.connection}/{self.state.replication} with a disk that is "
                f"{self.disk_state}: run `replicactl wait-sync {self.name}` first."
            )

    def side(self) -> Side | None:
        """This copy as the decision table sees it; None without a disk."""
        if not self.attached:
            return None
        superblock = self.superblock
        return Side(
            node=self.node_name,
            generations=superblock.generations,
            size_bytes=superblock.size_bytes,
            just_created=superblock.just_created,
            inconsistent=superblock.inconsistent,
            ahead=superblock.ahead,
            promoted_alone=superblock.promoted_alone,
            unbroken=self.unbroken and self.settings.protocol == "C",
            is_primary=self.state.role is Role.PRIMARY,
            attaching=self.peer_volume is not None,
            parted_as_primary=superblock.parted_as_primary,
            dirty=self.disk.bitmap.count,
            discard=self.discard_my_data,
            policies=self.settings.after_split_brain,
            room_bytes=self.disk.store.room_bytes(),
        )

    def facts(self) -> dict[str, Any]:
        """What the peer is told whenever it changes."""
        return {
            "role": str(self.state.role),
            "disk": str(self.disk_state),
            "paused": self.paused,
            "punches_fast": self.attached and self.disk.store.punches_fast,
        }

    def status(self) -> dict[str, Any]:
        """The status document (docs/operations)."""
        return status_document(self)

    @contextlib.asynccontextmanager
    async def watch(self) -> AsyncIterator[asyncio.Event]:
        """An event that is set at each change of the status."""
        event = asyncio.Event()
        self._watchers.add(event)
        try:
            yield event
        finally:
            self._watchers.discard(event)

    @property
    def peer_address(self) -> str:
        """Where the peer's clients are served, for messages."""
        return str(self._cfg.peer.nbd)

    def changed(self) -> None:
        """Tell the peer and the watchers when what they see of this node is different now."""
        facts = self.facts()
        if facts != self._told and self.link is not None:
            self._told = facts
            self.link.send_map(wire.UPDATE, facts)
        if self.session is not None:
            self.session.verification.look()
        for event in self._watchers:
            event.set()

    def _refuse_clients(self) -> str | None:
        """Why NBD clients are turned away, or None."""
        state = self.state
        if state.role is Role.PRIMARY and not self.demoting:
            return None
        if state.peer_role is Role.PRIMARY:
            where = f"{self.peer_name} ({self._cfg.peer.node.address}, NBD at {self.peer_address}) is Primary"
        else:
            where = f"run `replicactl promote {self.name}` on the node that shall serve it"
        return f"{self.name} is Secondary on {self.node_name}: {where}."

    # ── durable changes ──────────────────────────────────────────────────────────────────────────────────────

    async def save(self) -> None:
        """Make the superblock durable; goes on to its end even when the caller is cancelled."""
        await asyncio.shield(self.disk.metadata.save_superblock())

    def new_generation(self) -> int:
        """A fresh generation id."""
        return self._runtime.random_id()

    def random_seed(self) -> int:
        """A random 64-bit number other than 0."""
        return self._runtime.random_id()

    async def _record_alone(self) -> None:
        """The in-sync set shrinks to this node: a new generation, and the peer known to be out of sync, durably
        before the first write that it lacks is acknowledged (safety rule "Ack").
        """
        superblock = self.superblock
        superblock.generations = started_alone(superblock.generations, self.new_generation())
        superblock.peers[0].outdated = True
        superblock.promoted_alone = False
        await self.save()
        log.info(
            "%s: goes on without %s as generation %016x",
            self.name,
            self.peer_name,
            superblock.generations.current,
        )

    def disk_failed(self, error: OSError) -> None:
        """The local disk reported an error (`on-io-error`)."""
        if self.failed or self._attached is None or self._attached[1].handed_over:
            return
        # Passing an error on takes a client to pass it to; a Secondary's copy must not silently lack a write. And after
        # a failed flush nobody knows what the disk holds; without an activity log nothing can be written to it. In all
        # these cases it is given up, whatever the policy is. (DRBD detaches for errors of its metadata, too.)
        # (Nor the copy of a Primary that works through its peer: its disk is one that the peer mirrors to.)
        serving = self.state.role is Role.PRIMARY and self.peer_volume is None
        pass_on = self.settings.on_io_error == "pass-on" and serving
        if pass_on and not isinstance(error, (LostWriteError, ActivityLogLost)):
            return
        self._copy_ends()
        self.failed = True
        disk, volume = self._attached
        log.error("%s: the disk %s failed (%s) and is no longer used.", self.name, self.settings.backing, error)
        self.hooks.fire(Event.DISK_FAILED, f"the disk {self.settings.backing} failed ({error}).")
        volume.abandon_store(error)
        superblock = disk.metadata.superblock
        superblock.inconsistent = True
        self._background(self._record_failure(disk))
        if self.peer_can_serve:
            self.work_through_peer(volume)
        elif self.link is not None:
            # A Primary that is about to be, or is, source of a resync as well: what its disk still gives must not be
            # taken for a good copy (found by the simulator). One that worked through its peer does so on a new link.
            self.link.refuse(f"the disk of {self.node_name} failed ({error.strerror or error}).")
        self.changed()

    def _read_failed(self, error: OSError) -> None:
        """The disk could not give what a client wanted to read. Elsewhere it may still be good: it is only given up
        when that costs nothing.
        """
        if self.peer_can_serve:
            self.disk_failed(error)

    @property
    def peer_can_serve(self) -> bool:
        """Whether this node is Primary, and its peer has everything that clients have been told."""
        in_step = self.state.role is Role.PRIMARY and self.state.replication is Replication.ESTABLISHED
        return in_step and self.link is not None and self.session is not None and self.peer_volume is None

    def work_through_peer(self, volume: Volume | None = None) -> PeerVolume:
        """Serve clients from the peer's copy; `volume`: of the disk that has to be done without from now on."""
        assert self.link is not None and self.session is not None
        before = self.superblock.generations.current if volume is not None else 0
        peer_volume = self.peer_volume = PeerVolume(self.settings.timeout_s, before)
        self.export.serve(peer_volume)
        if volume is not None:
            volume.stop_timer()
            peer_volume.adopt(self.link, volume.hand_over())
            self.state.change(replication=Replication.OFF)
        self.session.ask_to_serve()
        log.warning("%s: %s works through the disk of %s", self.name, self.node_name, self.peer_name)
        return peer_volume

    async def lead(self, link: PeerLink | None) -> None:
        """A Primary that worked through its peer has a good copy of its own again: clients are served from that."""
        volume, superblock = self.volume, self.superblock
        superblock.primary = True
        superblock.promoted_alone = False
        await self.save()
        if link is None:
            # What the peer led, and has not flushed, is known to nobody here: it must not pass for an equal copy.
            await volume.ensure_alone_recorded()
        peer_volume = self.peer_volume
        if peer_volume is None or not self.attached:
            return
        self.peer_volume = None
        if link is not None:
            volume.start_mirroring(link)
        volume.start_timer()
        self.export.serve(volume)
        peer_volume.hand_back(volume)
        log.info("%s: %s works with its own disk again", self.name, self.node_name)
        self.changed()

    async def _lead_alone(self) -> None:
        try:
            await self.lead(None)
        except OSError as error:
            self.disk_failed(error)

    def reject_disk(self, reason: str) -> None:
        """The disk that was attached does not fit: go on without it, through the peer."""
        log.error("%s: the attached disk is not used: %s", self.name, reason)
        self.release_disk()
        self.state.change(last_error=reason)

    async def _record_failure(self, disk: LocalDisk) -> None:
        with contextlib.suppress(OSError):
            await asyncio.shield(disk.metadata.save_superblock())

    # ── the link ─────────────────────────────────────────────────────────────────────────────────────────────

    def _link_opened(self, link: PeerLink) -> None:
        self.link = link
        self._told = self.facts()
        self.state.change(connection=Connection.CONNECTED, replication=Replication.NEGOTIATING, last_error="")
        self._complaint = ""
        log.info("%s: connected to %s, session %016x", self.name, self.peer_name, link.session)
        self.session = Session(self, link)

    def _link_closed(self, link: PeerLink, reason: str) -> None:
        if self.session is not None and self.session.in_use and not link.meant_to_end:
            self.hooks.fire(Event.PEER_LOST, reason)  # what it was used for is worth more than that it is gone
        self.link = None
        session, self.session = self.session, None
        if session is not None:
            session.end()
            self._background(session.finished())
        if self._attached is not None:
            self._attached[1].stop_mirroring()
            if self.state.role is Role.PRIMARY and self.disk.bitmap.count and self.peer_volume is None:
                # The peer may have lost what it had not flushed, under the same generation.
                self.superblock.ahead = True
        if self.peer_volume is not None:
            self.peer_volume.link_lost()
            if self.attached and self.state.replication is Replication.ESTABLISHED:
                # The resync was complete: this copy has everything that was answered.
                self._background(self._lead_alone())
        self.progress = None
        changes: dict[str, Any] = {
            "replication": Replication.OFF,
            "peer_role": Role.UNKNOWN,
            "peer_disk": Disk.UNKNOWN,
        }
        if self.state.connection is Connection.CONNECTED:
            changes |= {"connection": Connection.CONNECTING, "last_error": reason}
        self.state.change(**changes)

    def _link_failed(self, reason: str) -> None:
        if self._complaint != reason:  # the same again and again is one line in the log
            self._complaint = reason
            _complaints.warning("%s: %s", self.name, reason)
            if self.state.connection is not Connection.CONNECTED:  # else it was a stranger, and the peer is well
                self.state.change(last_error=reason)

    def stand_alone(self, reason: str, *, split_brain: bool = False) -> None:
        """Leave the peer until an operator says `connect`."""
        log.error("%s: goes StandAlone: %s", self.name, reason)
        self.state.change(connection=Connection.STAND_ALONE, last_error=reason)
        if split_brain:
            self.hooks.fire(Event.SPLIT_BRAIN, reason)
        self.connector.disconnect(reason)

    def renegotiate(self, why: str) -> None:
        """Make the link anew, so that both nodes decide again from what is true now."""
        if self.link is not None:
            self.link.refuse(why, again=True)

    def pause(self, paused: bool) -> None:
        """Hold a resync back on this node's account, or let it go on."""
        self.paused = paused
        if self.session is not None:
            self.session.apply_pause()
        self.changed()

    def begin_sync(self, role: Replication) -> None:
        """A resync starts: count its progress from here."""
        self.progress = SyncProgress(self.disk.bitmap.count, asyncio.get_running_loop().time())
        self.state.change(replication=role)

    def end_sync(self) -> None:
        """The resync is complete."""
        self.progress = None

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = spawn(work, "end of a session")
        self._past_sessions.add(task)
        task.add_done_callback(self._past_sessions.discard)

    async def past_finished(self) -> None:
        """Nothing read from a dead connection is still being applied."""
        if self.session is not None:
            await self.session.verification.finished()
        while self._past_sessions:
            await asyncio.wait(set(self._past_sessions))

    @property
    def syncing(self) -> bool:
        """Whether a resync is under way."""
        return self.state.replication in SYNCING
