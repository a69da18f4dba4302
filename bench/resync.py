"""Resyncs and verifications, measured: beside a client, of dense and of sparse volumes, and after a crash.

    python -m bench.resync load [--tree NAME=DIR …] [--rounds N]    # what a client's writes take meanwhile
    python -m bench.resync reads [--tree NAME=DIR …]                # and what its reads take, from the page cache
    python -m bench.resync cold-reads [--tree NAME=DIR …]           # or from the disk (images in /var/tmp)
    python -m bench.resync verify [--tree NAME=DIR …]               # a verification, beside a client's writes
    python -m bench.resync copy [--tree NAME=DIR …] [--rounds N]    # a dense volume, beside nbdcopy
    python -m bench.resync sparse [--tree NAME=DIR …]               # 1 TiB that holds 1 GiB
    python -m bench.resync crash [--tree NAME=DIR …]                # hot extents of which little differs

Both nodes and the client are on this machine, images in /dev/shm if there is one. A tree is a checkout whose
`replicad` is measured; without one, it is this one. All trees are measured in turn (A B A B …).
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench import servers
from bench.load import SPAN_BYTES, libnbd
from nbdserver.blockfile import BlockFile
from tests.cluster.cluster import Cluster

_HERE = Path(__file__).resolve().parents[1]
_MIB = 1 << 20
#: The defaults of replica.config; the tests' harness has faster ones.
_DEFAULTS = {"timeout": "6", "connect-interval": "1", "settle-interval": "5"}
_REQUEST_BYTES = 4096
_DENSE_BYTES = 1 << 30

Figures = dict[str, float]


@contextlib.contextmanager
def pair(tree: Path, folder: Path, size_bytes: int, **settings: str) -> Iterator[Cluster]:
    """Two nodes of that tree's code, not yet started, with images that are not yet made."""
    with Cluster(folder, size_bytes=size_bytes, **{**_DEFAULTS, **settings}) as cluster:
        for node in cluster.nodes:
            inherited = node.environment()
            node.environment = lambda inherited=inherited: {**inherited, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}  # type: ignore[method-assign, misc]
        yield cluster


def fill(image: Path, size_bytes: int, start: int = 0, stop: int | None = None) -> None:
    """Data that is not zero and has no holes, in [start, stop) of an image."""
    piece = random.Random(4).randbytes(4 * _MIB)
    with image.open("r+b" if image.exists() else "xb") as file:
        file.truncate(size_bytes)
        file.seek(start)
        for at in range(start, size_bytes if stop is None else stop, len(piece)):
            file.write(piece[: (size_bytes if stop is None else stop) - at])


# ── a client ─────────────────────────────────────────────────────────────────────────────────────────────────────


