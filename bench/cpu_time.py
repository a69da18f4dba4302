"""Processor time of other processes: what stays the same when the machine has other things to do."""

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

#: linux/posix-timers.h: a process's clock is the complement of its id, shifted, and what the clock counts.
_COUNTS_RUN_TIME: Final = 2
#: Of /proc/PID/stat, counted behind the name: user and system time of children that have ended and were waited for.
_CHILDREN_TIMES: Final = slice(13, 15)


def spent_ns(process_ids: Iterable[int]) -> int:
    """Time that these processes and their children have run so far, with all their threads, also those that have ended.

    To the nanosecond; that of children that have ended (nbd-server has one for each client) to a hundredth of a second.
    OSError when one of them is gone.
    """
    return sum(_own_ns(each) + _ended_children_ns(each) + _children_ns(each) for each in process_ids)


def _own_ns(process_id: int) -> int:
    return time.clock_gettime_ns((~process_id << 3) | _COUNTS_RUN_TIME)


def _children_ns(process_id: int) -> int:
    spent = 0
    for child in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split():
        with contextlib.suppress(OSError):  # it has just ended
            spent += _own_ns(int(child))
    return spent


def _ended_children_ns(process_id: int) -> int:
    _, _, fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")
    ticks = sum(map(int, fields.split()[_CHILDREN_TIMES]))
    return ticks * 10**9 // os.sysconf("SC_CLK_TCK")
