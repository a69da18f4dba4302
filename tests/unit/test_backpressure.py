"""Writes wait in the node and not in the kernel, while the page cache has no room for them."""

import asyncio
import math
from collections.abc import Mapping
from pathlib import Path

from nbdserver.blockfile import BlockFile
from replica import wire
from replica.backpressure import LEAST_BETWEEN_LOOKS
from replica.mirror import Mirror
from replica.page_cache import PageCache, headroom_bytes
from replica.store import FileStore
from tests.unit.a_volume import disk, volume_on
from tests.unit.test_link import opened, run

PAGE = 4096
VMSTAT = """nr_free_pages 5000
nr_dirty {dirty}
nr_writeback {writeback}
nr_writeback_temp 7
nr_dirty_threshold 8000
nr_dirty_background_threshold 4000
nr_dirtied 99999
"""


class FullCache(FileStore):
    """Its page cache has room when it is told to have."""

    def __init__(self, file: BlockFile, size_bytes: int) -> None:
        super().__init__(file, size_bytes)
        self.has_room = True

    def headroom_bytes(self) -> float:
        return float(1 << 20) if self.has_room else 0.0


def test_writers_wait_before_the_kernel_slows_them_down() -> None:
    """It does so from halfway between its two thresholds on, and it writes by itself from the lower one on."""
    assert headroom_bytes(VMSTAT.format(dirty=0, writeback=0)) == 5000 * PAGE
    assert headroom_bytes(VMSTAT.format(dirty=3000, writeback=1500)) == 500 * PAGE
    assert headroom_bytes(VMSTAT.format(dirty=5500, writeback=400)) < 0
    assert headroom_bytes("nr_dirty 4\n") == headroom_bytes("") == math.inf


def test_this_machine_says_how_much_room_there_is() -> None:
    cache = PageCache()
    assert math.isfinite(cache.headroom_bytes())
    cache.close()
    assert cache.headroom_bytes() == math.inf


def test_a_file_in_memory_always_has_room(tmp_path: Path) -> None:
    with disk(tmp_path) as store:
        store._file.in_memory = True
        assert store.headroom_bytes() == math.inf


def test_clients_writes_wait_until_there_is_room_or_for_a_while(tmp_path: Path) -> None:
    async def test() -> None:
        with disk(tmp_path, FullCache) as store:
            volume = await volume_on(store, tmp_path)
            volume.alone_recorded = True
            done: asyncio.Queue[int] = asyncio.Queue()

            def write(number: int, length: int = 512) -> None:
                def answer(errors: Mapping[int, int]) -> None:
                    assert not errors
                    done.put_nowait(number)

                volume.write_batch([(LEAST_BETWEEN_LOOKS, memoryview(bytes([number]) * length))], answer)

            store.has_room = False
            write(1)  # after which it looks
            assert done.get_nowait() == 1
            write(2)
            assert done.empty() and volume.read_now(LEAST_BETWEEN_LOOKS, 1) == b"\x01"
            store.has_room = True
            assert await done.get() == 2
            write(3, LEAST_BETWEEN_LOOKS)
            assert done.get_nowait() == 3

            # All that is dirty may be another program's: it is flushed here, and nobody waits for ever.
            store.has_room = False
            write(4, LEAST_BETWEEN_LOOKS)
            write(5)
            assert done.get_nowait() == 4 and done.empty()
            assert await done.get() == 5
            await volume.settle()

    run(test)


def test_the_peers_writes_wait_too_and_none_is_lost(tmp_path: Path) -> None:
    async def test() -> None:
        one, two = await opened()
        acknowledged: asyncio.Queue[int] = asyncio.Queue()
        one.link.handlers[wire.APPLIED] = lambda flags, sequence, offset, payload: acknowledged.put_nowait(sequence)
        with disk(tmp_path, FullCache) as store:
            Mirror(two.link, store, "C", lambda error: None)
            store.has_room = False
            for number in range(1, 9):
                one.link.send(wire.WRITE, bytes([number]) * 4096, sequence=number, offset=4096 * number)
                if number == 1:
                    assert await acknowledged.get() == 1
            assert not two.link._transport.is_reading()
            store.has_room = True
            while await acknowledged.get() < 8:
                pass
            assert two.link._transport.is_reading()
            for number in range(1, 9):
                assert store.read_now(4096 * number, 4096) == bytes([number]) * 4096
            for end in (one, two):
                end.link.close("the test is over.")

    run(test)
