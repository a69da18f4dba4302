"""`python -m tests.fuzz.record`: how the corpus was made.

Lets the real clients that are installed open an export of a real `nbdserver` through a proxy that keeps what they
send, and adds what no client sends but the targets need (frames, maps, requests of the kernel's client).
"""

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import msgpack

from replica import auth, wire
from replica.bitmap import BLOCK_SIZE, Bitmap
from replica.digests import block_digests, pack_runs
from replica.heartbeat.node_state import Claim, GroupState, NodeState, Phase, Readiness, Ready, Status
from replica.side_message import pack_side
from tests.fuzz import heartbeat_target, peer_target
from tests.fuzz.replies import REQUEST_MAGIC
from tests.fuzz.targets import CORPUS

_ROOT = Path(__file__).resolve().parents[2]
_MAX_STREAM_BYTES = 4096
_TIMEOUT_S = 20

#: What is run, with the address put in for {uri}, {host} and {port}. Some fail after the handshake, which is enough.
CLIENTS = {
    "nbdinfo": "nbdinfo {uri}",
    "nbdinfo-list": "nbdinfo --list {uri}",
    "nbdinfo-map": "nbdinfo --map {uri}",
    "nbdsh": "/usr/bin/python3 -mnbd -u {uri} -c h.pwrite(b'a'*512,0) -c h.pread(512,0) -c h.zero(4096,4096)",
    "nbdcopy": "nbdcopy --connections=1 --requests=1 {uri} null:",
    "qemu-io": "qemu-io -f raw -c write_-z_0_4k -c write_8k_512 -c read_0_4k -c discard_0_64k -c flush {uri}",
    "qemu-img": "qemu-img map -f raw {uri}",
    "qemu-nbd-list": "qemu-nbd -L -b {host} -p {port}",
    "nbd-client-list": "nbd-client -l {host} {port}",
    "nbd-client": "nbd-client -N disk {host} {port} /dev/nbd0",
    "nbdkit": "nbdkit -U - nbd {uri} --run nbdinfo_$uri",
    "fio": "fio --name=f --ioengine=nbd --uri={uri} --rw=randrw --bs=512 --size=4k --iodepth=2 --aux-path=/tmp",
}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "disk.img"
        image.touch()
        os.truncate(image, 1 << 20)
        command = [sys.executable, "-m", "nbdserver", str(image), "--listen", "127.0.0.1:0", "--export", "disk"]
        environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert server.stdout is not None
        port = int(server.stdout.readline().rsplit(":", 1)[1].split("/")[0])
        try:
            for name, words in CLIENTS.items():
                _record(name, words, port)
        finally:
            server.terminate()
            server.wait(_TIMEOUT_S)
    _made_by_hand()
    return 0


def _record(name: str, words: str, port: int) -> None:
    program = words.split(maxsplit=1)[0]
    if shutil.which(program) is None:
        print(f"{program} is not installed: nothing recorded")
        return
    streams: list[bytearray] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near_port = listener.getsockname()[1]
        threading.Thread(target=_accept, args=(listener, port, streams), daemon=True).start()
        uri = f"nbd://127.0.0.1:{near_port}/disk"
        command = [word.format(uri=uri, host="127.0.0.1", port=near_port) for word in words.split()]
        if program in ("qemu-io", "nbdkit"):
            command = [word.replace("_", " ") if "_" in word and "://" not in word else word for word in command]
        subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)
        listener.shutdown(socket.SHUT_RDWR)
    for number, stream in enumerate(streams[:2]):
        cut = _end_of_options(bytes(stream))
        _keep("nbd-handshake", f"{name}-{number}", b"\0" + bytes(stream[:cut]))
        if len(stream) > cut:
            _keep("nbd-transmission", f"{name}-{number}", b"\x20" + bytes(stream[cut:][:_MAX_STREAM_BYTES]))


