"""The one clock of the cluster manager."""

import time


def now() -> float:
    """Seconds since the boot of this machine, suspension included: what a node slept through has passed."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
