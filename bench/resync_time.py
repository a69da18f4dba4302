"""How long does a resync take, by how much of the volume differs?

    python -m bench.resync_time [--rounds N] [--write-docs]

The Secondary is stopped, the client writes random blocks of 4 KiB, the Secondary comes back: from the moment in which
the nodes are connected to the one in which both copies are the same. No client writes meanwhile. Beside it, `nbdcopy`
from one nbdkit to another: a plain copy of the whole image.
"""

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from rich.console import Console

from bench import charts, document, expectation, machine, servers
from bench.expectation import Expectation
from bench.latency import duration
from bench.load import Client, Workload, fio, has_fio, libnbd
from tests.cluster.cluster import Cluster, in_sync

SECTION: Final = "resync"
#: Of the volume's size, so much is written; of random blocks some are the same.
_WRITTEN: Final = (0.001, 0.01, 0.05)
_SIZE_BYTES: Final = 256 << 20
_RANDOM: Final = "resync"
_PLAIN_COPY: Final = "nbdcopy"
_PATIENCE_S: Final = 60.0


#: What copies → share of the volume → seconds, one per round.
Times = dict[str, dict[float, list[float]]]


def measure(rounds: int, size_bytes: int, note: Callable[[str], None] = lambda text: None) -> Times:
    """Each round copies each share once."""
    times: Times = {_RANDOM: {}, _PLAIN_COPY: {}}
    with servers.image_folder() as folder, Cluster(folder, size_bytes=size_bytes, **servers.DEFAULTS) as cluster:
        cluster.up()
        with Client(cluster.node1.uri, Workload("write", 4 << 10)) as client:
            client.warm_up(size_bytes)
        for number in range(rounds):
            for written in _WRITTEN:
                note(f"round {number + 1} of {rounds}: {written:.1%} is written")
                share, took_s = resync(cluster, written)
                times[_RANDOM].setdefault(round(share, 4), []).append(took_s)
            note(f"round {number + 1} of {rounds}: everything")
            times[_RANDOM].setdefault(1.0, []).append(full_resync(cluster))
            if not servers.missing(("nbdkit", "nbdcopy")):
                times[_PLAIN_COPY].setdefault(1.0, []).append(plain_copy(cluster.node1.image, folder / "copy.img"))
    return times


def resync(cluster: Cluster, written: float) -> tuple[float, float]:
    """Write while the Secondary is away, and let it come back: the share that was dirty, and the seconds."""
    cluster.node2.stop()
    cluster.node1.wait_alone()
    workload = Workload("write", 4 << 10, 64, cluster.size_bytes)
    fio([cluster.node1.uri], workload, _PATIENCE_S, most_bytes=round(written * cluster.size_bytes))
    dirty_bytes = cluster.node1.volume()["out_of_sync_bytes"]
    with cluster.node2.starting():
        pass
    cluster.node1.wait_connection("Connected")
    began_s = time.monotonic()
    cluster.wait_in_sync()
    return dirty_bytes / cluster.size_bytes, time.monotonic() - began_s


def full_resync(cluster: Cluster) -> float:
    """The Secondary's copy is declared bad; the seconds."""
    began_s = time.monotonic()
    if in_sync(cluster.node1.ctl("invalidate-remote")):
        cluster.node1.wait_for(lambda status: not in_sync(status))
    cluster.wait_in_sync()
    return time.monotonic() - began_s


def plain_copy(source: Path, target: Path) -> float:
    """nbdcopy between two nbdkits; its own start counts, as it is some milliseconds."""
    target.unlink(missing_ok=True)
    with target.open("xb") as file:
        file.truncate(source.stat().st_size)
    with servers.nbdkit_of(source) as readable, servers.nbdkit_of(target) as writable:
        began_s = time.monotonic()
        subprocess.run(["nbdcopy", readable.uri, writable.uri], check=True, capture_output=True, timeout=_PATIENCE_S)
        took_s = time.monotonic() - began_s
    target.unlink()
    return took_s


def as_markdown(times: Times, size_bytes: int) -> list[str]:
    """The table, as it goes into docs/benchmarks.md."""
    cells = []
    for name, share, each_s in _medians(times):
        mib_per_s = share * size_bytes / each_s / (1 << 20)
        cells.append(
            [f"{name}, {share:.2%} of {size_bytes >> 20} MiB", duration(each_s * 1e6), f"{mib_per_s:,.0f} MiB/s"]
        )
    plain, whole = (statistics.median(times[name][1.0]) if times[name] else None for name in (_PLAIN_COPY, _RANDOM))
    expected = Expectation("everything: rate of `nbdcopy`", plain / whole if plain and whole else None, 0.7)
    heads = ["what is copied", "time", "rate"]
    return [*document.table(heads, cells), "", *document.table(expectation.HEADS, expectation.rows([expected]))]


def chart(times: Times) -> str:
    """Time by share."""
    points = {
        name: [(math.log10(share), each_s * 1e6) for of, share, each_s in _medians(times) if of == name]
        for name in times
    }
    marks = {f"{share:g} %": math.log10(share / 100) for share in (0.1, 1, 10, 100)}
    return charts.lines("time of a resync, by how much of the volume differs", "dirty", points, marks, duration)


def _medians(times: Times) -> Iterator[tuple[str, float, float]]:
    for name, by_share in times.items():
        for share, all_s in sorted(by_share.items()):
            yield name, share, statistics.median(all_s)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 measured, 1 not possible here."""
    parser = argparse.ArgumentParser(prog="bench.resync_time", description="How long resyncs take.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size-mib", type=int, default=_SIZE_BYTES >> 20)
    parser.add_argument("--write-docs", action="store_true", help=f"update {document.BENCHMARKS.name} and its chart")
    options = parser.parse_args(arguments)
    if not has_fio() or libnbd() is None:
        print("bench.resync_time: the clients are missing: install fio and python3-libnbd", file=sys.stderr)
        return 1
    facts = machine.facts(("nbdcopy", "fio"))
    try:
        with Console(stderr=True).status("starting both nodes") as status:
            times = measure(options.rounds, options.size_mib << 20, status.update)
    except (RuntimeError, AssertionError, OSError, subprocess.SubprocessError) as error:
        print(f"bench.resync_time: {error}", file=sys.stderr)
        return 1
    how = machine.how(f"python -m bench.resync_time --rounds {options.rounds}")
    lines = [how, "", *(f"- {fact}" for fact in facts), "", *as_markdown(times, options.size_mib << 20)]
    print("\n".join(lines))
    if options.write_docs:
        document.write_section(document.BENCHMARKS, SECTION, lines)
        (document.DOCS / "resync-time.svg").write_text(chart(times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
