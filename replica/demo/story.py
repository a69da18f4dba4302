"""The story of the demo, step by step. Every step checks something and says so, or raises `Failed`."""

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from replica import control
from replica.cli._status_text import bytes_text, progress_text
from replica.demo import images, nodes
from replica.demo.load import BLOCK_BYTES, DataLost, Ledger, Writer, verify
from replica.demo.nbd_client import NbdClient, NbdLost, NbdRefused
from replica.demo.nodes import RESOURCE, Cluster, CommandFailed, Node
from replica.demo.screen import Screen
from replica.errors import ReplicaError

_EXTENT_BYTES = 4 << 20
#: The load keeps to a few places of the volume, as a database does: first two extents, after the crash one more.
_BEFORE = (100, 180)
_AFTER = (100, 180, 220)
_WRITES = 6000
_DEPTH = 16
_SYNC_TIMEOUT_S = 60.0

EXPECTED_ERRORS = (CommandFailed, DataLost, NbdLost, NbdRefused, ReplicaError, OSError)


class Failed(Exception):
    """A check of the story failed: one sentence."""


class _InSync(Exception):
    """Both copies are UpToDate: ends following the status."""


class Story:
    """The steps, in order, on one cluster."""

    def __init__(self, cluster: Cluster, screen: Screen, rng: random.Random) -> None:
        self._cluster = cluster
        self._screen = screen
        self._rng = rng
        self._ledger = Ledger()
        self._copied_bytes = 0

    def tell(self) -> None:
        """All of it."""
        one, other = self._cluster.node1, self._cluster.node2
        self._set_up()
        self._first_promotion(one)
        self._crash(one)
        self._fail_over(other)
        self._go_on(other)
        with self._background_load(other):
            self._come_back(one, other)
        self._compare("after the crash")
        self._switch_over(one)
        self._stop()
        self._compare("after both nodes were stopped")

    # ── the steps ────────────────────────────────────────────────────────────────────────────────────────────

    def _set_up(self) -> None:
        cluster, screen = self._cluster, self._screen
        screen.step(f"Two nodes, and a volume of {bytes_text(nodes.SIZE_BYTES)} on each")
        cluster.write_secret()
        for node in (cluster.node1, cluster.node2):
            cluster.ctl(node, "create-md", RESOURCE, "--size", nodes.SIZE_TEXT)
        for node in (cluster.node1, cluster.node2):
            cluster.start(node)
        cluster.ctl(cluster.node1, "wait-connect", RESOURCE, "--timeout", "20")
        for node in (cluster.node1, cluster.node2):
            cluster.ctl(node, "status", RESOURCE)
        screen.tick("both nodes run, have found each other and wait for a first Primary")

    def _first_promotion(self, node: Node) -> None:
        self._screen.step("The first Primary (--force, once: new volumes have no data to choose between)")
        self._cluster.ctl(node, "promote", "--force", RESOURCE)
        self._cluster.ctl(node, "wait-sync", RESOURCE, "--timeout", "60")
        self._cluster.ctl(node, "status", RESOURCE)
        self._screen.tick(f"{node.name} is Primary and both copies are UpToDate")

    def _crash(self, node: Node) -> None:
        screen, ledger = self._screen, self._ledger
        screen.step(f"A client writes over NBD, and {node.name} dies in the middle of it")
        killed = False

        def kill_in_the_middle() -> bool:
            nonlocal killed
            if ledger.acknowledged_count >= _WRITES and not killed:
                killed = True
                self._cluster.kill(node)
            return False

        client = NbdClient.connect(node.nbd, RESOURCE)
        try:
            Writer(ledger, self._rng, _DEPTH).write(client, _blocks(_BEFORE), kill_in_the_middle)
        except NbdLost:
            if not killed:
                raise Failed(f"the connection to {node.name} ended before it was killed") from None
        finally:
            client.close()
        screen.tick(
            f"{node.name} is dead: {ledger.acknowledged_count} writes acknowledged, {len(ledger.under_way)} under way"
        )

    def _fail_over(self, node: Node) -> None:
        self._screen.step(f"{node.name} takes its place")
        self._cluster.ctl(node, "promote", RESOURCE)
        self._cluster.ctl(node, "status", RESOURCE)
        under_way = len(self._ledger.under_way)
        arrived = self._read_back(node)
        self._screen.tick(
            f"every acknowledged write is on {node.name} (read back from {len(self._ledger.blocks())} blocks); of the "
            f"{under_way} under way {arrived or 'none'} had arrived"
        )

    def _go_on(self, node: Node) -> None:
        self._screen.step(f"The client goes on with {node.name}, which is alone now")
        before = self._ledger.acknowledged_count
        client = NbdClient.connect(node.nbd, RESOURCE)
        Writer(self._ledger, self._rng, _DEPTH).write(
            client, _blocks(_AFTER), lambda: self._ledger.acknowledged_count >= before + _WRITES
        )
        client.flush()
        client.disconnect()
        self._cluster.ctl(node, "status", RESOURCE)
        self._screen.tick(f"{self._ledger.acknowledged_count - before} more writes; what the dead node lacks is noted")

    def _come_back(self, node: Node, source: Node) -> None:
        screen = self._screen
        screen.step(f"{node.name} comes back; the client keeps writing meanwhile")
        self._cluster.start(node)
        with screen.progress("resync") as show:
            self._follow_resync(source, show)
        self._cluster.ctl(source, "wait-sync", RESOURCE, "--timeout", "60")
        self._cluster.ctl(source, "status", RESOURCE)
        copied, total = self._copied_bytes, nodes.SIZE_BYTES
        if not 0 < copied < total // 10:
            raise Failed(f"the resync copied {bytes_text(copied)} of {bytes_text(total)}: a small part was expected")
        screen.tick(f"in sync again: copied {bytes_text(copied)} of {bytes_text(total)} ({copied / total:.1%})")

    def _follow_resync(self, source: Node, show: Callable[[float, str], None]) -> None:
        def seen(status: dict[str, Any]) -> None:
            volume = status["volumes"][0]
            self._copied_bytes = max(self._copied_bytes, volume["resync_total_bytes"])
            if volume["done_percent"] is not None:
                show(volume["done_percent"], progress_text(volume))
            elif status["replication"] == "Established" and self._copied_bytes:
                raise _InSync
            elif status["connection"] == "StandAlone":
                raise Failed(f"the nodes do not connect: {status['last_error']}")

        try:
            self._cluster.follow(source, seen, _SYNC_TIMEOUT_S)
        except _InSync:
            return
        raise Failed("replicad ended before the resync")

    def _switch_over(self, node: Node) -> None:
        screen, cluster, ledger = self._screen, self._cluster, self._ledger
        screen.step(f"Planned switchover back to {node.name}, under load")
        begun, generation = ledger.acknowledged_count, self._generation(node)
        enough_before, enough_after = threading.Event(), threading.Event()
        taken_over_at: list[int] = []

        def until() -> bool:
            if ledger.acknowledged_count >= begun + _WRITES // 4:
                enough_before.set()
            if taken_over_at and ledger.acknowledged_count >= taken_over_at[0] + _WRITES // 4:
                enough_after.set()
            return enough_after.is_set()

        writer = Writer(ledger, self._rng, _DEPTH)
        paths = (cluster.node1.nbd, cluster.node2.nbd)
        with _Background(lambda: writer.write_anywhere(paths, RESOURCE, _blocks(_AFTER), until)) as load:
            load.wait_for(enough_before)
            cluster.ctl(node, "takeover", RESOURCE)
            taken_over_at.append(ledger.acknowledged_count)
            load.wait_for(enough_after)
        cluster.ctl(node, "status", RESOURCE)
        cluster.ctl(node, "wait-sync", RESOURCE, "--timeout", "60")
        if not writer.reconnects:
            raise Failed("the client's connection to the old Primary was never ended")
        self._read_back(node)
        # A node that had to write without its peer for a moment has a new generation.
        how = "without a resync" if self._generation(node) == generation else "after a short resync"
        screen.tick(
            f"{node.name} is Primary {how}; the client waited {writer.longest_pause_s:.2f} s at most, saw no error and "
            "misses no write"
        )

    def _stop(self) -> None:
        self._screen.step("Both nodes stop in order, as on a reboot")
        for node in (self._cluster.node2, self._cluster.node1):
            self._cluster.stop(node)
        self._screen.tick("both daemons drained, flushed and ended with exit status 0")

    # ── what the steps share ─────────────────────────────────────────────────────────────────────────────────

    def _generation(self, node: Node) -> str:
        status: dict[str, Any] = control.call(node.control_socket, "status", timeout_s=10.0)
        generation: str = status["volumes"][0]["generations"]["current"]
        return generation

    def _read_back(self, node: Node) -> int:
        client = NbdClient.connect(node.nbd, RESOURCE)
        try:
            return verify(client, self._ledger)
        finally:
            client.close()

    @contextmanager
    def _background_load(self, node: Node) -> Iterator[None]:
        """A client writes to ``node``, at a moderate pace, until the context ends."""
        stop = threading.Event()

        def load() -> None:
            client = NbdClient.connect(node.nbd, RESOURCE)
            Writer(self._ledger, self._rng, depth=1).write(client, _blocks(_AFTER), lambda: stop.wait(0.002))
            client.flush()
            client.disconnect()

        with _Background(load):
            try:
                yield
            finally:
                stop.set()

    def _compare(self, when: str) -> None:
        one, other = self._cluster.node1, self._cluster.node2
        self._screen.command(f"cmp {one.image.name} {other.image.name}")
        difference = images.first_difference(one.image, other.image)
        if difference is not None:
            raise Failed(f"the two images differ {when}, first at byte {difference}")
        self._screen.tick(f"the two images are the same, byte for byte, {when}")


