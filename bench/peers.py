"""Replica beside other servers: the same clients, one server after the other, round after round.

    python -m bench.peers [--rounds N] [--seconds S] [--json FILE] [--write-docs]

Figures move with the machine and from minute to minute; so every round measures all servers in turn (A B A B …),
and the median of the rounds is what counts. The ratio to the C mirror compares like with like: both answer a write
when two processes have it; it is the ratio to the faster of the two C mirrors (one links its halves by a Unix socket,
one by TCP; Replica's link is TCP). The other servers replicate nothing: they show what replication costs.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from bench import servers
from bench.load import Client, Workload, fio_rate, has_fio, libnbd

REPLICA, MIRRORS = "Replica C", ("C mirror", "C mirror, TCP")
LIBNBD_WORKLOADS = (
    Workload("write", 4 << 10),
    Workload("write", 4 << 10, 16),
    Workload("write", 64 << 10),
    Workload("write", 1 << 20),
    Workload("read", 4 << 10, 16),
    Workload("flush", 4 << 10),
)
FIO_WORKLOADS = (
    Workload("write", 4 << 10),
    Workload("write", 4 << 10, 16),
    Workload("write", 4 << 10, 64),
    Workload("write", 1 << 20, 4),
    Workload("read", 4 << 10, 16),
)
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


@dataclass
class Row:
    """One workload of one client: the rates of every server, in requests per second, one per round."""

    client: str
    workload: Workload
    rates: dict[str, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """ "libnbd: write 4 KiB, depth 16"."""
        return f"{self.client}: {self.workload.name}"

    def median(self, server: str) -> float | None:
        """The median rate of this server."""
        return statistics.median(self.rates[server]) if self.rates.get(server) else None

    def ratio(self) -> float | None:
        """Replica's rate in relation to that of the faster C mirror."""
        ours, theirs = self.median(REPLICA), max(self.median(name) or 0.0 for name in MIRRORS)
        return ours / theirs if ours and theirs else None


@dataclass
class Comparison:
    """What was measured, and where."""

    command: str
    when: str
    machine: list[str]
    names: list[str]
    rows: list[Row]
    resident_bytes: dict[str, int]
    left_out: list[str]


def compare(rounds: int, seconds: float, note: Callable[[str], None] = lambda text: None) -> Comparison:
    """Measure; takes about rounds × seconds × servers × workloads. RuntimeError without any client."""
    clients: list[tuple[str, tuple[Workload, ...], Callable[[str, Workload], float]]] = []
    left_out: list[str] = []
    if libnbd() is not None:
        clients.append(("libnbd", LIBNBD_WORKLOADS, lambda uri, workload: _libnbd_rate(uri, workload, seconds)))
    else:
        left_out.append("libnbd (python3-libnbd)")
    if has_fio():
        fio_seconds = max(1.0, seconds)
        clients.append(("fio", FIO_WORKLOADS, lambda uri, workload: fio_rate(uri, workload, fio_seconds)))
    else:
        left_out.append("fio")
    if not clients:
        raise RuntimeError("there is no client to measure with: install python3-libnbd or fio")
    with _all_servers(left_out) as targets:
        rows = [Row(name, workload) for name, workloads, _ in clients for workload in workloads]
        measures = {name: measure for name, _, measure in clients}
        for number in range(rounds):
            for row in rows:
                note(f"round {number + 1} of {rounds}: {row.name}")
                for target in targets:
                    row.rates.setdefault(target.name, []).append(measures[row.client](target.uri, row.workload))
        resident = {target.name: target.resident_bytes() for target in targets}
        names = [target.name for target in targets]
    command = " ".join(("python -m bench.peers", f"--rounds {rounds}", f"--seconds {seconds:g}"))
    return Comparison(command, date.today().isoformat(), machine(), names, rows, resident, left_out)


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
        if libnbd() is not None:
            for target in targets:
                with Client(target.uri, Workload("write", 4096)) as client:
                    client.warm_up()
        yield targets


def _libnbd_rate(uri: str, workload: Workload, seconds: float) -> float:
    with Client(uri, workload) as client:
        return client.rate(seconds)


