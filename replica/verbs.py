"""What an operator (or the peer on an operator's behalf) can ask of a resource.

Each verb runs under the resource's `admin` lock, which also guards the handshake, so that two decisions about the
same copy never interleave. A verb that cannot be carried out raises `Refused` with a sentence: why, and what to do.
"""

import asyncio
import contextlib
import errno
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from replica.errors import Refused
from replica.generation import started_alone
from replica.hooks import Event
from replica.link import LinkLost, PeerLink
from replica.states import SYNC_TARGETS, Connection, Disk, Replication, Role

if TYPE_CHECKING:
    from replica.resource import Resource

log = logging.getLogger("replica.resource")

#: How long a peer may take to answer a request; a takeover waits for its clients to drain.
REQUEST_TIMEOUT_S: Final = 30.0
#: How long a request of the peer waits for a handshake or another verb to be over.
BUSY_S: Final = 2.0


class Verbs:
    """The operator's side of one resource."""

    def __init__(self, resource: "Resource") -> None:
        self._resource = resource
        self._name = resource.name
        self._node = resource.node_name
        self._peer = resource.peer_name

    # ── roles ────────────────────────────────────────────────────────────────────────────────────────────────

    async def promote(self, *, force: bool = False, peer_is_dead: bool = False) -> None:
        """Become Primary: serve clients. `peer_is_dead`: the caller is certain that the peer does not run. Its link is
        lost at once, instead of when its time is over; everything else is as after the loss of a link. A peer that
        connects again is not dead, and is asked as always. (A Primary is one already, and goes on alone.)
        """
        if peer_is_dead and self._resource.link is not None:
            # Before the lock is taken: a handshake with the dead peer may hold it, or a verb that asks it something.
            self._resource.link.close(f"{self._peer} is dead, as {self._node} was told.")
        async with self._resource.admin:
            await self._promote(force)

    async def _promote(self, force: bool) -> None:
        resource = self._resource
        if resource.state.role is Role.PRIMARY:
            return
        if self._needs_peer() and await self._promote_through_peer(force):
            return
        self._check_promotable(force)
        if resource.link is not None:
            await self._ask_peer("promote")
        await resource.past_finished()
        superblock, volume = resource.superblock, resource.volume
        await resource.disk.store.flush()
        anew = force and (superblock.inconsistent or superblock.just_created)
        if anew:
            superblock.generations = started_alone(superblock.generations, resource.new_generation())
            superblock.inconsistent = superblock.just_created = False
            superblock.peers[0].outdated = True
        elif resource.served_generation == superblock.generations.current and not volume.mirroring:
            # The peer, Primary without a disk, has seen this generation and must not take what comes now for it.
            superblock.generations = started_alone(superblock.generations, resource.new_generation())
        superblock.outdated = False
        superblock.primary = True
        # The peer may come back having lost what is durable here by now, and must not win by its crash.
        superblock.promoted_alone = not volume.mirroring
        # Promoted alone it is the younger Primary, unless it is one again: what it was when they parted stays.
        superblock.parted_as_primary = superblock.parted_as_primary or volume.mirroring
        await resource.save()
        # While every write is mirrored, `alone_recorded` is what the session made it.
        if not volume.mirroring:
            volume.alone_recorded = superblock.peers[0].outdated
        resource.export.serve(volume)
        volume.start_timer()
        resource.state.change(role=Role.PRIMARY)
        self._tell_promoted()
        if anew:
            resource.renegotiate(f"{self._node} was promoted with --force.")

    def _needs_peer(self) -> bool:
        """Whether this node has no good disk of its own, and a connected peer that has one."""
        resource, state = self._resource, self._resource.state
        good_here = resource.attached and state.replication not in SYNC_TARGETS
        good_there = state.peer_disk in (Disk.UP_TO_DATE, Disk.CONSISTENT)
        return good_there and not good_here and resource.export.size_bytes > 0

    async def _promote_through_peer(self, force: bool) -> bool:
        """Serve clients from the peer's copy; False when that is not needed any more."""
        resource = self._resource
        self._refuse_second_primary()
        if resource.lost_newer_disk and not force:
            raise Refused(
                f"the disk that {self._node} had has newer data of {self._name} than that of {self._peer}: attach it, "
                f"or lose them with `replicactl promote --force {self._name}`."
            )
        await self._ask_peer("promote")
        await resource.past_finished()
        if resource.link is None:
            raise Refused(f"the connection to {self._peer}, which has the only good copy, was lost: try again.")
        if not self._needs_peer():
            return False  # the resync was completed meanwhile
        peer_volume = resource.work_through_peer()
        resource.state.change(role=Role.PRIMARY)
        await peer_volume.decided.wait()
        if not peer_volume.open:
            why = resource.state.last_error or f"{self._peer} did not answer"
            await self._demote(force=True)
            raise Refused(f"{self._name} cannot be served from the disk of {self._peer}: {why}")
        self._tell_promoted()
        return True

    def _tell_promoted(self) -> None:
        log.info("%s: %s is Primary", self._name, self._node)
        self._resource.hooks.fire(Event.PROMOTED, f"{self._name} is Primary on {self._node}.")

    def _check_promotable(self, force: bool) -> None:
        name, node, peer, state = self._name, self._node, self._peer, self._resource.state
        disk = self._resource.disk_state
        self._refuse_second_primary()
        if disk in (Disk.DISKLESS, Disk.FAILED):
            raise Refused(
                f"{name} has no usable disk on {node} ({disk}), and no connected peer with a good one: attach a disk, "
                f"or connect to {peer}."
            )
        if state.replication in SYNC_TARGETS:
            raise Refused(f"{name} is being resynced from {peer}: wait for it with `replicactl wait-sync {name}`.")
        if force:
            return
        if self._resource.superblock.just_created:
            raise Refused(
                f"{name} has no data to choose between yet: run `replicactl promote --force {name}` on the node "
                "to start from."
            )
        if disk is Disk.INCONSISTENT:
            raise Refused(
                f"the disk of {name} on {node} is Inconsistent (a resync was not completed): connect it to {peer}, "
                f"or accept the damage with `replicactl promote --force {name}`."
            )
        if disk is Disk.OUTDATED:
            raise Refused(
                f"the disk of {name} on {node} is Outdated ({peer} has newer data): connect it, or lose the newer "
                f"data with `replicactl promote --force {name}`."
            )

    def _refuse_second_primary(self) -> None:
        if self._resource.state.peer_role is Role.PRIMARY:
            raise Refused(
                f"{self._name} is Primary on {self._peer}: demote it there first, or run `replicactl takeover "
                f"{self._name}` here."
            )

    async def demote(self, *, force: bool = False) -> None:
        """Become Secondary: finish what clients asked for, flush both sides, empty the activity log."""
        async with self._resource.admin:
            await self._demote(force)

    async def _demote(self, force: bool) -> None:
        resource = self._resource
        if resource.state.role is Role.SECONDARY:
            return
        clients = len(resource.export.clients)
        if clients and not force:
            raise Refused(
                f"{self._name} is in use by {clients} NBD client{'s' if clients > 1 else ''}: disconnect them, or run "
                f"`replicactl demote --force {self._name}`."
            )
        resource.demoting = True
        try:
            await asyncio.gather(*(client.drain() for client in list(resource.export.clients)))
            if resource.peer_volume is not None:
                await self._leave_peer_volume()
            elif resource.has_disk:
                await self._leave_volume()
            resource.export.serve(None)
            resource.state.change(role=Role.SECONDARY)
            log.info("%s: %s is Secondary", self._name, self._node)
            resource.hooks.fire(Event.DEMOTED, f"{self._name} is Secondary on {self._node}.")
        finally:
            resource.demoting = False

    async def _leave_volume(self) -> None:
        resource = self._resource
        superblock, volume = resource.superblock, resource.volume
        volume.stop_timer()
        if not resource.failed:
            await volume.empty_activity_log()
        superblock.primary = False
        superblock.parted_as_primary = superblock.parted_as_primary and not volume.mirroring
        # Alone without a new generation, and yet the peer may have lost what it had not flushed.
        superblock.ahead = superblock.ahead or (not volume.mirroring and resource.disk.bitmap.count > 0)
        await resource.save()

    async def _leave_peer_volume(self) -> None:
        resource = self._resource
        if resource.session is not None:
            with contextlib.suppress(LinkLost, OSError):
                await resource.session.leave_peer_volume()
        await resource.past_finished()
        if resource.peer_volume is None:
            # The local copy has taken over just now.
            await self._leave_volume()
            return
        resource.peer_volume.fail()
        resource.peer_volume = None
        if resource.link is not None and resource.attached and resource.state.replication is Replication.ESTABLISHED:
            # The resync was completed meanwhile, and the volume was to mirror once this node led again.
            resource.volume.start_mirroring(resource.link)

    async def takeover(self) -> None:
        """Graceful switchover: the peer drains, flushes and demotes; this node is promoted."""
        async with self._resource.admin:
            state = self._resource.state
            if state.role is Role.PRIMARY:
                return
            one_disk = self._resource.serving_peer or self._needs_peer()
            if state.replication is not Replication.ESTABLISHED and not one_disk:
                raise Refused(
                    f"{self._name} can be taken over only while both copies are in sync, and it is "
                    f"{state.connection}/{state.replication}: run `replicactl wait-sync {self._name}`, or "
                    "`replicactl promote` if the peer is dead."
                )
            if state.peer_role is Role.PRIMARY:
                await self._ask_peer("takeover")
                state.change(peer_role=Role.SECONDARY)
            await self._promote(force=False)

    # ── the link ─────────────────────────────────────────────────────────────────────────────────────────────

    async def connect(self, *, discard_my_data: bool = False) -> None:
        """Leave StandAlone; `discard_my_data`: after a split brain, this node's own changes may be overwritten."""
        resource = self._resource
        if discard_my_data and resource.state.role is Role.PRIMARY:
            raise Refused(f"{self._name} is Primary on {self._node}: demote it before its data can be discarded.")
        if discard_my_data and resource.state.connection is Connection.CONNECTED:
            raise Refused(f"{self._name} is connected to {self._peer}: there is no split brain to end.")
        resource.discard_my_data = discard_my_data
        if resource.state.connection is Connection.STAND_ALONE:
            resource.state.change(connection=Connection.CONNECTING, last_error="")
        resource.connector.connect()

    async def disconnect(self) -> None:
        """Go StandAlone."""
        state = self._resource.state
        self._refuse_to_part("disconnected")
        if state.connection is not Connection.STAND_ALONE:
            state.change(connection=Connection.STAND_ALONE, last_error="")
        self._resource.connector.disconnect(f"{self._node} was told to disconnect.")

    async def pause_sync(self, *, paused: bool) -> None:
        """Hold a resync back on this node's account, or let it go on."""
        self._resource.pause(paused)

    # ── verification ─────────────────────────────────────────────────────────────────────────────────────────

    async def verify(self, *, start: int = 0, stop: int | None = None, repair: bool = False) -> None:
        """Begin to compare both copies from `start` to `stop` (bytes; None: the volume's end), while clients write;
        `repair`: and to send the Primary's blocks where they differ. Returns when it has begun.
        """
        resource = self._resource
        async with resource.admin:
            self._need_link()
            if resource.session is not None:
                await resource.session.verification.begin(start, stop, repair=repair)

    async def stop_verify(self) -> None:
        """End the verification that either node drives."""
        session = self._resource.session
        if session is None:
            raise Refused(f"{self._name} is not being verified.")
        session.verification.stop()

    # ── the size ─────────────────────────────────────────────────────────────────────────────────────────────

    async def resize(self, *, assume_clean: bool = False) -> None:
        """Let both copies grow to what both backings have room for, while clients use the volume. `assume_clean`: what
        is new is the same on both nodes already.
        """
        resource = self._resource
        async with resource.admin:
            self._need_link()
            if resource.session is not None:
                await resource.session.resize.run(assume_clean=assume_clean)

    # ── the copies ───────────────────────────────────────────────────────────────────────────────────────────

    async def attach(self) -> None:
        """Use the local disk again."""
        async with self._resource.admin:
            if self._resource.attached:
                raise Refused(f"{self._name} already has its disk on {self._node}.")
            if self._resource.state.role is Role.PRIMARY and self._resource.peer_volume is None:
                raise Refused(
                    f"{self._node} is Primary, its disk has failed and {self._peer} could not stand in: let the "
                    f"clients go and run `replicactl demote --force {self._name}` first."
                )
            await self._resource.past_finished()
            self._resource.release_disk()
            await self._resource.attach_disk()
            self._resource.renegotiate(f"{self._node} attached its disk.")

    async def detach(self) -> None:
        """Stop using the local disk (to replace it, say). A Primary goes on through its peer."""
        resource = self._resource
        async with resource.admin:
            if resource.serving_peer:
                self._refuse_to_part("detached")
            if resource.state.role is Role.PRIMARY and resource.attached and resource.peer_volume is None:
                await self._detach_from_primary()
            else:
                resource.renegotiate(f"{self._node} detached its disk.")
            await resource.past_finished()
            resource.release_disk()

    async def _detach_from_primary(self) -> None:
        resource = self._resource
        disk, volume = resource.disk, resource.volume
        if resource.peer_can_serve:
            # The last time that this copy can be asked; and the peer shows that it is alive.
            await volume.settle()
        if not resource.peer_can_serve:
            raise Refused(
                f"{self._name} is Primary on {self._node} and {self._peer} is not in sync: wait for it with "
                f"`replicactl wait-sync {self._name}`."
            )
        volume.abandon_store(OSError(errno.ENODEV, "the disk was detached"))
        peer_volume = resource.work_through_peer(volume)
        await peer_volume.decided.wait()
        await volume.quiet()
        if not peer_volume.open:
            log.error("%s: the disk is detached, and %s does not serve instead", self._name, self._peer)
            return
        # The peer flushed before it began; flushed here as well, this copy lacks only what is written from now on.
        superblock = disk.metadata.superblock
        superblock.primary = False
        try:
            await disk.store.flush()
            await disk.metadata.save_bitmap(disk.bitmap)
            await resource.save()
            await disk.metadata.save_activity_log(())
        except OSError as error:
            # The peer serves, and nothing here is needed for that. If this disk is attached again, its activity log
            # says what it may lack, as after a crash.
            log.warning("%s: the disk that is detached failed (%s).", self._name, error)

    def _refuse_to_part(self, what: str) -> None:
        resource = self._resource
        if resource.serving_peer:
            raise Refused(
                f"{self._peer} is Primary and works through the disk of {self._node}, which cannot be {what} now: "
                f"attach a disk there, or run `replicactl takeover {self._name}` here."
            )
        if resource.peer_volume is not None and resource.peer_volume.open:
            raise Refused(
                f"{self._node} is Primary and works through the disk of {self._peer}, which cannot be {what} now: "
                f"attach a disk here, or run `replicactl takeover {self._name}` there."
            )

    async def invalidate(self) -> None:
        """Declare the local copy bad: it is fetched in full from the peer."""
        await self._give_up_copy()
        self._resource.renegotiate(f"{self._node} was told that its copy is bad.")

    async def _give_up_copy(self) -> None:
        async with self._resource.admin:
            state = self._resource.state
            if state.role is Role.PRIMARY:
                raise Refused(f"{self._name} is Primary on {self._node}: demote it before its copy is invalidated.")
            if state.peer_disk is not Disk.UP_TO_DATE:
                raise Refused(
                    f"the copy of {self._peer} is {state.peer_disk}, so this one is not thrown away: connect to an "
                    "UpToDate peer first."
                )
            disk = self._resource.disk
            disk.metadata.superblock.inconsistent = True
            await disk.metadata.set_all_bits(disk.bitmap)
            self._resource.changed()

    async def invalidate_remote(self) -> None:
        """Declare the peer's copy bad: it is sent in full from here."""
        await self._ask_peer("invalidate")
        # By the side that asked: the answer comes over this very link.
        self._resource.renegotiate(f"{self._node} was told that the copy of {self._peer} is bad.")

    async def outdate(self) -> None:
        """Mark the local copy as older than the peer's, so that it is not promoted by mistake."""
        async with self._resource.admin:
            state = self._resource.state
            if state.role is Role.PRIMARY:
                raise Refused(f"{self._name} is Primary on {self._node}: its copy is the newest there is.")
            if state.replication is Replication.ESTABLISHED:
                raise Refused(f"{self._name} is in sync with {self._peer}: disconnect it before it can be outdated.")
            self._refuse_to_part("outdated")
            self._resource.superblock.outdated = True
            await self._resource.save()
            self._resource.changed()

    # ── between the nodes ────────────────────────────────────────────────────────────────────────────────────

    def _need_link(self) -> PeerLink:
        link = self._resource.link
        if link is None or self._resource.state.replication is Replication.NEGOTIATING:
            raise Refused(f"{self._name} is not connected to {self._peer}: run `replicactl wait-connect {self._name}`.")
        return link

    async def _ask_peer(self, operation: str) -> None:
        try:
            await self._need_link().request({"op": operation}, REQUEST_TIMEOUT_S)
        except TimeoutError:
            raise Refused(
                f"{self._peer} did not answer the request to {operation} in {REQUEST_TIMEOUT_S:.0f} s: see "
                f"`replicactl status {self._name}` there."
            ) from None
        except LinkLost as lost:
            raise Refused(f"{self._peer} did not answer the request to {operation}: {lost}") from None

    async def asked_by_peer(self, operation: str) -> None:
        """Carry out the peer's request; ReplicaError with a sentence for its operator."""
        operations: dict[str, Callable[[], Awaitable[None]]] = {
            "promote": self._consent_to_promotion,
            "takeover": lambda: self.demote(force=True),
            "invalidate": self._give_up_copy,
        }
        if operation not in operations:
            raise Refused(f"{self._node} does not know the request {operation!r}: update the older node.")
        try:
            # Not for ever: the peer holds its own lock meanwhile, and what holds this one may be waiting for that.
            async with asyncio.timeout(BUSY_S), self._resource.admin:
                pass
        except TimeoutError:
            raise Refused(f"{self._node} is busy with another change of {self._name}: try again.") from None
        await operations[operation]()

    async def _consent_to_promotion(self) -> None:
        if self._resource.state.role is Role.PRIMARY:
            raise Refused(f"{self._name} is Primary on {self._node}: demote it there first.")
