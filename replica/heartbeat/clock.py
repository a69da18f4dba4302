"""The one clock of the cluster manager."""

import time


def now() -> float:
    """Seconds since the machine was booted, the time that it was suspended included (CLOCK_BOOTTIME)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
