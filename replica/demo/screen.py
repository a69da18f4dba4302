"""What the demo shows: steps, command lines, ticks and a progress bar; plain lines where there is no terminal."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

ShowProgress = Callable[[float, str], None]


class Screen:
    """Writes to standard output, line by line."""

    def __init__(self) -> None:
        # soft_wrap: long lines are the terminal's business, and a pipe gets them whole.
        self._console = Console(highlight=False, soft_wrap=True)
        unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
        self._tick, self._cross = ("✓", "✗") if unicode else ("ok:", "FAILED:")
        self._step = 0
        self._began_s = time.monotonic()
        self.ticks: list[str] = []

    def line(self, text: str = "", style: str = "") -> None:
        """A line of text as it is."""
        self._console.print(f"[{style}]{escape(text)}[/]" if style else escape(text))

    def step(self, title: str) -> None:
        """What comes next."""
        self._step += 1
        self._began_s = time.monotonic()
        self.line()
        self.line(f"{self._step}. {title}", "bold")

    def command(self, text: str) -> None:
        """A command line that the reader could type."""
        self.line(f"   $ {text}", "cyan")

    def output(self, text: str) -> None:
        """What a command answered."""
        for line in text.splitlines():
            self.line(f"     {line}", "dim")

    def tick(self, text: str) -> None:
        """Something was checked and is well."""
        self.ticks.append(text)
        took_s = time.monotonic() - self._began_s
        self._console.print(f"   [bold green]{self._tick}[/] {escape(text)}  [dim]({took_s:.1f} s)[/]")
        self._began_s = time.monotonic()

    def cross(self, text: str) -> None:
        """A check failed."""
        self._console.print(f"   [bold red]{self._cross}[/] {escape(text)}")

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[ShowProgress]:
        """A bar that goes away in the end; gives ``show(percent, words)``. Nothing is shown without a terminal."""
        if not self._console.is_terminal:
            yield lambda percent, words: None
            return
        columns = (TextColumn("   {task.description}"), BarColumn(bar_width=40), TextColumn("{task.fields[words]}"))
        with Progress(*columns, console=self._console, transient=True) as progress:
            bar = progress.add_task(title, total=100.0, words="")
            yield lambda percent, words: progress.update(bar, completed=percent, words=words, refresh=True)
