"""How the two ends of a peer link prove to each other that they know the cluster's secret.

Both send HELLO (who they are, a fresh nonce), then AUTH = HMAC-SHA-256(secret, role ‖ own HELLO ‖ peer's HELLO).
The role byte differs between the dialing and the accepting end, so an answer cannot be reflected; both HELLOs are
under the MAC, so nobody in between can change a version, a name or a nonce. The session id is derived from the
same material and names this one connection in the logs. Pure: nonces come in as arguments.
"""

import hashlib
import hmac
from dataclasses import dataclass
from typing import Any, Final

from replica import wire

NONCE_BYTES: Final = 32
MAC_BYTES: Final = 32


@dataclass(frozen=True)
class Identity:
    """Who speaks, and what both ends of a link must agree on before they begin."""

    cluster: str
    resource: str
    node: str
    peer: str
    protocol: str
    integrity: bool


def hello(me: Identity, nonce: bytes) -> bytes:
    """The payload of HELLO."""
    return wire.pack_map(
        {
            "program": "replica",
            "version_min": wire.VERSION_MIN,
            "version_max": wire.VERSION_MAX,
            "cluster": me.cluster,
            "resource": me.resource,
            "node": me.node,
            "protocol": me.protocol,
            "data_integrity": me.integrity,
            "nonce": nonce,
        }
    )


def check_hello(me: Identity, payload: bytes) -> dict[str, Any]:
    """The peer's HELLO, checked against what we are. Raises ProtocolError with a sentence for both logs."""
    message = wire.unpack_map(payload)
    if message.get("program") != "replica":
        raise wire.ProtocolError("the other end is not a Replica node.")
    low, high = wire.field(message, "version_min", int), wire.field(message, "version_max", int)
    if low > wire.VERSION_MAX or high < wire.VERSION_MIN:
        raise wire.ProtocolError(
            f"{me.node} speaks link protocol {wire.VERSION_MIN} to {wire.VERSION_MAX}, the other end {low} to {high}: "
            "update the older node."
        )
    agreed: tuple[tuple[str, str | bool], ...] = (
        ("cluster", me.cluster),
        ("resource", me.resource),
        ("node", me.peer),
        ("protocol", me.protocol),
        ("data_integrity", me.integrity),
    )
    for name, ours in agreed:
        theirs = wire.field(message, name, type(ours))
        if theirs != ours:
            raise wire.ProtocolError(
                f"{me.node} expected {name} {ours!r} at the other end of {me.resource}'s link and found {theirs!r}: "
                "compare the two configuration files."
            )
    if len(wire.field(message, "nonce", bytes)) != NONCE_BYTES:
        raise wire.ProtocolError(f"a HELLO must carry a nonce of {NONCE_BYTES} bytes.")
    return message


def proof(secret: bytes, *, dialer: bool, own_hello: bytes, peer_hello: bytes) -> bytes:
    """The payload of AUTH as the end with role `dialer` computes it."""
    return _mac(secret, b"dialer" if dialer else b"accepter", own_hello, peer_hello)


def verify(secret: bytes, mac: bytes, *, dialer: bool, own_hello: bytes, peer_hello: bytes) -> bool:
    """Whether `mac` is what a peer that knows the secret sends us (we being the `dialer` or not)."""
    expected = proof(secret, dialer=not dialer, own_hello=peer_hello, peer_hello=own_hello)
    return hmac.compare_digest(mac, expected)


def session_id(secret: bytes, *, dialer_hello: bytes, accepter_hello: bytes) -> int:
    """A 64-bit name for this one connection, the same at both ends, different for every connection."""
    return int.from_bytes(_mac(secret, b"session", dialer_hello, accepter_hello)[:8], "big")


def _mac(secret: bytes, purpose: bytes, first: bytes, second: bytes) -> bytes:
    message = b"".join(len(part).to_bytes(4, "big") + part for part in (b"replica link v1", purpose, first, second))
    return hmac.new(secret, message, hashlib.sha256).digest()
