"""Online verify: what differs is found exactly, whatever clients write meanwhile; and what becomes of it."""

import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from replica import wire
from replica.digests import pack_runs
from replica.errors import ReplicaError
from replica.hooks import Event
from tests.cluster.cluster import MIB, Cluster, Node, open_nbd
from tests.cluster.load import Load, Model
from tests.cluster.peers import FakePeer
from tests.cluster.test_hooks import Line, Recorder, line, recorder  # noqa: F401 - fixtures
from tests.cluster.test_peer_port import with_fake_peer

BLOCK = 4096
#: Blocks that are planted: both sides of a chunk's end, a run of two, the first and the last of the volume.
PLANTED = (0, 63, 64, 65, 700, 701, 4095)


def plant(node: Node, blocks: tuple[int, ...]) -> None:
    """As a disk that returns other bytes than were written to it."""
    with node.image.open("rb+", buffering=0) as image:
        for block in blocks:
            image.seek(block * BLOCK + 17)
            byte = image.read(1)
            image.seek(block * BLOCK + 17)
            image.write(bytes([byte[0] ^ 1]))


def verified(node: Node, *options: str) -> dict[str, Any]:
    """Run to its end; the result, which the exit status agrees with."""
    result = node.cli("verify", "--wait", *options)
    assert result.stderr == ""
    last: dict[str, Any] = node.volume()["last_verify"]
    assert last["complete"] and last["reason"] == ""
    assert result.returncode == (3 if last["found_bytes"] else 0)
    return last


def refused(node: Node, *options: str) -> str:
    result = node.cli("verify", *options)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def marked(node: Node) -> int:
    """What is durably out of sync, in blocks."""
    out_of_sync_bytes: int = node.dump_md()["out_of_sync_bytes"]
    return out_of_sync_bytes // BLOCK


def fill(cluster: Cluster, rng: random.Random) -> None:
    cluster.node1.write(0, rng.randbytes(4 * MIB))
    cluster.quiesce()


def test_equal_copies(pair: Cluster, rng: random.Random) -> None:
    fill(pair, rng)
    for node in pair.nodes:
        last = verified(node)
        assert (last["found_bytes"], last["position_bytes"], last["driver"]) == (0, pair.size_bytes, node.name)
        assert node.peer.wait_for(lambda status: status["volumes"][0]["verify"] is None)
        assert node.peer.volume()["last_verify"]["driver"] == node.name
        assert marked(pair.node1) == marked(pair.node2) == 0


@pytest.mark.parametrize("driver", ["node1", "node2"])
@pytest.mark.parametrize("bad", ["node1", "node2"])
def test_what_differs_is_found_exactly_and_resynced_on_connect(
    pair: Cluster, rng: random.Random, driver: str, bad: str
) -> None:
    nodes = {node.name: node for node in pair.nodes}
    fill(pair, rng)
    plant(nodes[bad], PLANTED)
    assert verified(nodes[driver])["found_bytes"] == len(PLANTED) * BLOCK
    nodes[driver].peer.wait_for(lambda status: status["volumes"][0]["last_verify"] is not None)
    for node in pair.nodes:
        assert node.volume()["out_of_sync_bytes"] == len(PLANTED) * BLOCK
        assert marked(node) == len(PLANTED)
        assert node.status()["replication"] == "Established"
    served = pair.node1.image.read_bytes()
    pair.node2.ctl("disconnect")
    pair.node1.wait_alone()
    pair.node2.ctl("connect")
    pair.node1.wait_for(lambda status: status["volumes"][0]["out_of_sync_bytes"] == 0)
    pair.wait_in_sync()
    pair.check_identical()
    assert pair.node1.image.read_bytes() == served, "the Primary's data are what clients see"
    assert marked(pair.node1) == marked(pair.node2) == 0


