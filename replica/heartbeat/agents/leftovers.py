"""What is left of a daemon whose first process has died: workers that go on serving, and keep its port.

An init script knows a daemon by its PID file, and can neither stop nor start it then. But a daemon leads a session of
its own (setsid(2)), its workers are members of that session, and no other process gets the session's number while it
has members: so when the daemon was seen to run a moment ago, what is in its session belongs to it. All of this blocks.
"""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Final, NamedTuple

PROC: Final = Path("/proc")
#: Where a daemon that is called so has its PID file.
PID_FILES: Final = ("/run/{0}.pid", "/run/{0}/{0}.pid")
GRACE_S: Final = 2.0
_LOOK_AGAIN_S: Final = 0.05


class Daemon(NamedTuple):
    """The first process of a daemon: its number is also that of its session."""

    pid: int
    started: int  # in clock ticks since the boot


class _Process(NamedTuple):
    pid: int
    zombie: bool
    session: int
    started: int


def find_daemon(name: str) -> Daemon | None:
    """The running daemon of that name that leads a session of its own, by its PID file; None when there is none."""
    for pattern in PID_FILES:
        try:
            process = _process(int(Path(pattern.format(name)).read_text()))
        except (OSError, ValueError):
            continue
        if process is not None and process.session == process.pid and not process.zombie and process.pid > 1:
            return Daemon(process.pid, process.started)
    return None


def leftovers(daemon: Daemon) -> list[int]:
    """The processes of the daemon's session; none while the daemon runs, or when its number is another's by now."""
    first = _process(daemon.pid)
    if first is not None and not first.zombie:
        return []
    numbers = (int(path.name) for path in PROC.iterdir() if path.name.isdigit())
    members = (process for process in map(_process, numbers) if process is not None)
    return [
        one.pid
        for one in members
        if one.session == daemon.pid and one.started >= daemon.started and not one.zombie and one.pid != os.getpid()
    ]


def end_leftovers(daemon: Daemon) -> int:
    """End them, by SIGTERM and after `GRACE_S` by SIGKILL; how many there were."""
    there = leftovers(daemon)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in leftovers(daemon):
            _kill(daemon, pid, number)
        limit_s = time.monotonic() + GRACE_S
        while leftovers(daemon) and time.monotonic() < limit_s:
            time.sleep(_LOOK_AGAIN_S)
    return len(there)


def _kill(daemon: Daemon, pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(OSError):  # whether it is gone is looked at anyway
        descriptor = os.pidfd_open(pid)
        try:
            process = _process(pid)  # looked at again: now the number cannot become another's
            if process is not None and process.session == daemon.pid:
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)


def _process(pid: int) -> _Process | None:
    """From proc(5), /proc/PID/stat: the name, in parentheses, may have anything in it."""
    try:
        text = (PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    state, _parent, _group, session, *rest = text.rpartition(")")[2].split()
    return _Process(pid, state in "ZX", int(session), int(rest[15]))
