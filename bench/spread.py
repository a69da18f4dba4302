"""Two servers measured round by round: the ratio of each round, its middle and its spread. Pure.

A machine that others use is fast in one minute and slow in the next. The two figures of one round are from the same
minute; so the ratio is made in each round, and the median over the rounds is what counts.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

#: A difference counts when chance alone would make the rounds agree so well less often than this.
CHANCE: Final = 0.01


@dataclass(frozen=True)
class Spread:
    """The median of the rounds' ratios, and the quartiles: half of all rounds were between them."""

    median: float
    low: float
    high: float
    #: Whether the rounds agree on a difference (see `outside_noise`).
    real: bool

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def spread(ours: Sequence[float], theirs: Sequence[float]) -> Spread | None:
    """Of ours to theirs, round by round; None without a round that has both."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=False) if mine and other]
    if not ratios:
        return None
    low, _, high = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Spread(statistics.median(ratios), low, high, outside_noise(ratios))


def outside_noise(ratios: Sequence[float]) -> bool:
    """The sign test: did one side win so many rounds that chance alone hardly explains it?

    With 8 rounds all have to agree. It asks nothing of how the noise is distributed.
    """
    more, less = sum(ratio > 1 for ratio in ratios), sum(ratio < 1 for ratio in ratios)
    rounds = more + less
    as_uneven = sum(math.comb(rounds, count) for count in range(min(more, less) + 1)) * 2
    return rounds > 0 and as_uneven / 2**rounds < CHANCE
