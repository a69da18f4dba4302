"""The NBD export of a resource: open on the Primary only, backed by this node's volume or the peer's."""

import errno
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from nbdserver.constants import MAX_BLOCK_BYTES
from nbdserver.export import Export, ExportClient, WriteDone
from nbdserver.extents import Extent

T = TypeVar("T")


class Served(Protocol):
    """A volume as clients use it: this node's (`replica.volume`), or the peer's (`replica.peer_volume`)."""

    def write_batch(self, writes: Sequence[tuple[int, memoryview]], done: WriteDone) -> bool: ...

    def read_now(self, offset: int, length: int) -> bytes | None: ...

    async def read(self, offset: int, length: int) -> bytes: ...

    async def write_durable(self, offset: int, data: bytes) -> None: ...

    async def zero(self, offset: int, length: int, punch: bool) -> None: ...

    async def flush(self) -> None: ...

    def zeroes_fast(self, offset: int, length: int, punch: bool) -> bool: ...

    async def block_status(self, offset: int, length: int, most: int) -> list[Extent]: ...

    async def prefetch(self, offset: int, length: int) -> None: ...


class ResourceExport(Export):
    """What NBD clients see of a resource. `refusal` decides who may open it (the role, a demotion under way)."""

    name: str
    description: str
    size_bytes: int
    read_only: bool

    def __init__(
        self, name: str, size_bytes: int, refuse: Callable[[], str | None], read_failed: Callable[[OSError], None]
    ) -> None:
        self.name = name
        self.description = f"Replica resource {name}"
        self.size_bytes = size_bytes
        self.read_only = False
        self.clients: set[ExportClient] = set()
        self._refuse = refuse
        self._read_failed = read_failed
        self._served: Served | None = None

    def serve(self, source: Served | None) -> None:
        """Serve this volume (on becoming Primary), or none. What is under way in the one before goes on with it."""
        self._served = source

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
        if self._served is None:
            done(dict.fromkeys(range(len(writes)), errno.ESHUTDOWN))
            return False
        return self._served.write_batch(writes, done)

    def read_now(self, offset: int, length: int) -> bytes | None:
        """Read from the local page cache."""
        served = self._served or self._serving()  # a call less for each read
        try:
            return served.read_now(offset, length)
        except OSError as error:
            self._report(served, error)
            if served is self._served:
                raise
            return None  # `read` asks the copy that is served now

    async def read(self, offset: int, length: int) -> bytes:
        """Read from the local disk, or from the peer's if there is none."""
        return await self._insist(self._reporting(lambda served: served.read(offset, length)))

    async def block_status(self, offset: int, length: int, most: int) -> list[Extent]:
        """The holes of the local disk, where that is good."""
        return await self._insist(self._reporting(lambda served: served.block_status(offset, length, most)))

    async def write_durable(self, offset: int, data: bytes) -> None:
        """Write with FUA on every in-sync node."""
        await self._insist(lambda served: served.write_durable(offset, data))

    async def flush(self) -> None:
        """Flush every in-sync node."""
        await self._insist(lambda served: served.flush())

    async def trim(self, offset: int, length: int) -> None:
        """Deallocate on both nodes; reads as zeroes on both afterwards."""
        await self.zero(offset, length, True)

    async def zero(self, offset: int, length: int, punch: bool) -> None:
        """Zero on both nodes."""
        await self._insist(lambda served: served.zero(offset, length, punch))

    def zeroes_fast(self, offset: int, length: int, punch: bool) -> bool:
        """Whether zeroing is fast on every node that has to do it."""
        return self._serving().zeroes_fast(offset, length, punch)

    async def prefetch(self, offset: int, length: int) -> None:
        """Read ahead on the local disk; no more than one read can ask for: a hint must not empty the page cache."""
        await self._insist(lambda served: served.prefetch(offset, min(length, MAX_BLOCK_BYTES)))

    def _reporting(self, ask: Callable[[Served], Awaitable[T]]) -> Callable[[Served], Awaitable[T]]:
        """The same, and a failure is told to the resource."""

        async def ask_and_report(served: Served) -> T:
            try:
                return await ask(served)
            except OSError as error:
                self._report(served, error)
                raise

        return ask_and_report

    async def _insist(self, ask: Callable[[Served], Awaitable[T]]) -> T:
        """The answer of what is served now. When another copy took over meanwhile, the error was not the client's:
        that one is asked. (The client still waits for its answer, so doing it once more breaks no order.)
        """
        while True:
            served = self._serving()
            try:
                return await ask(served)
            except OSError:
                if served is self._served:
                    raise

    def _report(self, served: Served, error: OSError) -> None:
        if served is self._served:
            self._read_failed(error)

    def _serving(self) -> Served:
        if self._served is None:
            raise OSError(errno.ESHUTDOWN, "the resource is no longer Primary on this node")
        return self._served