def machine() -> list[str]:
    """The machine and the programs, one fact each."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    facts = [
        f"{os.cpu_count()} × {cpu[1] if cpu else platform.machine()}",
        f"Linux {platform.release()}",
        f"Python {platform.python_version()}, uvloop {uvloop.__version__}",
        f"images on {'tmpfs' if Path('/dev/shm').is_dir() else 'the disk of the temporary folder'}",
    ]
    for program in ("qemu-nbd", "nbdkit", "fio"):
        with contextlib.suppress(OSError):
            done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
            facts.append(done.stdout.splitlines()[0].strip() if done.stdout else program)
    return facts


# ── showing it ───────────────────────────────────────────────────────────────────────────────────────────────


def cells(comparison: Comparison) -> Iterator[list[str]]:
    """The table's rows: the name, each server's rate, the ratio."""
    for row in comparison.rows:
        ratio = row.ratio()
        rates = [_rate_text(row.median(name), row.workload) for name in comparison.names]
        yield [row.name, *rates, f"{ratio:.2f} ×" if ratio else "–"]
    resident = (comparison.resident_bytes[name] for name in comparison.names)
    yield ["resident memory after it", *(f"{bytes_ / (1 << 20):.0f} MiB" for bytes_ in resident), ""]


def heads(comparison: Comparison) -> list[str]:
    """The table's columns."""
    return ["requests per second", *comparison.names, "ratio to C mirror"]


def _rate_text(rate: float | None, workload: Workload) -> str:
    if rate is None:
        return "–"
    if workload.length >= 1 << 20:
        return f"{rate:,.0f} ({rate * workload.length / 1e9:.1f} GB/s)"
    return f"{rate:,.0f}"


def as_table(comparison: Comparison) -> Table:
    """The table for a terminal."""
    table = Table(title=f"Replica beside other servers ({comparison.when})")
    for number, head in enumerate(heads(comparison)):
        table.add_column(head, justify="right" if number else "left", no_wrap=True)
    for row in cells(comparison):
        table.add_row(*row)
    return table


def as_markdown(comparison: Comparison) -> str:
    """The section of docs/benchmarks.md between its markers."""
    lines = [
        f"Measured on {comparison.when} with `{comparison.command}`; medians of the rounds, requests per second.",
        "",
        *(f"- {fact}" for fact in comparison.machine),
    ]
    if comparison.left_out:
        lines.append(f"- not installed, hence not measured: {', '.join(comparison.left_out)}")
    columns = heads(comparison)
    lines += ["", f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    lines += [f"| {' | '.join(row)} |" for row in cells(comparison)]
    return "\n".join(lines) + "\n"


def write_document(comparison: Comparison, document: Path = DOCUMENT) -> None:
    """Put the figures between the markers of the document; RuntimeError when it has none."""
    before, begin, rest = document.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise RuntimeError(f"{document} lacks the markers {BEGIN} and {END}")
    document.write_text(f"{before}{BEGIN}\n{as_markdown(comparison)}{END}{after}")


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything, for programs."""
    document = asdict(comparison)
    for row, stored in zip(comparison.rows, document["rows"], strict=True):
        stored |= {"name": row.name, "medians": {name: row.median(name) for name in row.rates}, "ratio": row.ratio()}
    return document


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 measured, 1 not possible here."""
    parser = argparse.ArgumentParser(prog="bench.peers", description="Compare Replica with other NBD servers.")
    parser.add_argument("--rounds", type=int, default=5, help="how often every server is measured (default 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each single measurement (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    parser.add_argument("--write-docs", action="store_true", help=f"update {DOCUMENT.name}")
    options = parser.parse_args(arguments)
    console = Console()
    # A pipe has no width of its own, and a table broken into words is of no use.
    console = console if console.is_terminal else Console(width=170)
    try:
        with console.status("starting the servers") as status:
            comparison = compare(options.rounds, options.seconds, status.update)
    except (RuntimeError, OSError) as error:
        print(f"bench.peers: {error}", file=sys.stderr)
        return 1
    console.print(as_table(comparison))
    for name in comparison.left_out:
        console.print(f"not installed: {name}")
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(comparison), indent=2) + "\n")
    if options.write_docs:
        write_document(comparison)
    return 0


if __name__ == "__main__":
    sys.exit(main())
