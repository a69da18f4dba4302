"""Files with secrets: read only when nobody else can."""

import os
import stat
from pathlib import Path


def read_private_file(path: Path, max_bytes: int, make_one: str) -> bytes:
    """What a file holds, at most one byte more than ``max_bytes``.

    Raises ValueError with the rest of a sentence that begins with the path, when it is not there, no regular file, of
    somebody else or open to others. ``make_one`` says how to make such a file.
    """
    try:
        # Asked about and read through one descriptor; O_NONBLOCK so that a FIFO in its place cannot hang us.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ValueError(f"does not exist: {make_one}") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"is not a regular file: {make_one}")
        if status.st_uid not in (os.geteuid(), 0):
            raise ValueError(f"belongs to user {status.st_uid}: it must belong to root or to the user of the daemon")
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise ValueError(f"has mode {mode:04o} and others may use it: run `chmod 600 {path}`")
        return os.read(descriptor, max_bytes + 1)
    finally:
        os.close(descriptor)
