"""Both nodes promoted while they were apart: nothing is overwritten until an operator says which changes to lose."""

import hashlib
from typing import Any

import pytest

from tests.cluster.cluster import MIB, Cluster, Node


def promoted_apart(pair: Cluster, *, writes_on_node2: bool = True) -> None:
    """Both were Primary without the other and have data of their own; both are Secondary and StandAlone now."""
    node1, node2 = pair.nodes
    for node in pair.nodes:
        node.ctl("disconnect")
    for node in pair.nodes:
        node.wait_connection("StandAlone")
    node1.write(0, b"1" * 8192)
    node2.ctl("promote")
    if writes_on_node2:
        node2.write(4096, b"2" * 8192)
        node2.write(8 * MIB, b"2" * MIB)


def demote(node: Node) -> None:
    node.ctl("demote")
    assert node.status()["role"] == "Secondary"


def digests(cluster: Cluster) -> list[str]:
    return [hashlib.sha256(node.image.read_bytes()).hexdigest() for node in cluster.nodes]


def connect_both(pair: Cluster) -> None:
    for node in pair.nodes:
        node.ctl("connect")


def both_stand_alone(pair: Cluster) -> None:
    """Both nodes see the split brain by themselves and wait for an operator."""
    for node in pair.nodes:
        status = node.wait_for(lambda status: status["connection"] == "StandAlone" and status["last_error"] != "")
        assert "discard-my-data" in status["last_error"], status
        assert "goes StandAlone" in node.log()


def nothing_is_overwritten(pair: Cluster) -> list[str]:
    """They connect, and part again with both copies as they were: these digests."""
    before = digests(pair)
    assert before[0] != before[1]
    connect_both(pair)
    both_stand_alone(pair)
    assert digests(pair) == before
    return before


@pytest.mark.parametrize("primaries", [(), ("node1",), ("node1", "node2")])
def test_a_split_brain_overwrites_nothing(pair: Cluster, primaries: tuple[str, ...]) -> None:
    promoted_apart(pair)
    for node in pair.nodes:
        if node.name not in primaries:
            demote(node)
    before = nothing_is_overwritten(pair)
    # The same once more, and after a restart of both.
    for node in pair.nodes:
        node.stop().start()
    both_stand_alone(pair)
    assert digests(pair) == before


@pytest.mark.parametrize("loser", ["node1", "node2"])
def test_discard_my_data_heals_it(pair: Cluster, loser: str) -> None:
    promoted_apart(pair)
    for node in pair.nodes:
        demote(node)
    connect_both(pair)
    both_stand_alone(pair)
    losing, winning = (pair.node1, pair.node2) if loser == "node1" else (pair.node2, pair.node1)
    kept = hashlib.sha256(winning.image.read_bytes()).hexdigest()
    losing.ctl("connect", discard_my_data=True)
    winning.ctl("connect")
    pair.wait_in_sync()
    assert digests(pair) == [kept, kept]
    # Only what either side had changed was copied: one whole extent at most where a block was, not the volume.
    for node in pair.nodes:
        assert f"{loser} discards its own" in node.log()
        assert [line for line in node.log().splitlines() if "is synced from" in line][-1].endswith("by bitmap.")
    winning.ctl("promote")
    winning.write(0, b"w" * 4096)
    pair.quiesce().check_identical()


def test_both_discarding_heals_nothing(pair: Cluster) -> None:
    promoted_apart(pair)
    for node in pair.nodes:
        demote(node)
    before = digests(pair)
    for node in pair.nodes:
        node.ctl("connect", discard_my_data=True)
    for node in pair.nodes:
        node.wait_for(lambda status: status["connection"] == "StandAlone" and "only one" in status["last_error"])
    assert digests(pair) == before


def test_the_primary_does_not_discard_its_data(pair: Cluster) -> None:
    promoted_apart(pair)
    done = pair.node1.cli("connect", "--discard-my-data")
    assert done.returncode == 1
    assert "demote it" in done.stderr


def test_no_split_brain_when_only_one_wrote(pair: Cluster) -> None:
    """node2 was promoted but changed nothing: its copy is simply older."""
    promoted_apart(pair, writes_on_node2=False)
    demote(pair.node2)
    connect_both(pair)
    pair.wait_in_sync()
    assert pair.node1.read(0, 8192) == b"1" * 8192
    pair.quiesce().check_identical()


def test_unrelated_data_are_not_mixed(libnbd: Any, cluster: Cluster) -> None:
    """Two copies that never belonged together: both were made Primary by force before they met."""
    cluster.create()
    for node in cluster.nodes:
        node.start()
        node.ctl("promote", force=True)
        node.write(0, node.name.encode() * 1024)
        node.ctl("disconnect")
        node.stop()
    before = digests(cluster)
    cluster.start()
    for node in cluster.nodes:
        status = node.wait_connection("StandAlone")
        assert "nothing in common" in status["last_error"]
    assert digests(cluster) == before
