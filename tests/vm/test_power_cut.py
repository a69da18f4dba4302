"""Power cuts that are real to the kernel: nodes in virtual machines lose their page caches under load.

Nothing acknowledged is lost while one node in sync runs on; nothing flushed is lost when both lose power at once; and
what a node has on its own disk right after a cut shows that it did lose something.
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import MIB
from tests.cluster.load import Load
from tests.vm.durable import DurableModel
from tests.vm.machine import need_image
from tests.vm.pair import Node, Pair, power_cut

ROUNDS = int(os.environ.get("REPLICA_POWER_CUT_ROUNDS") or 6)
#: Whose power is cut. Every kind comes once before any comes again.
KINDS = ("primary", "returning", "secondary", "both", "both", "source", "target")
_SIZE_BYTES = 32 * MIB


class Rounds:
    """One pair whose power is cut again and again, and the model of what its clients were promised."""

    def __init__(self, pair: Pair, rng: random.Random) -> None:
        self.pair = pair
        self.rng = rng
        self.model = DurableModel(pair.size_bytes)
        self.primary = pair.nodes[0]
        self.requests = 0
        self.cuts = 0
        self.lost_sectors = 0
        self.lost_writes = 0

    def play(self, kind: str) -> None:
        """One round of this kind, ending with both copies proven right."""
        {
            "primary": self.cut_primary,
            "returning": self.cut_primary_that_returns,
            "secondary": self.cut_secondary,
            "both": self.cut_both,
            "source": self.cut_source,
            "target": self.cut_target,
        }[kind]()
        self.check_copies()

    # ── what happens ─────────────────────────────────────────────────────────────────────────────────────────

    def cut_primary(self) -> None:
        """Failover under load: the other node has everything that was acknowledged."""
        dead, then = self.fail_over()
        if self.rng.random() < 0.7:
            self.end(self.load())
        self.bring_back(dead, then)

    def cut_primary_that_returns(self) -> None:
        """Nobody takes over: the Primary comes back without what it lost, and must not overwrite who has it."""
        dead, then = self.lose_primary()
        self.bring_back(dead, then)
        self.pair.wait_in_sync()
        self.promote(self.rng.choice(self.pair.nodes))

    def cut_secondary(self) -> None:
        """No client notices."""
        load = self.load()
        dead = self.primary.peer
        self.cut(dead)
        load.wait_done(self.rng.randint(20, 100))
        self.bring_back(dead)
        load.wait_done(self.rng.randint(20, 100))
        self.end(load)
        assert not load.errors

    def cut_both(self) -> None:
        """What was flushed is there, with the copy that the nodes agree on, or with either one promoted alone."""
        load = self.load()
        self.cut(*self.pair.nodes)
        self.end(load)
        self.pair.boot(*self.pair.nodes)
        for node in self.pair.nodes:
            self.look_at_disk(node, self.model)
        alone = self.rng.choice(self.pair.nodes) if self.rng.random() < 0.4 else None
        if alone is not None and self.in_step(alone.peer):
            alone.start()
            alone.ctl("promote")
            self.primary = alone
            self.check_flushed()
            alone.peer.start()
        else:
            for node in self.pair.nodes:
                node.start()
            self.pair.wait_in_sync()
            self.primary = self.rng.choice(self.pair.nodes)
            self.primary.ctl("promote")
            self.check_flushed()

    def cut_source(self) -> None:
        """The Primary loses power while its peer is resynced: what it had flushed is on its own disk, at least."""
        load = self.load_in_resync()
        dead = self.primary
        self.cut(dead)
        self.end(load)
        survivor = dead.peer
        if survivor.wait_alone()["volumes"][0]["disk"] == "Inconsistent":
            self.bring_back(dead)
            self.pair.wait_in_sync()
            self.primary = self.rng.choice(self.pair.nodes)
            self.primary.ctl("promote")
            self.check_flushed()
        else:  # the resync was over before the cut
            self.promote(survivor)
            self.bring_back(dead)

    def cut_target(self) -> None:
        """The target of a resync loses power in the middle of it, and begins anew."""
        load = self.load_in_resync()
        dead = self.primary.peer
        self.cut(dead)
        load.wait_done(self.rng.randint(10, 50))
        self.bring_back(dead)
        self.end(load)
        assert not load.errors

    # ── parts of it ──────────────────────────────────────────────────────────────────────────────────────────

    def load(self) -> Load:
        """A load on the Primary that was answered some random number of times already."""
        load = Load(self.model, self.primary.open_nbd, self.rng, connections=self.rng.randint(1, 3))
        load.wait_done(self.rng.randint(50, 1000))
        return load

    def end(self, load: Load) -> None:
        """The load ends, by itself or because its server is gone."""
        load.finish()
        self.requests += load.done

    def cut(self, *nodes: Node) -> None:
        """Cut the power."""
        power_cut(*nodes)
        self.cuts += len(nodes)

    def lose_primary(self) -> tuple[Node, DurableModel]:
        """The Primary loses power under load; the dead node, and what it had promised by then."""
        dead = self.primary
        was_alone = dead.times_alone()
        load = self.load()
        self.cut(dead)
        self.end(load)
        # Else the other one may lack what was acknowledged, and no promise is broken.
        assert dead.times_alone() == was_alone, "this host is too slow: the link was lost before the power"
        dead.peer.wait_alone()
        return dead, self.model.as_it_is()

    def fail_over(self) -> tuple[Node, DurableModel]:
        """The same, and the other node takes over."""
        dead, then = self.lose_primary()
        self.promote(dead.peer)
        return dead, then

    def load_in_resync(self) -> Load:
        """A load on the new Primary, whose peer is back after a power cut and has much to copy."""
        dead, then = self.fail_over()
        self.bring_back(dead, then)
        dead.wait(replication=("SyncTarget", "Established"))
        return self.load()

    def bring_back(self, node: Node, then: DurableModel | None = None) -> None:
        """Boot a node and start its daemon; `then` is what it must have on its disk, if both were in step."""
        self.pair.boot(node)
        if then is not None:
            self.look_at_disk(node, then)
        node.start()

    def look_at_disk(self, node: Node, then: DurableModel) -> None:
        """What was flushed is on the node's own disk, before its daemon touches it; count what else is not."""
        with node.copy_out().open("rb") as file:
            sectors, writes = then.lost_on(lambda offset, length: os.pread(file.fileno(), length, offset))
        print(f"    {node.name} ({node.kind}) lost {sectors} acknowledged sectors of {writes} writes", file=sys.stderr)
        self.lost_sectors += sectors
        self.lost_writes += writes

    def in_step(self, node: Node) -> bool:
        """Whether this node, when it died, had not recorded that it goes on without the other."""
        return not json.loads(node.cli("dump-md"))["peers"][0]["outdated"]

    def promote(self, node: Node) -> None:
        """`node` serves from now on, and serves what was acknowledged."""
        node.ctl("promote")
        self.primary = node
        self.check()

    def check(self) -> None:
        """The Primary has everything that was acknowledged."""
        handle = self.primary.open_nbd()
        handle.flush()
        self.model.check(lambda offset, length: handle.pread(length, offset))
        handle.shutdown()

    def check_flushed(self) -> None:
        """The Primary has everything that was flushed, and nothing that nobody wrote."""
        handle = self.primary.open_nbd()
        handle.flush()
        self.model.check_flushed(lambda offset, length: handle.pread(length, offset))
        handle.shutdown()

    def check_copies(self) -> None:
        """Both copies are the same, and what the model says; half the time the nodes change places afterwards."""
        self.pair.wait_in_sync()
        self.check()
        self.pair.check_identical()
        if self.rng.random() < 0.5:
            self.primary.peer.ctl("takeover")
            self.primary = self.primary.peer


