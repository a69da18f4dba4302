"""The promise of the project: no acknowledged write is lost, whatever is killed whenever, and the copies meet again."""

import os
import random
from typing import Any

import pytest

from tests.cluster.cluster import MIB, Cluster, Node, open_nbd
from tests.cluster.load import Load, Model

ROUNDS = int(os.environ.get("REPLICA_KILL_ROUNDS") or 12)
#: What is killed in a round, and when. Every kind comes once before any comes again.
KINDS = ("primary", "primary", "secondary", "both", "source", "target")


class Rounds:
    """One pair that is hurt again and again, and the model of what its clients were promised."""

    def __init__(self, cluster: Cluster, rng: random.Random) -> None:
        self.cluster = cluster
        self.rng = rng
        self.model = Model(cluster.size_bytes)
        self.primary = cluster.node1

    def play(self, kind: str) -> None:
        """One round of this kind, ending with both copies proven right and a new Primary."""
        {
            "primary": self.kill_primary,
            "secondary": self.kill_secondary,
            "both": self.kill_both,
            "source": self.kill_source,
            "target": self.kill_target,
        }[kind]()
        self.check_copies()

    def load(self) -> Load:
        """A load on the Primary that was answered some random number of times already."""
        load = Load(self.model, lambda: open_nbd(self.primary), self.rng, connections=self.rng.randint(1, 3))
        load.wait_done(self.rng.randint(20, 400))
        return load

    def kill_primary(self) -> None:
        """Failover under load."""
        load = self.load()
        dead = self.primary.kill9()
        load.finish()
        self.take_over(dead)
        self.some_writes()
        dead.start()

    def kill_secondary(self) -> None:
        """The peer dies under load: no client notices."""
        load = self.load()
        dead = self.primary.peer.kill9()
        load.wait_done(self.rng.randint(20, 200))
        dead.start()
        load.wait_done(self.rng.randint(20, 200))
        load.finish()
        assert not load.errors

    def kill_both(self) -> None:
        """Both die, in either order; one of them is promoted once both are back, or the Secondary before that."""
        load = self.load()
        first, second = self.rng.sample((self.primary, self.primary.peer), 2)
        first.kill9()
        second.kill9()
        load.finish()
        if first is self.primary and self.rng.random() < 0.5:
            # It was in sync to its end. (Had it died first, its peer might have gone on alone, and it would be old.)
            second.start()
            self.promote(second)
            self.some_writes()
            first.start()
        else:
            self.cluster.start()
            self.cluster.wait_in_sync()
            self.promote(self.rng.choice(self.cluster.nodes))

    def kill_source(self) -> None:
        """The Primary dies while its peer is being resynced: only the Primary's copy is any good until it is back."""
        load = self.start_resync()
        dead = self.primary.kill9()
        load.finish()
        target = self.primary.peer.wait_alone()
        if target["volumes"][0]["disk"] == "Inconsistent":
            dead.start()
            dead.wait_in_sync()
            self.promote(dead)
        else:  # the resync was over before the kill
            self.take_over(dead)
            dead.start()

    def kill_target(self) -> None:
        """The target dies in the middle of its resync and begins anew."""
        load = self.start_resync()
        dead = self.primary.peer.kill9()
        load.wait_done(self.rng.randint(10, 50))
        dead.start()
        load.finish()
        assert not load.errors

    def start_resync(self) -> Load:
        """A load, with the peer just back from the dead and a good part of the volume to copy."""
        load = self.load()
        peer = self.primary.peer.kill9()
        load.wait_done(100)
        peer.start()
        peer.wait_for(lambda status: status["replication"] in ("SyncTarget", "Established"))
        load.wait_done(self.rng.randint(1, 30))
        return load

    def take_over(self, dead: Node) -> None:
        """The survivor becomes Primary; everything that was acknowledged is there."""
        dead.peer.wait_alone()
        self.promote(dead.peer)

    def promote(self, node: Node) -> None:
        """`node` serves from now on, and serves what was promised."""
        node.ctl("promote")
        self.primary = node
        self.check()

    def check(self) -> None:
        """The Primary reads as the model says."""
        with self.primary.nbd() as handle:
            self.model.check(lambda offset, length: handle.pread(length, offset))

    def some_writes(self) -> None:
        """The new Primary goes on alone, or not at all."""
        if self.rng.random() < 0.7:
            self.load().finish()

    def check_copies(self) -> None:
        """Both copies are the same and as the model says, on the disks and through NBD."""
        self.cluster.wait_in_sync()
        self.check()
        self.cluster.quiesce().check_identical()


@pytest.mark.timeout(max(120, 20 * ROUNDS))
@pytest.mark.parametrize("al_extents", ["7", "1237"])
def test_nothing_acknowledged_is_lost(libnbd: Any, new_cluster: Any, rng: random.Random, al_extents: str) -> None:
    size_bytes = (64 if al_extents == "7" else 16) * MIB
    cluster = new_cluster(al_extents=al_extents, size_bytes=size_bytes, resync_rate='"64M"')
    rounds = Rounds(cluster.up(), rng)
    plan: list[str] = []
    while len(plan) < max(1, ROUNDS // 2):
        plan += rng.sample(KINDS, len(KINDS))
    for kind in plan[: max(1, ROUNDS // 2)]:
        print(f"round: {kind} dies, Primary is {rounds.primary.name}")
        try:
            rounds.play(kind)
        except BaseException:
            print(cluster.logs())
            raise
