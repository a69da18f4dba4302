"""Who a client is, across its connections: fences those that it has given up.

The Linux kernel sends requests that were not answered in time again, on a new connection. If the server was only
frozen, the old connection's requests still wait in its socket, and would be executed after what the client
sent later. So a client may claim the server (option `OPT_CLAIM`, this server's own): it names itself and the generation
of its connections. Before the claim is acknowledged, all its connections of older generations are dropped: what is
unread there is never executed, and what is being executed has ended.

The data of the option: 16 bytes that are the client's own (random), then the generation, 64 bits big-endian.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from struct import Struct
from typing import Protocol

_CLAIM = Struct(">16sQ")


@dataclass(frozen=True)
class ClientIdentity:
    """A client (16 bytes) and the generation of one of its connections."""

    client: bytes
    generation: int

    def packed(self) -> bytes:
        """The data of the option."""
        return _CLAIM.pack(self.client, self.generation)

    @classmethod
    def unpack(cls, data: bytes) -> "ClientIdentity":
        """From the data of the option; raises ValueError with a sentence."""
        if len(data) != _CLAIM.size:
            raise ValueError(f"a claim has {_CLAIM.size} bytes, not {len(data)}")
        return cls(*_CLAIM.unpack(data))

    def precedes(self, other: "ClientIdentity") -> bool:
        """Whether it is of an older generation of the same client."""
        return self.client == other.client and self.generation < other.generation


class Claimant(Protocol):
    """A connection, as far as it matters here."""

    identity: ClientIdentity | None
    closed: asyncio.Event

    def revoke(self) -> None:
        """Execute nothing more of what was or is received, and drop the connection."""


async def fence(identity: ClientIdentity, connections: Iterable[Claimant]) -> str | None:
    """Drop what this claim outdates among `connections`, and wait until nothing of it is under way.

    Returns a sentence instead when a newer claim of the same client holds. The claimant's own `identity` has to be set
    before, so that a newer claim finds it however long this one waits.
    """
    others = list(connections)
    if any(other.identity is not None and identity.precedes(other.identity) for other in others):
        return "this client has newer connections already"
    outdated = [other for other in others if other.identity is not None and other.identity.precedes(identity)]
    for other in outdated:
        other.revoke()
    for other in outdated:
        await other.closed.wait()
    return None
