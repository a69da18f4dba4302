"""What was sent to the peer and is not yet known to be durable there. Pure.

It becomes dirty when the link drops: the peer may lose it in a power cut, or never have received it.
"""

from array import array
from collections.abc import Iterator
from typing import Final

#: An entry packs (first block, count) into one 64-bit number: 40 bits of block number, 24 bits of count.
COUNT_BITS: Final = 24
_COUNT_MASK: Final = (1 << COUNT_BITS) - 1


class Unsettled:
    """Block ranges in two generations: `recent`, and those that the round under way will settle.

    The hot path appends ``first << COUNT_BITS | count`` to `recent` itself, 8 bytes and no object per write; that is
    right for counts below 2**24 (64 GiB), which `note` takes care of.
    """

    def __init__(self) -> None:
        self.recent = array("Q")
        self._settling = array("Q")

    def note(self, first: int, count: int) -> None:
        """`count` blocks from `first` on were sent."""
        while count > 0:
            step = min(count, _COUNT_MASK)
            self.recent.append(first << COUNT_BITS | step)
            first, count = first + step, count - step

    def begin_round(self) -> None:
        """A flush of the peer begins that covers all there is now."""
        self._settling.extend(self.recent)
        self.recent = array("Q")

    def end_round(self) -> None:
        """The peer has flushed: what was there when the round began is settled."""
        self._settling = array("Q")

    def take_all(self) -> Iterator[tuple[int, int]]:
        """Every (first, count) not settled; afterwards there is none. For the end of the link."""
        taken = self._settling + self.recent
        self._settling, self.recent = array("Q"), array("Q")
        return ((entry >> COUNT_BITS, entry & _COUNT_MASK) for entry in taken)
