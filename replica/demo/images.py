"""The backing files of both nodes, compared byte for byte."""

import errno
import os
from pathlib import Path

_PIECE_BYTES = 1 << 20


def first_difference(one: Path, other: Path) -> int | None:
    """The offset of the first byte that differs, or None; both files have to be quiet.

    Where both files have holes nothing is read: holes are zeroes by definition.
    """
    with one.open("rb", buffering=0) as left, other.open("rb", buffering=0) as right:
        size_bytes = os.fstat(left.fileno()).st_size
        if os.fstat(right.fileno()).st_size != size_bytes:
            return min(size_bytes, os.fstat(right.fileno()).st_size)
        position = 0
        while (position := min(_next_data(left.fileno(), position), _next_data(right.fileno(), position))) < size_bytes:
            length = min(_PIECE_BYTES, size_bytes - position)
            ours, theirs = os.pread(left.fileno(), length, position), os.pread(right.fileno(), length, position)
            if ours != theirs:
                return position + next(at for at in range(length) if ours[at : at + 1] != theirs[at : at + 1])
            position += length
    return None


def _next_data(descriptor: int, position: int) -> int:
    """The next offset with data at or after ``position``; the file's size when there is none."""
    try:
        return os.lseek(descriptor, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return os.fstat(descriptor).st_size
        return position  # no SEEK_DATA here: take it as data
