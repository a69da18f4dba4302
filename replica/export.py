"""The NBD export of a resource: open on the Primary only, backed by the volume."""

import errno
from collections.abc import Callable, Sequence

from nbdserver.export import Export, ExportClient, WriteDone
from replica.volume import Volume


class ResourceExport(Export):
    """What NBD clients see of a resource. `refusal` decides who may open it (the role, a demotion under way)."""

    name: str
    description: str
    size_bytes: int
    read_only: bool

    def __init__(self, name: str, size_bytes: int, refuse: Callable[[], str | None]) -> None:
        self.name = name
        self.description = f"Replica resource {name}"
        self.size_bytes = size_bytes
        self.read_only = False
        self.clients: set[ExportClient] = set()
        self._refuse = refuse
        self._volume: Volume | None = None

    def serve(self, volume: Volume | None) -> None:
        """Serve this volume (on becoming Primary), or none."""
        self._volume = volume

    def refusal(self) -> str | None:
        """Why the export cannot be opened now."""
        return self._refuse()

    def opened(self, client: ExportClient) -> None:
        """A client may send requests from now on."""
        self.clients.add(client)

    def closed(self, client: ExportClient) -> None:
        """A client and all its requests are gone."""
        self.clients.discard(client)

    def write_batch(self, writes: Sequence[tuple[int, memoryview]], done: WriteDone) -> bool:
        """Hand the batch to the volume."""
        if self._volume is None:
            done(dict.fromkeys(range(len(writes)), errno.ESHUTDOWN))
            return False
        return self._volume.write_batch(writes, done)

    def read_now(self, offset: int, length: int) -> bytes | None:
        """Read from the local page cache."""
        return self._serving().store.read_now(offset, length)

    async def read(self, offset: int, length: int) -> bytes:
        """Read from the local disk."""
        return await self._serving().store.read(offset, length)

    async def write_durable(self, offset: int, data: bytes) -> None:
        """Write with FUA on every in-sync node."""
        await self._serving().write_durable(offset, data)

    async def flush(self) -> None:
        """Flush every in-sync node."""
        await self._serving().flush()

    async def trim(self, offset: int, length: int) -> None:
        """Deallocate on both nodes; reads as zeroes on both afterwards."""
        await self._serving().zero(offset, length, True)

    async def zero(self, offset: int, length: int, punch: bool) -> None:
        """Zero on both nodes."""
        await self._serving().zero(offset, length, punch)

    def _serving(self) -> Volume:
        if self._volume is None:
            raise OSError(errno.ESHUTDOWN, "the resource is no longer Primary on this node")
        return self._volume
