"""How far a resync is, how fast it is now, and when it will be over. Pure: counts and the time come in."""

import collections
from typing import Final

from replica.bitmap import BLOCK_SIZE

#: The rate is that of about so long: holes and equal blocks go by so fast that an average over all would mislead.
_SPAN_S: Final = 20.0
_LEAST_BETWEEN_S: Final = 0.5


class SyncProgress:
    """A resync that began with `total_blocks` dirty blocks. Who looks at it is what makes the rate a recent one."""

    def __init__(self, total_blocks: int, now_s: float) -> None:
        self.total_blocks = total_blocks
        self._marks = collections.deque([(now_s, total_blocks)])

    def resumed(self, left_blocks: int, now_s: float) -> None:
        """It was paused, and goes on."""
        self._marks = collections.deque([(now_s, left_blocks)])

    def done_percent(self, left_blocks: int) -> float:
        """Of the blocks that were dirty when it began, those that are not any more."""
        if not self.total_blocks:
            return 100.0
        return round(100.0 * max(0, self.total_blocks - left_blocks) / self.total_blocks, 1)

    def rate_bytes_s(self, left_blocks: int, now_s: float) -> float:
        """What became clean per second, lately."""
        marks = self._marks
        while len(marks) > 1 and now_s - marks[1][0] >= _SPAN_S:
            marks.popleft()
        if now_s - marks[-1][0] >= _LEAST_BETWEEN_S:
            marks.append((now_s, left_blocks))
        since_s, before = marks[0]
        return max(0, before - left_blocks) * BLOCK_SIZE / (now_s - since_s) if now_s > since_s else 0.0
