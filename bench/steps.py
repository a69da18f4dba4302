"""Where the time of a 4 KiB write goes: processor time by step, system calls, functions.

    python -m bench.steps [--rounds N] [--seconds S] [--write-docs]

By step: servers that do ever more of the work (`bench.floor.Steps`), then Replica; each difference is a step. (A
profiler that counts calls would slow down some steps more than others.) System calls are counted by strace, functions
by py-spy, where they are installed.
"""

import argparse
import collections
import contextlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from bench import document, machine, measure, peers, servers
from bench.floor import Steps
from bench.load import has_fio, libnbd, watch

SECTION: Final = "steps"
_DEPTHS: Final = (1, 16, 64)
_NODES: Final = ("Primary", "Secondary")
_SAMPLES_PER_S: Final = 500
#: Of all samples, for a function to be shown.
_LEAST_SHARE: Final = 0.01
_IDLE: Final = "_worker (concurrent/futures"

Note = Callable[[str], None]


# ── by step ──────────────────────────────────────────────────────────────────────────────────────────────────


def by_step(rows: Sequence[measure.Row]) -> list[str]:
    """Differences of processor time, in microseconds for each request."""
    servers_in_order = [str(Steps.RECEIVE), str(Steps.WRITE), peers.FLOOR, peers.REPLICA]
    names = [
        "receive, take apart, answer",
        "write on one node (`pwrite`)",
        "send on; the Secondary receives, writes, answers",
        "what Replica does besides: activity log, bitmap, order, limits, checks",
        "**all**",
    ]
    columns = []
    for row in rows:
        costs = [row.cpu_us(name) or 0.0 for name in servers_in_order]
        columns.append([after - before for before, after in zip([0.0, *costs], costs, strict=False)] + [costs[-1]])
    cells = [[name, *(f"{column[number]:.1f} µs" for column in columns)] for number, name in enumerate(names)]
    return document.table(["processor time of a 4 KiB write", *(f"depth {row.workload.depth}" for row in rows)], cells)


# ── system calls ─────────────────────────────────────────────────────────────────────────────────────────────


def read_strace(summary: str) -> dict[str, int]:
    """System calls and how often, from the output of `strace -c`."""
    counts = {}
    for line in summary.splitlines():
        found = re.fullmatch(r"\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)(?:\s+\d+)?\s+(\w+)", line)
        if found and found[2] != "total":
            counts[found[2]] = int(found[1])
    return counts


@contextlib.contextmanager
def counting_calls(process_id: int, counts: dict[str, int]) -> Iterator[None]:
    """The system calls of a process and its threads while this lasts."""
    with tempfile.NamedTemporaryFile("r", prefix="strace-") as output:
        command = ["strace", "-c", "-f", "-q", "-o", output.name, "-p", str(process_id)]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as strace:
            _wait_traced(process_id, strace)
            try:
                yield
            finally:
                strace.send_signal(signal.SIGINT)
        counts |= read_strace(output.read())


def _wait_traced(process_id: int, strace: "subprocess.Popen[bytes]") -> None:
    status = Path(f"/proc/{process_id}/status")
    while f"TracerPid:\t{strace.pid}" not in status.read_text():
        if strace.poll() is not None:
            raise RuntimeError("strace cannot look at that process here")


def system_calls(target: servers.Target, seconds: float, note: Note) -> list[str]:
    """For each request, on each node."""
    cells: dict[str, list[str]] = {}
    columns = [(node, depth) for node in range(2) for depth in _DEPTHS]
    for column, (node, depth) in enumerate(columns):
        note(f"system calls, {_NODES[node]}, depth {depth}")
        counts: dict[str, int] = {}
        with counting_calls(target.process_ids[node], counts):
            seen = watch(target.uri, peers.SMALL_WRITES[depth], seconds)
        for name, count in counts.items():
            if count >= seen.requests / 100:
                cells.setdefault(name, ["0"] * len(columns))[column] = f"{count / seen.requests:.2f}"
    heads = ["system calls per 4 KiB write", *(f"{_NODES[node]}, depth {depth}" for node, depth in columns)]
    return document.table(heads, [[f"`{name}`", *row] for name, row in sorted(cells.items())])


