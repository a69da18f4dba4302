"""Growing a volume while clients use it."""

import os
import random
import shutil
from typing import Any

import pytest

from tests.cluster.cluster import MIB, Cluster, Node, open_nbd
from tests.cluster.load import Load, Model

LARGE = 40 * MIB


def grow_backings(cluster: Cluster, size_bytes: int = LARGE) -> None:
    for node in cluster.nodes:
        os.truncate(node.image, size_bytes)


def resized(node: Node, *options: str) -> None:
    result = node.cli("resize", *options)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def refused(node: Node, *options: str) -> str:
    result = node.cli("resize", *options)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def sizes(cluster: Cluster) -> set[int]:
    """What both nodes have, by their status and on record."""
    return {node.volume()["size_bytes"] for node in cluster.nodes} | {
        node.dump_md()["size_bytes"] for node in cluster.nodes
    }


@pytest.mark.parametrize("asked", ["node1", "node2"])
def test_what_is_a_hole_on_both_is_not_copied(pair: Cluster, asked: str) -> None:
    node = pair.node1 if asked == "node1" else pair.node2
    with pair.node1.nbd() as handle:
        handle.pwrite(b"1" * MIB, 0)
        grow_backings(pair)
        resized(node)
        assert sizes(pair) == {LARGE}
        assert node.status()["replication"] == "Established"
        assert all(one.volume()["out_of_sync_bytes"] == 0 for one in pair.nodes)
        # A client that is there sees the size that it was told, and a new one the new size.
        assert handle.get_size() == pair.size_bytes
        handle.pwrite(b"2" * MIB, MIB)
    with pair.node1.nbd() as handle:
        assert handle.get_size() == LARGE
    pair.node1.write(LARGE - MIB, b"3" * MIB)
    pair.quiesce().check_identical()
    pair.node2.ctl("takeover")
    assert pair.node2.read(LARGE - MIB, MIB) == b"3" * MIB
    for one in pair.nodes:
        one.stop()
    pair.start()
    pair.wait_in_sync()
    assert sizes(pair) == {LARGE}


@pytest.mark.parametrize("asked", ["node1", "node2"])
def test_what_is_not_known_to_be_the_same_is_copied(pair: Cluster, asked: str) -> None:
    node = pair.node1 if asked == "node1" else pair.node2
    grow_backings(pair)
    with pair.node2.image.open("rb+") as image:
        image.seek(LARGE - MIB)
        image.write(b"leftovers" * 1000)
    resized(node)
    pair.node1.wait_for(lambda status: status["volumes"][0]["out_of_sync_bytes"] == 0)
    pair.wait_in_sync()
    assert sizes(pair) == {LARGE}
    pair.quiesce().check_identical()
    assert pair.node1.read(LARGE - MIB, MIB) == bytes(MIB)


def test_assume_clean_copies_nothing(pair: Cluster) -> None:
    grow_backings(pair)
    for node in pair.nodes:
        with node.image.open("rb+") as image:
            image.seek(LARGE - MIB)
            image.write(b"same" * 1000)
    resized(pair.node1, "--assume-clean")
    assert pair.node1.status()["replication"] == "Established"
    assert all(node.volume()["out_of_sync_bytes"] == 0 for node in pair.nodes)
    assert pair.node1.read(LARGE - MIB, 4) == b"same"
    pair.quiesce().check_identical()


def test_while_clients_write(pair: Cluster, rng: random.Random) -> None:
    model = Model(pair.size_bytes)
    load = Load(model, lambda: open_nbd(pair.node1), rng)
    load.wait_done(50)
    for factor in (2, 3, 4):
        grow_backings(pair, factor * pair.size_bytes)
        with pair.node1.image.open("rb+") as image:
            image.seek(factor * pair.size_bytes - 4096)
            image.write(b"left")
        resized(pair.nodes[factor % 2])
        pair.wait_in_sync()
        load.wait_done(50)
    load.finish()
    assert not load.errors
    assert sizes(pair) == {4 * pair.size_bytes}
    with pair.node1.nbd() as handle:
        model.check(lambda offset, length: handle.pread(length, offset))
    pair.quiesce().check_identical()


def keep_metadata(node: Node) -> Any:
    """The metadata as they are now; call the result to have them again, as after a crash in the middle."""
    kept = node.metadata.with_suffix(".kept")
    shutil.copyfile(node.metadata, kept)
    return lambda: shutil.copyfile(kept, node.metadata)


def test_a_secondary_that_has_not_grown_grows_when_it_connects(pair: Cluster) -> None:
    pair.node1.write(0, b"1" * MIB)
    pair.quiesce()
    grow_backings(pair)
    back = keep_metadata(pair.node2)
    resized(pair.node1)
    pair.node2.stop()
    pair.node1.wait_alone()
    pair.node1.write(LARGE - MIB, b"2" * MIB)
    back()
    pair.node2.start()
    pair.wait_in_sync()
    assert sizes(pair) == {LARGE}
    pair.quiesce().check_identical()


def test_a_primary_that_has_not_grown_keeps_its_size_until_told_again(pair: Cluster) -> None:
    """The Secondary has grown, and the Primary crashed before it did."""
    grow_backings(pair)
    back = keep_metadata(pair.node1)
    resized(pair.node1)
    pair.node2.stop()
    pair.node1.kill9()
    back()
    pair.node1.start()
    pair.node1.ctl("promote", peer_is_dead=True)
    pair.node1.write(0, b"1" * MIB)
    pair.node2.start()
    pair.wait_in_sync()
    assert sizes(pair) == {pair.size_bytes}
    resized(pair.node2)
    assert sizes(pair) == {LARGE}
    pair.node1.write(LARGE - MIB, b"2" * MIB)
    pair.quiesce().check_identical()


def test_a_secondary_that_has_grown_takes_over(pair: Cluster) -> None:
    grow_backings(pair)
    back = keep_metadata(pair.node1)
    resized(pair.node1)
    pair.node1.kill9()
    back()
    pair.node2.wait_alone()
    pair.node2.ctl("promote")
    pair.node2.write(LARGE - MIB, b"2" * MIB)
    pair.node1.start()
    pair.wait_in_sync()
    assert sizes(pair) == {LARGE}
    pair.quiesce().check_identical()


def test_refusals(pair: Cluster) -> None:
    node1, node2 = pair.nodes
    assert "grow both first" in refused(node1)
    os.truncate(node1.image, LARGE)
    assert f"{pair.size_bytes} on node2 and {LARGE} on node1" in refused(node2)
    assert sizes(pair) == {pair.size_bytes}
    os.truncate(node2.image, LARGE + 1000)
    node2.ctl("disconnect")
    node1.wait_alone()
    assert "not connected" in refused(node1)
    node2.ctl("connect")
    pair.wait_in_sync()
    resized(node1)
    assert sizes(pair) == {LARGE}
    assert "never shrinks" in refused(node1)


def test_not_while_it_is_verified(libnbd: Any, new_cluster: Any) -> None:
    cluster = new_cluster(verify_rate='"1M"').up()
    cluster.node1.write(0, b"1" * 16 * MIB)
    grow_backings(cluster)
    cluster.node1.ctl("verify")
    assert "verified" in refused(cluster.node1)
    assert "verified" in refused(cluster.node2)
    cluster.node2.ctl("verify", stop=True)
    resized(cluster.node1)
    assert sizes(cluster) == {LARGE}
