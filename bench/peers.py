"""Replica beside other servers: the same clients, one server after the other, round after round.

    python -m bench.peers [--rounds N] [--seconds S] [--json FILE] [--write-docs]

Figures move with the machine and from minute to minute; so every round measures all servers in turn, and ratios are
made in each round. The ratio to the C mirror compares like with like: both answer a write when two processes have it;
it is the ratio to the faster of the two C mirrors (one links its halves by a Unix socket, one by TCP; Replica's link is
TCP). The other servers replicate nothing: they show what replication costs. `floor` is the bound of what a pair in
Python can do, see `bench.floor`.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from bench import charts, document, expectation, machine, servers
from bench.expectation import Expectation
from bench.latency import PERCENTILES, duration
from bench.load import Client, Workload, has_fio, libnbd
from bench.measure import Row, in_turn
from bench.spread import Spread

REPLICA, FLOOR, QEMU_NBD, NBDKIT = "Replica C", "floor", "qemu-nbd", "nbdkit"
MIRRORS = ("C mirror", "C mirror, TCP")
#: By depth; these also have tables of their own for latency and processor time.
SMALL_WRITES: Final = {depth: Workload("write", 4 << 10, depth) for depth in (1, 16, 64)}
LARGE_WRITES: Final = {depth: Workload("write", 1 << 20, depth) for depth in (1, 4)}
READS: Final = Workload("read", 4 << 10, 16)
FLUSHED: Final = Workload("flush", 4 << 10)
WORKLOADS: Final = (*SMALL_WRITES.values(), *LARGE_WRITES.values(), READS, FLUSHED)
SECTION: Final = "peers"
PROGRAMS: Final = ("qemu-nbd", "nbdkit", "fio")


@dataclass
class Comparison:
    """What was measured, and where."""

    command: str
    facts: list[str]
    names: list[str]
    rows: list[Row]
    resident_bytes: dict[str, int]
    left_out: list[str]

    def row(self, workload: Workload) -> Row:
        """Of this workload; an empty one if it was not measured."""
        return next((row for row in self.rows if row.workload == workload), Row(workload))

    def mirror(self, row: Row) -> str:
        """The faster of the C mirrors."""
        return max(MIRRORS, key=lambda name: row.rate(name) or 0.0)

    def ratio(self, row: Row) -> Spread | None:
        """Replica's rate in relation to that of the faster C mirror."""
        return row.rate_ratio(REPLICA, self.mirror(row))


def compare(rounds: int, seconds: float, note: Callable[[str], None] = lambda text: None) -> Comparison:
    """Measure; takes about rounds × seconds × servers × workloads. RuntimeError without any client."""
    left_out: list[str] = []
    workloads = list(WORKLOADS)
    if not has_fio():
        left_out.append("fio")
        workloads = [FLUSHED]
    if libnbd() is None:
        left_out.append("libnbd (python3-libnbd)")
        workloads.remove(FLUSHED)
    if not workloads:
        raise RuntimeError("there is no client to measure with: install fio and python3-libnbd")
    in_memory = Path("/dev/shm").is_dir()
    facts = [*machine.facts(PROGRAMS), f"images on {'tmpfs' if in_memory else 'the disk of the temporary folder'}"]
    with _all_servers(left_out) as targets:
        rows = in_turn(targets, workloads, rounds, seconds, note)
        resident = {target.name: target.resident_bytes() for target in targets}
        names = [target.name for target in targets]
    command = f"python -m bench.peers --rounds {rounds} --seconds {seconds:g}"
    return Comparison(command, facts, names, rows, resident, left_out)


@contextlib.contextmanager
def _all_servers(left_out: list[str]) -> Iterator[list[servers.Target]]:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(servers.image_folder())
        targets = [stack.enter_context(servers.replica(folder))]
        for name, (start, programs) in servers.PEERS.items():
            if missing := servers.missing(programs):
                left_out.append(f"{name} ({', '.join(missing)})")
            else:
                targets.append(stack.enter_context(start(folder)))
        warm_up(targets)
        yield targets


def warm_up(targets: Sequence[servers.Target]) -> None:
    """Write what the clients will write to, once."""
    if libnbd() is not None:
        for target in targets:
            with Client(target.uri, Workload("write", 4096)) as client:
                client.warm_up()


# ── what is expected ─────────────────────────────────────────────────────────────────────────────────────────


def expectations(comparison: Comparison) -> list[Expectation]:
    """What this is to reach, and what it did."""

    def to_mirror(workload: Workload, bound: float) -> Expectation:
        ratio = comparison.ratio(comparison.row(workload))
        return Expectation(f"{workload.name}: rate of the C mirror", ratio and ratio.median, bound)

    def to_single(name: str, workload: Workload, bound: float) -> Expectation:
        ratio = comparison.row(workload).rate_ratio(REPLICA, name)
        return Expectation(f"{workload.name}: rate of {name}, which has one copy", ratio and ratio.median, bound)

    one, sixteen = (comparison.row(SMALL_WRITES[depth]) for depth in (1, 16))
    median_us, tail_us = (sixteen.latencies(REPLICA).percentile_us(percentile) for percentile in (50, 99))
    ours_us, floor_us = (one.latencies(name).percentile_us(50) for name in (REPLICA, FLOOR))
    return [
        *(to_mirror(SMALL_WRITES[depth], bound) for depth, bound in ((1, 1.3), (16, 5.0), (64, 7.0))),
        *(to_mirror(workload, 3.0) for workload in LARGE_WRITES.values()),
        *(to_single(QEMU_NBD, workload, 0.6) for workload in LARGE_WRITES.values()),
        to_mirror(FLUSHED, 0.83),
        to_single(QEMU_NBD, sixteen.workload, 1.5),
        to_single(NBDKIT, sixteen.workload, 0.4),
        to_single(QEMU_NBD, READS, 3.0),
        Expectation(
            f"{sixteen.workload.name}: p99 in relation to p50",
            tail_us / median_us if tail_us and median_us else None,
            4.0,
            at_most=True,
        ),
        Expectation(
            f"{one.workload.name}: p50 in relation to that of `floor`",
            ours_us / floor_us if ours_us and floor_us else None,
            1.5,
            at_most=True,
        ),
    ]


