"""A peer's bytes given to a real peer link: a stranger's, and those of a peer that has proven itself but is broken."""

import asyncio
import contextlib
import math
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from replica import auth, sync_hash, wire
from replica.bitmap import BLOCK_SIZE, Bitmap
from replica.control import ControlError, _read_request
from replica.generation import Generations, Side, decide
from replica.link import LinkSettings, PeerLink
from replica.mirror import Mirror
from replica.range_lock import RangeLocks
from replica.resync import SyncTarget
from replica.side_message import pack_side, unpack_side
from replica.sync_rate import pace_of
from replica.throttle import Throttle
from replica.verify_report import VerifyProgress
from replica.verify_walk import Answers

SECRET = b"0123456789abcdef"
ME = auth.Identity("web", "r0", "node1", "node2", "C", False)
PEER = auth.Identity("web", "r0", "node2", "node1", "C", False)
NONCE = b"1" * auth.NONCE_BYTES
HELLO = auth.hello(PEER, b"2" * auth.NONCE_BYTES)
PROOF = auth.proof(SECRET, dialer=False, own_hello=HELLO, peer_hello=auth.hello(ME, NONCE))
GREETING = wire.pack(wire.HELLO, HELLO) + wire.pack(wire.AUTH, PROOF)
SIZE_BYTES = 1 << 20
MAX_INPUT_BYTES = 3 << 20
_MAX_SENTENCE_CHARACTERS = 1000


