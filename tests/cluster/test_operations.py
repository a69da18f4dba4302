"""What an operator does day by day: each verb through the real `replicactl`, and what it leaves behind."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from replica.errors import ReplicaError
from tests.cluster.cluster import MIB, PATIENCE_S, Cluster, Node, open_nbd
from tests.cluster.load import Load, Model


def done(node: Node, verb: str, *arguments: str) -> str:
    """Run the verb; its output."""
    result = node.cli(verb, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def refused(node: Node, verb: str, *arguments: str) -> str:
    """Run the verb, which is refused; its one sentence."""
    result = node.cli(verb, *arguments)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


@pytest.fixture
def slow_pair(libnbd: Any, new_cluster: Callable[..., Cluster]) -> Cluster:
    """A pair whose resync takes as long as a test wants to look at it."""
    return new_cluster(resync_rate='"2M"', size_bytes=8 * MIB).up()


# ── the disk ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_detach_and_attach(pair: Cluster) -> None:
    node1, node2 = pair.nodes
    node1.write(0, b"1" * MIB)
    pair.quiesce()
    done(node2, "detach")
    assert node2.status()["volumes"][0]["disk"] == "Diskless"
    node1.wait_for(lambda status: status["peer"]["disk"] == "Diskless")
    node1.write(MIB, b"2" * MIB)
    assert "no disk" in refused(node2, "outdate")
    # The files are free for other programs now.
    with node2.image.open("rb+") as image:
        image.seek(8 * MIB)
        assert image.read(16) == bytes(16)
    done(node2, "attach")
    pair.wait_in_sync()
    assert "already has its disk" in refused(node2, "attach")
    pair.quiesce().check_identical()


def test_a_detached_disk_that_was_not_written_to_needs_no_resync(pair: Cluster) -> None:
    pair.node1.write(0, b"1" * MIB)
    pair.quiesce()
    before = pair.node1.generations()["current"]
    done(pair.node2, "detach")
    done(pair.node2, "attach")
    pair.wait_in_sync()
    assert pair.node1.generations()["current"] == before


def test_invalidate_fetches_the_whole_copy(slow_pair: Cluster) -> None:
    node1, node2 = slow_pair.nodes
    node1.write(0, b"1" * 8 * MIB)
    slow_pair.quiesce()
    assert "demote" in refused(node1, "invalidate")
    with node2.image.open("rb+") as image:
        image.write(b"rot" * 1000)
    done(node2, "invalidate")
    status = node2.wait_replication("SyncTarget")
    assert status["volumes"][0]["disk"] == "Inconsistent"
    assert status["volumes"][0]["resync_total_bytes"] == slow_pair.size_bytes
    slow_pair.wait_in_sync()
    slow_pair.check_identical()
    assert f"complete: {slow_pair.size_bytes} bytes of data were sent, 0 were equal" in node1.log()


def test_invalidate_remote_sends_the_whole_copy(pair: Cluster) -> None:
    node1, node2 = pair.nodes
    node1.write(0, b"1" * MIB)
    pair.quiesce()
    with node2.image.open("rb+") as image:
        image.write(b"rot" * 1000)
    assert "demote" in refused(node2, "invalidate-remote")
    assert node1.read(0, 3) == b"111"
    done(node1, "invalidate-remote")
    node2.wait_for(lambda status: status["volumes"][0]["out_of_sync_bytes"] == 0)
    pair.wait_in_sync()
    pair.check_identical()
    assert node2.image.read_bytes()[:3] == b"111"


def test_the_only_good_copy_is_not_thrown_away(pair: Cluster) -> None:
    done(pair.node1, "demote")
    done(pair.node1, "disconnect")
    pair.node2.wait_alone()
    for node in pair.nodes:
        assert "UpToDate" in refused(node, "invalidate")
    assert "not connected" in refused(pair.node2, "invalidate-remote")


# ── the link ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["node1", "node2"])
def test_disconnect_lasts_until_connect(pair: Cluster, name: str) -> None:
    node1, node2 = pair.nodes
    node = node1 if name == "node1" else node2
    done(node, "disconnect")
    assert done(node, "cstate").strip() == "StandAlone"
    assert "StandAlone" in refused(node, "wait-connect", "--timeout", "30")
    node.peer.wait_alone()
    node1.write(0, b"x" * 4096)
    # Whoever of the two dials: the other end has nothing to connect to, and says so in vain.
    for _ in range(3):
        assert node.peer.status()["connection"] == "Connecting"
    assert "not connected after" in refused(node.peer, "wait-connect", "--timeout", "0.5")
    done(node, "connect")
    for either in pair.nodes:
        done(either, "wait-connect", "--timeout", str(PATIENCE_S))
        done(either, "wait-sync", "--timeout", str(PATIENCE_S))
    pair.check_identical()


def test_waiting_has_an_end(cluster: Cluster) -> None:
    cluster.create()
    cluster.node1.start()
    assert "not connected after" in refused(cluster.node1, "wait-connect", "--timeout", "0.2")
    assert "not in sync after" in refused(cluster.node1, "wait-sync", "--timeout", "0.2")


def test_waiting_ends_when_the_peer_comes(pair: Cluster) -> None:
    pair.node2.kill9()
    pair.node1.wait_alone()
    command = [sys.executable, "-m", "replica.cli", *pair.node1.options(), "wait-sync", "--timeout", str(PATIENCE_S)]
    with subprocess.Popen(command, env=pair.node1.environment()) as waiting:
        pair.node2.start()
        assert waiting.wait(PATIENCE_S) == 0
    assert pair.node1.wait_in_sync()


def test_a_resync_can_be_paused_from_either_side(slow_pair: Cluster) -> None:
    node1, node2 = slow_pair.nodes
    done(node2, "disconnect")
    node1.write(0, b"1" * 4 * MIB)
    done(node1, "pause-sync")
    done(node2, "connect")
    assert node1.wait_replication("PausedSyncS")["volumes"][0]["out_of_sync_bytes"] == 4 * MIB
    node2.wait_replication("PausedSyncT")
    done(node2, "pause-sync")
    # Both hold it: it goes on only when both have let go. Application writes are mirrored all the while.
    done(node1, "resume-sync")
    node1.write(4 * MIB, b"2" * MIB)
    node1.wait_replication("PausedSyncS")
    assert node2.image.read_bytes()[4 * MIB : 5 * MIB] == b"2" * MIB
    done(node2, "resume-sync")
    slow_pair.wait_in_sync()
    slow_pair.quiesce().check_identical()


def test_a_resync_that_gives_way_to_clients_can_be_paused(libnbd: Any, pair: Cluster, rng: random.Random) -> None:
    node1, node2 = pair.nodes
    old = rng.randbytes(8 * MIB)
    node1.write(0, old)
    done(node2, "disconnect")
    node1.write(0, old[:MIB] + rng.randbytes(MIB))  # the log of a crash would say no more than that all of it is dirty
    node1.write(2 * MIB, old[2 * MIB :])
    done(node2, "pause-sync")
    done(node2, "connect")
    volume = node1.wait_replication("PausedSyncS")["volumes"][0]
    assert (volume["done_percent"], volume["resync_rate_bytes_s"], volume["eta_seconds"]) == (0.0, 0, None)
    node1.write(12 * MIB, b"3" * MIB)
    assert node1.volume()["out_of_sync_bytes"] == 8 * MIB
    load = Load(Model(pair.size_bytes), lambda: open_nbd(node1), rng)
    load.wait_done(50)
    done(node2, "resume-sync")
    pair.wait_in_sync()
    load.finish()
    assert not load.errors
    pair.quiesce().check_identical()


# ── takeover ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_takeover_loses_nothing_of_a_client_that_reconnects(pair: Cluster, rng: random.Random) -> None:
    """As an administrator moves the service for maintenance, while the clients go on."""
    model = Model(pair.size_bytes)
    primaries = list(pair.nodes)

    def reconnect() -> Any:
        """What a client behind the cluster's address does: the node that is Primary now."""
        for _ in range(1000):
            try:
                return open_nbd(primaries[0])
            except Exception as error:
                if "Error" not in type(error).__name__:
                    raise
                primaries[0].wait_for(lambda status: status["role"] == "Primary" or status["peer"]["role"] == "Primary")
                primaries.reverse()
        raise AssertionError("no Primary")

    load = Load(model, reconnect, rng, reconnect=True)
    for new in (pair.node2, pair.node1, pair.node2):
        load.wait_done(200)
        done(new, "takeover")
        load.wait_done(200)
    load.finish()
    assert not load.errors
    with pair.node2.nbd() as handle:
        model.check(lambda offset, length: handle.pread(length, offset))
    pair.wait_in_sync()
    pair.quiesce().check_identical()


