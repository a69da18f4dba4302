"""The seam between the node and the machine: disk, network and randomness come in through here.

Time is the running event loop's clock and nothing else. A simulator puts its own `Runtime` (and its own loop) in this
one's place and runs the node's code unchanged.
"""

import asyncio
import contextlib
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from nbdserver.blockfile import BlockFile, BlockFileError
from replica import link_tls, programs
from replica.errors import ReplicaError
from replica.metadata import MetadataFile
from replica.store import FileOfMetadata, FileStore, Store, backing_fingerprint

ProtocolFactory = Callable[[], asyncio.BaseProtocol]


class Listener(Protocol):
    """Something that accepts connections until closed."""

    def close(self) -> None: ...


class ClosableMetadataFile(MetadataFile, Protocol):
    """A metadata file that is held open (and locked) by this process."""

    async def forget_cache(self) -> None:
        """Flush; from here on, what is read is what the medium has. OSError."""

    def close(self) -> None: ...


class OpenBacking(Protocol):
    """A backing file or device that this process holds exclusively."""

    size_bytes: int
    fingerprint: str

    def store(self, size_bytes: int) -> Store:
        """The first `size_bytes` of it as a store."""

    def close(self) -> None: ...


class Runtime(Protocol):
    """What a node needs of its machine. All errors are ReplicaErrors with a sentence, or OSErrors of the network."""

    def open_backing(self, path: Path) -> OpenBacking: ...

    def open_metadata(self, path: Path) -> ClosableMetadataFile: ...

    async def listen(self, host: str, port: int, factory: ProtocolFactory) -> Listener: ...

    async def dial(self, host: str, port: int, local_host: str, factory: ProtocolFactory) -> None: ...

    def clock_s(self) -> float:
        """What the event loop's clock shows, in fine steps (uvloop's own are milliseconds)."""

    def random_bytes(self, count: int) -> bytes: ...

    def random_id(self) -> int:
        """A random 64-bit number other than 0."""

    async def run_hook(
        self, command: Sequence[str], variables: Mapping[str, str], timeout_s: float, on_line: Callable[[str], None]
    ) -> str:
        """Run a program to its end, `timeout_s` at most: what was wrong ("returned 1"), or "" for status 0. Raises
        nothing; when the caller is cancelled, the program is ended.
        """


class HostBacking:
    """`OpenBacking` on the real machine."""

    def __init__(self, file: BlockFile) -> None:
        self._file = file
        self.size_bytes = file.size_bytes
        self.fingerprint = backing_fingerprint(file)

    def store(self, size_bytes: int) -> Store:
        """The first `size_bytes` of it as a store."""
        return FileStore(self._file, size_bytes)

    def close(self) -> None:
        """Let go of it unless a store took it over (that closes it itself)."""
        self._file.close()


class _TlsListener:
    """A listener with the connections that shake hands."""

    def __init__(self, server: asyncio.AbstractServer, acceptor: link_tls.TlsAcceptor) -> None:
        self._server = server
        self._acceptor = acceptor

    def close(self) -> None:
        self._server.close()
        self._acceptor.close()


class HostRuntime:
    """The real machine; with `tls`, connections to the peer use that."""

    def __init__(self, tls: link_tls.LinkTls | None = None) -> None:
        self._tls = tls

    def open_backing(self, path: Path) -> OpenBacking:
        """Open and lock the backing; ReplicaError when it is missing, in use or not a disk."""
        try:
            return HostBacking(BlockFile.open(path))
        except BlockFileError as error:
            raise ReplicaError(str(error)) from None

    def open_metadata(self, path: Path) -> ClosableMetadataFile:
        """Open and lock the metadata file; ReplicaError when it is missing or in use."""
        if not path.exists():
            raise ReplicaError(f"{path}: there are no metadata yet: make them with `replicactl create-md`.")
        try:
            return FileOfMetadata.open(path)
        except BlockFileError as error:
            raise ReplicaError(str(error)) from None

    async def listen(self, host: str, port: int, factory: ProtocolFactory) -> Listener:
        """Accept connections on host:port; ReplicaError when the port is taken or the address is not ours."""
        acceptor = link_tls.TlsAcceptor(self._tls, factory) if self._tls is not None else None
        try:
            server = await asyncio.get_running_loop().create_server(acceptor or factory, host, port, reuse_address=True)
        except OSError as error:
            raise ReplicaError(
                f"cannot listen for the peer on {host}:{port} ({error.strerror or error}): "
                "is another program using the port, or is the address not this node's?"
            ) from None
        return server if acceptor is None else _TlsListener(server, acceptor)

    async def dial(self, host: str, port: int, local_host: str, factory: ProtocolFactory) -> None:
        """Connect to host:port from this node's own address; OSError when that fails, ReplicaError when TLS does."""

        async def connect(factory: ProtocolFactory) -> None:
            loop = asyncio.get_running_loop()
            transport, _ = await loop.create_connection(factory, host, port, local_addr=(local_host, 0))
            peer_socket = transport.get_extra_info("socket")
            if peer_socket is not None:
                with contextlib.suppress(OSError):
                    peer_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        if self._tls is None:
            await connect(factory)
        else:
            await link_tls.dial(self._tls, connect, factory)

    def clock_s(self) -> float:
        """Seconds, of the same clock as the event loop's."""
        return time.monotonic()

    def random_bytes(self, count: int) -> bytes:
        """Unpredictable bytes."""
        return secrets.token_bytes(count)

    def random_id(self) -> int:
        """A random 64-bit number other than 0."""
        return secrets.randbits(64) or 1

    async def run_hook(
        self, command: Sequence[str], variables: Mapping[str, str], timeout_s: float, on_line: Callable[[str], None]
    ) -> str:
        """Run a program with these variables and little else (`replica.programs`)."""
        return (await programs.run(command, variables, timeout_s, on_line)).problem
