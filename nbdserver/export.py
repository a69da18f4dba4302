"""What the server serves: the interface between a connection and the storage behind it."""

import abc
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from nbdserver.extents import DATA, Extent

# Index in the batch -> NBD error number of that write. Empty: all of them succeeded.
WriteDone = Callable[[Mapping[int, int]], None]

NO_ERRORS: Mapping[int, int] = MappingProxyType({})


class ExportClient(Protocol):
    """A connection that has this export open, as the export sees it."""

    @property
    def peer_name(self) -> str:
        """Who it is, for logs: "192.0.2.1:40000" or "unix client 7"."""

    def drain(self) -> Awaitable[None]:
        """Stop reading, finish every request received so far, send the replies, close gracefully.

        Done when no request of this connection is under way in the export any more and the replies
        are on their way; the half-closed socket lingers briefly afterwards by itself, so that a late
        request does not turn into a reset that destroys the replies. Can be called more than once.
        """

    def abort(self) -> None:
        """Drop the connection at once, replies included. What is under way in the export goes on."""


class Export(abc.ABC):
    """A block device that clients can open.

    The hot calls (`write_batch`, `read_now`) are plain functions for many requests per call; what may
    block is a coroutine. All of them are called on the loop's thread, with ranges that were already
    checked against `size_bytes`. Coroutines raise OSError; its errno is mapped to the protocol's numbers.
    """

    # Plain annotations at run time, read-only properties for the type checker: an implementation may
    # then have either an attribute or a property.
    if TYPE_CHECKING:

        @property
        def name(self) -> str: ...
        @property
        def description(self) -> str: ...
        @property
        def size_bytes(self) -> int: ...
        @property
        def read_only(self) -> bool: ...
    else:
        name: str
        description: str
        size_bytes: int
        read_only: bool

    def refusal(self) -> str | None:
        """One sentence why it cannot be opened now; None when it can."""
        return None

    def opened(self, client: ExportClient) -> None:  # noqa: B027 - a hook, not a duty
        """A client finished the handshake for this export and may send requests from now on."""

    def closed(self, client: ExportClient) -> None:  # noqa: B027
        """The client is gone and none of its requests is under way any more."""

    @abc.abstractmethod
    def write_batch(self, writes: Sequence[tuple[int, memoryview]], done: WriteDone) -> bool:
        """Write (offset, data) pairs in this order; call `done` exactly once, possibly before returning.

        `done` takes {index: NBD error number} for the writes that failed and is called on the loop's
        thread. Never raises. Returns True when references to the views are kept after the return: their
        memory is then never used again for anything else. Otherwise it is overwritten right away.
        """

    @abc.abstractmethod
    def read_now(self, offset: int, length: int) -> bytes | None:
        """Exactly `length` bytes, or None when that could block (`read` is then used). Raises OSError."""

    @abc.abstractmethod
    async def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes. Raises OSError."""

    @abc.abstractmethod
    async def write_durable(self, offset: int, data: bytes) -> None:
        """Write and return when the data is on stable storage (FUA). Raises OSError."""

    @abc.abstractmethod
    async def flush(self) -> None:
        """Make every write answered before this call durable. Raises OSError."""

    @abc.abstractmethod
    async def trim(self, offset: int, length: int) -> None:
        """The contents of the range are no longer needed. Raises OSError."""

    @abc.abstractmethod
    async def zero(self, offset: int, length: int, punch: bool) -> None:
        """The range reads as zeroes afterwards; `punch` False: it must stay allocated. Raises OSError."""

    def zeroes_fast(self, offset: int, length: int, punch: bool) -> bool:
        """Whether `zero` of this range is certain to take less time than a write of zeroes; does not block."""
        return False

    async def block_status(self, offset: int, length: int, most: int) -> list[Extent]:
        """At least one and at most `most` extents from `offset` on, of `length` bytes or less. Raises OSError.

        `nbdserver.extents.HOLE` only for what reads as zeroes; `DATA` is never wrong.
        """
        return [(length, DATA)]

    async def prefetch(self, offset: int, length: int) -> None:  # noqa: B027 - a hint
        """The range will soon be read. Raises OSError."""
