"""Figures in the documents: between markers, so that a run replaces them and nothing else."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

DOCS: Final = Path(__file__).resolve().parents[1] / "docs"
BENCHMARKS: Final = DOCS / "benchmarks.md"


def write_section(document: Path, name: str, lines: Iterable[str]) -> None:
    """Put the lines between the markers of this name; RuntimeError when the document has none."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found_begin, rest = document.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise RuntimeError(f"{document} lacks the markers {begin} and {end}")
    document.write_text("\n".join([before + begin, *lines, end + after]))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """In Markdown: the first column of words, the others of figures."""
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]
