"""One heartbeat as it goes over the wire; docs/wire.md has the layout. Pure.

    offset  size  field
    0       4     magic "RpHB"
    4       1     version, 1
    5       1     method of the signature
    6       2     length of the body, little endian
    8       n     signature over everything else: 32 bytes (sha256), 20 (sha1), 16 (md5) or 4 (crc)
    8 + n         body, one msgpack map

Nothing of the body is looked at before the signature has been found right.
"""

import hashlib
import hmac
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final, NamedTuple

import msgpack

from replica.errors import ReplicaError
from replica.heartbeat.node_state import Claim, GroupState, NodeState, Status, state_from_wire, state_to_wire
from replica.heartbeat.settings import Auth, AuthMethod

VERSION: Final = 1
#: Of a whole packet. UDP would carry more, in more fragments, each of which can be lost.
MAX_BYTES: Final = 8192
NONCE_BYTES: Final = 16
#: Of start numbers and sequences; seconds since 1970 leave room for ever.
MAX_NUMBER: Final = 1 << 62

_MAX_NAME_CHARACTERS: Final = 255
_MAGIC: Final = b"RpHB"
_HEADER: Final = struct.Struct("<4sBBH")
#: Keeps signatures apart from those that are made with the same secret for the peer link (`replica.auth`).
_PURPOSE: Final = b"replica heartbeat v1"
_SHORTENED_TO: Final = (200, 50, 0)


class _Method(NamedTuple):
    number: int
    signature_bytes: int


_METHODS: Final[Mapping[AuthMethod, _Method]] = {
    AuthMethod.SHA256: _Method(1, 32),
    AuthMethod.SHA1: _Method(2, 20),
    AuthMethod.MD5: _Method(3, 16),
    AuthMethod.CRC: _Method(4, 4),
}
_NAMES: Final = {method.number: name for name, method in _METHODS.items()}


class Flaw(Enum):
    """What is wrong with a packet."""

    #: It is not a heartbeat of this program, or damaged.
    MALFORMED = "malformed"
    #: It was signed with another secret, or in another way.
    SIGNATURE = "signature"
    #: It does not fit: only when packing.
    SIZE = "size"


class PacketError(ReplicaError):
    """A packet that cannot be used, or made."""

    def __init__(self, flaw: Flaw, sentence: str) -> None:
        super().__init__(sentence)
        self.flaw = flaw


class Number(NamedTuple):
    """The place of a packet among all that its node ever sent; zeroes: before the first one."""

    start: int = 0
    #: Grows with every packet of one start.
    sequence: int = 0


NOTHING_YET: Final = Number()


class Echo(NamedTuple):
    """Of the last packet that the sender heard of the other node: what that one wrote in it, and how old it is."""

    nonce: bytes
    sent_s: float  # on the clock of the node that is echoed
    age_s: float


@dataclass(frozen=True, slots=True)
class Packet:
    """One heartbeat."""

    cluster: str
    node: str
    number: Number
    #: When it was sent, on the sender's clock: it comes back in an `Echo`.
    sent_s: float
    #: The sender's present session: random, made at its start and after each pause.
    nonce: bytes
    #: The newest that it ever accepted from the other node: one that has lost its start number learns it from here.
    known: Number
    heard: Echo | None  # in the present run of the sender
    state: NodeState


def pack(packet: Packet, auth: Auth) -> bytes:
    """The signed bytes; PacketError when they would be more than MAX_BYTES."""
    body: bytes = msgpack.packb(
        {
            "cluster": packet.cluster,
            "node": packet.node,
            "number": packet.number,
            "sent": packet.sent_s,
            "nonce": packet.nonce,
            "known": packet.known,
            "heard": packet.heard,
            "state": state_to_wire(packet.state),
        },
        unicode_errors="replace",  # what a program wrote need not be text
    )
    method = _METHODS[auth.method]
    size_bytes = _HEADER.size + method.signature_bytes + len(body)
    if size_bytes > MAX_BYTES:
        raise PacketError(
            Flaw.SIZE,
            f"a heartbeat with the state of {len(packet.state.groups)} groups has {size_bytes} bytes, {MAX_BYTES} at "
            "most are sent: use fewer groups, or shorter names.",
        )
    header = _HEADER.pack(_MAGIC, VERSION, method.number, len(body))
    return header + _signature(auth, header, body) + body


def pack_shortened(packet: Packet, auth: Auth) -> bytes:
    """As `pack`; texts that only explain something are cut as far as they have to be."""
    try:
        return pack(packet, auth)
    except PacketError:
        for length in _SHORTENED_TO[:-1]:
            try:
                return pack(_shortened(packet, length), auth)
            except PacketError:
                continue
        return pack(_shortened(packet, _SHORTENED_TO[-1]), auth)


