"""The Secondary stands in for the disk of a Primary that has none: how the two agree on it, on one link.

The Primary's clients then work through the Secondary's volume (`replica.peer_volume` → `replica.peer_service`). It
begins with SERVE: the Secondary makes its copy durable and records that the Primary's lacks what comes now, and only
then is anything answered. It ends with YIELD: nothing is under way any more, both copies are flushed, and the
Secondary's activity log is empty; from then on the Primary leads again, or is Primary no more.
"""

import asyncio
import logging
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from replica import wire
from replica.errors import Refused
from replica.generation import Side
from replica.link import PeerLink
from replica.peer_service import PeerService
from replica.peer_volume import PeerVolume
from replica.states import Replication, Role
from replica.tasks import spawn

if TYPE_CHECKING:
    from replica.resource import Resource
    from replica.session import Session

log = logging.getLogger("replica.session")


class StandIn:
    """Both ends of it: `ask`, `take_lead` and `leave` are the Primary's, the rest the Secondary's."""

    def __init__(self, resource: "Resource", session: "Session", link: PeerLink) -> None:
        self._resource = resource
        self._session = session
        self._link = link
        self._service: PeerService | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._beginning: asyncio.Task[None] | None = None
        #: SERVE and YIELD take effect in the order in which they come.
        self._turn = asyncio.Lock()
        link.expect(wire.YIELDED)
        link.handlers[wire.SERVE] = self._on_serve
        link.handlers[wire.SERVING] = self._on_serving
        link.handlers[wire.YIELD] = self._on_yield

    # ── the Primary's end ────────────────────────────────────────────────────────────────────────────────────

    def ask(self) -> None:
        """Ask the peer to serve; what it answers opens the resource's `peer_volume`."""
        self._link.send(wire.SERVE, flags=wire.FLAG_TARGET if self._resource.syncing else 0)

    def may_go_on(self, peer: Side, ran_on: bool, served: int) -> bool:
        """On a new link, while this node is Primary without a good disk: whether the peer still has all that was
        answered, and nothing else. If not, clients get errors: they must not be shown a past that they do not know.

        `ran_on`: it has applied every write since both were in sync. `served`: the generation in which it stood in
        last; a promotion since would have made another one.
        """
        resource = self._resource
        peer_volume = resource.peer_volume
        if peer_volume is None:
            return False
        current = peer.generations.current
        known = current in ((peer_volume.generation,) if peer_volume.generation else (peer_volume.before, served))
        if ran_on and known and not peer.is_primary and not peer.incomplete:
            return True
        what = "was Primary" if peer.is_primary or not known else "was started anew and may have lost writes"
        reason = (
            f"{resource.node_name} has no good disk, and {resource.peer_name} {what} meanwhile: let the clients go, "
            f"demote {resource.node_name} and promote {resource.peer_name}."
        )
        self._give_up(peer_volume, reason)
        return False

    def _give_up(self, peer_volume: PeerVolume, reason: str) -> None:
        """The peer does not serve: clients get errors, and the operator this sentence."""
        log.error("%s: %s", self._resource.name, reason)
        peer_volume.fail()
        self._resource.state.change(last_error=reason)

    def _on_serving(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        message = wire.unpack_map(payload)
        peer_volume = self._resource.peer_volume
        if peer_volume is None:
            return
        if "error" in message:
            self._give_up(peer_volume, str(message["error"]))
            return
        peer_volume.serve_on(self._link, wire.field(message, "current", int))
        if self._session.bitmap_is_exact and self._resource.syncing:
            peer_volume.read_here(self._resource.disk.store, self._resource.disk.bitmap)

    async def take_lead(self) -> None:
        """The local copy is in sync: clients are served from it again."""
        async with self._turn:
            if await self._rest():
                await self._resource.lead(self._link)

    async def leave(self) -> None:
        """This node is to be Primary no more, and its clients are gone."""
        peer_volume = self._resource.peer_volume
        if peer_volume is not None and peer_volume.open:
            await peer_volume.flush()
        async with self._turn:
            await self._rest()

    async def _rest(self) -> bool:
        """Ask the peer to rest, with nothing under way. False when it is not needed any more."""
        peer_volume = self._resource.peer_volume
        if peer_volume is None:
            return False
        await peer_volume.rest()
        self._link.send(wire.YIELD)
        await self._link.receive(wire.YIELDED)
        return True

    # ── the Secondary's end ──────────────────────────────────────────────────────────────────────────────────

    @property
    def serving(self) -> bool:
        """Whether the peer works through this node's volume."""
        return self._service is not None

    def end(self) -> None:
        """The link is gone: what has only been asked for does not begin any more."""
        if self._beginning is not None:
            # It may wait for a verb that waits in turn for everything of this link to be over.
            self._beginning.cancel()

    async def finished(self) -> None:
        """Return when nothing of the link, which is gone, is under way, and the volume is at rest."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))
        await self._end_service()

    async def _end_service(self) -> None:
        service, self._service = self._service, None
        if service is not None:
            try:
                await service.end()
            except OSError as error:
                self._resource.disk_failed(error)
            self._resource.changed()

    def _on_serve(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        self._beginning = self._start(self._serve(bool(flags & wire.FLAG_TARGET)))

    async def _serve(self, peer_is_target: bool) -> None:
        async with self._turn, self._resource.admin:
            if self._link.closed:
                return
            try:
                await self._begin_service(peer_is_target)
            except OSError as error:
                self._resource.disk_failed(error)
            except Refused as refusal:
                self._link.send_map(wire.SERVING, {"error": str(refusal)})

    async def _begin_service(self, peer_is_target: bool) -> None:
        resource = self._resource
        if resource.state.role is Role.PRIMARY or not resource.attached or (side := resource.side()) is None:
            raise Refused(f"{resource.node_name} cannot stand in for the disk of {resource.peer_name}.")
        if side.incomplete or resource.superblock.outdated:
            raise Refused(f"the copy of {resource.node_name} is {resource.disk_state}: no node has a good disk.")
        volume = resource.volume
        if self._service is None:
            await self._session.mirror_finished()
            if not peer_is_target:
                # The Primary's disk is gone altogether. As when this node is promoted: durable before anything new.
                volume.stop_mirroring()
                await resource.disk.store.flush()
                await volume.ensure_alone_recorded()
            resource.served_generation = resource.superblock.generations.current
            if self._link.closed:
                return
            self._service = PeerService(self._link, volume)
            # Clients are told nothing any more but what this copy has, whatever it lacked before.
            resource.unbroken = True
        if resource.state.replication is Replication.ESTABLISHED and not volume.mirroring:
            resource.state.change(replication=Replication.OFF)
        self._link.send_map(wire.SERVING, {"current": resource.served_generation})
        log.info("%s: %s works through the disk of %s", resource.name, resource.peer_name, resource.node_name)
        resource.changed()

    def _on_yield(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        self._start(self._yield())

    async def _yield(self) -> None:
        async with self._turn:
            await self._end_service()
        if self._resource.attached:
            self._session.start_mirror()
        self._link.send(wire.YIELDED)

    def _start(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = spawn(work, "standing in for the peer's disk")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
