"""Structured replies, holes and the newer commands, by clients that others wrote: on a plain file, and on a volume that
two nodes replicate. (What clients make of a takeover is tested elsewhere.)
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.interop.test_nbdserver_clients import MIB, SIZE, client, import_nbd, need, start, stop

HOLE = 3
DATA = 0


@pytest.fixture(params=["file", "volume"])
def uri(request: pytest.FixtureRequest, short_dir: Path) -> Iterator[str]:
    """An empty export of SIZE bytes."""
    if request.param == "volume":
        import_nbd()
        with Cluster(short_dir, size_bytes=SIZE) as cluster:
            yield cluster.up().node1.uri
            cluster.quiesce().check_identical()
        return
    image = short_dir / "image"
    image.touch()
    os.truncate(image, SIZE)
    server, address = start(str(image), "--unix", str(short_dir / "nbd"))
    yield address
    stop(server)


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A file of SIZE bytes: data, a hole, data, a hole up to the end."""
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, SIZE)
    with path.open("r+b") as file:
        file.write(os.urandom(5 * MIB))
        file.seek(25 * MIB)
        file.write(os.urandom(7 * MIB))
    return path


EXTENTS_OF_SPARSE = [
    (0, 5 * MIB, DATA),
    (5 * MIB, 20 * MIB, HOLE),
    (25 * MIB, 7 * MIB, DATA),
    (32 * MIB, 32 * MIB, HOLE),
]


def mapped(uri: str) -> list[tuple[int, int, int]]:
    extents = json.loads(client("nbdinfo", "--map", "--json", uri))
    return [(extent["offset"], extent["length"], extent["type"]) for extent in extents]


def allocated_bytes(path: Path) -> int:
    return os.stat(path).st_blocks * 512


def test_nbdinfo(uri):
    (export,) = json.loads(client("nbdinfo", "--list", "--json", uri))["exports"]
    assert export["contexts"] == ["base:allocation"]
    (export,) = json.loads(client("nbdinfo", "--json", uri))["exports"]
    assert export["contexts"] == ["base:allocation"]
    assert (export["block_size_minimum"], export["block_size_preferred"]) == (1, 4096)
    assert export["block_size_maximum"] == 32 * MIB
    assert all(export[name] for name in ("can_df", "can_cache", "can_fast_zero", "can_trim", "can_zero"))
    assert "structured" in client("nbdinfo", uri)
    assert mapped(uri) == [(0, SIZE, HOLE)]
    assert "hole,zero" in client("nbdinfo", "--map", "--totals", uri)


def test_nbdcopy_keeps_holes_both_ways(uri, sparse, tmp_path):
    client("nbdcopy", "--flush", str(sparse), uri)
    assert mapped(uri) == EXTENTS_OF_SPARSE
    back = tmp_path / "back"
    client("nbdcopy", uri, str(back))
    assert back.read_bytes() == sparse.read_bytes()
    assert allocated_bytes(back) <= 12 * MIB + 64 * 1024