@pytest.mark.parametrize("driver", ["node1", "node2"])
@pytest.mark.parametrize("bad", ["node1", "node2"])
def test_repair(pair: Cluster, rng: random.Random, driver: str, bad: str) -> None:
    nodes = {node.name: node for node in pair.nodes}
    fill(pair, rng)
    plant(nodes[bad], PLANTED)
    served = pair.node1.image.read_bytes()
    last = verified(nodes[driver], "--repair")
    assert last["found_bytes"] == last["repaired_bytes"] == len(PLANTED) * BLOCK
    pair.check_identical()
    assert pair.node1.image.read_bytes() == served
    assert verified(nodes[driver])["found_bytes"] == 0
    for node in pair.nodes:
        assert node.volume()["out_of_sync_bytes"] == 0
    pair.quiesce()
    assert marked(pair.node1) == marked(pair.node2) == 0


def test_what_was_found_before_is_repaired_later(pair: Cluster, rng: random.Random) -> None:
    fill(pair, rng)
    plant(pair.node2, PLANTED)
    verified(pair.node1)
    # Written over meanwhile: equal by now, and called dirty still.
    pair.node1.write(64 * BLOCK, rng.randbytes(BLOCK))
    last = verified(pair.node1, "--repair")
    assert last["found_bytes"] == (len(PLANTED) - 1) * BLOCK
    assert last["repaired_bytes"] == len(PLANTED) * BLOCK
    assert pair.node1.volume()["out_of_sync_bytes"] == pair.node2.volume()["out_of_sync_bytes"] == 0
    pair.check_identical()


def test_part_of_the_volume(pair: Cluster, rng: random.Random) -> None:
    fill(pair, rng)
    plant(pair.node2, (10, 20, 30))
    assert verified(pair.node1, "--from", "44K", "--to", "120K")["found_bytes"] == BLOCK
    assert verified(pair.node1, "--from", "120K")["found_bytes"] == BLOCK
    assert marked(pair.node1) == marked(pair.node2) == 2
    assert verified(pair.node2, "--to", "44K", "--repair")["repaired_bytes"] == BLOCK
    assert pair.node1.volume()["out_of_sync_bytes"] == 2 * BLOCK, "only what was asked for is repaired"