class Wire(asyncio.Transport):
    """The end of a cable: keeps what is sent, is drained always."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        self.sent = bytearray()

    def write(self, data: Any) -> None:
        assert not self.closed
        self.sent += data

    def writelines(self, list_of_data: Any) -> None:
        for data in list_of_data:
            self.write(data)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def close(self) -> None:
        self.closed = True

    abort = close


class MemoryStore:
    """A volume's data in memory, which notices what is out of its range."""

    size_bytes = SIZE_BYTES

    def __init__(self) -> None:
        self._data = bytearray(SIZE_BYTES)

    def _in_range(self, offset: int, length: int) -> None:
        assert offset >= 0 and length >= 0 and offset + length <= SIZE_BYTES, f"{length} bytes at {offset}"

    def headroom_bytes(self) -> float:
        return math.inf

    def write_now(self, offset: int, data: bytes | memoryview) -> None:
        self._in_range(offset, len(data))
        self._data[offset : offset + len(data)] = data

    def read_now(self, offset: int, length: int) -> bytes | None:
        self._in_range(offset, length)
        return bytes(self._data[offset : offset + length]) if length <= 8192 else None

    async def read(self, offset: int, length: int) -> bytes:
        self._in_range(offset, length)
        return bytes(self._data[offset : offset + length])

    async def read_medium(self, offset: int, length: int) -> bytes:
        self._in_range(offset, length)
        await asyncio.sleep(0)
        return bytes(self._data[offset : offset + length])

    async def next_data(self, offset: int, end: int) -> tuple[int, int]:
        self._in_range(offset, end - offset)
        start = min(max(offset, SIZE_BYTES // 2), end)
        return start, end

    async def write_durable(self, offset: int, data: bytes) -> None:
        self.write_now(offset, data)

    async def zero(self, offset: int, length: int, punch: bool) -> None:
        self.write_now(offset, bytes(length))

    def flush_now(self) -> bool:
        return False

    async def flush(self) -> None:
        await asyncio.sleep(0)


class Owner:
    """Takes a link over as a resource does that is in sync (first half of the frames) and being resynced."""

    def __init__(self) -> None:
        self.opened = 0
        self.reasons: list[str] = []
        self.store = MemoryStore()
        self.bitmap = Bitmap(SIZE_BYTES // BLOCK_SIZE)
        self.locks = RangeLocks(lambda: None)
        self.answers: Answers | None = None

    def link_opened(self, link: PeerLink) -> None:
        self.opened += 1
        link.expect(wire.STATE, wire.BITMAP, wire.SYNC_START, wire.SYNC_FINISH)
        Mirror(link, self.store, "C", self._failed)  # type: ignore[arg-type]
        SyncTarget(link, self.store, self.bitmap, self._failed)  # type: ignore[arg-type]
        self._verify(link)

    def _verify(self, link: PeerLink) -> None:
        """The peer drives a verification of all but the first blocks."""
        volume: Any = SimpleNamespace(
            store=self.store, bitmap=self.bitmap, metadata=self, admission=SimpleNamespace(locks=self.locks)
        )
        progress = VerifyProgress(1, "node2", 8192, SIZE_BYTES, repair=False, began_s=0.0)
        answers = self.answers = Answers(
            link, volume, Throttle(pace_of(None, 65536, 65536), time.monotonic), progress, 1, self._failed
        )
        link.handlers[wire.VERIFY_HASH] = answers.on_hash
        link.handlers[wire.VERIFY_BLOCKS] = answers.on_blocks
        link.handlers[wire.VERIFY_HOLE] = answers.on_hole
        link.handlers[wire.VERIFY_DONE] = answers.on_done

    async def save_bitmap(self, bitmap: Bitmap) -> None:
        await asyncio.sleep(0)

    def link_closed(self, link: PeerLink, reason: str) -> None:
        self.reasons.append(reason)

    def _failed(self, error: OSError) -> None:
        raise AssertionError("the store does not fail") from error


_loop: asyncio.AbstractEventLoop | None = None


def _run(work: Any) -> Any:
    global _loop  # noqa: PLW0603 - made in the process that uses it, once
    if _loop is None:
        _loop = asyncio.new_event_loop()
    failures: list[str] = []
    _loop.set_exception_handler(lambda loop, context: failures.append(repr(context)))
    result = _loop.run_until_complete(work)
    assert not failures, failures
    return result


async def _feed(stream: bytes, step: int, integrity: bool) -> tuple[Owner, Wire]:
    owner = Owner()
    identity = replace(ME, integrity=integrity)
    link = PeerLink(LinkSettings(identity, SECRET, 30.0, 10.0), owner, NONCE, dialer=True)
    cable = Wire()
    link.connection_made(cable)
    piece_bytes = max(8 ** (step - 1) if step else 1 << 30, len(stream) // 2000)
    for start in range(0, len(stream), piece_bytes):
        piece = stream[start : start + piece_bytes]
        while piece and not cable.closed:
            room = link.get_buffer(-1)
            assert len(room) > 0, "the link has no room for the rest of a frame"
            count = min(len(room), len(piece))
            room[:count] = piece[:count]
            piece = piece[count:]
            link.buffer_updated(count)
    for _ in range(20):  # ranges are held until the driver lets go of them, which it may never do
        await asyncio.sleep(0)
    if owner.answers is not None:
        await owner.answers.end()
        assert not owner.locks.held, "a range is still held"
    me = asyncio.current_task()
    while others := {task for task in asyncio.all_tasks() if task is not me}:
        await asyncio.wait(others)
    if not link.closed:
        link.close("the test is over.")
    assert len(owner.reasons) == 1, "a link ends once"
    check_sentence(owner.reasons[0])
    _check_frames(bytes(cable.sent))
    return owner, cable


def check_sentence(text: str) -> None:
    """What goes into logs and the status is one line of a bounded length, and moves no cursor."""
    assert text
    assert len(text) <= _MAX_SENTENCE_CHARACTERS, len(text)
    assert text.isprintable(), text


def _check_frames(sent: bytes) -> None:
    at = 0
    while at < len(sent):
        kind, _, volume, length, _, _, _ = wire.HEADER.unpack_from(sent, at)
        assert kind in wire.KIND_NAMES and volume == 0 and length <= wire.MAX_PAYLOAD_BYTES
        at += wire.HEADER_BYTES + length
    assert at == len(sent), "the last frame is not whole"


def greeting(data: bytes) -> None:
    """A stranger: it is never let in, and learns nothing but HELLO, our proof, and why it is turned away."""
    stream = data[1:MAX_INPUT_BYTES]
    owner, cable = _run(_feed(stream, data[0] & 7 if data else 0, False))
    # Only the corpus knows a proof that is right, for this one HELLO and this one nonce of ours.
    assert owner.opened == 0 or (HELLO in stream and PROOF in stream), "a stranger was let in"
    if not owner.opened:
        assert len(cable.sent) < 8192


def frames(data: bytes) -> None:
    """A peer that has proven itself: only what is in range reaches the store."""
    mode = data[0] if data else 0
    integrity = bool(mode & 8)
    hello = auth.hello(replace(PEER, integrity=integrity), b"2" * auth.NONCE_BYTES)
    mine = auth.hello(replace(ME, integrity=integrity), NONCE)
    mac = auth.proof(SECRET, dialer=False, own_hello=hello, peer_hello=mine)
    opening = wire.pack(wire.HELLO, hello) + wire.pack(wire.AUTH, mac)
    stream = data[1:MAX_INPUT_BYTES]
    if integrity:
        stream = _with_checksums(stream)
    owner, _ = _run(_feed(opening + stream, mode & 7, integrity))
    assert owner.opened == 1


def _with_checksums(stream: bytes) -> bytes:
    """The same frames with checksums that fit, as far as they are frames: a guesser would never get past them."""
    out = bytearray(stream)
    at = 0
    while len(out) - at >= wire.HEADER_BYTES:
        kind, flags, volume, length, sequence, offset, _ = wire.HEADER.unpack_from(out, at)
        payload = bytes(out[at + wire.HEADER_BYTES : at + wire.HEADER_BYTES + length])
        check = wire.checksum(kind, flags, volume, length, sequence, offset, payload)
        wire.HEADER.pack_into(out, at, kind, flags, volume, length, sequence, offset, check)
        at += wire.HEADER_BYTES + length
    return bytes(out)


MINE = Side("node1", Generations(0x1122, 0, (0x33, 0x44)), SIZE_BYTES, unbroken=True)


def state(data: bytes) -> None:
    """STATE's map: read into a description that can be compared, recorded and sent again, or refused in a sentence."""
    try:
        message = wire.unpack_map(data)
        side = unpack_side("node2", message.get("side"))
    except wire.ProtocolError as error:
        check_sentence(str(error))
        return
    if side is None:
        return
    for mine in (MINE, replace(MINE, just_created=True), replace(MINE, is_primary=True)):
        verdict, mirrored = decide(mine, side), decide(side, mine)
        assert verdict.rule == mirrored.rule
    numbers = (side.generations.current, side.generations.base, *side.generations.history)
    assert all(0 <= number < 1 << 64 for number in numbers), "a generation that no superblock can hold"
    assert 0 < side.size_bytes < 1 << 63 and side.dirty >= 0
    wire.pack_map({"side": pack_side(side)})


def maps(data: bytes) -> None:
    """Every other payload that is read as a whole: it is understood, or refused in a sentence."""
    bitmap = Bitmap(SIZE_BYTES // BLOCK_SIZE)
    with contextlib.suppress(ValueError):
        bitmap.merge_packed(data)
    assert bitmap.count <= bitmap.blocks
    with contextlib.suppress(ValueError):
        blocks = sync_hash.count_of(data)
        assert sum(count for _, _, count in sync_hash.runs(data[: -(-blocks // 8)], blocks)) == blocks
    for read in (wire.unpack_map, wire.unpack_length, lambda payload: auth.check_hello(ME, payload)):
        try:
            read(data)
        except wire.ProtocolError as error:
            check_sentence(str(error))


def control(data: bytes) -> None:
    """The control socket: one request is understood, or answered with one sentence."""
    _run(_control(data))


async def _control(data: bytes) -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(data[:MAX_INPUT_BYTES])
    reader.feed_eof()
    try:
        verb, args = await _read_request(reader)
    except ControlError as error:
        check_sentence(str(error))
    else:
        assert isinstance(verb, str) and all(isinstance(key, str) for key in args)
