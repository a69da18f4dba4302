"""What is expected of a figure, and whether it was met: the tables of the documents say so."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Expectation:
    """`measured` is to be at least, or at most, `bound`; None when it was not measured. `unit` follows both."""

    sentence: str
    measured: float | None
    bound: float
    unit: str = "×"
    at_most: bool = False

    @property
    def verdict(self) -> str:
        """ "met", "**missed**" or "not measured"."""
        if self.measured is None:
            return "not measured"
        is_met = self.measured <= self.bound if self.at_most else self.measured >= self.bound
        return "met" if is_met else "**missed**"

    def row(self) -> list[str]:
        """The cells of its row."""
        bound = f"{'≤' if self.at_most else '≥'} {self.bound:g} {self.unit}".rstrip()
        return [self.sentence, bound, self._measured_text(), self.verdict]

    def _measured_text(self) -> str:
        if self.measured is None:
            return "–"
        figure = f"{self.measured:,.0f}" if self.measured >= 100 else f"{self.measured:.3g}"
        return f"{figure} {self.unit}".rstrip()


HEADS = ["expected", "bound", "measured", ""]


def rows(expectations: Iterable[Expectation]) -> list[list[str]]:
    """One for each."""
    return [expectation.row() for expectation in expectations]
