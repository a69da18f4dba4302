"""Conditions that are not kind: a volume far larger than the activity log reaches, many clients and resources at once,
disks that cannot keep up.

    python -m bench.strain [--only large|many|disk …] [--disk FOLDER] [--write-docs]

`disk` takes root: it bounds how much unwritten data the kernel keeps (vm.dirty_bytes), and puts that back.
"""

import argparse
import contextlib
import os
import resource
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from bench import cpu_time, document, expectation, machine, measure, peers, servers
from bench.expectation import Expectation
from bench.latency import PERCENTILES, Latencies, duration
from bench.load import Workload, fio, has_fio, libnbd
from replica import config, control
from replica.activity_log import EXTENT_SHIFT
from tests.cluster.cluster import Cluster

SECTION: Final = "strain"
_SMALL: Final = 4 << 10
_REACHES: Final = 20
_AT_ONCE: Final = 4
_DISK_WORKLOAD: Final = Workload("write", 64 << 10, 16)
_DISK_BYTES: Final = 4 << 30
_DIRTY_BYTES: Final = 32 << 20
_POLL_S: Final = 0.02
_VM: Final = Path("/proc/sys/vm")

Report = list[str]
Note = Callable[[str], None]


# ── a volume that the activity log covers a twentieth of ─────────────────────────────────────────────────────


