"""Datagrams given to a real membership: from strangers, and from a peer that knows the secret but is broken."""

import hashlib
import hmac
import itertools
import struct
from pathlib import Path

from replica.heartbeat.membership import Membership
from replica.heartbeat.node_state import NodeState, Phase
from replica.heartbeat.packet import MAX_BYTES, NONCE_BYTES, Flaw, PacketError, unpack
from replica.heartbeat.settings import Auth, AuthMethod, HeartbeatSettings, PathKind, PathSettings
from tests.fuzz.peer_target import check_sentence

KEY = Auth(AuthMethod.SHA256, b"0123456789abcdef")
_NOW_S = 100.0


def settings(node: str, peer: str) -> HeartbeatSettings:
    """Of a cluster "web"."""
    nowhere = Path("/nonexistent")
    path = PathSettings(PathKind.UNICAST, "", "192.168.2.45")
    return HeartbeatSettings("web", node, peer, KEY, (path,), (), nowhere, nowhere)


def nodes() -> tuple[Membership, Membership]:
    """node1 and node2, which have heard each other."""
    numbers = itertools.count()
    made = [
        Membership(settings(*names), 0.0, start, lambda: next(numbers).to_bytes(NONCE_BYTES, "big"))
        for names, start in ((("node1", "node2"), 1000), (("node2", "node1"), 2000))
    ]
    for listener, talker in (made, made[::-1], made):
        assert listener.accept(talker.pack_next(NodeState(Phase.UP), 1.0), 1.0, "192.168.2.45", 0).newer
    return made[0], made[1]


def signed(body: bytes) -> bytes:
    """A packet with this body, by docs/wire.md alone."""
    header = b"RpHB" + struct.pack("<BBH", 1, 1, len(body))
    message = b"".join(struct.pack(">I", len(part)) + part for part in (b"replica heartbeat v1", header, body))
    return header + hmac.new(KEY.key, message, hashlib.sha256).digest() + body


def heartbeat(data: bytes) -> None:
    """The first byte says whether the rest is a datagram as it comes, or the body of one that is signed rightly."""
    here, there = nodes()
    body = data[1 : MAX_BYTES - 100]
    datagram = signed(body) if data[:1] == b"S" else data[1:]
    before = here.view()
    verdict = here.accept(datagram, _NOW_S, "192.168.2.45", 0)
    for event in verdict.events:
        check_sentence(str(event))
    after = here.view()
    if not verdict.newer:
        assert (after.heard_s, after.state, after.start_number) == (before.heard_s, before.state, before.start_number)
        assert (after.hears_us, after.left) == (before.hears_us, before.left)
    try:
        packet = unpack(datagram, KEY)
    except PacketError as error:
        assert error.flaw in (Flaw.MALFORMED, Flaw.SIGNATURE)
        assert not verdict.newer
    else:
        assert verdict.newer == (
            packet.cluster == "web" and packet.node == "node2" and packet.number > (before.start_number, 2)
        )
    # Whatever came, this node's own heartbeats are still in order.
    assert there.accept(here.pack_next(NodeState(Phase.UP), _NOW_S), _NOW_S, "192.168.2.44", 0).newer
