"""Protocols A, B and C, checksums on the wire, zeroes and holes: the copies end up the same in all of them."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import MIB, Cluster, open_nbd
from tests.cluster.load import Load, Model
from tests.cluster.peers import Proxy


@pytest.mark.parametrize("protocol", ["A", "B", "C"])
@pytest.mark.parametrize("integrity", ["false", "true"])
def test_both_copies_are_the_same_once_all_is_quiet(
    libnbd: Any, new_cluster: Callable[..., Cluster], rng: random.Random, protocol: str, integrity: str
) -> None:
    cluster = new_cluster(protocol=f'"{protocol}"', data_integrity=integrity).up()
    node1, node2 = cluster.nodes
    assert node1.status()["protocol"] == protocol
    model = Model(cluster.size_bytes)
    load = Load(model, lambda: open_nbd(node1), rng)
    load.wait_done(300)
    node2.kill9()
    load.wait_done(100)
    node2.start()
    load.wait_done(300)
    load.finish()
    assert not load.errors
    cluster.wait_in_sync()
    cluster.quiesce().check_identical()
    node2.ctl("takeover")
    with node2.nbd() as handle:
        model.check(lambda offset, length: handle.pread(length, offset))


@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_a_failover_loses_nothing_that_was_flushed(
    libnbd: Any, new_cluster: Callable[..., Cluster], protocol: str
) -> None:
    """Whatever the protocol: a flush is a promise about both nodes."""
    cluster = new_cluster(protocol=f'"{protocol}"').up()
    node1, node2 = cluster.nodes
    with node1.nbd() as handle:
        for block in range(200):
            handle.pwrite(bytes([block]) * 4096, block * 16384)
        handle.flush()
        node1.kill9()
    node2.wait_alone()
    node2.ctl("promote")
    with node2.nbd() as handle:
        for block in range(200):
            assert handle.pread(4096, block * 16384) == bytes([block]) * 4096
    node1.start()
    cluster.wait_in_sync()
    cluster.check_identical()


# ── checksums ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def proxied(libnbd: Any, new_cluster: Callable[..., Cluster]) -> Iterator[tuple[Cluster, Proxy]]:
    """A pair with data-integrity whose link runs through a proxy."""
    cluster = new_cluster(data_integrity="true")
    with Proxy(("127.0.0.2", cluster.port)) as proxy:
        cluster.on["node2"] = {"port": str(proxy.port)}
        cluster.write_config(cluster.node1)
        cluster.on.clear()
        yield cluster.up(), proxy


def flip_first(marker: bytes, spoiled: list[int]) -> Callable[[bytes], bytes]:
    """Flips one bit of the first `marker` that comes by, and notes in `spoiled` where."""

    def flip_once(data: bytes) -> bytes:
        at = data.find(marker)
        if at < 0 or spoiled:
            return data
        spoiled.append(at)
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    return flip_once


def test_a_bit_that_flips_on_the_wire_is_noticed(proxied: tuple[Cluster, Proxy]) -> None:
    cluster, proxy = proxied
    node1, node2 = cluster.nodes
    marker = b"\xa5precious data\x5a" * 64
    spoiled: list[int] = []
    proxy.spoil = flip_first(marker, spoiled)
    node1.write(64 * 4096, marker + bytes(4096 - len(marker)))
    assert spoiled
    cluster.wait_in_sync()
    assert "a WRITE frame arrived with a wrong checksum" in node2.log()
    cluster.quiesce().check_identical()
    assert node2.image.read_bytes()[64 * 4096 :].startswith(marker)


def test_a_bit_that_flips_in_a_resync_is_noticed(proxied: tuple[Cluster, Proxy]) -> None:
    cluster, proxy = proxied
    node1, node2 = cluster.nodes
    marker = b"\xa5resynced data\x5a" * 64
    node2.ctl("disconnect")
    node1.write(0, marker * 64)
    spoiled: list[int] = []
    proxy.spoil = flip_first(marker, spoiled)
    node2.ctl("connect")
    cluster.wait_in_sync()
    assert spoiled
    assert "a SYNC_DATA frame arrived with a wrong checksum" in node2.log()
    cluster.check_identical()


# ── zeroes and holes ─────────────────────────────────────────────────────────────────────────────────────────────


def allocated(path: Path) -> int:
    """Bytes of disk that a file takes."""
    return os.stat(path).st_blocks * 512


def test_trim_and_zeroes_reach_both_copies(libnbd: Any, pair: Cluster) -> None:
    node1 = pair.node1
    node1.write(0, b"d" * 8 * MIB)
    with node1.nbd() as handle:
        handle.trim(MIB, MIB)
        handle.zero(MIB, 3 * MIB)
        handle.zero(MIB, 5 * MIB, libnbd.CMD_FLAG_NO_HOLE)
        handle.trim(512, 7 * MIB + 512)
        handle.zero(1536, 7 * MIB + 8192 + 512, libnbd.CMD_FLAG_FUA)
        for offset, length in (
            (MIB, MIB),
            (3 * MIB, MIB),
            (5 * MIB, MIB),
            (7 * MIB + 512, 512),
            (7 * MIB + 8704, 1536),
        ):
            assert handle.pread(length, offset) == bytes(length)
        assert handle.pread(512, 7 * MIB) == b"d" * 512
        handle.flush()
    pair.check_identical()
    for node in pair.nodes:
        assert allocated(node.image) <= 6 * MIB + 65536
    pair.node2.ctl("takeover")
    assert pair.node2.read(0, 8 * MIB) == node1.image.read_bytes()[: 8 * MIB]


def test_trimmed_alone_and_trimmed_at_the_peer(pair: Cluster) -> None:
    node1, node2 = pair.nodes
    node1.write(0, b"d" * 8 * MIB)
    pair.quiesce()
    node2.kill9()
    node1.wait_alone()
    with node1.nbd() as handle:
        handle.trim(4 * MIB, 2 * MIB)
        handle.flush()
    node2.start()
    pair.wait_in_sync()
    pair.check_identical()
    for node in pair.nodes:
        assert allocated(node.image) <= 4 * MIB + 65536


# ── sparse images ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_large_sparse_volume_stays_sparse(libnbd: Any, new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(size_bytes=10 << 30)
    cluster.create()
    node1, node2 = cluster.nodes
    with node1.image.open("rb+") as image:
        for offset in (0, 1 << 30, (5 << 30) + 12345, (10 << 30) - MIB):
            image.seek(offset)
            image.write(os.urandom(MIB))
    cluster.begin().wait_in_sync()
    cluster.check_identical()
    assert allocated(node2.image) < 16 * MIB
    assert allocated(node1.image) < 16 * MIB


def test_a_hole_replaces_data_of_the_target(libnbd: Any, cluster: Cluster) -> None:
    """A full resync onto a disk that holds something else: what is a hole at the source is one afterwards."""
    node1, node2 = cluster.nodes
    node2.image.write_bytes(b"old" * (cluster.size_bytes // 3) + b"o")
    cluster.create()
    with node1.image.open("rb+") as image:
        image.seek(MIB)
        image.write(b"n" * MIB)
    cluster.begin().wait_in_sync()
    cluster.check_identical()
    assert node2.image.read_bytes() == bytes(MIB) + b"n" * MIB + bytes(cluster.size_bytes - 2 * MIB)
    assert allocated(node2.image) <= MIB + 65536
