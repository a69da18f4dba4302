"""A heartbeat survives the wire as it was, and nothing else is taken for one."""

import hashlib
import hmac
import struct
import zlib
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica import auth as link_auth
from replica.heartbeat.node_state import Claim, GroupState, NodeState, Phase, Readiness, Ready, Status, state_to_wire
from replica.heartbeat.packet import (
    MAX_BYTES,
    MAX_NUMBER,
    NONCE_BYTES,
    Echo,
    Flaw,
    Number,
    Packet,
    PacketError,
    check_fits,
    pack,
    pack_shortened,
    unpack,
)
from replica.heartbeat.settings import Auth, AuthMethod
from tests.unit.heartbeat_settings import KEY, OTHER_KEY

NONCE = bytes(range(NONCE_BYTES))
PACKET = Packet(
    "web",
    "node2",
    Number(1_700_000_000, 17),
    1234.5,
    NONCE,
    Number(1_700_000_001, 3),
    Echo(NONCE[::-1], 99.25, 0.125),
    NodeState(Phase.UP, {"web": GroupState(Claim(3, "node1"), Status.STARTED)}, 1, 2, "abc"),
)
AUTHS = [KEY, Auth(AuthMethod.SHA1, b"HI!"), Auth(AuthMethod.MD5, b"Hello!"), Auth(AuthMethod.CRC, b"")]
COUNTS = st.integers(0, MAX_NUMBER - 1)
NUMBERS = st.builds(Number, COUNTS, COUNTS)
TIMES = st.floats(0, 1e11)
NONCES = st.binary(min_size=NONCE_BYTES, max_size=NONCE_BYTES)
PACKETS = st.builds(
    Packet,
    st.text(max_size=255),
    st.text(max_size=255),
    NUMBERS,
    TIMES,
    NONCES,
    NUMBERS,
    st.none() | st.builds(Echo, NONCES, TIMES, TIMES),
    st.just(PACKET.state),
)


def signed(body: bytes, *, version: int = 1, method: int = 1, magic: bytes = b"RpHB") -> bytes:
    """By docs/wire.md alone."""
    header = magic + struct.pack("<BBH", version, method, len(body))
    message = b"".join(struct.pack(">I", len(part)) + part for part in (b"replica heartbeat v1", header, body))
    return header + hmac.new(KEY.key, message, hashlib.sha256).digest() + body


def body_of(packet: Packet = PACKET, **changes: object) -> dict[str, object]:
    return {
        "cluster": packet.cluster,
        "node": packet.node,
        "number": list(packet.number),
        "sent": packet.sent_s,
        "nonce": packet.nonce,
        "known": list(packet.known),
        "heard": packet.heard and list(packet.heard),
        "state": state_to_wire(packet.state),
        **changes,
    }


def flaw_of(data: bytes, auth: Auth = KEY) -> Flaw:
    with pytest.raises(PacketError) as caught:
        unpack(data, auth)
    assert str(caught.value).endswith(".")
    return caught.value.flaw


@pytest.mark.parametrize("auth", AUTHS, ids=lambda auth: auth.method)
def test_a_packet_survives_the_wire_signed_in_each_way(auth: Auth) -> None:
    assert unpack(pack(PACKET, auth), auth) == PACKET


@given(PACKETS)
def test_any_packet_survives_the_wire(packet: Packet) -> None:
    assert unpack(pack(packet, KEY), KEY) == packet


def test_the_bytes_are_those_of_the_document() -> None:
    assert pack(PACKET, KEY) == signed(msgpack.packb(body_of()))


def test_a_checksum_is_over_the_same_bytes() -> None:
    data = pack(PACKET, AUTHS[3])
    message = b"".join(struct.pack(">I", len(part)) + part for part in (b"replica heartbeat v1", data[:8], data[12:]))
    assert data[8:12] == struct.pack(">I", zlib.crc32(message))


@pytest.mark.parametrize("auth", AUTHS, ids=lambda auth: auth.method)
def test_every_changed_bit_is_noticed(auth: Auth) -> None:
    data = pack(PACKET, auth)
    for at in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            flaw_of(bytes(changed), auth)


@pytest.mark.parametrize("theirs", [OTHER_KEY, *AUTHS[1:]], ids=lambda auth: auth.method)
def test_another_secret_or_method_is_told_from_garbage(theirs: Auth) -> None:
    assert flaw_of(pack(PACKET, theirs)) is Flaw.SIGNATURE


