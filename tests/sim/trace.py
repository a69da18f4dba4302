"""What happened: the last events for people, and a running checksum of all of them for comparing two runs."""

import zlib
from collections import deque

from tests.sim.loop import World


class Violation(AssertionError):
    """A safety rule was broken; the text says which and how."""


class Trace:
    """The events of one run. `echo` prints each one as it comes."""

    def __init__(self, world: World, keep: int = 400, *, echo: bool = False) -> None:
        self.world = world
        self._echo = echo
        self.lines: deque[str] = deque(maxlen=keep)
        self.checksum = 0
        self.counts: dict[str, int] = {}

    def note(self, text: str) -> None:
        line = f"{self.world.now_s:10.6f} {text}"
        self.checksum = zlib.crc32(line.encode(), self.checksum)
        self.lines.append(line)
        if self._echo:
            print(line)

    def fault(self, kind: str, text: str) -> None:
        """A fault was injected, or a verb given: counted by kind."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.note(f"*** {kind} {text}")
