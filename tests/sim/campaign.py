"""The command line: many seeds, on all processors, and what they come to."""

import argparse
import contextlib
import functools
import sys
import time
from collections import Counter
from collections.abc import Iterator

from tests.sim.run import Listen, Outcome, quiet, run_seed
from tests.sim.workers import in_order, usable_cpus

#: Seeds that a process takes at once.
CHUNK = 10
#: Between two lines that say how far it is.
PROGRESS_S = 60.0


def main(arguments: list[str] | None = None) -> int:
    """`python -m tests.sim`."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description="Run seeds of the simulator.")
    parser.add_argument("--seeds", type=int, help="how many seeds to run (default 100, for a canary at most 2000)")
    parser.add_argument("--start", type=int, default=1, help="the first seed (default 1)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1; 0: one for each processor)")
    parser.add_argument("--canary", help="plant this bug and run until it is found; 'all': each of them")
    parser.add_argument("--keep-going", action="store_true", help="go on after a seed that failed")
    parser.add_argument("--verbose", action="store_true", help="print every event (one process)")
    parser.add_argument("--checksums", action="store_true", help="print the checksum of each run")
    options = parser.parse_args(arguments)
    options.jobs = 1 if options.verbose else options.jobs or usable_cpus()
    if options.canary:
        from tests.sim import canaries

        return canaries.hunt(options.canary, options.start, options.seeds or canaries.MOST_SEEDS, options.jobs)
    return campaign(options, range(options.start, options.start + (options.seeds or 100)))


_for_good = contextlib.ExitStack()


@functools.cache
def _listen() -> Listen:
    """`quiet()` for as long as this process lives."""
    return _for_good.enter_context(quiet())


def _run(seed: int, *, checksum: bool) -> Outcome:
    return run_seed(seed, _listen(), checksum=checksum)


def _outcomes(options: argparse.Namespace, seeds: range) -> Iterator[Outcome]:
    if options.jobs > 1:
        yield from in_order(functools.partial(_run, checksum=options.checksums), seeds, options.jobs, CHUNK)
        return
    with quiet(echo=options.verbose) as listen:
        for seed in seeds:
            yield run_seed(seed, listen, echo=options.verbose, checksum=options.checksums)


def campaign(options: argparse.Namespace, seeds: range) -> int:
    """Run the seeds, report failures with their trace, sum up. The exit status: 1 when one failed, 130 after Ctrl-C."""
    totals = Totals()
    status = 0
    try:
        with contextlib.closing(_outcomes(options, seeds)) as outcomes:
            for outcome in outcomes:
                totals.add(outcome)
                if options.checksums:
                    print(f"seed {outcome.seed} checksum {outcome.checksum:08x}", flush=True)
                if outcome.violation is not None:
                    status = 1
                    report(outcome)
                    if not options.keep_going:
                        break
                totals.progress(len(seeds))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        status = 130
    totals.print()
    return status


class Totals:
    """What all runs come to."""

    def __init__(self) -> None:
        self.began_s = self._said_s = time.monotonic()
        self.runs = self.failed = 0
        self.virtual_s = 0.0
        self.sums: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()

    def add(self, outcome: Outcome) -> None:
        self.runs += 1
        self.failed += outcome.violation is not None
        self.virtual_s += outcome.virtual_s
        self.faults.update(outcome.faults)
        for name in ("steps", "requests", "answers", "errors", "checks"):
            self.sums[name] += getattr(outcome, name)

    def progress(self, seeds: int) -> None:
        now_s = time.monotonic()
        if now_s - self._said_s >= PROGRESS_S:
            self._said_s = now_s
            print(f"{self.runs} of {seeds} seeds, {self.failed} failed", file=sys.stderr, flush=True)

    def print(self) -> None:
        spent_s, sums = time.monotonic() - self.began_s, self.sums
        print(
            f"{self.runs} seeds, {self.failed} failed, {self.virtual_s:.0f} simulated seconds in {spent_s:.1f} s "
            f"({self.runs / spent_s:.1f} seeds/s, {self.virtual_s / spent_s:.1f} simulated s/s): {sums['requests']} "
            f"requests, {sums['answers']} answers ({sums['errors']} errors), {sums['checks']} checks of Cover, "
            f"{sums['steps']} steps"
        )
        print("faults and verbs: " + ", ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items())))


def report(outcome: Outcome, lines: int = 60) -> None:
    """What a person needs to understand a failing seed."""
    print(f"\nseed {outcome.seed} FAILED: {outcome.violation}")
    for line in outcome.trace[-lines:]:
        print(f"  {line}")
    print(f"replay: python -m tests.sim --seeds 1 --start {outcome.seed} --verbose\n", flush=True)