# ── what there is to see ─────────────────────────────────────────────────────────────────────────────────────────


def test_status_as_json(slow_pair: Cluster) -> None:
    node1, node2 = slow_pair.nodes
    (status,) = json.loads(done(node1, "status", "--json"))
    assert (status["name"], status["node"], status["role"]) == ("r0", "node1", "Primary")
    assert (status["connection"], status["replication"], status["protocol"]) == ("Connected", "Established", "C")
    assert status["peer"] == {"name": "node2", "role": "Secondary", "disk": "UpToDate", "address": "127.0.0.2"}
    (volume,) = status["volumes"]
    assert (volume["disk"], volume["peer_disk"]) == ("UpToDate", "UpToDate")
    assert (volume["size_bytes"], volume["out_of_sync_bytes"]) == (slow_pair.size_bytes, 0)
    assert volume["generations"] == node2.volume()["generations"]
    assert volume["generations"]["base"] == "0" * 16
    assert volume["done_percent"] is None
    done(node2, "disconnect")
    node1.write(0, b"1" * 4 * MIB)
    done(node1, "pause-sync")
    done(node2, "connect")
    node1.wait_replication("PausedSyncS")
    ((volume,),) = [one["volumes"] for one in json.loads(done(node1, "status", "--json", "r0"))]
    assert volume["done_percent"] == 0.0
    assert volume["eta_seconds"] is None
    assert volume["out_of_sync_bytes"] == volume["resync_total_bytes"] == 4 * MIB
    done(node1, "resume-sync")
    node1.wait_for(lambda status: status["volumes"][0]["done_percent"] is None)
    slow_pair.wait_in_sync()


