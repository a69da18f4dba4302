"""In a guest: an application on a file system that writes, syncs, reads back, and must never see an error.

    python -m tests.vm.writer FOLDER SEED SECONDS

A deterministic exerciser of one file (as fsx is): writes, appends, truncations, holes, fsyncs, renames, re-reads, all
checked against what the file has to hold. Prints one JSON document: operations, the longest one in seconds. Any
difference or error ends it with status 1, and the seed replays it.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

_MAX_BYTES = 1 << 20
_MAX_WRITE_BYTES = 64 << 10


class Exerciser:
    """One file, and what it must hold."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self._path = folder / "exercised"
        self._other = folder / "renamed"
        self._rng = rng
        self._content = bytearray()
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)

    def step(self) -> str:
        """One operation; its name."""
        operation = self._rng.choice(
            (self._write, self._write, self._write, self._append, self._truncate, self._read, self._read, self._sync,
             self._rename, self._from_disk)
        )  # fmt: skip
        operation()
        return operation.__name__.strip("_")

    def check(self) -> None:
        """All of the file."""
        found = os.pread(self._descriptor, _MAX_BYTES + 1, 0)
        if found != self._content:
            at = next((n for n, (a, b) in enumerate(zip(found, self._content, strict=False)) if a != b), None)
            raise AssertionError(f"{len(found)} bytes, not {len(self._content)}, the first difference at {at}")

    def _write(self) -> None:
        self._put(self._rng.randrange(_MAX_BYTES - _MAX_WRITE_BYTES))

    def _append(self) -> None:
        if len(self._content) < _MAX_BYTES - _MAX_WRITE_BYTES:
            self._put(len(self._content))

    def _put(self, offset: int) -> None:
        data = self._rng.randbytes(self._rng.randint(1, _MAX_WRITE_BYTES))
        if os.pwrite(self._descriptor, data, offset) != len(data):
            raise AssertionError("a short write")
        if offset > len(self._content):
            self._content += bytes(offset - len(self._content))
        self._content[offset : offset + len(data)] = data

    def _truncate(self) -> None:
        size = self._rng.randrange(_MAX_BYTES // 2)
        os.ftruncate(self._descriptor, size)
        del self._content[size:]
        self._content += bytes(size - len(self._content))

    def _read(self) -> None:
        if self._content:
            start = self._rng.randrange(len(self._content))
            length = self._rng.randint(1, _MAX_WRITE_BYTES)
            if os.pread(self._descriptor, length, start) != self._content[start : start + length]:
                raise AssertionError(f"wrong data at {start}")

    def _sync(self) -> None:
        os.fsync(self._descriptor)

    def _rename(self) -> None:
        os.rename(self._path, self._other)
        self._path, self._other = self._other, self._path

    def _from_disk(self) -> None:
        """Read all of it from the device, not from the page cache."""
        os.fsync(self._descriptor)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self.check()


def main() -> int:
    """Until SECONDS have passed."""
    folder, seed, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    exerciser = Exerciser(folder, random.Random(seed))
    operations, longest_s, longest = 0, 0.0, ""
    end = time.monotonic() + seconds
    while (started := time.monotonic()) < end:
        name = exerciser.step()
        operations += 1
        took_s = time.monotonic() - started
        if took_s > longest_s:
            longest_s, longest = took_s, name
    exerciser.check()
    print(json.dumps({"seed": seed, "operations": operations, "longest_s": round(longest_s, 1), "longest": longest}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
