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
        measured = "–" if self.measured is None else f"{self.measured:.3g} {self.unit}"
        return [self.sentence, f"{'≤' if self.at_most else '≥'} {self.bound:g} {self.unit}", measured, self.verdict]


HEADS = ["expected", "bound", "measured", ""]


def rows(expectations: Iterable[Expectation]) -> list[list[str]]:
    """One for each."""
    return [expectation.row() for expectation in expectations]