def test_the_last_block_may_be_shorter(libnbd: Any, new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(size_bytes=2 * MIB + 512)
    for node in cluster.nodes:
        node.image.touch(mode=0o600)
        os.truncate(node.image, cluster.size_bytes)
    cluster.up()
    cluster.node1.write(2 * MIB, b"x" * 512)
    cluster.quiesce()
    with cluster.node2.image.open("rb+", buffering=0) as image:
        image.seek(2 * MIB + 511)
        image.write(b"y")
    assert verified(cluster.node2)["found_bytes"] == 512
    assert verified(cluster.node1, "--repair")["repaired_bytes"] == 512
    cluster.check_identical()


# ── while clients write ──────────────────────────────────────────────────────────────────────────────────────────


def test_no_write_is_taken_for_a_difference_nor_hides_one(pair: Cluster, rng: random.Random) -> None:
    """A client writes, trims and flushes all the while in the first half; what differs is in the other one."""
    half = pair.size_bytes // 2
    with pair.node1.nbd() as handle:
        for start in range(half, pair.size_bytes, MIB):
            handle.pwrite(rng.randbytes(MIB), start)
    model = Model(half)
    load = Load(model, lambda: open_nbd(pair.node1), rng)
    load.wait_done(50)
    for _ in range(3):
        for node in pair.nodes:
            assert verified(node)["found_bytes"] == 0
            load.wait_done(20)
    planted = tuple(half // BLOCK + block for block in (0, 9, 500))
    plant(pair.node2, planted)
    assert verified(pair.node1, "--repair")["repaired_bytes"] == len(planted) * BLOCK
    load.finish()
    assert not load.errors
    pair.quiesce().check_identical()
    with pair.node1.nbd() as handle:
        model.check(lambda offset, length: handle.pread(length, offset))


def test_a_takeover_meanwhile_changes_nothing(
    libnbd: Any, new_cluster: Callable[..., Cluster], rng: random.Random
) -> None:
    cluster = new_cluster(verify_rate='"8M"').up()
    cluster.node1.write(0, rng.randbytes(16 * MIB))
    cluster.quiesce()
    plant(cluster.node2, (4000,))
    cluster.node1.ctl("verify", repair=True)
    cluster.node2.ctl("takeover")
    assert cluster.node1.volume()["verify"] is not None
    bad = cluster.node2.image.read_bytes()
    cluster.node2.write(0, rng.randbytes(MIB))
    status = cluster.node1.wait_for(lambda status: status["volumes"][0]["last_verify"] is not None)
    last = status["volumes"][0]["last_verify"]
    assert (last["complete"], last["found_bytes"], last["repaired_bytes"]) == (True, BLOCK, BLOCK)
    # By now that node is the one that clients see.
    assert cluster.node1.image.read_bytes()[MIB:] == bad[MIB:]
    cluster.quiesce().check_identical()


def test_holes_are_not_read(libnbd: Any, new_cluster: Callable[..., Cluster], rng: random.Random) -> None:
    """Half a TiB; to read it would take longer than any test has patience for."""
    size_bytes = 512 << 30
    cluster = new_cluster(size_bytes=size_bytes).up()
    for at in (0, 100 << 30, size_bytes - MIB):
        cluster.node1.write(at, rng.randbytes(MIB))
    cluster.quiesce()
    plant(cluster.node2, (256, (200 << 30) // BLOCK))  # where both have a hole
    plant(cluster.node1, ((300 << 30) // BLOCK,))
    plant(cluster.node2, ((100 << 30) // BLOCK,))
    assert verified(cluster.node1)["found_bytes"] == 4 * BLOCK
    assert verified(cluster.node2, "--repair")["repaired_bytes"] == 4 * BLOCK
    assert verified(cluster.node1)["found_bytes"] == 0


# ── when it does not come to its end ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def slow_pair(libnbd: Any, new_cluster: Callable[..., Cluster], rng: random.Random) -> Cluster:
    """Whose verification takes as long as a test wants to look at it."""
    cluster = new_cluster(verify_rate='"1M"').up()
    cluster.node1.write(0, rng.randbytes(16 * MIB))
    return cluster.quiesce()


def under_way(node: Node) -> dict[str, Any]:
    """Its progress, once there is some."""
    status = node.wait_for(
        lambda status: status["volumes"][0]["verify"] is not None and status["volumes"][0]["verify"]["position_bytes"]
    )
    verify: dict[str, Any] = status["volumes"][0]["verify"]
    return verify


@pytest.mark.parametrize("victim", ["node1", "node2"])
def test_a_node_that_dies_ends_it(slow_pair: Cluster, victim: str) -> None:
    dead = slow_pair.node1 if victim == "node1" else slow_pair.node2
    survivor = dead.peer
    plant(dead, (3,))
    slow_pair.node1.ctl("verify")
    for node in slow_pair.nodes:
        verify = under_way(node)
        assert 0 < verify["done_percent"] < 100
        assert verify["rate_bytes_s"] > 0 and verify["eta_seconds"] > 0
    survivor.wait_for(lambda status: status["volumes"][0]["verify"]["found_bytes"] > 0)
    dead.kill9()
    status = survivor.wait_for(lambda status: status["volumes"][0]["last_verify"] is not None)
    last = status["volumes"][0]["last_verify"]
    assert not last["complete"] and "connection was lost" in last["reason"]
    assert 0 < last["position_bytes"] < slow_pair.size_bytes and not last["position_bytes"] % BLOCK
    assert f"go on with --from {last['position_bytes']}" in survivor.log()
    dead.start()
    survivor.wait_for(lambda status: status["volumes"][0]["out_of_sync_bytes"] == 0)
    slow_pair.wait_in_sync()
    # The restarted Primary's log covered its extents, the Secondary's mark its block: the Primary's data are on both.
    slow_pair.check_identical()


@pytest.mark.parametrize("name", ["node1", "node2"])
def test_it_can_be_stopped_on_either_node(slow_pair: Cluster, name: str) -> None:
    asked = slow_pair.node1 if name == "node1" else slow_pair.node2
    slow_pair.node1.ctl("verify")
    under_way(slow_pair.node2)
    assert "already" in refused(slow_pair.node1)
    assert "already" in refused(slow_pair.node2)
    assert asked.cli("verify", "--stop").returncode == 0
    for node in slow_pair.nodes:
        status = node.wait_for(lambda status: status["volumes"][0]["last_verify"] is not None)
        assert status["volumes"][0]["verify"] is None
        assert status["volumes"][0]["last_verify"]["reason"] == f"it was stopped on {name}"
    assert "not being verified" in refused(asked, "--stop")
    # Nothing is held any more.
    slow_pair.node1.write(0, b"x" * 16 * MIB)
    slow_pair.quiesce().check_identical()


def test_waiting_for_one_that_is_stopped(slow_pair: Cluster) -> None:
    slow_pair.node1.ctl("verify")
    under_way(slow_pair.node1)
    slow_pair.node1.ctl("detach")
    status = slow_pair.node1.wait_for(lambda status: status["volumes"][0]["last_verify"] is not None)
    assert "not in sync any more" in status["volumes"][0]["last_verify"]["reason"]
    slow_pair.node2.wait_for(lambda status: status["volumes"][0]["last_verify"] is not None)
    slow_pair.node1.write(0, b"y" * 16 * MIB)
    slow_pair.node1.ctl("attach")
    slow_pair.wait_in_sync()
    slow_pair.quiesce().check_identical()


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_refusals(pair: Cluster) -> None:
    node1, node2 = pair.nodes
    assert "no part of it" in refused(node1, "--from", "64M")
    assert "no part of it" in refused(node1, "--from", "8K", "--to", "8K")
    assert "not whole ones" in refused(node1, "--from", "512")
    assert "no other option" in refused(node1, "--stop", "--wait")
    assert node1.cli("verify", "--from", "much").returncode == 2
    with pytest.raises(ReplicaError, match="number of bytes"):
        node1.ctl("verify", from_bytes="0")
    node1.ctl("demote")
    assert "promote the node whose data are right" in refused(node2, "--repair")
    assert verified(node2)["found_bytes"] == 0  # without a Primary there is nothing against looking
    node1.ctl("disconnect")
    node2.wait_alone()
    assert "not connected" in refused(node1)
    assert "not connected" in refused(node2)


# ── peers that are older, or broken ──────────────────────────────────────────────────────────────────────────────


def test_an_older_peer_does_not_know_it(libnbd: Any, new_cluster: Callable[..., Cluster]) -> None:
    pair = new_cluster(timeout="30").up()  # the fake one does not say that it lives
    fake = with_fake_peer(pair)
    sentence = "node1 does not know the request 'verify': update the older node."

    def answer() -> None:
        assert wire.unpack_map(fake.receive(wire.REQUEST))["op"] == "verify"
        fake.send(wire.pack(wire.REPLY, wire.pack_map({"error": sentence}), sequence=1))

    with ThreadPoolExecutor(1) as other:
        answered = other.submit(answer)
        with pytest.raises(ReplicaError, match=sentence):
            pair.node2.ctl("verify")
        answered.result()
    assert pair.node2.volume()["verify"] is None
    # It is not told what it does not know, and would end the link for.
    fake.send(wire.pack(wire.PING))
    frames = iter(fake.receive_any, (wire.PONG, b""))
    assert all(not wire.kind_name(kind).startswith("VERIFY") for kind, _ in frames)
    fake.close()


def begun(fake: FakePeer, size_bytes: int) -> None:
    message = {"op": "verify", "from": 0, "to": size_bytes, "seed": 1, "repair": False}
    fake.send(wire.pack(wire.REQUEST, wire.pack_map(message), sequence=1))
    assert wire.unpack_map(fake.receive(wire.REPLY)) == {"ok": True}


def test_a_driver_that_vanishes_leaves_nothing_locked(pair: Cluster) -> None:
    fake = with_fake_peer(pair)
    begun(fake, pair.size_bytes)
    fake.send(wire.pack(wire.VERIFY_HASH, wire.pack_length(MIB), sequence=1, offset=0))
    assert len(fake.receive(wire.VERIFY_DIGEST)) == 16
    fake.send(wire.pack(wire.VERIFY_BLOCKS, sequence=1))
    assert len(fake.receive(wire.VERIFY_DIGEST)) == 16 * MIB // BLOCK
    fake.close()
    pair.node2.wait_alone()
    pair.node2.ctl("promote")
    pair.node2.write(0, b"x" * MIB)
    last = pair.node2.volume()["last_verify"]
    assert (last["complete"], last["position_bytes"], last["driver"]) == (False, 0, "node1")


def test_frames_that_are_out_of_bounds_end_the_link(pair: Cluster) -> None:
    size_bytes, length = pair.size_bytes, wire.pack_length(MIB)
    pair.node1.stop()
    for what, frames in {
        "beyond the end": [wire.pack(wire.VERIFY_HASH, length, sequence=1, offset=size_bytes - BLOCK)],
        "too long": [wire.pack(wire.VERIFY_HASH, wire.pack_length(2 * MIB), sequence=1)],
        "not a block": [wire.pack(wire.VERIFY_HOLE, length, sequence=1, offset=512)],
        "twice": [wire.pack(wire.VERIFY_HOLE, length, sequence=1)] * 2,
        "not held": [wire.pack(wire.VERIFY_DONE, sequence=7)],
        "blocks of nothing": [wire.pack(wire.VERIFY_BLOCKS, sequence=7)],
        "other blocks": [
            wire.pack(wire.VERIFY_HASH, length, sequence=1),
            wire.pack(wire.VERIFY_DONE, pack_runs([(255, 2)]), sequence=1),
        ],
        "too many": [wire.pack(wire.VERIFY_HOLE, wire.pack_length(BLOCK), sequence=at) for at in range(1000)],
        "complete": [wire.pack(wire.VERIFY_END, wire.pack_map({"reason": 7, "repaired": 0}))],
    }.items():
        pair.node2.wait_alone()
        fake = FakePeer(pair)
        fake.be_in_step()
        pair.node2.wait_replication("Established")
        begun(fake, size_bytes)
        for frame in frames:
            fake.send(frame)
        with pytest.raises((AssertionError, ConnectionError)):
            fake.receive(wire.VERIFY_END)
        fake.close()
        assert pair.node2.wait_alone()["volumes"][0]["out_of_sync_bytes"] == 0, what
    assert "Traceback" not in pair.node2.log()


# ── what is told ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_hook_is_told_on_both_nodes(
    libnbd: Any,
    new_cluster: Callable[..., Cluster],
    recorder: Recorder,  # noqa: F811 - a fixture
    rng: random.Random,
) -> None:
    cluster = new_cluster(hooks=recorder.hooks).up()
    fill(cluster, rng)
    verified(cluster.node1)
    plant(cluster.node2, (1,))
    verified(cluster.node1)
    told = recorder.wait_all(*((node, Event.OUT_OF_SYNC) for node in cluster.nodes))
    for facts in told.values():
        if facts["REPLICA_EVENT"] == Event.OUT_OF_SYNC:
            assert "4096 bytes differ" in facts["REPLICA_REASON"]
    for node in cluster.nodes:
        assert recorder.events(node).count(Event.OUT_OF_SYNC) == 1
        assert "4096 bytes differ" in node.log()
    text = cluster.node1.cli("status").stdout
    assert "last verify: " in text and "4.0 KiB found to differ" in text and "4.0 KiB out of sync" in text
