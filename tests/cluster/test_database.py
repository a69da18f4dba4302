"""Databases on ext4 on the volume: after any failover the file system needs no repair, and no commit is lost."""

import os
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import MIB, Cluster, Node
from tests.cluster.databases import Database, PostgreSQL, SQLite
from tests.cluster.ledger import Ledger
from tests.cluster.mounted import Mounted, mounted, need_mounts
from tests.cluster.writers import Writers

#: For each database; `make database ROUNDS=` sets it. Every kind comes once before any comes again.
ROUNDS = int(os.environ.get("REPLICA_DATABASE_ROUNDS") or 0)
KINDS = ("primary", "secondary", "source", "target")
WRITERS = 3
#: Long enough for every bounded wait to run out and everything to be taken down.
TIMEOUT_S = 300 + 30 * ROUNDS
_MAX_DELAY_S = 0.02


class Rounds:
    """A pair, a file system on it, a database on that, which are hurt again and again; and what was committed."""

    def __init__(self, cluster: Cluster, files: Mounted, database: Database, rng: random.Random) -> None:
        self.cluster = cluster
        self.files = files
        self.database = database
        self.rng = rng
        self.book = Ledger(WRITERS)
        self.primary = cluster.node1
        self.unanswered = 0
        self.writers: Writers | None = None

    def create(self) -> None:
        """File system and database, in use."""
        self.files.attach()
        self.files.make()
        self.files.mount()
        self.database.create(WRITERS)
        self.database.start()

    def play(self, kind: str) -> None:
        """One round of this kind; both copies are the same at its end, and the database is in use."""
        {
            "primary": self.kill_primary,
            "secondary": self.kill_secondary,
            "source": self.kill_source,
            "target": self.kill_target,
        }[kind]()
        self.cluster.wait_in_sync()
        self.check()
        self.cluster.quiesce().check_identical()
        self.use()

    # ── what happens to them ─────────────────────────────────────────────────────────────────────────────────

    def kill_primary(self) -> None:
        """Failover under load; the dead node comes back under load, too."""
        dead = self.fail_over()
        writers = self.write()
        dead.start()
        self.some(writers)
        writers.finish()

    def kill_secondary(self) -> None:
        """No client notices."""
        writers = self.write()
        dead = self.primary.peer.kill9()
        self.some(writers)
        dead.start()
        self.some(writers)
        writers.finish()

    def kill_source(self) -> None:
        """After a failover the new Primary dies, too, while it is the source of a resync: its copy is the good one."""
        writers = self.write_in_resync(self.fail_over())
        dead = self.primary.kill9()
        self.lost(writers)
        target = dead.peer.wait_alone()
        if target["volumes"][0]["disk"] == "Inconsistent":
            dead.start()
            self.cluster.wait_in_sync()
            self.promote(self.rng.choice(self.cluster.nodes))
        else:  # the resync was over before the kill
            self.promote(dead.peer)
            dead.start()

    def kill_target(self) -> None:
        """After a failover the old Primary dies again in the middle of its resync, and begins anew."""
        writers = self.write_in_resync(self.fail_over())
        dead = self.primary.peer.kill9()
        self.some(writers)
        dead.start()
        self.some(writers)
        writers.finish()

    # ── parts of it ──────────────────────────────────────────────────────────────────────────────────────────

    def write(self) -> Writers:
        """Clients that have committed some random number of transactions already."""
        self.writers = self.database.write(self.book)
        self.some(self.writers)
        return self.writers

    def some(self, writers: Writers) -> None:
        """Let the clients go on until a random moment."""
        writers.wait_committed(self.rng.randint(5, 60))
        threading.Event().wait(self.rng.uniform(0, _MAX_DELAY_S))  # else it would always be right after a commit

    def fail_over(self) -> Node:
        """Kill the Primary under load and go on with the other node; returns the dead one."""
        writers = self.write()
        dead = self.primary.kill9()
        self.lost(writers)
        dead.peer.wait_alone()
        self.promote(dead.peer)
        return dead

    def write_in_resync(self, dead: Node) -> Writers:
        """Clients at work, and the dead node back and being resynced (or done already)."""
        writers = self.write()
        dead.start()
        dead.wait_replication("SyncTarget", "Established")
        writers.wait_committed(self.rng.randint(1, 20))
        return writers

    def lost(self, writers: Writers) -> None:
        """The server under the file system is dead: the clients see errors and end, and everything is taken down."""
        writers.wait_failed()
        self.database.crashed()
        self.files.abandon()

    def promote(self, node: Node) -> None:
        """`node` serves from now on; file system and database are whole there, and in use."""
        node.ctl("promote")
        self.primary = node
        self.files.move(node)
        self.files.attach()
        self.files.mount()
        self.database.start()
        self.check()
        self.use()

    def check(self) -> None:
        """The database holds what was committed; then e2fsck finds nothing to mend, and all is let go of."""
        self.unanswered += self.book.check(self.database.dump())
        self.database.stop()
        self.files.unmount()
        self.files.check()
        self.files.detach()

    def use(self) -> None:
        """File system and database again after a check."""
        self.files.attach()
        self.files.mount()
        self.database.start()

    def end(self) -> None:
        """Whatever runs, end it; the file system below first, so that nothing can hang."""
        self.files.abandon()
        if self.writers is not None:
            self.writers.kill()
        self.database.crashed()


def _play(
    cluster: Cluster, files: Mounted, database: Database, rng: random.Random, kinds: tuple[str, ...], rounds: int
) -> None:
    game = Rounds(cluster, files, database, rng)
    plan: list[str] = []
    while len(plan) < rounds:
        plan += rng.sample(kinds, len(kinds))
    try:
        game.create()
        for kind in plan[:rounds]:
            print(f"round: {kind} dies, Primary is {game.primary.name}")
            game.play(kind)
    except BaseException:
        print(cluster.logs())
        raise
    finally:
        game.end()
    print(
        f"{rounds} rounds: {sum(game.book.committed)} transactions, of which {game.unanswered} were there "
        "though nobody had been told; none lost",
        file=sys.stderr,
    )


@pytest.mark.root
@pytest.mark.timeout(TIMEOUT_S)
def test_sqlite(libnbd: Any, new_cluster: Callable[..., Cluster], short_dir: Path, rng: random.Random) -> None:
    need_mounts()
    cluster = new_cluster(size_bytes=128 * MIB, resync_rate='"64M"').up()
    with mounted(short_dir, cluster.node1) as files:
        mode = rng.choice(("DELETE", "WAL"))
        print(f"journal mode {mode}")
        _play(cluster, files, SQLite(files.folder, mode), rng, KINDS, ROUNDS or len(KINDS))


@pytest.mark.root
@pytest.mark.timeout(TIMEOUT_S)
def test_postgresql(libnbd: Any, new_cluster: Callable[..., Cluster], short_dir: Path, rng: random.Random) -> None:
    need_mounts()
    cluster = new_cluster(size_bytes=128 * MIB, resync_rate='"64M"')
    with mounted(short_dir, cluster.node1) as files:
        database = PostgreSQL(files.folder, short_dir)
        cluster.up()
        _play(cluster, files, database, rng, KINDS, ROUNDS or 2)
