"""Holes, zeroes and trims, as clients see them: the same on both nodes, whichever way the other one became Primary."""

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import MIB, Cluster, Node

KIB = 1024


def mapped(node: Node) -> list[dict[str, Any]]:
    """What `nbdinfo --map --json` says of the node's export."""
    program = shutil.which("nbdinfo")
    if program is None:
        pytest.skip("nbdinfo is not installed (Debian package libnbd-bin)")
    done = subprocess.run([program, "--map", "--json", node.uri], capture_output=True, timeout=60, check=True)
    extents: list[dict[str, Any]] = json.loads(done.stdout)
    return extents


def holes(node: Node) -> list[tuple[int, int]]:
    """(offset, length) of the holes."""
    return [(extent["offset"], extent["length"]) for extent in mapped(node) if extent["type"] == 3]


def data(node: Node) -> list[tuple[int, int]]:
    """(offset, length) of what is allocated."""
    return [(extent["offset"], extent["length"]) for extent in mapped(node) if extent["type"] == 0]


@contextlib.contextmanager
def connected(node: Node, nbd: Any) -> Iterator[Any]:
    """A libnbd handle that has negotiated base:allocation and checks nothing by itself."""
    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    handle.set_strict_mode(0)
    handle.connect_uri(node.uri)
    yield handle
    handle.shutdown()


def change_at_random(handle: Any, nbd: Any, size_bytes: int, rng: random.Random, count: int) -> None:
    """Writes, trims and zeroes, with holes and without, on block boundaries and off them."""
    for _ in range(count):
        unit = rng.choice((4 * KIB, 4 * KIB, 64 * KIB, 512, 1))
        length = rng.randint(1, 40) * unit
        offset = rng.randrange(size_bytes - length + 1) // unit * unit
        kind = rng.choice(("write", "write", "trim", "zero", "zero without a hole"))
        if kind == "write":
            handle.pwrite(rng.randbytes(length), offset, rng.choice((0, nbd.CMD_FLAG_FUA)))
        elif kind == "trim":
            handle.trim(length, offset)
        else:
            handle.zero(length, offset, 0 if kind == "zero" else nbd.CMD_FLAG_NO_HOLE)


def contents(handle: Any, size_bytes: int) -> bytes:
    return b"".join(handle.pread(MIB, at) for at in range(0, size_bytes, MIB))


def test_what_clients_see_of_each_change(libnbd: Any, pair: Cluster) -> None:
    with connected(pair.node1, libnbd) as handle:
        handle.pwrite(b"d" * 8 * MIB, 0)
        handle.trim(MIB, 1 * MIB)
        handle.zero(MIB, 3 * MIB)
        handle.zero(MIB, 5 * MIB, libnbd.CMD_FLAG_NO_HOLE)
        handle.flush()
    before = mapped(pair.node1)
    seen = holes(pair.node1)
    assert (1 * MIB, MIB) in seen
    assert (3 * MIB, MIB) in seen
    assert (8 * MIB, 8 * MIB) in seen
    pair.node2.ctl("takeover")
    assert mapped(pair.node2) == before
    with connected(pair.node2, libnbd) as handle:
        expected = b"".join((b"\0" if at in (1, 3, 5) or at >= 8 else b"d") * MIB for at in range(16))
        assert contents(handle, pair.size_bytes) == expected


@pytest.mark.parametrize("how", ["takeover", "kill"])
def test_holes_and_contents_are_the_same_on_the_other_node(
    libnbd: Any, pair: Cluster, rng: random.Random, how: str
) -> None:
    size = pair.size_bytes
    with connected(pair.node1, libnbd) as handle:
        change_at_random(handle, libnbd, size, rng, 60)
        before = mapped(pair.node1), contents(handle, size)
    if how == "kill":
        pair.node1.kill9()
        pair.node2.wait_alone()
        pair.node2.ctl("promote")
    else:
        pair.node2.ctl("takeover")
    with connected(pair.node2, libnbd) as handle:
        assert mapped(pair.node2) == before[0]
        assert contents(handle, size) == before[1]


def test_a_resync_brings_holes_too(libnbd: Any, pair: Cluster, rng: random.Random) -> None:
    size = pair.size_bytes
    with connected(pair.node1, libnbd) as handle:
        handle.pwrite(b"d" * 5 * MIB, 3 * MIB)
    pair.node2.kill9()
    pair.node1.wait_alone()
    with connected(pair.node1, libnbd) as handle:
        handle.trim(MIB, 4 * MIB)
        handle.zero(MIB, 6 * MIB)
        change_at_random(handle, libnbd, 3 * MIB, rng, 40)
        expected = contents(handle, size)
    pair.node2.start()
    pair.wait_in_sync()
    on_source = mapped(pair.node1)
    pair.node2.ctl("takeover")
    # Short holes between data may have been copied as data; no data has become a hole, and no long hole data.
    assert {(4 * MIB, MIB), (6 * MIB, MIB)} <= set(holes(pair.node2))
    data_on_target = data(pair.node2)
    for extent in on_source:
        if extent["type"] == 0:
            start, stop = extent["offset"], extent["offset"] + extent["length"]
            assert any(at <= start and stop <= at + length for at, length in data_on_target)
    with connected(pair.node2, libnbd) as handle:
        assert contents(handle, size) == expected


