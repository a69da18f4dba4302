"""How much of the page cache is dirty, and how much may be."""

import math
import os
from typing import Final

_VMSTAT: Final = "/proc/vmstat"
_VMSTAT_BYTES: Final = 1 << 16


def headroom_bytes(vmstat: str) -> float:
    """How much may be written before writers should wait; negative: they should by now; infinite: nobody knows.

    Above the background threshold the kernel's own threads write; halfway from there to the other threshold it begins
    to slow writers down (mm/page-writeback.c, `dirty_freerun_ceiling`). Half of that way is used.
    """
    pages = dict(line.split() for line in vmstat.splitlines() if line.startswith(("nr_dirty", "nr_writeback ")))
    try:
        background, threshold = int(pages["nr_dirty_background_threshold"]), int(pages["nr_dirty_threshold"])
        dirty = int(pages["nr_dirty"]) + int(pages["nr_writeback"])
    except (KeyError, ValueError):
        return math.inf
    return (background + (threshold - background) / 4 - dirty) * os.sysconf("SC_PAGE_SIZE")


class PageCache:
    """That of this machine."""

    def __init__(self) -> None:
        try:
            self._fd = os.open(_VMSTAT, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1

    def headroom_bytes(self) -> float:
        """See above."""
        if self._fd < 0:
            return math.inf
        try:
            return headroom_bytes(os.pread(self._fd, _VMSTAT_BYTES, 0).decode("ascii", "replace"))
        except OSError:
            return math.inf

    def close(self) -> None:
        """Can be called more than once."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