def work_until_told(kind: str, uri: str, size_bytes: int, results: Path) -> None:
    """4 KiB, one at a time, until SIGTERM; then (begin, duration) of each request, in seconds, to a file."""
    nbd = libnbd()
    assert nbd is not None
    handle = nbd.NBD()
    handle.connect_uri(uri)
    rng, told = random.Random(2), []
    data, samples = rng.randbytes(_REQUEST_BYTES), array("d")
    request = partial(handle.pwrite, data) if kind == "write" else partial(handle.pread, _REQUEST_BYTES)
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    now = time.monotonic
    print("ready", flush=True)
    while not told:
        place = rng.randrange(size_bytes // _REQUEST_BYTES) * _REQUEST_BYTES
        began_s = now()
        request(place)
        samples.extend((began_s, now() - began_s))
    results.write_bytes(samples.tobytes())
    handle.shutdown()


class Client:
    """It reads or writes (`kind`) at random places of the first so many bytes, in a process of its own."""

    def __init__(self, kind: str, uri: str, folder: Path, size_bytes: int = SPAN_BYTES) -> None:
        self._results = folder / "samples"
        command = [sys.executable, "-m", "bench.resync", "client", kind, uri, str(size_bytes), str(self._results)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=_HERE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def finish(self) -> list[tuple[float, float]]:
        """(begin, duration) of each request."""
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(30) == 0
        samples = array("d")
        samples.frombytes(self._results.read_bytes())
        return list(zip(samples[::2], samples[1::2], strict=True))


def quantiles(durations: list[float]) -> Figures:
    """Of durations in seconds, in microseconds."""
    ordered = sorted(durations)

    def at(share: float) -> float:
        return round(1e6 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1) if ordered else 0.0

    return {"requests": len(ordered), "p50": at(0.5), "p99": at(0.99), "p99.9": at(0.999), "most": at(1.0)}


# ── what is measured ─────────────────────────────────────────────────────────────────────────────────────────────


def cpu_s(cluster: Cluster) -> float:
    """Processor time that both nodes have had so far: it moves less than time does on a busy machine."""
    ticks = 0
    for node in cluster.nodes:
        fields = Path(f"/proc/{node._running().pid}/stat").read_text().rpartition(") ")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def full_resync(cluster: Cluster) -> float:
    """Copy everything anew; seconds until both are in sync."""
    began_s = time.monotonic()
    cluster.node2.ctl("invalidate")
    cluster.node2.wait_replication("SyncTarget")
    cluster.wait_in_sync()
    return time.monotonic() - began_s


def full_verify(cluster: Cluster) -> float:
    """Compare everything; seconds until that is done."""
    began_s = time.monotonic()
    done = cluster.node1.cli("verify", "--wait")
    assert done.returncode == 0, done.stderr
    return time.monotonic() - began_s


def load(tree: Path, folder: Path) -> Figures:
    """What a client's writes take, and the resync beside them."""
    return _beside_a_client(tree, folder, "write", SPAN_BYTES)


def reads(tree: Path, folder: Path) -> Figures:
    """The same for reads."""
    return _beside_a_client(tree, folder, "read", SPAN_BYTES)


def cold_reads(tree: Path, folder: Path) -> Figures:
    """The same, and hardly any of them from the page cache. The target's image stays where all others are: it has a
    disk of its own.
    """
    with tempfile.TemporaryDirectory(prefix="rb-", dir="/var/tmp") as on_disk:
        image = folder / "node2.img"
        image.touch()
        os.truncate(image, _DENSE_BYTES)
        (Path(on_disk) / image.name).symlink_to(image)
        return _beside_a_client(tree, Path(on_disk), "read", _DENSE_BYTES)


def verify(tree: Path, folder: Path) -> Figures:
    """What a client's writes take, and a verification beside them."""
    return _beside_a_client(tree, folder, "write", SPAN_BYTES, full_verify)


def _beside_a_client(
    tree: Path, folder: Path, kind: str, span_bytes: int, work: Callable[[Cluster], float] = full_resync
) -> Figures:
    """A client without such work, then with it; and the work without a client."""
    with pair(tree, folder, _DENSE_BYTES) as cluster:
        fill(cluster.node1.image, _DENSE_BYTES)
        cluster.up()
        alone_s = work(cluster)
        if span_bytes == _DENSE_BYTES:  # all of the image: these requests are to need the disk
            forget(cluster.node1.image)
        client = Client(kind, cluster.node1.uri, folder, span_bytes)
        time.sleep(1)  # the activity log is warm
        calm_s = time.monotonic()
        time.sleep(5)
        began_s = time.monotonic()
        beside_s = work(cluster)
        ended_s = began_s + beside_s
        samples = client.finish()
        cluster.quiesce().check_identical()
    without = quantiles([took for at, took in samples if calm_s <= at < began_s])
    beside = quantiles([took for at, took in samples if began_s + 0.3 <= at < ended_s - 0.3])
    return {
        **{f"without {name}": value for name, value in without.items()},
        **{f"beside {name}": value for name, value in beside.items()},
        "p99 ratio": round(beside["p99"] / without["p99"], 2),
        "MB/s alone": round(_DENSE_BYTES / alone_s / 1e6),
        "MB/s beside": round(_DENSE_BYTES / beside_s / 1e6),
    }


def forget(image: Path) -> None:
    """Have the page cache forget it."""
    with contextlib.closing(BlockFile.open(image, read_only=True, exclusive=False)) as file:
        file.forget_cache()


def copy(tree: Path, folder: Path) -> Figures:
    """A dense volume, resynced without clients; and nbdcopy between two servers of such images."""
    size_bytes = 2 << 30
    with pair(tree, folder, size_bytes) as cluster:
        fill(cluster.node1.image, size_bytes)
        fill(cluster.node2.image, size_bytes)
        cluster.up()
        before_s = cpu_s(cluster)
        seconds = full_resync(cluster)
        used_s = cpu_s(cluster) - before_s
        cluster.check_identical()
        for node in cluster.nodes:
            node.stop()
        sockets, ended_s = [], sum(os.times()[2:4])
        with contextlib.ExitStack() as stack:
            for node in cluster.nodes:
                path = folder / f"{node.name}.nbdkit"
                stack.enter_context(servers._process(["nbdkit", "-f", "-U", str(path), "file", str(node.image)], path))
                sockets.append(f"nbd+unix:///?socket={path}")
            began_s = time.monotonic()
            subprocess.run(["nbdcopy", *sockets], check=True)
            copied_s = time.monotonic() - began_s
    return {
        "resync MB/s": round(size_bytes / seconds / 1e6),
        "resync processor s": round(used_s, 2),
        "nbdcopy processor s": round(sum(os.times()[2:4]) - ended_s, 2),
        "nbdcopy MB/s": round(size_bytes / copied_s / 1e6),
        "ratio": round(copied_s / seconds, 2),
    }


def sparse(tree: Path, folder: Path) -> Figures:
    """The first resync of 1 TiB that holds 1 GiB, a part of it in small pieces as a file system leaves them."""
    size_bytes = 1 << 40
    with pair(tree, folder, size_bytes) as cluster:
        fill(cluster.node1.image, size_bytes, 0, 1 << 30)
        with cluster.node1.image.open("r+b") as file:
            for at in range(2 << 30, size_bytes, 128 * _MIB):
                file.seek(at)
                file.write(b"x" * _REQUEST_BYTES)
        began_s = time.monotonic()
        cluster.create().begin()
        cluster.node1.wait_replication("SyncSource")
        resync_s = time.monotonic()
        cluster.wait_in_sync()
        ended_s = time.monotonic()
        stored = [node.image.stat().st_blocks * 512 for node in cluster.nodes]
        memory = [node.resident_bytes() for node in cluster.nodes]
        used_s = cpu_s(cluster)
    return {
        "start s": round(resync_s - began_s, 2),
        "resync s": round(ended_s - resync_s, 2),
        "processor s": round(used_s, 2),
        "source MiB": stored[0] >> 20,
        "target MiB": stored[1] >> 20,
        "resident MiB": max(memory) >> 20,
    }


def crash(tree: Path, folder: Path) -> Figures:
    """The Primary dies with a warm activity log, comes back, and gets its hot extents from the other node."""
    with pair(tree, folder, _DENSE_BYTES) as cluster:
        fill(cluster.node1.image, _DENSE_BYTES)
        cluster.up()
        client = Client("write", cluster.node1.uri, folder)
        time.sleep(2)
        client.finish()
        cluster.node1.kill9()
        cluster.node2.wait_alone()
        cluster.node2.ctl("promote")
        cluster.node2.write(0, b"2" * _MIB)
        began_s = time.monotonic()
        cluster.node1.start()
        total = cluster.node2.wait_for(lambda status: bool(status["volumes"][0]["resync_total_bytes"]))
        dirty = total["volumes"][0]["resync_total_bytes"]
        cluster.wait_in_sync()
        seconds = time.monotonic() - began_s
        cluster.quiesce().check_identical()
    return {"dirty MiB": dirty >> 20, "seconds with the start": round(seconds, 2)}


MEASURES: dict[str, Callable[[Path, Path], Figures]] = {
    "load": load,
    "reads": reads,
    "cold-reads": cold_reads,
    "verify": verify,
    "copy": copy,
    "sparse": sparse,
    "crash": crash,
}


def main() -> int:
    """Prints one line for each run, and medians."""
    if sys.argv[1:2] == ["client"]:
        kind, uri, size_bytes, results = sys.argv[2:]
        work_until_told(kind, uri, int(size_bytes), Path(results))
        return 0
    parser = argparse.ArgumentParser(prog="bench.resync", description="Measure resyncs.")
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("--tree", action="append", metavar="NAME=DIR", help="a checkout to measure")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if libnbd() is None:
        print("bench.resync: libnbd's Python module is not installed (Debian: python3-libnbd)", file=sys.stderr)
        return 1
    trees = dict(tree.split("=", 1) for tree in options.tree or [f"this={_HERE}"])
    figures: dict[str, list[Figures]] = {name: [] for name in trees}
    for _ in range(options.rounds):
        for name, tree in trees.items():
            with servers.image_folder() as folder:
                figures[name].append(MEASURES[options.what](Path(tree), folder))
            print(name, json.dumps(figures[name][-1]), flush=True)
    for name, rounds in figures.items():
        print("median", name, json.dumps({key: statistics.median(one[key] for one in rounds) for key in rounds[0]}))
    return 0


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(_HERE)
    sys.exit(main())