# ── functions ────────────────────────────────────────────────────────────────────────────────────────────────


def read_stacks(folded: str) -> Mapping[str, int]:
    """Samples by the innermost function, from stacks in one line each ("a;b;c 17"); threads that wait for work do not
    count.
    """
    samples: collections.Counter[str] = collections.Counter()
    for line in folded.splitlines():
        stack, _, count = line.rpartition(" ")
        if not stack.rpartition(";")[2].startswith(_IDLE):
            samples[re.sub(r":\d+\)$", ")", stack.rpartition(";")[2])] += int(count)
    return samples


def functions(target: servers.Target, depth: int, seconds: float, note: Note) -> list[str]:
    """The functions that the processor was found in most, on each node; in a function is also what it calls in C."""
    shares: dict[str, list[float]] = {}
    for node in range(2):
        note(f"functions, {_NODES[node]}")
        with tempfile.NamedTemporaryFile("r", prefix="py-spy-") as output:
            command = [
                *("py-spy", "record", "--pid", str(target.process_ids[node]), "--duration", f"{round(seconds)}"),
                *("--rate", str(_SAMPLES_PER_S), "--format", "raw", "--output", output.name),
            ]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as profiler:
                watch(target.uri, peers.SMALL_WRITES[depth], seconds + 1)
            if profiler.returncode:
                raise RuntimeError("py-spy cannot look at that process here")
            samples = read_stacks(output.read())
        whole = sum(samples.values()) or 1
        for name, count in samples.items():
            shares.setdefault(name, [0.0, 0.0])[node] = count / whole
    most = sorted(shares.items(), key=lambda each: -max(each[1]))
    cells = [[f"`{name}`", *(f"{share:.0%}" for share in row)] for name, row in most if max(row) >= _LEAST_SHARE]
    return document.table([f"share of samples, depth {depth}", *_NODES], cells)


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────


def measure_all(rounds: int, seconds: float, note: Note) -> list[str]:
    """All tables. RuntimeError without a client."""
    if not has_fio() or libnbd() is None:
        raise RuntimeError("the clients are missing: install fio and python3-libnbd")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(servers.image_folder())
        parts = [stack.enter_context(servers.part_of_floor(folder, steps)) for steps in (Steps.RECEIVE, Steps.WRITE)]
        floor = stack.enter_context(servers.floor(folder))
        ours = stack.enter_context(servers.replica(folder))
        peers.warm_up([*parts, floor, ours])
        workloads = [peers.SMALL_WRITES[depth] for depth in _DEPTHS]
        lines = by_step(measure.in_turn([*parts, floor, ours], workloads, rounds, seconds, note))
        if shutil.which("strace"):
            lines += ["", *system_calls(ours, seconds, note)]
        if shutil.which("py-spy"):
            lines += ["", *functions(ours, 16, max(3.0, seconds), note)]
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 measured, 1 not possible here."""
    parser = argparse.ArgumentParser(prog="bench.steps", description="Where the time of a write goes.")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each single measurement (default 1)")
    parser.add_argument("--write-docs", action="store_true", help=f"update {document.BENCHMARKS.name}")
    options = parser.parse_args(arguments)
    facts = machine.facts()
    try:
        with Console(stderr=True).status("starting the servers") as status:
            tables = measure_all(options.rounds, options.seconds, status.update)
    except (RuntimeError, OSError) as error:
        print(f"bench.steps: {error}", file=sys.stderr)
        return 1
    command = f"python -m bench.steps --rounds {options.rounds} --seconds {options.seconds:g}"
    lines = [machine.how(command), "", *(f"- {fact}" for fact in facts), "", *tables]
    print("\n".join(lines))
    if options.write_docs:
        document.write_section(document.BENCHMARKS, SECTION, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