def test_fast_zero_is_fast_on_both_nodes_or_refused(libnbd: Any, new_cluster: Callable[..., Cluster]) -> None:
    pair = new_cluster().up()
    fast = libnbd.CMD_FLAG_FAST_ZERO
    with connected(pair.node1, libnbd) as handle:
        handle.pwrite(b"d" * 4 * MIB, 0)
        handle.zero(MIB, 0, fast)  # the test's files lie on a file system with holes
        assert handle.pread(4 * MIB, 0) == bytes(MIB) + b"d" * 3 * MIB
        for offset, length, flags in ((MIB, MIB, libnbd.CMD_FLAG_NO_HOLE), (MIB + 512, MIB, 0), (MIB, MIB - 512, 0)):
            with pytest.raises(libnbd.Error) as caught:
                handle.zero(length, offset, fast | flags)
            assert caught.value.errno == "ENOTSUP"
        assert handle.pread(3 * MIB, MIB) == b"d" * 3 * MIB
        pair.node1.ctl("detach")  # it works through its peer: what is fast there is not known here
        with pytest.raises(libnbd.Error):
            handle.zero(MIB, MIB, fast)
        handle.zero(MIB, MIB)
    pair.node2.ctl("takeover")
    with connected(pair.node2, libnbd) as handle:
        assert handle.pread(4 * MIB, 0) == bytes(2 * MIB) + b"d" * 2 * MIB


def test_without_a_good_disk_everything_counts_as_data(libnbd: Any, pair: Cluster) -> None:
    with connected(pair.node1, libnbd) as handle:
        handle.pwrite(b"d" * MIB, 0)
    assert data(pair.node1) == [(0, MIB)]
    pair.node1.ctl("detach")
    assert data(pair.node1) == [(0, pair.size_bytes)]
    with connected(pair.node1, libnbd) as handle:
        handle.trim(MIB, 0)
        handle.cache(MIB, 0)
        assert handle.pread(2 * MIB, 0) == bytes(2 * MIB)
    pair.node1.ctl("attach")
    pair.node1.wait_for(lambda status: not status["volumes"][0]["through_peer"])
    assert data(pair.node1) == []


def status(handle: Any, offset: int, length: int) -> list[tuple[int, int]]:
    """(length, flags) of the extents in one reply."""
    found: list[int] = []
    handle.block_status(length, offset, lambda _context, _offset, entries, _error: found.extend(entries))
    return list(zip(found[::2], found[1::2], strict=True))


def test_a_disk_that_is_being_filled_is_asked_only_for_what_it_has(libnbd: Any, pair: Cluster) -> None:
    pair.node1.write(0, b"d" * 2 * MIB)
    pair.quiesce()
    pair.node1.ctl("detach")
    with connected(pair.node1, libnbd) as handle:
        handle.trim(MIB, 0)
        pair.node1.ctl("pause-sync")
        pair.node1.ctl("attach")
        pair.node1.wait_replication("PausedSyncT", "PausedSyncS")
        handle.pread(1, 0)  # is answered once the peer serves on the new link
        assert status(handle, 0, MIB) == [(MIB, 0)]  # a hole, but the local disk does not have it yet
        assert status(handle, 0, 16 * MIB) == [(MIB, 0)]
        assert status(handle, MIB // 2, 16 * MIB - MIB // 2) == [(MIB // 2, 0)]
        assert status(handle, MIB, 3 * MIB) == [(MIB, 0), (2 * MIB, 3)]
        assert handle.pread(2 * MIB, 0) == bytes(MIB) + b"d" * MIB
        pair.node1.ctl("resume-sync")
        pair.node1.wait_for(lambda status: not status["volumes"][0]["through_peer"])
        assert status(handle, 0, 4 * MIB) == [(MIB, 3), (MIB, 0), (2 * MIB, 3)]


@pytest.fixture
def without_holes(short_dir: Path) -> Iterator[Path]:
    """A folder on a file system that cannot punch holes."""
    folder = short_dir / "ramfs"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "ramfs", "none", folder], check=False).returncode != 0:
        pytest.skip("needs root, to mount a file system that cannot punch holes")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.root
def test_fast_zero_asks_what_the_peers_disk_can(libnbd: Any, without_holes: Path, short_dir: Path) -> None:
    with Cluster(short_dir) as pair:
        pair.node2.image = without_holes / "node2.img"
        pair.write_config()
        pair.up()
        with connected(pair.node1, libnbd) as handle:
            handle.pwrite(b"d" * 2 * MIB, 0)
            with pytest.raises(libnbd.Error) as caught:
                handle.zero(MIB, 0, libnbd.CMD_FLAG_FAST_ZERO)
            assert caught.value.errno == "ENOTSUP"
            assert handle.pread(2 * MIB, 0) == b"d" * 2 * MIB
            handle.zero(MIB, 0)
            pair.node2.stop()
            pair.node1.wait_alone()
            handle.zero(MIB, MIB, libnbd.CMD_FLAG_FAST_ZERO)  # now it is this node's disk that counts
            assert handle.pread(2 * MIB, 0) == bytes(2 * MIB)
        pair.node2.start()
        pair.wait_in_sync()
        pair.node2.ctl("takeover")
        assert data(pair.node2) == [(0, pair.size_bytes)]  # it cannot say where holes are
        with connected(pair.node2, libnbd) as handle:
            assert handle.pread(2 * MIB, 0) == bytes(2 * MIB)
            with pytest.raises(libnbd.Error):
                handle.zero(MIB, 0, libnbd.CMD_FLAG_FAST_ZERO)


def test_a_socket_that_systemd_opened(libnbd: Any, cluster: Cluster) -> None:
    path = cluster.folder / "passed"
    cluster.create()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.fsencode(path))
        listening.listen()
        cluster.node1.passed = [listening]
        cluster.begin().wait_in_sync()
        assert not cluster.node1.nbd_path.exists()  # the configured address is not used
        cluster.node1.nbd_path = path
        cluster.node1.write(0, b"through the socket of another process")
        cluster.node1.stop()
        assert path.exists()
