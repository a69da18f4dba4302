"""The one clock of the cluster manager."""

import time


def now() -> float:
    """Seconds since the boot, those in which the machine slept included: a node that was paused has to know it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
