"""A Primary without a good disk works through its peer: clients notice nothing, and a disk is attached meanwhile."""

import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from replica.errors import ReplicaError
from tests.cluster.cluster import MIB, Cluster, Node, open_nbd
from tests.cluster.load import Load, Model


def disk(node: Node) -> str:
    """The state of the node's disk."""
    state: str = node.volume()["disk"]
    return state


def refused(node: Node, verb: str, **args: Any) -> str:
    """The one sentence with which the verb is refused."""
    with pytest.raises(ReplicaError) as caught:
        node.ctl(verb, **args)
    return str(caught.value)


def check(node: Node, model: Model) -> None:
    """The node serves what the model says."""
    with node.nbd() as handle:
        model.check(lambda offset, length: handle.pread(length, offset))


def begin_load(cluster: Cluster, rng: random.Random) -> tuple[Model, Load]:
    """Unique content, with flushes, FUA, trims and zeroes, on several connections to node1."""
    model = Model(cluster.size_bytes)
    return model, Load(model, lambda: open_nbd(cluster.node1), rng)


def end_load(load: Load) -> None:
    load.finish()
    assert not load.errors


class FailingDisk:
    """A real file that gives real errors on demand: nbdkit's error filter behind a FUSE mount."""

    def __init__(self, folder: Path, image: Path) -> None:
        self.folder = folder
        self.trigger = folder / "fail"
        self.path = folder / "mnt" / "disk"
        self._image = image
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "FailingDisk":
        socket, ready = self.folder / "disk.sock", self.folder / "disk.pid"
        self._processes.append(
            subprocess.Popen(
                [
                    *("nbdkit", "--foreground", "--unix", str(socket), "--pidfile", str(ready)),
                    *("--filter=error", "file", str(self._image), f"error-file={self.trigger}", "error-rate=100%"),
                ],
                stderr=subprocess.DEVNULL,
            )
        )
        self._await(ready)
        self.path.parent.mkdir()
        ready = self.folder / "fuse.pid"
        self._processes.append(
            subprocess.Popen(["nbdfuse", "--pidfile", str(ready), str(self.path), "--unix", str(socket)])
        )
        self._await(ready)
        return self

    def _await(self, ready: Path) -> None:
        """Both programs write their pid once they serve; poll, for neither tells it in another way."""
        process = self._processes[-1]
        while not (ready.exists() and ready.stat().st_size):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
                raise AssertionError(f"{process.args!r} ended with status {process.returncode}")

    def __exit__(self, *ignored: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.path.parent)], check=False)
        for process in reversed(self._processes):
            process.terminate()
            process.wait()


@pytest.fixture
def failing_disk(short_dir: Path) -> Iterator[FailingDisk]:
    missing = [name for name in ("nbdkit", "nbdfuse") if shutil.which(name) is None]
    if missing or os.geteuid() or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip(f"needs {', '.join(missing) or 'root and /dev/fuse'}")
    image = short_dir / "failing.img"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    with FailingDisk(short_dir, image) as disk_of_node1:
        yield disk_of_node1


# ── the disk goes ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_primarys_disk_is_detached_and_attached_under_load(pair: Cluster, rng: random.Random) -> None:
    node1, node2 = pair.nodes
    model, load = begin_load(pair, rng)
    for _ in range(3):
        load.wait_done(100)
        node1.ctl("detach")
        assert disk(node1) == "Diskless" and node1.volume()["through_peer"]
        assert disk(node2) == "UpToDate"
        load.wait_done(200)
        node1.ctl("attach")
        load.wait_done(100)
        pair.wait_in_sync()
        node1.wait_for(lambda status: not status["volumes"][0]["through_peer"])
    load.wait_done(100)
    end_load(load)
    check(node1, model)
    pair.quiesce().check_identical()


def test_a_disk_that_fails_is_no_outage(
    libnbd: Any, new_cluster: Callable[..., Cluster], failing_disk: FailingDisk, rng: random.Random
) -> None:
    cluster = new_cluster(on={"node1": {"backing": f'"{failing_disk.path}"'}})
    node1, node2 = cluster.nodes
    node1.image = failing_disk.path
    cluster.up()
    model, load = begin_load(cluster, rng)
    load.wait_done(100)
    failing_disk.trigger.touch()
    node1.wait_for(lambda status: status["volumes"][0]["disk"] == "Failed")
    load.wait_done(200)
    assert node1.status()["role"] == "Primary"
    # As if it were replaced; what it holds is not trusted.
    failing_disk.trigger.unlink()
    node1.ctl("attach")
    load.wait_done(100)
    cluster.wait_in_sync()
    end_load(load)
    check(node1, model)
    node1.ctl("demote")
    node2.ctl("promote")
    check(node2, model)


def test_a_disk_that_cannot_be_read_is_no_outage(
    libnbd: Any, new_cluster: Callable[..., Cluster], failing_disk: FailingDisk
) -> None:
    cluster = new_cluster(on={"node1": {"backing": f'"{failing_disk.path}"'}})
    node1 = cluster.node1
    node1.image = failing_disk.path
    cluster.up()
    node1.write(MIB, b"r" * MIB)
    node1.stop().start()  # a disk that is attached is read from the medium, so nothing is in the page cache
    cluster.wait_in_sync()
    node1.ctl("promote")
    failing_disk.trigger.touch()
    assert node1.read(0, 4 * MIB) == bytes(MIB) + b"r" * MIB + bytes(2 * MIB)
    assert disk(node1) == "Failed"


