"""The frames of the peer link as bytes."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica import wire

U8, U16, U64 = st.integers(0, 255), st.integers(0, 65535), st.integers(0, (1 << 64) - 1)


def test_the_layout_is_the_documented_one() -> None:
    frame = wire.pack(wire.WRITE, b"data", flags=3, volume=2, sequence=0x1122334455667788, offset=0x99)
    assert frame == (
        b"\x10\x03\x02\x00\x04\x00\x00\x00\x88\x77\x66\x55\x44\x33\x22\x11\x99" + bytes(7) + bytes(8) + b"data"
    )
    assert wire.HEADER_BYTES == 32


def test_kinds_are_distinct_and_named() -> None:
    kinds = [getattr(wire, name) for name in wire.KIND_NAMES.values()]
    assert len(set(kinds)) == len(kinds)
    assert wire.kind_name(wire.SYNC_DATA) == "SYNC_DATA"
    assert wire.kind_name(0xEE) == "0xee"


@given(U8, U8, U16, U64, U64, st.binary(max_size=300))
def test_what_is_packed_comes_back(
    kind: int, flags: int, volume: int, sequence: int, offset: int, payload: bytes
) -> None:
    frame = wire.pack(kind, payload, flags=flags, volume=volume, sequence=sequence, offset=offset, integrity=True)
    *fields, check = wire.HEADER.unpack_from(frame)
    assert fields == [kind, flags, volume, len(payload), sequence, offset]
    assert frame[wire.HEADER_BYTES :] == payload
    assert check == wire.checksum(kind, flags, volume, len(payload), sequence, offset, payload)


@given(st.binary(min_size=1, max_size=300), st.data())
def test_the_checksum_covers_every_bit(payload: bytes, data: st.DataObject) -> None:
    frame = bytearray(wire.pack(wire.WRITE, payload, sequence=7, offset=4096, integrity=True))
    bit = data.draw(st.integers(0, len(frame) * 8 - 1))
    frame[bit // 8] ^= 1 << bit % 8
    *fields, check = wire.HEADER.unpack_from(frame)
    assert check != wire.checksum(*fields, bytes(frame[wire.HEADER_BYTES :]))


def test_maps_come_back() -> None:
    message = {"text": "ü", "number": (1 << 64) - 1, "list": [1, 2], "bytes": b"\0", "none": None, "flag": True}
    assert wire.unpack_map(wire.pack_map(message)) == message
    assert wire.unpack_map(memoryview(wire.pack_map(message))) == message


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x81",
        msgpack.packb([1, 2]),
        msgpack.packb({1: 2}),
        msgpack.packb({b"bytes": 2}),
        msgpack.packb({"ext": msgpack.ExtType(5, b"x")}),
        msgpack.packb({"text": b"\xff\xfe".decode("latin-1")})[:-1],
        b"\x81\xa1t\xa2\xff\xfe",
        msgpack.packb({"long": "x" * 5000}),
        msgpack.packb({"long": b"x" * 5000}),
        msgpack.packb({"long": list(range(2000))}),
        msgpack.packb({str(number): number for number in range(300)}),
        msgpack.packb({}) + b"more",
        b"\x81\xa1x" + b"\x91" * 5000,
        b"\xdf\xff\xff\xff\xff",
    ],
)
def test_maps_that_are_none_are_refused(payload: bytes) -> None:
    with pytest.raises(wire.ProtocolError) as caught:
        wire.unpack_map(payload)
    assert "\n" not in str(caught.value)


def test_a_map_too_large_for_a_frame_is_not_made() -> None:
    with pytest.raises(wire.ProtocolError, match="over the bound"):
        wire.pack_map({"x": b"x" * wire.MAX_PAYLOAD_BYTES})


@pytest.mark.parametrize(("value", "kind"), [(None, int), ("1", int), (True, int), (1, bool), (b"x", str), ({}, list)])
def test_fields_are_checked_for_their_type(value: object, kind: type) -> None:
    assert wire.field({"a": kind()}, "a", kind) == kind()
    with pytest.raises(wire.ProtocolError, match="'a'"):
        wire.field({"a": value}, "a", kind)
    with pytest.raises(wire.ProtocolError, match="'a'"):
        wire.field({}, "a", kind)


def test_lengths() -> None:
    assert wire.unpack_length(wire.pack_length((1 << 64) - 1)) == (1 << 64) - 1
    for payload in (b"", b"1234567", b"123456789"):
        with pytest.raises(wire.ProtocolError):
            wire.unpack_length(payload)
