"""Who may become Primary, who may not, and what the operator is told."""

from collections.abc import Callable
from typing import Any

import pytest

from replica.errors import ReplicaError
from tests.cluster.cluster import MIB, Cluster, Node, open_nbd


def refused(node: Node, verb: str, **args: Any) -> str:
    """The one sentence with which the verb is refused."""
    with pytest.raises(ReplicaError) as caught:
        node.ctl(verb, **args)
    said = str(caught.value)
    assert said
    assert "\n" not in said
    return said


# ── promote ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_pair_needs_force_once(libnbd: Any, cluster: Cluster) -> None:
    cluster.create().start()
    for node in cluster.nodes:
        node.wait_connection("Connected")
    for node in cluster.nodes:
        assert "--force" in refused(node, "promote")
        assert node.status()["volumes"][0]["disk"] == "Inconsistent"
    cluster.node2.ctl("promote", force=True)
    cluster.wait_in_sync()
    assert cluster.node2.status()["role"] == "Primary"
    cluster.node2.ctl("demote")
    cluster.node1.ctl("promote")


def test_a_new_pair_needs_force_also_from_the_command_line(cluster: Cluster) -> None:
    cluster.create().start()
    done = cluster.node1.cli("promote")
    assert (done.returncode, done.stdout) == (1, "")
    assert "promote --force" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert cluster.node1.cli("promote", "--force").returncode == 0
    assert cluster.node1.cli("role").stdout.startswith("Primary/")


def test_only_one_is_primary(pair: Cluster) -> None:
    assert "Primary on node1" in refused(pair.node2, "promote")
    assert "Primary on node1" in refused(pair.node2, "promote", force=True)
    assert pair.node2.status()["role"] == "Secondary"
    assert pair.node1.status()["role"] == "Primary"
    pair.node1.ctl("demote")
    pair.node2.ctl("promote")


def test_promoting_twice_changes_nothing(pair: Cluster) -> None:
    before = pair.node1.generations()
    pair.node1.ctl("promote")
    assert pair.node1.generations() == before


def half_copied(cluster: Cluster) -> None:
    """node2 dead-ended in the middle of a full resync: node1 is gone."""
    cluster.create()
    cluster.node1.image.write_bytes(b"d" * cluster.size_bytes)
    done = cluster.node1.cli("create-md", "--force")
    assert done.returncode == 0, done.stderr
    cluster.start()
    cluster.node1.ctl("promote", force=True)
    cluster.node2.wait_replication("SyncTarget")
    cluster.node1.kill9()
    cluster.node2.wait_alone()