@pytest.mark.timeout(300 + 300 * ROUNDS)
def test_power_cuts(libnbd: Any, short_dir: Path, rng: random.Random) -> None:
    image = need_image()
    settings = {
        "protocol": '"C"',
        "timeout": "5",
        "connect_interval": "0.2",
        # Between the client's own flushes nothing is flushed, or something is every now and then.
        "settle_interval": rng.choice(("60", "60", "1")),
        "resync_rate": '"8M"',
        "al_extents": rng.choice(("7", "1237")),
    }
    plan: list[str] = []
    while len(plan) < ROUNDS:
        plan += rng.sample(KINDS, len(KINDS))
    with Pair(short_dir, image, rng, _SIZE_BYTES, **settings) as pair:
        rounds = Rounds(pair.up(), rng)
        for kind in plan[:ROUNDS]:
            print(f"round: {kind} loses power, Primary is {rounds.primary.name}", file=sys.stderr)
            try:
                rounds.play(kind)
            except BaseException:
                print(pair.logs())
                raise
    print(
        f"{ROUNDS} rounds, {rounds.cuts} power cuts, {rounds.requests} requests answered, {rounds.model.flushes} of "
        f"them flushes; the nodes' own disks lacked {rounds.lost_sectors} acknowledged sectors of {rounds.lost_writes} "
        "writes after the cuts, none of them flushed; nothing that was promised is lost",
        file=sys.stderr,
    )
    assert rounds.lost_sectors > 0, "no cut ever cost a node anything: these were no power cuts"