def _accept(listener: socket.socket, port: int, streams: list[bytearray]) -> None:
    while True:
        try:
            near, _ = listener.accept()
        except OSError:
            return
        far = socket.create_connection(("127.0.0.1", port))
        stream = bytearray()
        streams.append(stream)
        threading.Thread(target=_pump, args=(near, far, stream), daemon=True).start()
        threading.Thread(target=_pump, args=(far, near, bytearray()), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            kept += data
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def _end_of_options(stream: bytes) -> int:
    at = 4
    while stream[at : at + 8] == b"IHAVEOPT":
        at += 16 + int.from_bytes(stream[at + 12 : at + 16])
    return min(at, len(stream))


def _keep(target: str, name: str, data: bytes) -> None:
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def _request(command: int, cookie: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack(">IHHQQI", REQUEST_MAGIC, flags, command, cookie, offset, length or len(data)) + data


def _made_by_hand() -> None:
    kernel = b"".join(  # the kernel's client: its cookies are a counter and a tag, its requests whole pages
        (
            _request(0, 0x100000000, 0, 4096),
            _request(1, 0x100000001, 4096, data=b"k" * 4096),
            _request(3, 0x100000002),
            _request(4, 0x100000003, 8192, 65536),
            _request(1, 0x100000004, 0, data=b"f" * 512, flags=1),
            _request(2, 0),
        )
    )
    _keep("nbd-transmission", "kernel", b"\0" + kernel)
    edges = b"".join(
        (
            _request(1, 1, (1 << 20) - 1, data=b"ab"),
            _request(0, 2, 1 << 20, 1),
            _request(0, 3, (1 << 64) - 1, 2),
            _request(6, 4, 0, (1 << 32) - 1),
            _request(4, 5, 1 << 63, 4096),
            _request(1, 6, 1 << 20),
            _request(7, 7, 0, 4096),
            _request(5, 8, 0, 4096),
            _request(9, 9, 0, 0),
            _request(0, 10, 4096, 200_000),
        )
    )
    _keep("nbd-transmission", "edges", b"\x38" + edges)
    _keep("nbd-transmission", "large-write", b"\x0d" + _request(1, 1, 512, data=b"w" * 130_000)[:131_000])
    _keep(
        "nbd-handshake", "all-options", b"\0\0\0\0\3" + b"".join(_option(number, b"") for number in (3, 5, 8, 9, 10, 2))
    )
    _keep("nbd-handshake", "export-name", b"\0\0\0\0\1" + _option(1, b"disk"))
    _keep("peer-greeting", "peer", b"\0" + peer_target.GREETING)
    _keep("peer-greeting", "error", b"\0" + wire.pack(wire.ERROR, b"no\r\n\x1b[2J"))
    _keep("peer-greeting", "browser", b"\0GET / HTTP/1.1\r\nHost: node2\r\n\r\n")
    every = b"".join(
        (
            wire.pack(wire.WRITE, b"w" * 4096, sequence=1),
            wire.pack(wire.WRITE_DURABLE, b"d" * 512, sequence=2, offset=4096),
            wire.pack(wire.ZERO, wire.pack_length(8192), sequence=3, offset=8192, flags=wire.FLAG_PUNCH),
            wire.pack(wire.FLUSH, sequence=4),
            wire.pack(wire.PING),
            wire.pack(wire.REPLY, wire.pack_map({"ok": True}), sequence=1),
        )
    )
    _keep("peer-frames", "writes", b"\0" + every)
    resync = b"".join(
        (
            wire.pack(wire.SYNC_START, wire.pack_map({"base": 1, "current": 2, "history": [1], "dirty": 3})),
            wire.pack(wire.BITMAP, _bitmap(), flags=wire.FLAG_LAST),
            wire.pack(wire.SYNC_DATA, b"s" * 4096, sequence=1, offset=65536),
            wire.pack(wire.SYNC_ZERO, wire.pack_length(4096), sequence=2, offset=0),
            wire.pack(wire.SYNC_FLUSH, sequence=3),
            wire.pack(wire.ERROR, b"the end"),
        )
    )
    _keep("peer-frames", "resync", b"\x0a" + resync)
    questions = b"".join(
        (
            wire.pack(wire.SYNC_HASH, block_digests(bytes(BLOCK_SIZE), 1), sequence=1, offset=BLOCK_SIZE),
            wire.pack(wire.SYNC_HASH, block_digests(bytes(3 * BLOCK_SIZE), 1), sequence=2),
            wire.pack(wire.SYNC_FLUSH, sequence=3),
        )
    )
    _keep("peer-frames", "questions", b"\x08" + questions)
    verification = b"".join(
        (
            wire.pack(wire.VERIFY_HASH, wire.pack_length(65536), sequence=1, offset=65536),
            wire.pack(wire.VERIFY_HOLE, wire.pack_length(262144), sequence=2, offset=393216),
            wire.pack(wire.VERIFY_BLOCKS, sequence=1),
            wire.pack(wire.VERIFY_DONE, pack_runs([(0, 1), (3, 13)]), sequence=1, offset=131072),
            wire.pack(wire.VERIFY_DONE, sequence=2, offset=524288),
            wire.pack(wire.VERIFY_HASH, wire.pack_length(4096), sequence=3, offset=131072),
        )
    )
    _keep("peer-frames", "verification", b"\0" + verification)
    state = {"role": "Primary", "disk": "UpToDate", "paused": False, "ran_on": False, "served": 0}
    _keep("peer-state", "state", wire.pack_map({**state, "side": pack_side(peer_target.MINE)}))
    # Found by the fuzzer, or beside what it found: numbers that no superblock can hold.
    side = pack_side(peer_target.MINE)
    assert side is not None
    for what, wrong in {"negative": {"dirty": -1}, "long": {"history": list(range(1, 41))}, "id": {"base": -5}}.items():
        _keep("peer-state", f"wrong-{what}", wire.pack_map({**state, "side": {**side, **wrong}}))
    _keep("peer-state", "no-disk", wire.pack_map({**state, "side": None}))
    _keep("peer-maps", "hello", auth.hello(peer_target.PEER, bytes(range(32))))
    _keep("peer-maps", "bitmap", _bitmap())
    _keep("peer-maps", "length", wire.pack_length(4096))
    _heartbeats()
    _keep("control", "status", msgpack.packb({"verb": "status", "args": {}}))
    _keep("control", "promote", msgpack.packb({"verb": "promote", "args": {"force": True}}))


def _heartbeats() -> None:
    here, there = heartbeat_target.nodes()
    group = GroupState(Claim(3, "node2"), Status.STARTED, Ready(Readiness.IF_ALONE, "why"), 1, "ip", "problem")
    packet = there.pack_next(NodeState(Phase.UP, {"web": group, "db": GroupState()}, 1, 2, "digest"), 2.0)
    signature_end = 40
    _keep("heartbeat", "node2", b"S" + packet[signature_end:])
    _keep("heartbeat", "own", b"S" + here.pack_next(NodeState(), 2.0)[signature_end:])
    _keep("heartbeat", "datagram", b"-" + packet)
    _keep("heartbeat", "wrong-signature", b"-" + packet[:8] + bytes(32) + packet[signature_end:])
    body = msgpack.unpackb(packet[signature_end:])
    wrong: dict[str, dict[str, object]] = {
        "cluster": {"cluster": "a\x1b[2J"},
        "node": {"node": "a\nb"},
        "old": {"number": [2000, 1]},
        "number": {"number": [1 << 62, 0]},
        "known": {"known": [(1 << 62) - 1, 5]},
        "start": {"number": [2001, 1]},
        "times": {"sent": float("nan")},
        "heard": {"heard": [bytes(16), 1.0, 1e300]},
        "left": {"state": {**body["state"], "phase": "left"}},
    }
    for what, changes in wrong.items():
        _keep("heartbeat", what, b"S" + msgpack.packb({**body, **changes}))


def _option(number: int, data: bytes) -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def _bitmap() -> bytes:
    bitmap = Bitmap(peer_target.SIZE_BYTES // BLOCK_SIZE)
    bitmap.set_range(3, 40)
    return next(iter(bitmap.pack(1 << 16)))


if __name__ == "__main__":
    sys.exit(main())