def test_a_half_copied_disk_is_not_promoted(libnbd: Any, new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(resync_rate='"1M"')
    half_copied(cluster)
    node2 = cluster.node2
    assert node2.status()["volumes"][0]["disk"] == "Inconsistent"
    assert "Inconsistent" in refused(node2, "promote")
    # It stays so when the daemon starts anew, and an operator can accept the damage.
    node2.stop().start()
    assert "Inconsistent" in refused(node2, "promote")
    node2.ctl("promote", force=True)
    node2.write(0, b"x" * 4096)
    assert node2.status()["volumes"][0]["disk"] == "UpToDate"


def test_an_outdated_disk_is_not_promoted(pair: Cluster) -> None:
    node1, node2 = pair.nodes
    assert "in sync" in refused(node2, "outdate")
    node2.ctl("disconnect")
    node2.ctl("outdate")
    assert node2.status()["volumes"][0]["disk"] == "Outdated"
    assert "Outdated" in refused(node2, "promote")
    node2.stop().start()
    node1.wait_in_sync()
    assert node2.wait_in_sync()["volumes"][0]["disk"] == "UpToDate"
    assert "newest" in refused(node1, "outdate")
    node2.ctl("disconnect")
    node2.ctl("outdate")
    node2.ctl("promote", force=True)
    assert node2.status()["volumes"][0]["disk"] == "UpToDate"


# ── demote ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_demote_spares_clients_unless_forced(libnbd: Any, pair: Cluster) -> None:
    node1 = pair.node1
    client = open_nbd(node1)
    client.pwrite(b"a" * 4096, 0)
    said = refused(node1, "demote")
    assert "1 NBD client" in said
    assert "--force" in said
    client.pwrite(b"b" * 4096, 4096)
    assert node1.cli("demote").returncode == 1
    assert node1.cli("demote", "--force").returncode == 0
    assert node1.status()["role"] == "Secondary"
    with pytest.raises(libnbd.Error):
        client.pwrite(b"c" * 4096, 8192)
    pair.check_identical()
    assert pair.node2.image.read_bytes()[:8193] == b"a" * 4096 + b"b" * 4096 + b"\0"


# ── clients ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_client_of_the_secondary_is_told_where_the_primary_is(libnbd: Any, pair: Cluster) -> None:
    pair.node2.wait_for(lambda status: status["peer"]["role"] == "Primary")
    said = server_message(libnbd, pair.node2)
    assert "node1 (127.0.0.1" in said
    assert "is Primary" in said
    pair.node1.ctl("demote")
    pair.node2.wait_for(lambda status: status["peer"]["role"] == "Secondary")
    assert "replicactl promote" in server_message(libnbd, pair.node2)


def server_message(libnbd: Any, node: Node) -> str:
    """What the server says when it refuses to open its export (libnbd shows that in its debug output only)."""
    lines: list[str] = []
    handle = libnbd.NBD()
    handle.set_debug(True)
    handle.set_debug_callback(lambda context, message: lines.append(message) or 0)
    handle.set_export_name(node.cluster.resource)
    with pytest.raises(libnbd.Error):
        handle.connect_unix(str(node.nbd_path))
    return [line for line in lines if "server error message" in line][-1]


def test_clients_of_both_names_get_the_volume(libnbd: Any, pair: Cluster) -> None:
    handle = libnbd.NBD()
    handle.connect_unix(str(pair.node1.nbd_path))
    assert handle.get_size() == pair.size_bytes
    with pair.node1.nbd() as named:
        assert named.get_size() == pair.size_bytes
        assert named.can_flush()
        assert named.can_fua()
        assert named.can_trim()
        assert named.can_zero()
        assert not named.is_read_only()
        assert pair.node1.status()["nbd"]["clients"] == 2


# ── takeover ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_takeover_moves_the_role_there_and_back(pair: Cluster) -> None:
    node1, node2 = pair.nodes
    for number, (new, old) in enumerate(((node2, node1), (node1, node2), (node2, node1))):
        old.write(number * 4096, bytes([65 + number]) * 4096)
        assert new.cli("takeover").returncode == 0
        assert new.status()["role"] == "Primary"
        old.wait_for(lambda status: status["role"] == "Secondary" and status["peer"]["role"] == "Primary")
        assert new.read(number * 4096, 4096) == bytes([65 + number]) * 4096
        new.write(MIB + number * 4096, b"n" * 4096)
    pair.quiesce().check_identical()
    for node in pair.nodes:
        # A switchover is no reason for a resync: the one link has lasted all the time.
        assert node.log().count("connected to") == 2


def test_takeover_is_refused_while_not_in_sync(pair: Cluster) -> None:
    node1, node2 = pair.nodes
    node2.ctl("disconnect")
    node1.write(0, b"x" * 4096)
    assert "in sync" in refused(node2, "takeover")
    assert node1.status()["role"] == "Primary"
    assert node2.status()["role"] == "Secondary"


def test_takeover_by_the_primary_itself_changes_nothing(pair: Cluster) -> None:
    pair.node1.ctl("takeover")
    assert pair.node1.status()["role"] == "Primary"


# ── a peer that is known to be dead ──────────────────────────────────────────────────────────────────────────────────


def test_a_dead_peer_is_not_waited_for(libnbd: Any, new_cluster: Callable[..., Cluster]) -> None:
    """Frozen, as one that lost power: its kernel says nothing, and the link looks well for `timeout` seconds."""
    cluster = new_cluster(timeout="300").up()
    cluster.node1.freeze()
    cluster.node2.ctl("promote", peer_is_dead=True)
    status = cluster.node2.status()
    assert (status["role"], status["volumes"][0]["peer_outdated"]) == ("Primary", False)
    cluster.node2.write(0, b"2" * MIB)
    assert cluster.node2.volume()["peer_outdated"] is True  # before the first answer that it lacks
    # Whoever said so was wrong, and nothing is lost by it.
    cluster.node1.thaw()
    assert "both Primary" in cluster.node2.wait_connection("StandAlone")["last_error"]
    assert cluster.node2.read(0, MIB) == b"2" * MIB


def test_a_primary_goes_on_without_a_dead_peer(libnbd: Any, new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(timeout="300").up()
    cluster.node2.freeze()
    assert cluster.node1.cli("promote", "--peer-is-dead").returncode == 0
    cluster.node1.write(0, b"1" * MIB)
    cluster.node2.thaw()
    cluster.wait_in_sync()


def test_a_peer_that_lives_is_asked_all_the_same(libnbd: Any, pair: Cluster) -> None:
    pair.node1.ctl("demote")
    for node in pair.nodes:  # each of them is told that the other one is dead
        node.ctl("promote", peer_is_dead=True)
        node.ctl("demote")
        pair.wait_in_sync()
