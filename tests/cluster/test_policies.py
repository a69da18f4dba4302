"""Policies after a split brain on real nodes: who loses, who does not, and that nothing is overwritten otherwise."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from replica import wire
from tests.cluster.cluster import MIB, Cluster, Node
from tests.cluster.peers import Proxy
from tests.cluster.test_split_brain import (
    connect_both,
    demote,
    digests,
    nothing_is_overwritten,
    promoted_apart,
)

NewCluster = Callable[..., Cluster]


def policies(**cases: str) -> str:
    """The setting's value in TOML."""
    return "{ " + ", ".join(f'{case.replace("_", "-")} = "{policy}"' for case, policy in cases.items()) + " }"


def digest(node: Node) -> str:
    return hashlib.sha256(node.image.read_bytes()).hexdigest()


def split(new_cluster: NewCluster, *primaries: str, **cases: str) -> Cluster:
    """Both nodes have changes of their own; node1 was Primary when they parted, and has changed less. They are
    StandAlone, and only `primaries` are Primary.
    """
    pair = new_cluster(after_split_brain=policies(**cases)).up()
    promoted_apart(pair)
    for node in pair.nodes:
        if node.name not in primaries:
            demote(node)
    return pair


def discards(pair: Cluster, policy: str, *, loser: str = "node1") -> None:
    """They connect, and this policy discards the loser's changes and nothing else."""
    winner = pair.node2 if loser == "node1" else pair.node1
    kept = digest(winner)
    assert kept != digest(winner.peer)
    connect_both(pair)
    pair.wait_in_sync()
    assert digests(pair) == [kept, kept]
    for node in pair.nodes:
        sentence = node.status()["last_error"]
        assert f"{policy} discards those of {loser} (" in sentence
        assert f"{loser} is synced from {winner.name}, by bitmap" in sentence
        assert sentence in node.log()


def nothing_happens(pair: Cluster, reason: str) -> None:
    """They connect, nothing is overwritten, and both nodes say why."""
    nothing_is_overwritten(pair)
    for node in pair.nodes:
        assert reason in node.status()["last_error"], node.status()


@pytest.mark.parametrize("crashed", [False, True], ids=["demoted", "crashed"])
@pytest.mark.parametrize(
    ("policy", "loser"), [("discard-younger-primary", "node2"), ("discard-older-primary", "node1")]
)
def test_by_age(libnbd: Any, new_cluster: NewCluster, policy: str, loser: str, crashed: bool) -> None:
    """Who was Primary when they parted is still known after a crash."""
    pair = split(new_cluster, *(("node1", "node2") if crashed else ()), no_primary=policy)
    if crashed:
        for node in pair.nodes:
            node.kill9()
        for node in pair.nodes:
            assert node.dump_md()["parted_as_primary"] is (node.name == "node1")
        kept = digest(pair.node1 if loser == "node2" else pair.node2)
        pair.start().wait_in_sync()
        assert digests(pair) == [kept, kept]
        assert f"{policy} discards those of {loser} (" in pair.node1.status()["last_error"]
    else:
        discards(pair, policy, loser=loser)


def test_who_was_primary_follows_the_roles_while_in_touch(libnbd: Any, new_cluster: NewCluster) -> None:
    """After a switchover the other one is the older Primary; when both were promoted later, nobody is."""
    pair = new_cluster(after_split_brain=policies(no_primary="discard-younger-primary")).up()
    pair.node2.ctl("takeover")
    assert [node.dump_md()["parted_as_primary"] for node in pair.nodes] == [False, True]
    pair.node2.ctl("demote")
    assert [node.dump_md()["parted_as_primary"] for node in pair.nodes] == [False, False]
    for node in pair.nodes:
        node.ctl("disconnect")
    for node in pair.nodes:
        node.wait_connection("StandAlone")
        node.ctl("promote")
        node.write(0, node.name.encode() * 1024)
        demote(node)
    nothing_happens(pair, "does not decide (neither node was Primary when they parted)")


def test_least_changes(libnbd: Any, new_cluster: NewCluster) -> None:
    pair = split(new_cluster, no_primary="discard-least-changes")
    discards(pair, "no-primary = discard-least-changes")
    assert "(dirty blocks: 2 on node1, 258 on node2)" in pair.node1.status()["last_error"]
    # The sentence is about this connection. A resync as any other: the pair works, and the next link is plain.
    pair.node1.ctl("promote")
    pair.node1.write(0, b"w" * 4096)
    pair.quiesce().check_identical()
    pair.node2.stop().start()
    pair.wait_in_sync()
    assert pair.node1.status()["last_error"] == ""


def test_as_many_changes_are_no_reason(libnbd: Any, new_cluster: NewCluster) -> None:
    pair = new_cluster(after_split_brain=policies(no_primary="discard-least-changes")).up()
    promoted_apart(pair, writes_on_node2=False)
    pair.node2.write(MIB, b"2" * 8192)
    for node in pair.nodes:
        demote(node)
    nothing_happens(pair, "discard-least-changes does not decide (dirty blocks: 2 on node1, 2 on node2)")


