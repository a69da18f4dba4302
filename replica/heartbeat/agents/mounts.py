"""What is mounted on this machine, and which processes use it. Calls read /proc and /sys only, and so never wait for a
file system.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

_OCTAL: Final = re.compile(r"\\([0-7]{3})")
_LINKS: Final = ("cwd", "root", "exe")


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo (proc(5))."""

    folder: str
    kind: str
    source: str
    #: Those of the file system itself: "ro" there is one that has become read-only.
    options: frozenset[str]


class User(NamedTuple):
    """A process."""

    pid: int
    name: str


def parse_mounts(text: str) -> list[Mount]:
    """The lines of a mountinfo file, in the order in which they were mounted. Pure."""
    mounts: list[Mount] = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, source, *options) = before.split(), after.split(" ")
        mounts.append(
            Mount(_plain(fields[4]), kind, _plain(source), frozenset(options[0].split(",") if options else ()))
        )
    return mounts


def mounts() -> list[Mount]:
    """Everything that is mounted, as this process sees it."""
    return parse_mounts(Path("/proc/self/mountinfo").read_text())


def mounted_at(folder: str) -> Mount | None:
    """What is mounted there, on top."""
    found = [mount for mount in mounts() if mount.folder == folder]
    return found[-1] if found else None


def mounted_within(folder: str) -> list[str]:
    """The folder and all mounts below it, in the order in which they can be unmounted."""
    return [mount.folder for mount in reversed(mounts()) if _is_within(mount.folder, folder)]


def loops_of(file: str) -> list[str]:
    """The loop devices on a file: "/dev/loop0"."""
    found: list[str] = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # detached meanwhile
            # A file whose file system has gone is still named, with this behind it.
            if backing.read_text().rstrip("\n").removesuffix(" (deleted)") == file:
                found.append(f"/dev/{backing.parts[3]}")
    return found


def users_of(folder: str) -> list[User]:
    """The processes that run from the folder, work in it, or have one of its files open or mapped; but not this one,
    nor the first.
    """
    return [
        User(pid, _name(pid))
        for pid in _pids()
        if pid not in (1, os.getpid()) and any(_is_within(path, folder) for path in _paths(pid))
    ]


def running(program: str, argument: str) -> list[int]:
    """The processes of a program that have this argument on their command line."""
    found: list[int] = []
    for pid in _pids():
        with contextlib.suppress(OSError):
            name, *arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if os.path.basename(os.fsdecode(name)) == program and os.fsencode(argument) in arguments:
                found.append(pid)
    return found


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _paths(pid: int) -> Iterator[str]:
    process = f"/proc/{pid}"
    for link in _LINKS:
        with contextlib.suppress(OSError):
            yield os.readlink(f"{process}/{link}")
    with contextlib.suppress(OSError):
        for number in os.listdir(f"{process}/fd"):
            with contextlib.suppress(OSError):
                yield os.readlink(f"{process}/fd/{number}")
    with contextlib.suppress(OSError):
        for line in Path(f"{process}/maps").read_text(errors="surrogateescape").splitlines():
            _, slash, path = line.partition("/")
            if slash:
                yield slash + path


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "?"


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def _plain(text: str) -> str:
    """Without the octal escapes of blanks and the like."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)