def check_fits(cluster: str, nodes: tuple[str, ...], groups: Iterable[str], auth: Auth) -> None:
    """PacketError when packets about groups of these names could not be sent, whatever their state."""
    name, nonce, most = max(nodes, key=len), bytes(NONCE_BYTES), Number(MAX_NUMBER - 1, MAX_NUMBER - 1)
    group = GroupState(Claim(MAX_NUMBER, name), Status.STARTING, wanted=True)
    state = NodeState(groups=dict.fromkeys(groups, group), settings_digest="0" * 64)
    pack(Packet(cluster, name, most, 0.0, nonce, most, Echo(nonce, 0.0, 0.0), state), auth)


def unpack(data: bytes, auth: Auth) -> Packet:
    """What was sent with the same `auth`; PacketError for anything else."""
    if not _HEADER.size < len(data) <= MAX_BYTES:
        raise PacketError(Flaw.MALFORMED, f"a heartbeat cannot have {len(data)} bytes.")
    magic, version, number, body_bytes = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise PacketError(Flaw.MALFORMED, "this is no heartbeat of Replica.")
    if version != VERSION:
        raise PacketError(
            Flaw.MALFORMED, f"a heartbeat has version {version}, this node knows {VERSION} only: update the older node."
        )
    if number not in _NAMES:
        raise PacketError(Flaw.MALFORMED, f"a heartbeat is signed in an unknown way ({number}).")
    method = _METHODS[_NAMES[number]]
    if len(data) != _HEADER.size + method.signature_bytes + body_bytes:
        raise PacketError(Flaw.MALFORMED, "a heartbeat is longer or shorter than it says.")
    if _NAMES[number] is not auth.method:
        raise PacketError(
            Flaw.SIGNATURE,
            f"a heartbeat is signed by {_NAMES[number]}, this node uses {auth.method}: use the same secret and method "
            "on both nodes.",
        )
    header, rest = data[: _HEADER.size], data[_HEADER.size :]
    signature, body = rest[: method.signature_bytes], rest[method.signature_bytes :]
    if not hmac.compare_digest(signature, _signature(auth, header, body)):
        raise PacketError(Flaw.SIGNATURE, "a heartbeat is signed with another secret: use the same one on both nodes.")
    try:
        return _packet(_map(body))
    except (ValueError, TypeError) as error:
        raise PacketError(Flaw.MALFORMED, f"the body of a heartbeat cannot be read: {error}.") from error


def _signature(auth: Auth, header: bytes, body: bytes) -> bytes:
    message = b"".join(len(part).to_bytes(4, "big") + part for part in (_PURPOSE, header, body))
    if auth.method is AuthMethod.CRC:
        return zlib.crc32(message).to_bytes(4, "big")
    return hmac.new(auth.key, message, getattr(hashlib, auth.method)).digest()


def _map(body: bytes) -> dict[str, Any]:
    """The body's map; ValueError. The bounds keep a signed but wrong body from costing more than its own size."""
    try:
        value = msgpack.unpackb(body, raw=False, strict_map_key=True, max_ext_len=0)
    except Exception as error:  # msgpack raises a family of unrelated types on bad input
        raise ValueError(f"it is not msgpack ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise ValueError("it is not a map")
    return value


def _packet(body: dict[str, Any]) -> Packet:
    match body:
        case {
            "cluster": str(cluster),
            "node": str(node),
            "number": number,
            "sent": sent_s,
            "nonce": nonce,
            "known": known,
            "heard": heard,
            "state": state,
        }:
            if max(len(cluster), len(node)) > _MAX_NAME_CHARACTERS:
                raise ValueError("a name is too long")
            return Packet(
                cluster,
                node,
                _number(number),
                _seconds("sent", sent_s),
                _nonce(nonce),
                _number(known),
                None if heard is None else _echo(heard),
                state_from_wire(state),
            )
    raise ValueError("a field is missing, or is of the wrong kind")


def _echo(value: object) -> Echo:
    match value:
        case [nonce, sent_s, age_s]:
            return Echo(_nonce(nonce), _seconds("sent", sent_s), _seconds("age", age_s))
    raise ValueError("what it heard is not complete")


def _number(value: object) -> Number:
    match value:
        case [int(start), int(sequence)] if not isinstance(start, bool) and not isinstance(sequence, bool):
            if 0 <= start < MAX_NUMBER and 0 <= sequence < MAX_NUMBER:
                return Number(start, sequence)
    raise ValueError("its number is none")


def _seconds(name: str, value: object) -> float:
    # Comparing keeps NaN out as well.
    if not isinstance(value, float) or not 0 <= value < 1e12:
        raise ValueError(f"its {name} is not a time")
    return value


def _nonce(value: object) -> bytes:
    if not isinstance(value, bytes) or len(value) != NONCE_BYTES:
        raise ValueError(f"its nonce has not {NONCE_BYTES} bytes")
    return value


def _shortened(packet: Packet, length: int) -> Packet:
    def cut(text: str) -> str:
        return text if len(text) <= length else text[: max(0, length - 1)] + "…"[:length]

    groups = {
        name: replace(
            group,
            ready=group.ready._replace(why=cut(group.ready.why)),
            resource=cut(group.resource),
            problem=cut(group.problem),
        )
        for name, group in packet.state.groups.items()
    }
    return replace(packet, state=replace(packet.state, groups=groups))
