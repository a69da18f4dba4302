"""What a handshake costs on large volumes: the bitmap packed, merged, stored and loaded.

    python -m bench.handshake [--write-docs]

Each row is a process of its own, so that its memory is its own. Metadata are on /dev/shm if there is one.
"""

import argparse
import asyncio
import itertools
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench import document, machine
from bench.latency import duration
from bench.servers import image_folder
from replica.bitmap import BITS_BYTES, BLOCK_SHIFT, SECTOR_BITS, Bitmap
from replica.metadata import Metadata
from replica.session import BITMAP_MESSAGE_BYTES
from tests.unit.a_volume import new_metadata

SECTION: Final = "handshake"
_HERE = Path(__file__).resolve().parents[1]
_GIB = 1 << 30
SIZES_BYTES = (_GIB, 1 << 40, 16 << 40)
#: Share of the blocks that are dirty, anywhere.
SHARES = (0.00001, 0.01)


def scattered(size_bytes: int, share: float) -> Bitmap:
    """A bitmap of so many bytes with so many dirty blocks, evenly scattered."""
    rng = random.Random(1)
    bitmap = Bitmap(size_bytes >> BLOCK_SHIFT)
    count = max(1, int(bitmap.blocks * share))
    if share < 0.001:
        for _ in range(count):
            bitmap.set_range(rng.randrange(bitmap.blocks), 1)
        return bitmap
    per_sector = round(SECTOR_BITS * share)
    for sector in range(bitmap.blocks // SECTOR_BITS):
        bits = 0
        for _ in range(per_sector):
            bits |= 1 << rng.randrange(SECTOR_BITS)
        bitmap.merge_sector(sector, bits.to_bytes(BITS_BYTES, "little"))
    return bitmap


@contextmanager
def timed(figures: dict[str, float], name: str) -> Iterator[None]:
    began_s = time.perf_counter()
    yield
    figures[name] = round(1000 * (time.perf_counter() - began_s), 1)


def memory_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


async def measure(size_bytes: int, share: float) -> dict[str, float]:
    """Milliseconds, and MiB at most so far."""
    before = memory_mib()
    bitmap = scattered(size_bytes, share)
    figures: dict[str, float] = {"dirty": bitmap.count, "bitmap MiB": memory_mib() - before}
    longest_s = bytes_ = messages = 0.0
    peer = Bitmap(bitmap.blocks)
    packing, merge_s, pack_s = bitmap.pack(BITMAP_MESSAGE_BYTES), 0.0, 0.0
    while True:
        began_s = time.perf_counter()
        message = next(packing, None)
        packed_s = time.perf_counter()
        if message is None:
            break
        peer.merge_packed(message)
        merged_s = time.perf_counter()
        pack_s, merge_s = pack_s + packed_s - began_s, merge_s + merged_s - packed_s
        longest_s = max(longest_s, packed_s - began_s, merged_s - packed_s)
        bytes_, messages = bytes_ + len(message), messages + 1
    assert peer.count == bitmap.count
    figures |= {"pack ms": round(1000 * pack_s, 1), "merge ms": round(1000 * merge_s, 1)}
    figures |= {"longest ms": round(1000 * longest_s, 1), "messages": messages, "wire KiB": round(bytes_ / 1024, 1)}
    with image_folder() as folder:
        file = new_metadata(folder / "r0.md", size_bytes, 1237)
        metadata = await Metadata.load(file)
        with timed(figures, "save ms"):
            await metadata.save_bitmap(peer)
        with timed(figures, "save again ms"):
            await metadata.save_bitmap(peer)
        loaded = Bitmap(bitmap.blocks)
        with timed(figures, "load ms"):
            await metadata.load_bitmap(loaded)
        assert loaded.count == bitmap.count
        file.close()
    with timed(figures, "walk ms"):
        at, runs = 0, 0
        while (run := loaded.next_run(at, 1 << 20)) is not None:
            at, runs = run[0] + run[1], runs + 1
    figures["in all MiB"] = memory_mib() - before
    return figures


def as_markdown(found: Mapping[tuple[int, float], dict[str, float]]) -> list[str]:
    """The table, as it goes into docs/benchmarks.md; the figures are those of `measure`, by size and share."""
    heads = ["volume", "dirty blocks", "on the wire", "packed", "merged", "longest step", "stored", "loaded", "memory"]
    cells = [
        [
            f"{size_bytes // _GIB:,} GiB, {100 * share:g} % dirty",
            f"{figures['dirty']:,.0f}",
            f"{figures['wire KiB']:,.0f} KiB",
            *(duration(1000 * figures[f"{step} ms"]) for step in ("pack", "merge", "longest", "save", "load")),
            f"{figures['in all MiB']:,.0f} MiB",
        ]
        for (size_bytes, share), figures in found.items()
    ]
    return [machine.how("python -m bench.handshake"), "", *document.table(heads, cells)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.handshake", description="Measure what a handshake costs.")
    parser.add_argument("--one", nargs=2, metavar=("BYTES", "SHARE"), help="only this, in this process, as JSON")
    parser.add_argument("--write-docs", action="store_true", help=f"update {document.BENCHMARKS.name}")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(asyncio.run(measure(int(options.one[0]), float(options.one[1])))))
        return 0
    found = {}
    for size_bytes, share in itertools.product(SIZES_BYTES, SHARES):
        command = [sys.executable, "-m", "bench.handshake", "--one", str(size_bytes), str(share)]
        done = subprocess.run(command, cwd=_HERE, capture_output=True, text=True, check=True)
        print(
            f"{size_bytes // _GIB:6} GiB, {100 * share:g} % dirty: {done.stdout.strip()}", file=sys.stderr, flush=True
        )
        found[size_bytes, share] = json.loads(done.stdout)
    lines = as_markdown(found)
    print("\n".join(lines))
    if options.write_docs:
        document.write_section(document.BENCHMARKS, SECTION, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
