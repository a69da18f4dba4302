"""Growing a volume while clients use it, after both backings were grown (`drbdadm resize`).

The Secondary grows first, then the Primary: as long as clients are shown the old size, nobody writes behind it, and a
write behind it finds both copies grown. A crash in between leaves one copy larger. At the next handshake a larger
target takes the size of its source, and a smaller one grows to it.
"""

from typing import TYPE_CHECKING, Any, Final

from replica import wire
from replica.bitmap import BLOCK_SIZE
from replica.errors import Refused
from replica.link import LinkLost, PeerLink
from replica.states import Role
from replica.superblock import MAX_VOLUME_BYTES

if TYPE_CHECKING:
    from replica.resource import Resource

#: What the other node can be asked.
LOOK, GROW = "resize-look", "resize-grow"
#: How long the other node may take to answer: it writes the bitmap of what is new.
REQUEST_TIMEOUT_S: Final = 60.0


class Resize:
    """Both nodes' side of it, on one link."""

    def __init__(self, resource: "Resource", link: PeerLink) -> None:
        self._resource = resource
        self._link = link

    async def run(self, *, assume_clean: bool) -> None:
        """Grow both copies to what both backings have room for. Refused; OSError of the own disk."""
        resource = self._resource
        self._check()
        size_bytes = resource.disk.size_bytes
        room_bytes, hole_to = await self._look()
        theirs = await self._ask({"op": LOOK, "size": size_bytes})
        their_room_bytes, their_hole_to = (_number(theirs, name) for name in ("room", "hole_to"))
        new_bytes = min(room_bytes, their_room_bytes, MAX_VOLUME_BYTES) // BLOCK_SIZE * BLOCK_SIZE
        if new_bytes <= size_bytes:
            raise Refused(
                f"{resource.name} has {size_bytes} bytes, and its backing {room_bytes} on {resource.node_name} and "
                f"{their_room_bytes} on {resource.peer_name}: grow both first (a volume never shrinks)."
            )
        clean = assume_clean or min(hole_to, their_hole_to) >= new_bytes
        request = {"op": GROW, "size": size_bytes, "to": new_bytes, "clean": clean}
        grown = False
        try:
            if resource.state.peer_role is Role.PRIMARY:
                await self._grow(size_bytes, new_bytes, clean=clean)
                await self._ask(request)
            else:
                await self._ask(request)
                await self._grow(size_bytes, new_bytes, clean=clean)
            grown = True
        finally:
            if not (grown and clean):
                # To copy what is new; or to agree on a size, should only one of the two have grown.
                resource.renegotiate(f"the size of {resource.name} has changed to {new_bytes} bytes.")

    async def asked(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """Carry out the peer's request, and what to add to the answer; None: it is not about resizing."""
        operation = message.get("op")
        if operation not in (LOOK, GROW):
            return None
        self._check()
        size_bytes = _number(message, "size")
        if size_bytes != self._resource.disk.size_bytes:
            raise Refused(f"{self._resource.name} has another size on {self._resource.node_name}: connect them anew.")
        if operation == GROW:
            await self._grow(size_bytes, _number(message, "to"), clean=wire.field(message, "clean", bool))
            return {}
        room_bytes, hole_to = await self._look()
        return {"room": room_bytes, "hole_to": hole_to}

    def _check(self) -> None:
        resource = self._resource
        resource.need_both_in_sync("resized")
        if resource.verify_progress is not None:
            raise Refused(
                f"{resource.name} is being verified: wait for that, or end it with `replicactl verify --stop "
                f"{resource.name}`."
            )

    async def _look(self) -> tuple[int, int]:
        """How large the backing is, and up to where it is a hole behind the volume's end."""
        disk = self._resource.disk
        room_bytes = disk.store.room_bytes()
        if room_bytes <= disk.size_bytes or disk.size_bytes % BLOCK_SIZE:
            return room_bytes, disk.size_bytes
        hole_to, _ = await disk.store.next_data(disk.size_bytes, room_bytes)
        return room_bytes, hole_to

    async def _grow(self, size_bytes: int, new_bytes: int, *, clean: bool) -> None:
        disk = self._resource.disk
        if not size_bytes < new_bytes <= min(disk.store.room_bytes(), MAX_VOLUME_BYTES) or new_bytes % BLOCK_SIZE:
            raise Refused(f"{self._resource.name} cannot grow from {size_bytes} to {new_bytes} bytes.")
        await self._resource.grow(new_bytes, clean=clean)

    async def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        name, peer = self._resource.name, self._resource.peer_name
        try:
            return await self._link.request(message, REQUEST_TIMEOUT_S)
        except (TimeoutError, LinkLost) as error:
            why = str(error) or f"no answer in {REQUEST_TIMEOUT_S:g} s"
            raise Refused(
                f"{peer} did not answer the request to {message['op']} ({why}): the nodes agree on a size when they "
                f"connect again; then run `replicactl resize {name}` once more."
            ) from None


def _number(message: dict[str, Any], name: str) -> int:
    value: int = wire.field(message, name, int)
    if value < 0:
        raise wire.ProtocolError(f"a control message has {value} as {name!r}.")
    return value
