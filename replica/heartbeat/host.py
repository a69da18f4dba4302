"""What the daemon asks of its machine for itself: to be scheduled in time, to be watched, and to be ended."""

import ctypes
import errno
import logging
import os
import time
from pathlib import Path
from typing import Final

log = logging.getLogger("replica.heartbeat")

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
#: Above everything that is scheduled by shares, below everything that was given a real priority.
_PRIORITY: Final = 1
_RB_AUTOBOOT: Final = 0x01234567  # reboot(2)
#: Between the two attempts of ending this machine.
_PATIENCE_S: Final = 1.0


def be_in_time() -> None:
    """Neither the load of the machine nor its swapping may delay a heartbeat. What cannot be had is not needed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0:
        log.debug("the daemon's memory cannot be locked (%s)", os.strerror(ctypes.get_errno()))
    try:
        # (What it starts is scheduled like everything else.)
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(_PRIORITY))
    except OSError as error:
        log.debug("the daemon cannot be scheduled before others (%s)", error.strerror)


class Watchdog:
    """A watchdog device: the machine is reset when it is not written to in time (ha.cf: watchdog)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def open(self) -> None:
        """Start it. What fails is logged: a node without is no worse than one that has none configured."""
        try:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            log.warning("the watchdog %s cannot be used (%s).", self._path, error.strerror)

    def feed(self) -> None:
        """The daemon is alive."""
        if self._descriptor is not None:
            try:
                os.write(self._descriptor, b".")
            except OSError as error:
                log.warning("the watchdog %s cannot be written to (%s).", self._path, error.strerror)

    def close(self) -> None:
        """End it in good order ("magic close")."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            try:
                os.write(descriptor, b"V")
            except OSError as error:
                log.warning("the watchdog %s cannot be ended (%s).", self._path, error.strerror)
            os.close(descriptor)


def reboot(why: str) -> None:
    """End this machine at once, without ending anything in order: nothing of it may go on."""
    log.critical("This node reboots itself: %s.", why)
    logging.shutdown()
    libc = ctypes.CDLL(None, use_errno=True)
    for _ in range(2):
        if libc.reboot(ctypes.c_int(_RB_AUTOBOOT)) != 0:
            break  # it is not allowed to, and the heartbeats go on
        # In a container it is carried out by a signal to its first process.
        time.sleep(_PATIENCE_S)
    problem = os.strerror(ctypes.get_errno() or errno.EPERM)
    log.critical("This node could not reboot itself (%s): switch it off.", problem)