def test_a_new_disk_gets_everything_while_the_primary_serves(pair: Cluster, rng: random.Random) -> None:
    node1 = pair.node1
    model, load = begin_load(pair, rng)
    load.wait_done(100)
    node1.ctl("detach")
    node1.image.unlink()
    done = node1.cli("create-md", "--size", str(pair.size_bytes), "--force")
    assert done.returncode == 0, done.stderr
    load.wait_done(100)
    node1.ctl("attach")
    load.wait_done(100)
    pair.wait_in_sync()
    end_load(load)
    check(node1, model)
    pair.quiesce().check_identical()


def test_a_disk_that_does_not_fit_is_refused_and_costs_nothing(pair: Cluster) -> None:
    node1, node2 = pair.nodes
    node1.write(0, b"good" * 1024)
    node1.ctl("detach")
    # Another program makes other metadata for it: data that have nothing in common with the peer's.
    stranger = node1.cli("create-md", "--force")
    assert stranger.returncode == 0, stranger.stderr
    small = pair.folder / "small.img"
    with small.open("wb") as file:
        file.truncate(MIB)
    os.rename(small, node1.image)
    assert "too small" in refused(node1, "attach")
    assert node1.read(0, 4096) == b"good" * 1024
    assert node1.status()["role"] == "Primary" and disk(node2) == "UpToDate"


# ── what cannot be done meanwhile, and what ends it ──────────────────────────────────────────────────────────


def test_the_only_disk_is_not_taken_away(pair: Cluster) -> None:
    node1, node2 = pair.nodes
    node1.ctl("detach")
    for node, verb in ((node2, "detach"), (node2, "disconnect"), (node1, "disconnect"), (node2, "outdate")):
        assert "takeover" in refused(node, verb)
    assert "is Primary on node1" in refused(node2, "promote")
    node2.ctl("takeover")
    assert node2.status()["role"] == "Primary"
    node2.write(0, b"t" * 4096)
    node1.ctl("attach")
    pair.wait_in_sync()
    pair.quiesce().check_identical()


def test_a_peer_that_was_started_anew_is_not_taken_for_the_same(pair: Cluster) -> None:
    node1, node2 = pair.nodes
    node1.write(0, b"1" * 4096)
    node1.ctl("detach")
    with node1.nbd() as handle:
        handle.pwrite(b"2" * 4096, 4096)
        node2.kill9()
        with pytest.raises(Exception, match="Input/output error"):
            handle.pread(4096, 0)
        node2.start()
        node1.wait_for(lambda status: "started anew" in status["last_error"])
        with pytest.raises(Exception, match="Input/output error"):
            handle.pread(4096, 0)
    node1.ctl("demote", force=True)
    node2.ctl("promote")
    assert node2.read(0, 8192) == b"1" * 4096 + b"2" * 4096
    node1.ctl("attach")
    pair.wait_in_sync()
    pair.quiesce().check_identical()


def test_a_secondary_whose_copy_is_not_complete_is_promoted_through_its_peer(
    libnbd: Any, new_cluster: Callable[..., Cluster], rng: random.Random
) -> None:
    cluster = new_cluster(resync_rate='"2M"').create()
    node1, node2 = cluster.nodes
    node1.image.write_bytes(b"d" * cluster.size_bytes)
    cluster.begin()
    node2.wait_replication("SyncTarget")
    node1.write(8 * MIB, b"n" * 4096)
    node2.ctl("takeover")
    status = node2.status()
    assert (status["role"], status["replication"]) == ("Primary", "SyncTarget")
    assert node2.read(8 * MIB, 8192) == b"n" * 4096 + b"d" * 4096
    node2.write(12 * MIB, b"m" * 4096)
    node2.write(0, b"l" * 4096)
    assert node2.read(0, 8192) == b"l" * 4096 + b"d" * 4096
    node2.wait_for(lambda status: status["replication"] == "Established" and not status["volumes"][0]["through_peer"])
    assert node2.read(12 * MIB, 8192) == b"m" * 4096 + b"d" * 4096
    cluster.quiesce().check_identical()


def test_a_node_that_lost_its_disk_is_promoted_through_its_peer(pair: Cluster) -> None:
    node1, node2 = pair.nodes
    node1.write(0, b"1" * 4096)
    node2.ctl("detach")
    node1.wait_for(lambda status: status["peer"]["disk"] == "Diskless")
    node2.ctl("takeover")
    assert node2.read(0, 4096) == b"1" * 4096
    node2.write(0, b"2" * 4096)
    node2.ctl("attach")
    pair.wait_in_sync()
    assert node2.read(0, 4096) == b"2" * 4096
    pair.quiesce().check_identical()


def test_older_data_are_not_served_for_want_of_the_newer_disk(pair: Cluster) -> None:
    node1, node2 = pair.nodes
    node2.ctl("disconnect")
    node1.wait_for(lambda status: status["replication"] == "Off")
    node1.write(0, b"n" * 8192)
    node1.ctl("demote")
    node1.ctl("detach")
    node2.ctl("connect")
    node1.wait_for(lambda status: status["peer"]["disk"] == "Consistent")
    assert refused(node1, "promote") == (
        "the disk that node1 had has newer data of r0 than that of node2: attach it, or lose them with `replicactl "
        "promote --force r0`."
    )
    assert node1.status()["role"] == "Secondary"
    node1.ctl("attach")
    pair.wait_in_sync()
    node1.ctl("promote")
    pair.quiesce().check_identical()
    # It is in sync now: node2 has all there is.
    node1.ctl("demote")
    node1.ctl("detach")
    node1.wait_for(lambda status: status["peer"]["disk"] == "Consistent")
    node1.ctl("promote")
    with node1.nbd() as handle:
        assert bytes(handle.pread(8192, 0)) == b"n" * 8192
