"""How long does a client wait when the Primary changes?

    python -m bench.switchover [--runs N] [--kills N] [--write-docs]

One client writes one block at a time and follows the Primary; a second one keeps 16 writes under way. Time and again
the other node takes over, or the Primary is killed and the other node is promoted.
"""

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console

from bench import document, expectation, machine, servers
from bench.expectation import Expectation
from bench.follower import Follower, following, load
from bench.latency import Latencies, duration
from tests.cluster.cluster import Cluster, Node

TAKEOVER: Final = "`takeover`"
PROMOTE: Final = "`replicactl promote` after kill -9"
PROMOTE_VERB: Final = "the same, without the start of `replicactl`"
SECTION: Final = "switchover"
_LOAD_DEPTH: Final = 16
#: After each change the clients get so many answers before the next one.
_CALM_ANSWERS: Final = 100


@dataclass
class Pauses:
    """What was measured: pauses by kind."""

    command: str
    facts: list[str]
    by_kind: dict[str, Latencies] = field(default_factory=dict)
    #: Answers to the client that were errors.
    errors: int = 0

    def add(self, kind: str, pause_s: float) -> None:
        """Note one."""
        self.by_kind.setdefault(kind, Latencies()).add(round(pause_s * 1e9))


def measure(runs: int, kills: int, note: Callable[[str], None] = lambda text: None) -> Pauses:
    """`runs` takeovers, and `kills` promotions of each kind after the Primary's death."""
    pauses = Pauses(f"python -m bench.switchover --runs {runs} --kills {kills}", machine.facts())
    with _pair() as (cluster, client):
        for number in range(runs):
            note(f"takeover {number + 1} of {runs}")
            pauses.add(TAKEOVER, take_over(cluster, client))
        for number in range(kills):
            for kind in (PROMOTE, PROMOTE_VERB):
                note(f"kill {number + 1} of {kills}")
                pauses.add(kind, kill_and_promote(cluster, client, by_command=kind == PROMOTE))
        pauses.errors = client.errors
    return pauses


@contextlib.contextmanager
def _pair() -> Iterator[tuple[Cluster, Follower]]:
    with (
        servers.image_folder() as folder,
        Cluster(folder, size_bytes=servers.SIZE_BYTES, **servers.DEFAULTS) as cluster,
    ):
        cluster.up()
        sockets = [node.nbd_path for node in cluster.nodes]
        with (
            load(sockets, cluster.resource, _LOAD_DEPTH),
            following(Follower(sockets, cluster.resource)) as client,
        ):
            yield cluster, client


def take_over(cluster: Cluster, client: Follower) -> float:
    """The other node takes over; the longest time between two answers, in seconds."""
    client.wait_answers(_CALM_ANSWERS)
    since_s = time.monotonic()
    _primary(cluster).peer.ctl("takeover")
    client.wait_answers(_CALM_ANSWERS)
    return client.longest_pause_s(since_s)


def kill_and_promote(cluster: Cluster, client: Follower, *, by_command: bool) -> float:
    """The Primary is killed, the other node promoted: from the command to the first answer, in seconds.

    The killed node is back and in sync when this returns.
    """
    client.wait_answers(_CALM_ANSWERS)
    primary = _primary(cluster)
    primary.kill9()
    primary.peer.wait_alone()
    since_s = time.monotonic()
    if by_command:
        done = primary.peer.cli("promote", cluster.resource)
        if done.returncode:
            raise RuntimeError(done.stderr)
    else:
        primary.peer.ctl("promote")
    client.wait_answers(_CALM_ANSWERS)
    took_s = client.first_answer_s(since_s) - since_s
    primary.start()
    cluster.wait_in_sync()
    return took_s


def _primary(cluster: Cluster) -> Node:
    return next(node for node in cluster.nodes if node.status()["role"] == "Primary")


def expectations(pauses: Pauses) -> list[Expectation]:
    """What this is to reach, and what it did."""

    def p99(kind: str, bound_ms: float) -> Expectation:
        pauses_us = pauses.by_kind[kind].percentile_us(99) if kind in pauses.by_kind else None
        return Expectation(f"{kind}: p99", pauses_us and pauses_us / 1e3, bound_ms, "ms", at_most=True)

    return [
        p99(TAKEOVER, 250),
        p99(PROMOTE, 300),
        Expectation("errors that the client got", pauses.errors, 0, "", at_most=True),
    ]


def as_markdown(pauses: Pauses) -> list[str]:
    """The tables, as they go into docs/benchmarks.md."""
    rows = [
        [kind, str(each.count), *(duration(each.percentile_us(percentile)) for percentile in (50, 99, 100))]
        for kind, each in pauses.by_kind.items()
    ]
    return [
        machine.how(pauses.command),
        "",
        *(f"- {fact}" for fact in pauses.facts),
        "",
        *document.table(["pause", "runs", "p50", "p99", "longest"], rows),
        "",
        *document.table(expectation.HEADS, expectation.rows(expectations(pauses))),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 measured, 1 it did not work."""
    parser = argparse.ArgumentParser(prog="bench.switchover", description="Pauses when the Primary changes.")
    parser.add_argument("--runs", type=int, default=50, help="takeovers (default 50)")
    parser.add_argument("--kills", type=int, default=10, help="kills, for each way to promote (default 10)")
    parser.add_argument("--write-docs", action="store_true", help=f"update {document.BENCHMARKS.name}")
    options = parser.parse_args(arguments)
    try:
        with Console(stderr=True).status("starting both nodes") as status:
            pauses = measure(options.runs, options.kills, status.update)
    except (RuntimeError, OSError, AssertionError, subprocess.SubprocessError) as error:
        print(f"bench.switchover: {error}", file=sys.stderr)
        return 1
    print("\n".join(as_markdown(pauses)))
    if options.write_docs:
        document.write_section(document.BENCHMARKS, SECTION, as_markdown(pauses))
    return 0


if __name__ == "__main__":
    sys.exit(main())