def large(rounds: int, seconds: float, note: Note) -> Report:
    """Writes all over it need an update of the log each; writes in one place do not."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(servers.image_folder())
        size_bytes = _REACHES * _reach_bytes(folder)
        own = folder / "large"
        own.mkdir()
        note(f"copying holes of {size_bytes >> 30} GiB")
        target = stack.enter_context(servers.replica(own, size_bytes=size_bytes))
        peers.warm_up([target])
        places = {"256 MiB": Workload("write", _SMALL).span_bytes, f"all {size_bytes >> 30} GiB": size_bytes}
        workloads = [Workload("write", _SMALL, depth, span) for span in places.values() for depth in (1, 16, 64)]
        rows = measure.in_turn([target], workloads, rounds, seconds, note)
    names = {span: name for name, span in places.items()}
    cells = [
        [
            f"{row.workload.name}, in {names[row.workload.span_bytes]}",
            f"{row.rate(target.name) or 0:,.0f}",
            duration(row.cpu_us(target.name)),
            *(duration(row.latencies(target.name).percentile_us(each)) for each in PERCENTILES),
        ]
        for row in rows
    ]
    heads = ["a volume of 20 times the activity log's reach", "requests/s", "CPU per request", "p50", "p99", "p99.9"]
    return document.table(heads, cells)


def _reach_bytes(folder: Path) -> int:
    cluster = Cluster(folder)
    local = config.load_config(str(cluster.node1.config), "node1").resource(cluster.resource).local
    return local.al_extents << EXTENT_SHIFT


# ── many at once ─────────────────────────────────────────────────────────────────────────────────────────────


def many(rounds: int, seconds: float, note: Note) -> Report:
    """One client; four clients of one resource; one client each of four resources (which are four pairs of daemons)."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(servers.image_folder())
        targets = []
        for number in range(_AT_ONCE):
            own = folder / str(number)
            own.mkdir()
            targets.append(stack.enter_context(servers.replica(own, name=f"r{number}")))
        peers.warm_up(targets)
        ways: dict[str, list[servers.Target]] = {
            "one client": targets[:1],
            f"{_AT_ONCE} clients of one resource": targets[:1] * _AT_ONCE,
            f"{_AT_ONCE} resources, a client each": targets,
        }
        cells = []
        for depth in (1, 16):
            for way, chosen in ways.items():
                note(f"{way}, depth {depth}")
                found = [_at_once(chosen, Workload("write", _SMALL, depth), seconds) for _ in range(rounds)]
                middle = sorted(found, key=lambda each: each.rate)[len(found) // 2]
                figures = (f"{middle.rate:,.0f}", duration(middle.cpu_us), f"{middle.servers:.2f}", f"{middle.all:.2f}")
                cells.append([f"{way}, depth {depth} each", *figures])
    heads = ["4 KiB writes", "requests/s in all", "CPU per request", "processors busy: nodes", "nodes and clients"]
    return document.table(heads, cells)


@dataclass(frozen=True)
class _Busy:
    rate: float
    cpu_us: float
    servers: float
    all: float


def _at_once(targets: Sequence[servers.Target], workload: Workload, seconds: float) -> _Busy:
    processes = {process_id for target in targets for process_id in target.process_ids}

    def spent_s() -> tuple[float, float]:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return cpu_time.spent_ns(processes) / 1e9, children.ru_utime + children.ru_stime

    before = spent_s()
    seen = fio([target.uri for target in targets], workload, seconds)
    nodes_s, clients_s = (after - since for after, since in zip(spent_s(), before, strict=True))
    took_s = seen.requests / seen.rate
    return _Busy(seen.rate, nodes_s * 1e6 / seen.requests, nodes_s / took_s, (nodes_s + clients_s) / took_s)


# ── disks that cannot keep up ────────────────────────────────────────────────────────────────────────────────


def disk(rounds: int, folder: Path, note: Note) -> Report:
    """More is written than the kernel may keep unwritten: from then on, who writes has to wait for the disk."""
    seen: dict[str, Latencies] = {}
    rates: dict[str, list[float]] = {}
    statuses = {node: Latencies() for node in ("Primary", "Secondary")}
    with bounded_dirty_memory(_DIRTY_BYTES):
        for number in range(rounds):
            for name in ("Replica C", "C mirror"):
                note(f"{name} on the disk, {number + 1} of {rounds}")
                with _on_disk(name, folder, statuses) as target:
                    found = fio([target.uri], _DISK_WORKLOAD, 20.0, most_bytes=_DISK_BYTES)
                seen.setdefault(name, Latencies()).merge(found.latencies)
                rates.setdefault(name, []).append(found.rate)
    heads = [f"{_DISK_WORKLOAD.name}, on the disk", "MiB/s", *(f"p{each:g}" for each in PERCENTILES), "longest"]
    cells = []
    answers = {f"`status` of the {node} meanwhile": latencies for node, latencies in statuses.items()}
    for name, latencies in {**seen, **answers}.items():
        rate = statistics.median(rates[name]) * _DISK_WORKLOAD.length / (1 << 20) if name in rates else None
        figures = (duration(latencies.percentile_us(each)) for each in (*PERCENTILES, 100))
        cells.append([name, f"{rate:,.0f}" if rate else "", *figures])
    ours, theirs = (seen[name].percentile_us(99.9) for name in ("Replica C", "C mirror"))
    worst_us = max(latencies.percentile_us(100) or 0 for latencies in statuses.values())
    expected = [
        Expectation(
            "p99.9 in relation to the C mirror's", ours / theirs if ours and theirs else None, 1.0, at_most=True
        ),
        Expectation("longest answer to `status`", worst_us / 1e3 or None, 100, "ms", at_most=True),
    ]
    return [*document.table(heads, cells), "", *document.table(expectation.HEADS, expectation.rows(expected))]


@contextlib.contextmanager
def _on_disk(name: str, folder: Path, statuses: Mapping[str, Latencies]) -> Iterator[servers.Target]:
    with tempfile.TemporaryDirectory(prefix="rb-", dir=folder) as place:
        if name == "C mirror":
            with servers.c_mirror(Path(place)) as target:
                yield target
            return
        with Cluster(Path(place), size_bytes=servers.SIZE_BYTES, **servers.DEFAULTS) as cluster:
            cluster.up()
            with (
                asking_for_status(cluster.node1.socket, statuses["Primary"]),
                asking_for_status(cluster.node2.socket, statuses["Secondary"]),
            ):
                yield servers.Target(name, cluster.node1.uri)


@contextlib.contextmanager
def asking_for_status(path: Path, answers: Latencies) -> Iterator[None]:
    """Somebody asks for the status all the time; `answers` gets how long each answer took."""
    stop = threading.Event()

    def ask() -> None:
        while not stop.wait(_POLL_S):
            began_ns = time.monotonic_ns()
            control.call(path, "status", {}, timeout_s=60)
            answers.add(time.monotonic_ns() - began_ns)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def bounded_dirty_memory(limit_bytes: int, vm: Path = _VM) -> Iterator[None]:
    """The kernel keeps at most so much unwritten data; it is as it was when this ends. PermissionError: takes root."""
    pairs = [("dirty_bytes", "dirty_ratio"), ("dirty_background_bytes", "dirty_background_ratio")]
    # Of each pair one counts, and writing it makes the other one zero.
    before = {pair: next(name for name in pair if _number(vm / name)) for pair in pairs}
    values = {name: _number(vm / name) for name in before.values()}
    try:
        (vm / "dirty_background_bytes").write_text(str(limit_bytes // 2))
        (vm / "dirty_bytes").write_text(str(limit_bytes))
        yield
    finally:
        for name, value in values.items():
            (vm / name).write_text(str(value))


def _number(file: Path) -> int:
    return int(file.read_text())


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 measured, 1 not possible here."""
    parser = argparse.ArgumentParser(prog="bench.strain", description="Replica under conditions that are not kind.")
    parser.add_argument("--only", nargs="*", choices=("large", "many", "disk"), default=("large", "many", "disk"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each single measurement (default 1)")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"), help="a folder on a disk (default /var/tmp)")
    parser.add_argument("--write-docs", action="store_true", help=f"update {document.BENCHMARKS.name}")
    options = parser.parse_args(arguments)
    if not has_fio() or libnbd() is None:
        print("bench.strain: the clients are missing: install fio and python3-libnbd", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was set is put back then, too
    lines = [machine.how("python -m bench.strain"), "", *(f"- {fact}" for fact in machine.facts(("fio",)))]
    with Console(stderr=True).status("") as status:
        if "large" in options.only:
            lines += ["", *large(options.rounds, options.seconds, status.update)]
        if "many" in options.only:
            lines += ["", *many(options.rounds, options.seconds, status.update)]
        if "disk" in options.only and os.geteuid() == 0:
            lines += ["", *disk(options.rounds, options.disk, status.update)]
    print("\n".join(lines))
    if options.write_docs:
        document.write_section(document.BENCHMARKS, SECTION, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
