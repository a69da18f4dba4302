"""Two revisions of Replica, round by round: which is faster, by how much, and is that more than noise?

    python -m bench.compare BASE [--rounds N] [--seconds S]

BASE is anything git knows as a commit. It is checked out beside this one (in build/, removed at the end) and runs from
there; both pairs have the same Python, the same clients (this revision's) and the same work. The processor time that
both daemons together spend on a request holds still where rates jump: on a busy machine, believe that.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from rich.console import Console

from bench import document, machine, servers
from bench.load import has_fio, libnbd
from bench.measure import Row, in_turn
from bench.peers import WORKLOADS, warm_up
from bench.spread import Spread
from tests.cluster.cluster import ROOT

_OURS: Final = "this one"
_HEADS: Final = ("", "rate, BASE", "rate, now", "now/BASE", "", "CPU, BASE", "CPU, now", "now/BASE", "")


def commit_of(revision: str) -> str:
    """Its short name; RuntimeError when there is no such commit."""
    wanted = f"{revision}^{{commit}}"
    return _git("rev-parse", "--verify", "--quiet", "--short", wanted, otherwise=f"there is no commit {revision!r}")


@contextlib.contextmanager
def checked_out(commit: str, build: Path = ROOT / "build") -> Iterator[Path]:
    """A worktree of this commit."""
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"base-{commit}-", dir=build) as place:
        _git("worktree", "add", "--detach", place, commit)
        try:
            yield Path(place)
        finally:
            _git("worktree", "remove", "--force", place)


def _git(*arguments: str, otherwise: str = "") -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(otherwise or f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


def compare(
    base: str, rounds: int, seconds: float, note: Callable[[str], None] = lambda text: None
) -> tuple[str, list[Row]]:
    """BASE's short name, and the samples of both."""
    commit = commit_of(base)
    if not has_fio() or libnbd() is None:
        raise RuntimeError("the clients are missing: install fio and python3-libnbd")
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(checked_out(commit))
        folder = stack.enter_context(servers.image_folder())
        targets = []
        for name, root in ((commit, place), (_OURS, ROOT)):
            own = folder / name.replace(" ", "-")
            own.mkdir()
            targets.append(stack.enter_context(servers.replica(own, name=name, root=root)))
        warm_up(targets)
        return commit, in_turn(targets, WORKLOADS, rounds, seconds, note)


def table(base: str, rows: list[Row]) -> list[str]:
    """Medians, and the spread of the ratios: median (quartiles)."""
    cells = []
    for row in rows:
        rate, cost = row.rate_ratio(_OURS, base), row.cpu_ratio(_OURS, base)
        cells.append(
            [
                row.workload.name,
                *(f"{row.rate(name) or 0:,.0f}" for name in (base, _OURS)),
                *(str(rate), verdict(rate, more_is="faster", less_is="slower")),
                *(f"{row.cpu_us(name) or 0:.1f} µs" for name in (base, _OURS)),
                *(str(cost), verdict(cost, more_is="dearer", less_is="cheaper")),
            ]
        )
    return document.table([head.replace("BASE", base) for head in _HEADS], cells)


def verdict(ratio: Spread | None, *, more_is: str, less_is: str) -> str:
    """In a word: "~" is a difference that may be noise."""
    if ratio is None or not ratio.real:
        return "~"
    return f"**{more_is if ratio.median > 1 else less_is}**"


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 measured, 1 not possible (no such commit, no client)."""
    parser = argparse.ArgumentParser(prog="bench.compare", description="Compare this revision with another one.")
    parser.add_argument("base", metavar="BASE", help="a commit, a branch or a tag")
    parser.add_argument("--rounds", type=int, default=8, help="default 8: fewer cannot tell a difference from noise")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each single measurement (default 1)")
    options = parser.parse_args(arguments)
    try:
        with Console(stderr=True).status("starting both") as status:
            commit, rows = compare(options.base, options.rounds, options.seconds, status.update)
    except (RuntimeError, OSError, AssertionError) as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 1
    lines = [machine.how(f"python -m bench.compare {options.base}"), "", *table(commit, rows)]
    print("\n".join([*lines, "", "~ is within the noise (sign test over the rounds, 1 in 100)."]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