def test_a_signature_of_the_peer_link_is_none_of_a_heartbeat() -> None:
    data = pack(PACKET, KEY)
    header, body = data[:8], data[40:]
    proof = link_auth.proof(KEY.key, dialer=True, own_hello=header, peer_hello=body)
    assert flaw_of(header + proof + body) is Flaw.SIGNATURE


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"RpHB",
        b"x" * 100,
        pack(PACKET, KEY)[:-1],
        pack(PACKET, KEY) + b"\0",
        b"RpHB" + bytes(MAX_BYTES),
        signed(msgpack.packb(body_of()), version=2),
        signed(msgpack.packb(body_of()), method=9),
        signed(msgpack.packb(body_of()), magic=b"RpHC"),
        signed(b""),
        signed(b"\xc1"),
        signed(msgpack.packb([1, 2])),
        signed(msgpack.packb(body_of()) + b"\0"),
        signed(b"\x91" * 5000),
        signed(msgpack.packb({1: 2})),
    ],
)
def test_what_is_no_heartbeat(data: bytes) -> None:
    assert flaw_of(data) is Flaw.MALFORMED


@pytest.mark.parametrize(
    "changes",
    [
        {"cluster": 1},
        {"cluster": "x" * 256},
        {"node": b"node2"},
        {"number": [1]},
        {"number": [1, -1]},
        {"number": [1, MAX_NUMBER]},
        {"number": [True, 1]},
        {"number": [1, "1"]},
        {"known": None},
        {"sent": -1.0},
        {"sent": float("nan")},
        {"sent": float("inf")},
        {"sent": 1},
        {"nonce": NONCE[1:]},
        {"nonce": "x" * NONCE_BYTES},
        {"heard": []},
        {"heard": [NONCE, 1.0, -1.0]},
        {"heard": 0},
        {"state": {}},
        {"state": None},
    ],
)
def test_a_signed_body_with_a_wrong_field(changes: dict[str, object]) -> None:
    assert flaw_of(signed(msgpack.packb(body_of(**changes)))) is Flaw.MALFORMED


@pytest.mark.parametrize("name", body_of())
def test_a_signed_body_without_a_field(name: str) -> None:
    body = body_of()
    del body[name]
    assert flaw_of(signed(msgpack.packb(body))) is Flaw.MALFORMED


@given(st.binary(max_size=200))
def test_a_signed_body_of_any_bytes_raises_nothing_else(body: bytes) -> None:
    flaw_of(signed(body))


def with_texts(groups: int, length: int) -> Packet:
    group = GroupState(
        Claim(1, "node1"), Status.FAILED, Ready(Readiness.NO, "w" * length), resource="r" * length, problem="p" * length
    )
    return replace(PACKET, state=NodeState(groups={f"group{number}": group for number in range(groups)}))


def test_what_does_not_fit_is_refused_with_a_sentence() -> None:
    with pytest.raises(PacketError, match=r"the state of 30 groups has \d+ bytes, 8192 at most") as caught:
        pack(with_texts(30, 300), KEY)
    assert caught.value.flaw is Flaw.SIZE


@pytest.mark.parametrize(("groups", "length"), [(1, 1000), (1, 5000), (30, 100), (30, 1000), (100, 1000)])
def test_explanations_are_cut_so_that_it_fits(groups: int, length: int) -> None:
    packet = with_texts(groups, length)
    sent = unpack(pack_shortened(packet, KEY), KEY)
    for name, group in sent.state.groups.items():
        whole = packet.state.groups[name]
        assert (group.claim, group.status, group.ready.readiness) == (whole.claim, whole.status, whole.ready.readiness)
        assert whole.problem.startswith(group.problem.removesuffix("…"))
    assert (sent == packet) == (groups * length < 3000)


def test_what_a_program_wrote_need_not_be_text() -> None:
    state = NodeState(groups={"web": GroupState(problem="caf\udce9")})
    sent = unpack(pack(replace(PACKET, state=state), KEY), KEY)
    assert sent.state.groups["web"].problem == "caf?"


def test_too_many_groups_are_found_before_the_first_packet() -> None:
    check_fits("web", ("node1", "node2"), (f"group{number}" for number in range(100)), KEY)
    with pytest.raises(PacketError, match="use fewer groups, or shorter names"):
        check_fits("web", ("node1", "node2"), (f"group{number}" for number in range(400)), KEY)
