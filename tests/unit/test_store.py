"""FileStore: what it does on the loop, and what in a thread."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserver.blockfile import BlockFile, LostWriteError
from replica.store import FileStore

SIZE = 1 << 20


@pytest.fixture
def in_memory() -> Iterator[BlockFile]:
    """A file on tmpfs."""
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK):
        pytest.skip("/dev/shm is not writable here")
    path = folder / f"store-test-{os.getpid()}"
    path.write_bytes(bytes(SIZE))
    file = BlockFile.open(path)
    yield file
    file.close()
    path.unlink()


def test_what_is_in_memory_is_flushed_on_the_loop(in_memory: BlockFile) -> None:
    store = FileStore(in_memory, SIZE)
    assert store.flush_now()
    asyncio.run(store.flush())


def test_a_disk_is_flushed_in_a_thread(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(SIZE))
    file = BlockFile.open(path)
    if file.in_memory:
        pytest.skip("the tests' folder is in memory")
    store = FileStore(file, SIZE)
    assert not store.flush_now()
    asyncio.run(store.flush())
    store.close()


def test_a_flush_that_failed_is_not_tried_again(in_memory: BlockFile) -> None:
    store = FileStore(in_memory, SIZE)
    pipe = os.pipe()
    good, in_memory.fd = in_memory.fd, pipe[0]  # nothing that can be flushed
    with pytest.raises(LostWriteError):
        store.flush_now()
    in_memory.fd = good
    for end in pipe:
        os.close(end)
    with pytest.raises(LostWriteError):
        store.flush_now()
    with pytest.raises(LostWriteError):
        asyncio.run(store.flush())