# ── showing it ───────────────────────────────────────────────────────────────────────────────────────────────


def rate_table(comparison: Comparison) -> list[str]:
    """Requests per second."""
    rows = []
    for row in comparison.rows:
        rates = (_rate_text(row.rate(name), row.workload) for name in comparison.names)
        rows.append([row.workload.name, *rates, str(comparison.ratio(row) or "–")])
    resident = (comparison.resident_bytes[name] for name in comparison.names)
    rows.append(["resident memory after it", *(f"{bytes_ / (1 << 20):.0f} MiB" for bytes_ in resident), ""])
    return document.table(["requests per second", *comparison.names, "ratio to C mirror"], rows)


def _rate_text(rate: float | None, workload: Workload) -> str:
    if rate is None:
        return "–"
    if workload.length >= 1 << 20:
        return f"{rate:,.0f} ({rate * workload.length / 1e9:.1f} GB/s)"
    return f"{rate:,.0f}"


def latency_table(comparison: Comparison) -> list[str]:
    """Percentiles of small writes, over all rounds."""
    rows = []
    for workload in SMALL_WRITES.values():
        latencies = [comparison.row(workload).latencies(name) for name in comparison.names]
        for percentile in PERCENTILES:
            figures = (duration(each.percentile_us(percentile)) for each in latencies)
            rows.append([f"{workload.name}: p{percentile:g}", *figures])
    return document.table(["latency", *comparison.names], rows)


def cost_table(comparison: Comparison) -> list[str]:
    """Processor time of a request."""
    rows = []
    for row in comparison.rows:
        costs = (duration(row.cpu_us(name)) for name in comparison.names)
        ratio = row.cpu_ratio(REPLICA, comparison.mirror(row))
        rows.append([row.workload.name, *costs, str(ratio or "–")])
    return document.table(["processor time per request", *comparison.names, "ratio to C mirror"], rows)


def as_markdown(comparison: Comparison) -> list[str]:
    """The tables, as they go into docs/benchmarks.md."""
    lines = [machine.how(comparison.command), "", *(f"- {fact}" for fact in comparison.facts)]
    if comparison.left_out:
        lines.append(f"- not installed, hence not measured: {', '.join(comparison.left_out)}")
    for table in (
        rate_table(comparison),
        latency_table(comparison),
        cost_table(comparison),
        document.table(expectation.HEADS, expectation.rows(expectations(comparison))),
    ):
        lines += ["", *table]
    return lines


def write_charts(comparison: Comparison, folder: Path = document.DOCS) -> None:
    """The pictures beside the tables."""
    for depth in (1, 16):
        row = comparison.row(SMALL_WRITES[depth])
        percentiles = {name: row.latencies(name) for name in comparison.names}
        picture = charts.latency_percentiles(f"4 KiB writes, depth {depth}", percentiles)
        (folder / f"latency-depth-{depth}.svg").write_text(picture)
    rates = {
        name: {depth: comparison.row(workload).rate(name) for depth, workload in SMALL_WRITES.items()}
        for name in comparison.names
    }
    (folder / "rate-by-depth.svg").write_text(charts.rate_by_depth("4 KiB writes per second, by depth", rates))


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything but the histograms, for programs."""
    return {
        "command": comparison.command,
        "facts": comparison.facts,
        "rows": [
            {
                "workload": row.workload.name,
                "rates": {name: row.rates(name) for name in comparison.names},
                "cpu_us": {name: row.costs(name) for name in comparison.names},
                "latency_us": {
                    name: {f"p{each:g}": row.latencies(name).percentile_us(each) for each in PERCENTILES}
                    for name in comparison.names
                },
            }
            for row in comparison.rows
        ],
        "resident_bytes": comparison.resident_bytes,
    }


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 measured, 1 not possible here."""
    parser = argparse.ArgumentParser(prog="bench.peers", description="Compare Replica with other NBD servers.")
    parser.add_argument("--rounds", type=int, default=4, help="how often every server is measured (default 4)")
    parser.add_argument("--seconds", type=float, default=0.8, help="for each single measurement (default 0.8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    parser.add_argument("--write-docs", action="store_true", help=f"update {document.BENCHMARKS.name} and its charts")
    options = parser.parse_args(arguments)
    try:
        with Console(stderr=True).status("starting the servers") as status:
            comparison = compare(options.rounds, options.seconds, status.update)
    except (RuntimeError, OSError) as error:
        print(f"bench.peers: {error}", file=sys.stderr)
        return 1
    print("\n".join(as_markdown(comparison)))
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(comparison), indent=2) + "\n")
    if options.write_docs:
        document.write_section(document.BENCHMARKS, SECTION, as_markdown(comparison))
        write_charts(comparison)
    return 0


if __name__ == "__main__":
    sys.exit(main())