@pytest.mark.parametrize("primary", ["node1", "node2"])
def test_the_secondary_loses(libnbd: Any, new_cluster: NewCluster, primary: str) -> None:
    pair = split(new_cluster, primary, one_primary="discard-secondary")
    winner = pair.node1 if primary == "node1" else pair.node2
    with winner.nbd() as handle:
        first = bytes(handle.pread(MIB, 0))
        discards(pair, "one-primary = discard-secondary", loser=winner.peer.name)
        # Its client has seen nothing of it.
        assert bytes(handle.pread(MIB, 0)) == first
        handle.pwrite(b"w" * 4096, 0)
    pair.quiesce().check_identical()


def test_consensus(libnbd: Any, new_cluster: NewCluster) -> None:
    """The Secondary, node1, has changed less: both policies agree."""
    pair = split(new_cluster, "node2", no_primary="discard-least-changes", one_primary="consensus")
    discards(pair, "one-primary = consensus (no-primary = discard-least-changes)")
    assert pair.node2.status()["role"] == "Primary"


def test_no_consensus(libnbd: Any, new_cluster: NewCluster) -> None:
    """The Primary has changed less, and a Primary never loses its data."""
    pair = split(new_cluster, "node1", no_primary="discard-least-changes", one_primary="consensus")
    nothing_happens(pair, "consensus (no-primary = discard-least-changes) does not decide (it would discard those of")
    assert "but node1 is Primary" in pair.node2.status()["last_error"]
    assert pair.node1.status()["role"] == "Primary"


def test_two_primaries_keep_what_they_have(libnbd: Any, new_cluster: NewCluster) -> None:
    cases = {"no_primary": "discard-least-changes", "one_primary": "discard-secondary", "two_primaries": "disconnect"}
    pair = split(new_cluster, "node1", "node2", **cases)
    nothing_happens(pair, "since they were last in sync: run 'replicactl connect --discard-my-data'")


def test_a_policy_for_another_case_does_nothing(libnbd: Any, new_cluster: NewCluster) -> None:
    nothing_happens(split(new_cluster, "node1", no_primary="discard-least-changes"), "last in sync: run 'replicactl")


def test_policies_that_differ_do_nothing(libnbd: Any, new_cluster: NewCluster) -> None:
    pair = new_cluster(after_split_brain=policies(no_primary="discard-least-changes"))
    pair.write_config(pair.node2, after_split_brain=policies(no_primary="discard-younger-primary"))
    pair.up()
    for node in pair.nodes:  # it is said before it matters
        assert "after-split-brain differs (node1: no-primary = discard-least-changes," in node.log()
    promoted_apart(pair)
    for node in pair.nodes:
        demote(node)
    nothing_happens(pair, "nothing is discarded because after-split-brain differs")


def test_the_operator_comes_first(libnbd: Any, new_cluster: NewCluster) -> None:
    """The policy would discard node1's changes, the operator says node2's."""
    pair = split(new_cluster, no_primary="discard-least-changes")
    kept = digest(pair.node1)
    pair.node2.ctl("connect", discard_my_data=True)
    pair.node1.ctl("connect")
    pair.wait_in_sync()
    assert digests(pair) == [kept, kept]
    assert pair.node1.status()["last_error"] == ""


def test_zero_changes_do_not_decide_when_both_have_some(libnbd: Any, new_cluster: NewCluster) -> None:
    pair = split(new_cluster, no_primary="discard-zero-changes")
    nothing_happens(pair, "discard-zero-changes does not decide (dirty blocks: 2 on node1, 258 on node2)")


def test_zero_changes(libnbd: Any, new_cluster: NewCluster) -> None:
    """A generation of its own and no changes: node1's were all resynced to node2, but the link was lost before that was
    on record, and the operator took node2 all the same.
    """
    pair = new_cluster(after_split_brain=policies(no_primary="discard-zero-changes"))
    finish = wire.pack(wire.SYNC_FINISH, wire.pack_map({}))

    def cut(data: bytes) -> bytes:
        if finish in data or cutting:
            cutting.append(True)
            raise ConnectionAbortedError
        return data

    cutting: list[bool] = []
    with Proxy(("127.0.0.2", pair.port)) as proxy:
        pair.on["node2"] = {"port": str(proxy.port)}
        pair.write_config(pair.node1)
        pair.on.clear()
        node1, node2 = pair.up().nodes
        node2.ctl("disconnect")
        node1.write(0, b"1" * MIB)
        proxy.spoil = cut
        node2.ctl("connect")
        node2.wait_for(lambda status: bool(cutting) and status["connection"] == "Connecting")
        node2.ctl("disconnect")
        node2.ctl("promote", force=True)
        node2.write(4096, b"2" * 4096)
        for node in pair.nodes:
            demote(node)
        assert [node.volume()["out_of_sync_bytes"] for node in pair.nodes] == [0, 4096]
        proxy.spoil = lambda data: data
        discards(pair, "no-primary = discard-zero-changes")
        assert pair.node1.image.read_bytes()[: 3 * 4096] == b"1" * 4096 + b"2" * 4096 + b"1" * 4096