def test_qemu_img(uri, sparse, tmp_path):
    client("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(sparse), uri)
    client("qemu-img", "compare", "-f", "raw", "-F", "raw", str(sparse), uri)
    extents = json.loads(client("qemu-img", "map", "--output=json", "-f", "raw", uri))
    assert [(one["start"], one["length"], one["data"]) for one in extents] == [
        (start, length, kind == DATA) for start, length, kind in EXTENTS_OF_SPARSE
    ]
    back = tmp_path / "back"
    client("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, str(back))
    assert back.read_bytes() == sparse.read_bytes()
    assert allocated_bytes(back) <= 12 * MIB + 64 * 1024
    client("qemu-img", "bench", "-w", "-c", "2000", "-d", "16", "-s", "4096", "-f", "raw", uri)
    client("qemu-img", "bench", "-c", "2000", "-d", "16", "-s", "65536", "-f", "raw", uri)


def test_qemu_img_puts_a_format_on_it(uri):
    client("qemu-img", "create", "-f", "qcow2", "-o", "cluster_size=64k", uri, "32M")
    client("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 2M", "-c", "write -z 1M 64k", "-c", "discard 2M 64k", uri)
    client("qemu-io", "-f", "qcow2", "-c", "read -P 0 1M 64k", "-c", "read -P 7 1088k 900k", uri)
    client("qemu-img", "check", "-f", "qcow2", uri)


def test_qemu_io(uri):
    commands = [
        "write -P 0x5a 0 4M",
        "write -f -P 0xa5 4M 64k",
        "write -z 1M 128k",
        "write -z -u 2M 512k",
        "write -z -u -n 3M 64k",  # FAST_ZERO
        "discard 3M 64k",
        "flush",
        "read -P 0x5a 0 1M",
        "read -P 0 1M 128k",
        "read -P 0x5a 1152k 896k",
        "read -P 0 2M 512k",
        "read -P 0 3M 64k",
        "read -P 0xa5 4M 64k",
        "read -P 0 5M 40M",
    ]
    output = client("qemu-io", "-f", "raw", *(word for command in commands for word in ("-c", command)), uri)
    assert "failed" not in output.lower()
    assert len(re.findall(r"^(?:read|wrote|discard) \d+/\d+", output, re.MULTILINE)) == len(commands) - 1


def test_libnbd(uri):
    nbd = import_nbd()
    handle = nbd.NBD()
    handle.set_strict_mode(0)
    handle.add_meta_context("base:allocation")
    handle.connect_uri(uri)
    assert handle.get_structured_replies_negotiated()
    assert handle.can_meta_context("base:allocation")
    handle.pwrite(b"d" * 2 * MIB, MIB)

    def extents(length, offset, flags=0):
        found = []
        handle.block_status(length, offset, lambda _, at, entries, error: found.append((at, entries[:])), flags)
        ((at, entries),) = found
        assert at == offset
        return entries

    assert extents(SIZE, 0) == [MIB, HOLE, 2 * MIB, DATA, SIZE - 3 * MIB, HOLE]
    assert extents(SIZE, 0, nbd.CMD_FLAG_REQ_ONE) == [MIB, HOLE]
    assert extents(512, 2 * MIB - 256) == [512, DATA]
    chunks = []
    data = handle.pread_structured(4 * MIB, 0, lambda buf, at, kind, error: chunks.append((at, len(buf), kind)))
    assert data == bytes(MIB) + b"d" * 2 * MIB + bytes(MIB)
    assert chunks == [(0, MIB, nbd.READ_HOLE), (MIB, 2 * MIB, nbd.READ_DATA), (3 * MIB, MIB, nbd.READ_HOLE)]
    chunks.clear()
    handle.pread_structured(
        4 * MIB, 0, lambda buf, at, kind, error: chunks.append((at, len(buf), kind)), nbd.CMD_FLAG_DF
    )
    assert chunks == [(0, 4 * MIB, nbd.READ_DATA)]
    handle.cache(SIZE, 0)
    handle.zero(MIB, MIB, nbd.CMD_FLAG_FAST_ZERO)
    assert extents(SIZE, 0) == [2 * MIB, HOLE, MIB, DATA, SIZE - 3 * MIB, HOLE]
    for call, number in (
        (lambda: handle.block_status(0, 0, lambda *_: 0), "EINVAL"),
        (lambda: handle.block_status(MIB, SIZE, lambda *_: 0), "EINVAL"),
        (lambda: handle.block_status(MIB, 0, lambda *_: 0, nbd.CMD_FLAG_DF), "EINVAL"),
        (lambda: handle.zero(MIB, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE), "ENOTSUP"),
        (lambda: handle.pread(MIB, SIZE), "EINVAL"),
    ):
        with pytest.raises(nbd.Error) as caught:
            call()
        assert caught.value.errno == number
    assert handle.pread(1, MIB * 5 // 2) == b"d"
    handle.shutdown()


def test_libnbd_without_structured_replies(uri):
    nbd = import_nbd()
    handle = nbd.NBD()
    handle.set_request_structured_replies(False)
    handle.connect_uri(uri)
    assert not handle.get_structured_replies_negotiated()
    assert not handle.can_df()
    handle.pwrite(b"d" * 4096, MIB)
    assert handle.pread(3 * MIB, 0) == bytes(MIB) + b"d" * 4096 + bytes(2 * MIB - 4096)
    handle.shutdown()


def test_fio_verify_deep_on_four_connections(uri, tmp_path):
    client(
        *("fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bsrange=512-64k"),
        *("--verify=crc32c", "--verify_fatal=1", "--iodepth=32", "--numjobs=4", f"--size={SIZE // 4}"),
        *(f"--offset_increment={SIZE // 4}", "--bs_unaligned=0", "--group_reporting", f"--aux-path={tmp_path}"),
    )


def test_nbdkit_as_a_client(uri, sparse):
    client("nbdcopy", str(sparse), uri)
    script = f'test "$(nbdinfo --map "$uri" | wc -l)" = {len(EXTENTS_OF_SPARSE)} && nbdcopy {sparse} "$uri"'
    # checkwrite refuses every write, trim and zero that would change anything; it needs the extents to be right.
    client("nbdkit", "-U", "-", "--filter=checkwrite", "--filter=retry", "nbd", f"uri={uri}", "--run", script)


def test_a_client_that_reconnects_sees_no_error_when_the_server_is_stopped(short_dir):
    """The reason why a server that stops closes, and does not answer ESHUTDOWN: that would be an I/O error here."""
    image, address = short_dir / "image", short_dir / "nbd"
    image.touch()
    os.truncate(image, SIZE)
    server, _ = start(str(image), "--unix", str(address))
    options = f"driver=nbd,server.type=unix,server.path={address},reconnect-delay=30"
    qemu_io = subprocess.Popen(
        [need("qemu-io"), "--image-opts", options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(command: str) -> str:
        assert qemu_io.stdin is not None and qemu_io.stdout is not None
        qemu_io.stdin.write(command + "\n")
        qemu_io.stdin.flush()
        answer: str = qemu_io.stdout.readline()
        qemu_io.stdout.readline()  # how long it took
        return answer

    try:
        assert "wrote 4096/4096" in ask("write -P 1 0 4k")
        stop(server)
        server, _ = start(str(image), "--unix", str(address))
        assert "read 4096/4096" in ask("read -P 1 0 4k")
        assert "wrote 4096/4096" in ask("write -P 2 0 4k")
    finally:
        qemu_io.communicate("quit\n", timeout=60)
    stop(server)
