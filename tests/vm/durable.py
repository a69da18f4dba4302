"""The model of the cluster tests, which also knows what must outlive a power cut."""

import copy
from array import array
from collections import deque
from collections.abc import Callable

from tests.cluster.load import SECTOR_BYTES, Model, sector_content, write_of

_READ_BYTES = 1 << 20


class DurableModel(Model):
    """What each sector may hold after a power cut of every copy: what was flushed there last, or anything newer.

    A flush covers what was answered before it was asked for; FUA covers its own write.
    """

    def __init__(self, size_bytes: int) -> None:
        super().__init__(size_bytes)
        self.durable = array("Q", bytes(8 * self.sectors))
        self.flushes = 0
        self._answers = 0
        #: What was answered and is not known to be durable, in the order of the answers: number, first, count.
        self._volatile: deque[tuple[int, int, int]] = deque()
        #: For each sector, in the same order: number of the answer, write.
        self._newer: dict[int, list[tuple[int, int]]] = {}

    def acknowledge(self, first: int, count: int, write: int, *, durable: bool = False) -> None:
        super().acknowledge(first, count, write)
        self._answers += 1
        if not durable:
            self._volatile.append((self._answers, first, count))
        for sector in range(first, first + count):
            if durable:
                self.durable[sector] = write
                self._newer.pop(sector, None)
            else:
                self._newer.setdefault(sector, []).append((self._answers, write))

    def flush_begins(self) -> int:
        return self._answers

    def flushed(self, mark: int) -> None:
        self.flushes += 1
        while self._volatile and self._volatile[0][0] <= mark:
            answer, first, count = self._volatile.popleft()
            for sector in range(first, first + count):
                newer = self._newer.get(sector)
                if newer and newer[0][0] == answer:  # else a write with FUA came after it
                    self.durable[sector] = newer.pop(0)[1]
                    if not newer:
                        del self._newer[sector]

    def check(self, read: Callable[[int, int], bytes]) -> None:
        """As the base class. Everything was flushed, without any request under way, before it is read."""
        super().check(read)
        self._everything_is_durable()

    def check_flushed(self, read: Callable[[int, int], bytes]) -> None:
        """The same after a power cut of all copies: what was acknowledged and not flushed may be lost, by sectors."""
        found = self._read(read)
        for sector, write in enumerate(found):
            self.acknowledged[sector] = write
        self.uncertain.clear()
        self._everything_is_durable()

    def lost_on(self, read: Callable[[int, int], bytes]) -> tuple[int, int]:
        """What one copy that lost power lacks of what was acknowledged: sectors, and writes that these are of.

        AssertionError when it lacks more than it may: what was flushed.
        """
        lost = [sector for sector, write in enumerate(self._read(read)) if self._is_lost(sector, write)]
        return len(lost), len({self.acknowledged[sector] for sector in lost})

    def as_it_is(self) -> "DurableModel":
        """A copy, which does not change."""
        return copy.deepcopy(self)

    def _is_lost(self, sector: int, found: int) -> bool:
        return found != self.acknowledged[sector] and found not in self.uncertain.get(sector, ())

    def _read(self, read: Callable[[int, int], bytes]) -> list[int]:
        """The write that each sector is of; AssertionError when one may not be there."""
        found: list[int] = []
        wrong: list[str] = []
        for start in range(0, self.size_bytes, _READ_BYTES):
            data = memoryview(read(start, min(_READ_BYTES, self.size_bytes - start)))
            for position in range(0, len(data), SECTOR_BYTES):
                sector, content = len(found), data[position : position + SECTOR_BYTES]
                durable = self.durable[sector]
                if content == sector_content(durable, sector):
                    found.append(durable)
                    continue
                write = write_of(content, sector)
                newer = [newer for _, newer in self._newer.get(sector, ())]
                if write is None or (write not in newer and write not in self.uncertain.get(sector, ())):
                    wrong.append(f"sector {sector}: write {durable} was flushed, newer are {newer[:9]}, found {write}")
                found.append(durable if write is None else write)
        assert not wrong, f"{len(wrong)} sectors are wrong: " + "; ".join(wrong[:5])
        return found

    def _everything_is_durable(self) -> None:
        self.durable = array("Q", self.acknowledged)
        self._newer.clear()
        self._volatile.clear()
