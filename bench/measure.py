"""Several servers, measured in turn: round after round, each of them with every workload."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from bench import cpu_time
from bench.latency import Latencies, merged
from bench.load import Workload, watch
from bench.servers import Target
from bench.spread import Spread, spread


@dataclass(frozen=True)
class Sample:
    """One server with one workload, once."""

    rate: float
    latencies: Latencies = field(repr=False)
    #: Processor time of all processes of the server, for each request.
    cpu_us: float


@dataclass
class Row:
    """One workload: the samples of every server, one per round."""

    workload: Workload
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def rates(self, server: str) -> list[float]:
        """Requests per second, one per round."""
        return [sample.rate for sample in self.samples.get(server, ())]

    def costs(self, server: str) -> list[float]:
        """Microseconds of processor for a request, one per round."""
        return [sample.cpu_us for sample in self.samples.get(server, ())]

    def rate(self, server: str) -> float | None:
        """The median of the rounds."""
        return _median(self.rates(server))

    def cpu_us(self, server: str) -> float | None:
        """The median of the rounds."""
        return _median(self.costs(server))

    def latencies(self, server: str) -> Latencies:
        """Of all rounds."""
        return merged(sample.latencies for sample in self.samples.get(server, ()))

    def rate_ratio(self, ours: str, theirs: str) -> Spread | None:
        """The rate of one in relation to that of another."""
        return spread(self.rates(ours), self.rates(theirs))

    def cpu_ratio(self, ours: str, theirs: str) -> Spread | None:
        """The processor time of one in relation to that of another."""
        return spread(self.costs(ours), self.costs(theirs))


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def once(target: Target, workload: Workload, seconds: float) -> Sample:
    """Measure."""
    before_ns = cpu_time.spent_ns(target.process_ids)
    seen = watch(target.uri, workload, seconds)
    spent_ns = cpu_time.spent_ns(target.process_ids) - before_ns
    return Sample(seen.rate, seen.latencies, spent_ns / 1e3 / seen.requests)


def in_turn(
    targets: Sequence[Target],
    workloads: Iterable[Workload],
    rounds: int,
    seconds: float,
    note: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Takes about rounds × workloads × targets × seconds; every other round begins with the last server (ABBA…)."""
    rows = [Row(workload) for workload in workloads]
    for number in range(rounds):
        for row in rows:
            note(f"round {number + 1} of {rounds}: {row.workload.name}")
            for target in targets if number % 2 == 0 else reversed(targets):
                row.samples.setdefault(target.name, []).append(once(target, row.workload, seconds))
    return rows