def test_status_of_a_node_that_is_down(pair: Cluster) -> None:
    pair.node2.stop()
    result = pair.node2.cli("status", "--json")
    assert result.returncode == 1
    assert "not running" in result.stderr
    assert json.loads(result.stdout)[0]["error"]


def test_one_word_answers(pair: Cluster) -> None:
    assert done(pair.node1, "role").strip() == "Primary/Secondary"
    assert done(pair.node2, "role").strip() == "Secondary/Primary"
    assert done(pair.node1, "cstate").strip() == "Connected"
    assert done(pair.node1, "dstate").strip() == "UpToDate/UpToDate"


def test_dump_md(pair: Cluster) -> None:
    pair.node1.write(5 * MIB, b"x" * 4096)
    running = pair.node1.dump_md()
    assert running["primary"] is True
    assert running["activity_log"]["extents"] == [1]
    assert (running["node"], running["peers"][0]["name"]) == ("node1", "node2")
    assert running["size_bytes"] == pair.size_bytes
    assert running["generations"] == pair.node1.generations()
    pair.node1.stop()
    stopped = pair.node1.dump_md()
    assert stopped["primary"] is False
    assert stopped["activity_log"]["extents"] == []
    assert stopped["out_of_sync_bytes"] == 0


def test_create_md_keeps_what_is_there(pair: Cluster) -> None:
    pair.node2.stop()
    before = pair.node2.metadata.read_bytes()[:8192]
    assert "--force" in refused(pair.node2, "create-md")
    assert pair.node2.metadata.read_bytes()[:8192] == before
    pair.node1.write(0, b"x" * 4096)
    done(pair.node2, "create-md", "--force")
    pair.node2.start()
    pair.wait_in_sync()
    assert "node2 is new: node2 is synced from node1, in full" in pair.node1.log()
    pair.quiesce().check_identical()


def test_create_md_leaves_a_running_daemon_alone(pair: Cluster) -> None:
    assert "in use" in refused(pair.node1, "create-md", "--force")
    pair.node1.write(0, b"x" * 4096)
    assert pair.node1.wait_in_sync()


def test_a_verb_that_nobody_knows(pair: Cluster) -> None:
    with pytest.raises(ReplicaError, match="does not know the verb"):
        pair.node1.ctl("levitate")
    assert pair.node1.cli("levitate").returncode == 2