class _Background:
    """A thread whose error is raised where its end is waited for."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "_Background":
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.join()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    def wait_for(self, event: threading.Event) -> None:
        """Wait until the work has set ``event``; raises its error."""
        while not event.wait(0.05):
            if self._ended.is_set():
                self.join()
                raise Failed("the client stopped too early")

    def join(self) -> None:
        """Wait for the end of the work; raises its error."""
        self._thread.join()
        if self._error is not None:
            raise self._error


def _blocks(extents: tuple[int, ...]) -> list[int]:
    """The numbers of all blocks in these extents."""
    per_extent = _EXTENT_BYTES // BLOCK_BYTES
    return [extent * per_extent + block for extent in extents for block in range(per_extent)]


def run(seed: int, keep: bool) -> int:
    """Tell the story; returns the exit status: 0 all is well, 1 a check failed, 130 interrupted."""
    screen = Screen()
    began_s = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Cluster(screen) as cluster:
        screen.line("Replica: two nodes on this machine, node1 at 127.0.0.1 and node2 at 127.0.0.2.")
        screen.line(f"Everything is in {cluster.folder}; the commands below need this:")
        screen.command(f"cd {cluster.folder}; export REPLICA_CONFIG=$PWD/replica.toml")
        cluster.keep = keep
        try:
            Story(cluster, screen, random.Random(seed)).tell()
        except KeyboardInterrupt:
            screen.line("Interrupted: stopping both nodes.")
            return 130
        except (Failed, *EXPECTED_ERRORS) as error:
            cluster.keep = True
            screen.cross(str(error))
            screen.line(f"The logs are {cluster.node1.log} and {cluster.node2.log}; --seed {seed} repeats the writes.")
            return 1
        except BaseException:
            cluster.keep = True
            raise
    screen.line()
    screen.line(f"All {len(screen.ticks)} checks passed in {time.monotonic() - began_s:.0f} s.", "bold green")
    if keep:
        screen.line(f"Kept, as asked: {cluster.folder}")
    return 0
