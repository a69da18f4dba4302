"""A node dies or hangs, with and without load: no client of the survivor notices, and the copies meet again."""

import random
import re
from collections.abc import Callable
from typing import Any

from tests.cluster.cluster import MIB, Cluster, Node, open_nbd
from tests.cluster.load import Load, Model

EXTENT_BYTES = 4 * MIB


def check(node: Node, model: Model) -> None:
    """The node serves what the model says."""
    with node.nbd() as handle:
        model.check(lambda offset, length: handle.pread(length, offset))


def copied_bytes(node: Node) -> int:
    """What the resync under way has to copy, as the node counts it."""
    total: int = node.volume()["resync_total_bytes"]
    return total


def test_a_secondary_that_dies_under_load_costs_no_client_a_write(pair: Cluster, rng: random.Random) -> None:
    model = Model(pair.size_bytes)
    load = Load(model, lambda: open_nbd(pair.node1), rng)
    for _ in range(3):
        load.wait_done(100)
        pair.node2.kill9()
        load.wait_done(100)
        pair.node2.start()
    load.wait_done(100)
    load.finish()
    assert not load.errors
    pair.wait_in_sync()
    check(pair.node1, model)
    pair.quiesce().check_identical()


def test_a_secondary_that_returns_gets_only_what_has_changed(libnbd: Any, new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(size_bytes=64 * MIB).up()
    node1, node2 = cluster.nodes
    node1.write(0, b"a" * 8 * MIB)
    cluster.quiesce()
    node2.kill9()
    node1.wait_alone()
    node1.ctl("pause-sync")
    for block in range(20):
        node1.write(block * MIB + 4096, b"b" * 4096)
    node1.write(40 * MIB + 100 * 512, b"c" * 1024)
    assert node1.volume()["out_of_sync_bytes"] == 21 * 4096
    node2.start()
    node1.wait_replication("PausedSyncS")
    assert copied_bytes(node1) == 21 * 4096
    node1.ctl("resume-sync")
    cluster.wait_in_sync()
    cluster.check_identical()


def test_a_primary_that_returns_gets_what_was_hot_and_no_more(libnbd: Any, new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(size_bytes=64 * MIB).up()
    node1, node2 = cluster.nodes
    for extent in (0, 5, 9):
        node1.write(extent * EXTENT_BYTES, b"a" * 4096)
    assert node1.volume()["activity_log"]["hot"] == 3
    node1.kill9()
    node2.wait_alone()
    node2.ctl("promote")
    node2.ctl("pause-sync")
    node2.write(12 * EXTENT_BYTES, b"b" * 8192)
    node1.start()
    node2.wait_replication("PausedSyncS")
    assert copied_bytes(node2) == 3 * EXTENT_BYTES + 8192
    node2.ctl("resume-sync")
    cluster.wait_in_sync()
    cluster.check_identical()


def test_of_what_was_hot_only_what_differs_is_sent(
    libnbd: Any, new_cluster: Callable[..., Cluster], rng: random.Random
) -> None:
    cluster = new_cluster(size_bytes=64 * MIB).up()
    node1, node2 = cluster.nodes
    node1.write(0, rng.randbytes(12 * MIB))
    cluster.quiesce()
    node1.kill9()
    node2.wait_alone()
    node2.ctl("promote")
    node2.write(MIB, rng.randbytes(8192))
    node2.write(6 * MIB + 4096, rng.randbytes(4096))
    node1.start()
    cluster.wait_in_sync()
    cluster.quiesce().check_identical()
    sent, equal = map(int, re.findall(r"complete: (\d+) bytes of data were sent, (\d+) were equal", node2.log())[-1])
    assert (sent, sent + equal) == (12288, 12 * MIB)


def test_a_clean_stop_of_the_primary_needs_no_resync(pair: Cluster) -> None:
    node1, node2 = pair.nodes
    node1.write(0, b"x" * MIB)
    node1.stop()
    assert "Traceback" not in node1.log()
    assert node1.dump_md()["primary"] is False
    node2.wait_alone()
    node1.start()
    pair.wait_in_sync()
    for node in pair.nodes:
        assert "is synced from" not in node.log().splitlines()[-1]
        assert "no dirty blocks" in node.log()
        assert node.status()["role"] == "Secondary"
    assert sum(node.log().count("the resync is complete") for node in pair.nodes) == 1  # the one that made the pair
    pair.check_identical()
    node2.ctl("promote")
    assert node2.read(0, MIB) == b"x" * MIB


def test_a_clean_stop_finishes_what_clients_asked_for(pair: Cluster, rng: random.Random) -> None:
    """SIGTERM under load: what was answered is on both copies, and nothing needs a resync."""
    node1, node2 = pair.nodes
    model = Model(pair.size_bytes)
    load = Load(model, lambda: open_nbd(node1), rng)
    load.wait_done(200)
    node1.stop()
    load.finish()
    assert not load.errors
    node2.wait_alone()
    pair.check_identical()
    node1.start()
    pair.wait_in_sync()
    assert "no dirty blocks" in node1.log()
    node2.ctl("promote")
    check(node2, model)


def test_a_secondary_that_hangs_holds_writes_no_longer_than_the_timeout(libnbd: Any, pair: Cluster) -> None:
    """Its kernel takes the frames, but it never answers: the write is answered once its loss is on record."""
    node1, node2 = pair.nodes
    before = node1.generations()["current"]
    with node1.nbd() as client:
        client.pwrite(b"1" * 4096, 0)
        node2.freeze()
        cookie = client.aio_pwrite(libnbd.Buffer.from_bytearray(bytearray(b"2" * 4096)), 4096)
        node1.wait_alone()
        while not client.aio_command_completed(cookie):
            client.poll(1000)
        # Only after the record, which says that node2 lacks it.
        metadata = node1.dump_md()
        assert metadata["generations"]["current"] != before
        assert metadata["generations"]["base"] == before
        assert metadata["peers"][0]["outdated"] is True
        assert "nothing was heard from the peer for 1 s" in node1.log()
        client.pwrite(b"3" * 4096, 8192)
    node2.thaw()
    pair.wait_in_sync()
    pair.quiesce().check_identical()
    assert pair.node2.image.read_bytes()[:12288] == b"1" * 4096 + b"2" * 4096 + b"3" * 4096


def test_a_primary_that_hangs_and_comes_back_overwrites_nothing(pair: Cluster) -> None:
    """node1 hangs, node2 takes over by hand, node1 comes back to life with its clients: it finds a newer copy."""
    node1, node2 = pair.nodes
    node1.write(0, b"1" * 4096)
    pair.quiesce()
    node1.freeze()
    node2.wait_alone()
    node2.ctl("promote")
    node2.write(0, b"2" * 4096)
    node1.thaw()
    for node in pair.nodes:
        node.wait_connection("StandAlone")
    assert node2.read(0, 4096) == b"2" * 4096
    node1.ctl("demote")
    for node in pair.nodes:
        node.ctl("connect")
    pair.wait_in_sync()
    assert node2.read(0, 4096) == b"2" * 4096
    pair.check_identical()


def test_alone_again_after_a_crash(pair: Cluster) -> None:
    """Everything a Primary did alone, over a crash of its own, reaches the peer: log and bitmap are durable."""
    node1, node2 = pair.nodes
    node1.write(0, b"0" * MIB)
    node2.kill9()
    node1.wait_alone()
    for number, offset in enumerate((1, 7, 3)):
        node1.write(offset * MIB + 512 * number, bytes([65 + number]) * 70_144)
        node1.kill9()
        node1.start()
        node1.ctl("promote")
    node1.write(9 * MIB, b"z" * 4096)
    node1.ctl("demote")
    node1.stop()
    node1.start()
    node1.ctl("promote")
    node1.write(10 * MIB, b"y" * 4096)
    node2.start()
    pair.wait_in_sync()
    pair.quiesce().check_identical()
    node2.ctl("takeover")
    for number, offset in enumerate((1, 7, 3)):
        assert node2.read(offset * MIB + 512 * number, 70_144) == bytes([65 + number]) * 70_144


def test_a_small_activity_log_misses_nothing(
    libnbd: Any, new_cluster: Callable[..., Cluster], rng: random.Random
) -> None:
    """Seven slots for the 256 extents of 1 GiB: each crash must still name every block that may differ."""
    cluster = new_cluster(size_bytes=1024 * MIB, al_extents="7").up()
    for _ in range(2):
        alive = cluster.node1 if cluster.node1.status()["role"] == "Primary" else cluster.node2
        model = Model(cluster.size_bytes)
        load = Load(model, lambda node=alive: open_nbd(node), rng, connections=2, depth=16, only="write")
        load.wait_done(400)
        alive.kill9()
        load.finish()
        survivor = alive.peer
        survivor.wait_alone()
        survivor.ctl("promote")
        survivor.write(rng.randrange(1024) * MIB, b"w" * 4096)
        alive.start()
        cluster.wait_in_sync()
        cluster.quiesce().check_identical()


def test_one_request_may_touch_more_extents_than_the_log_has_slots(
    libnbd: Any, new_cluster: Callable[..., Cluster]
) -> None:
    cluster = new_cluster(size_bytes=1024 * MIB, al_extents="7").up()
    node1 = cluster.node1
    with node1.nbd() as client:
        client.pwrite(b"x" * 4096, 100 * MIB)
        client.pwrite(b"y" * 32 * MIB, 200 * MIB)
        client.trim(600 * MIB, 4096)
        assert client.pread(4096, 100 * MIB) == bytes(4096)
        client.zero(100 * MIB, 210 * MIB)
        client.flush()
    cluster.check_identical()
