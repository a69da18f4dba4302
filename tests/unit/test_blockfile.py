"""BlockFile on a disk filesystem and on tmpfs: the same contract, different system calls."""

import asyncio
import ctypes
import errno
import fcntl
import mmap
import os
from pathlib import Path

import pytest

from nbdserver import blockfile
from nbdserver.blockfile import BlockFile, BlockFileError, LostWriteError
from nbdserver.export import NO_ERRORS
from nbdserver.extents import DATA, HOLE
from nbdserver.file_export import FileExport
from tests.cluster.mounted import need_mounts, run

MIB = 1024 * 1024
SIZE = 4 * MIB


@pytest.fixture(params=["disk", "tmpfs"])
def path(request, tmp_path):
    if request.param == "disk":
        yield tmp_path / "image"
        return
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        pytest.skip("/dev/shm is not writable here")
    file = shm / f"blockfile-test-{os.getpid()}"
    yield file
    file.unlink(missing_ok=True)


@pytest.fixture
def file(path):
    path.touch()
    os.truncate(path, SIZE)
    opened = BlockFile.open(path)
    yield opened
    opened.close()


def test_open_facts(file, path):
    assert (file.path, file.size_bytes, file.is_block_device) == (str(path), SIZE, False)
    os.truncate(path, SIZE + 4096)
    assert file.refresh_size() == file.size_bytes == SIZE + 4096


def test_write_and_read(file):
    file.write_now(4097, memoryview(b"hello"))
    file.write_durable(SIZE - 3, b"end")
    file.flush()
    assert file.read(4096, 7) == b"\0hello\0"
    assert file.read_now(SIZE - 4, 4) == b"\0end"
    assert file.read(0, SIZE)[-3:] == b"end"


def test_read_now_gives_all_or_none(file):
    assert file.read_now(SIZE - 10, 20) is None
    assert file.read_now(0, 2 * MIB) is None  # too much for the loop's thread
    file.write_now(0, b"x" * 65536)
    assert file.read_now(0, 65536) == b"x" * 65536


def in_page_cache(path: Path) -> list[bool]:
    """Of each page, by mincore(2)."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = ctypes.create_string_buffer(-(-len(mapped) // mmap.PAGESIZE))
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), pages) == 0
    return [bool(page & 1) for page in pages.raw]


def test_nothing_is_read_that_was_not_asked_for(short_dir):
    """Though it looks like a stream, of which the kernel would read more and more."""
    path, piece = short_dir / "on-disk", 64 << 10
    path.write_bytes(os.urandom(64 * piece))
    file = BlockFile.open(path)
    try:
        file.forget_cache()
        if file.in_memory or any(in_page_cache(path)):
            pytest.skip("the page cache does not forget here: this is no disk, or a busy one")
        for number in range(16):
            file.read_now(number * piece, piece, ahead=False)
            assert len(file.read(number * piece, piece, ahead=False)) == piece
        assert in_page_cache(path) == [True] * (16 * piece // mmap.PAGESIZE) + [False] * (48 * piece // mmap.PAGESIZE)
    finally:
        file.close()


def test_what_is_about_to_be_written_counts_as_on_the_medium(file):
    file.write_now(4096, b"x" * 4096)
    assert file.read_medium(4096, 4096) == b"x" * 4096
    file.flush()
    assert file.read_medium(0, 8192)[4096:] == b"x" * 4096
    with pytest.raises(OSError, match="ends before"):
        file.read_medium(file.size_bytes - 512, 4096)


def test_reading_behind_the_end_is_an_error(file):
    with pytest.raises(OSError, match="ends before") as caught:
        file.read(SIZE - 10, 20)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("punch", [True, False])
def test_zero(file, punch):
    file.write_now(0, b"\xff" * (3 * MIB))
    file.zero(4096 + 5, 2 * MIB, punch)
    assert file.read(0, 3 * MIB) == b"\xff" * 4101 + bytes(2 * MIB) + b"\xff" * (MIB - 4101)
    assert os.fstat(file.fd).st_size == SIZE
    file.zero(0, 0, punch)  # nothing to do is not an error
    blocks = os.fstat(file.fd).st_blocks * 512
    assert (blocks < 2 * MIB) if punch else (blocks >= 3 * MIB)


@pytest.mark.parametrize("punch", [True, False])
@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_zero_writes_zeroes_where_fallocate_cannot(file, monkeypatch, punch, number):
    def refuse(*_arguments: int) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(blockfile, "_fallocate", refuse)
    file.write_now(0, b"\xff" * SIZE)
    file.zero(1, SIZE - 2, punch)
    assert file.read(0, SIZE) == b"\xff" + bytes(SIZE - 2) + b"\xff"


def test_zero_reports_real_errors(file, monkeypatch):
    def fail(*_arguments: int) -> int:
        ctypes.set_errno(errno.ENOSPC)
        return -1

    monkeypatch.setattr(blockfile, "_fallocate", fail)
    with pytest.raises(OSError) as caught:
        file.zero(0, 4096, False)
    assert caught.value.errno == errno.ENOSPC


def test_next_data(file):
    assert file.next_data(0, SIZE) == (SIZE, SIZE)
    file.write_now(MIB, b"x" * 8192)
    assert file.next_data(0, SIZE) == (MIB, MIB + 8192)
    assert file.next_data(MIB + 100, MIB + 200) == (MIB + 100, MIB + 200)
    assert file.next_data(0, MIB) == (MIB, MIB)
    assert file.next_data(MIB + 8192, SIZE) == (SIZE, SIZE)
    assert file.next_data(SIZE, SIZE) == (SIZE, SIZE)


def test_durable_write_without_rwf_dsync(file, monkeypatch):
    def refuse(*_arguments: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(os, "pwritev", refuse)
    file.write_durable(10, b"data")
    assert file.read(10, 4) == b"data"


def test_only_a_failed_wait_counts_as_lost(file, monkeypatch):
    def fail(*_arguments: object) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "pwritev", fail)
    with pytest.raises(LostWriteError):
        file.write_durable(0, b"data")
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError) as caught:
        file.write_durable(0, b"data")
    assert not isinstance(caught.value, LostWriteError)


def test_short_writes_are_continued(file, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: whole(fd, bytes(data)[:3], offset))
    file.write_now(0, b"0123456789")
    assert file.read(0, 11) == b"0123456789\0"


def test_second_opener_is_refused_with_a_sentence(file, path):
    with pytest.raises(BlockFileError, match="in use by another process; stop that one first"):
        BlockFile.open(path)
    with pytest.raises(BlockFileError, match="in use"):
        BlockFile.open(path, read_only=True)
    BlockFile.open(path, exclusive=False).close()
    file.close()
    file.close()
    readers = [BlockFile.open(path, read_only=True) for _ in range(2)]
    with pytest.raises(BlockFileError, match="in use"):
        BlockFile.open(path)
    for reader in readers:
        reader.close()


def test_open_errors_are_sentences(tmp_path):
    with pytest.raises(BlockFileError, match=r"no such file; create it first$"):
        BlockFile.open(tmp_path / "missing")
    with pytest.raises(BlockFileError, match=r"the directory .*gone does not exist"):
        BlockFile.open(tmp_path / "gone" / "missing")
    with pytest.raises(BlockFileError, match="neither a regular file nor a block device"):
        BlockFile.open(tmp_path)


def test_a_failed_open_keeps_no_lock(path, monkeypatch):
    path.touch()

    def fail(*_arguments: object) -> None:
        raise OSError(errno.EWOULDBLOCK, "locked")

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", fail)
        with pytest.raises(BlockFileError):
            BlockFile.open(path)
    BlockFile.open(path).close()


def test_file_export_fails_for_good_after_a_failed_flush(file, monkeypatch):
    def fail(_fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    async def scenario() -> None:
        export = FileExport(file)
        outcomes: list[dict[int, int]] = []
        write = (0, memoryview(b"data"))
        assert export.write_batch([write], outcomes.append) is False
        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", fail)
            with pytest.raises(OSError):
                await export.flush()
        with pytest.raises(OSError, match="earlier flush"):  # although fdatasync would succeed now
            await export.flush()
        with pytest.raises(OSError, match="earlier flush"):
            await export.write_durable(0, b"data")
        with pytest.raises(OSError, match="earlier flush"):
            await export.zero(0, 4096, True)
        export.write_batch([write, write], outcomes.append)
        assert outcomes == [NO_ERRORS, {0: 5, 1: 5}]
        assert export.read_now(0, 4) == b"data"

    asyncio.run(scenario())


def test_file_export_reports_errors_by_index(file, monkeypatch):
    whole = os.pwrite

    def full(fd: int, data: memoryview, offset: int) -> int:
        if offset == 8192:
            raise OSError(errno.EDQUOT, "quota")
        return whole(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    outcomes: list[dict[int, int]] = []
    writes = [(offset, memoryview(b"z" * 4096)) for offset in (0, 8192, 4096)]
    FileExport(file).write_batch(writes, outcomes.append)
    assert outcomes == [{1: 28}]
    assert file.read(0, 12288) == b"z" * 8192 + bytes(4096)


def test_zeroing_is_known_to_be_fast_where_holes_can_be_punched(file, path):
    before = os.stat(path)
    assert file.punches_fast  # both file systems of these tests can
    assert (os.stat(path).st_size, os.stat(path).st_blocks) == (before.st_size, before.st_blocks)


def test_zeroing_is_never_fast_where_it_is_not_known(path, monkeypatch):
    path.touch()
    os.truncate(path, SIZE)
    reader = BlockFile.open(path, read_only=True)
    assert not reader.punches_fast
    reader.close()

    def unsupported(*_):
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr(blockfile, "_fallocate", unsupported)
    other = BlockFile.open(path)
    assert not other.punches_fast
    assert not FileExport(other).zeroes_fast(0, 4096, True)
    other.close()


def test_block_status_and_prefetch_of_a_file(file):
    file.write_now(MIB, b"d" * MIB)
    file.write_now(3 * MIB, b"d" * 4096)
    export = FileExport(file)

    async def look(offset, length, most):
        await export.prefetch(offset, 2**32)
        return await export.block_status(offset, length, most)

    expected = [(MIB, HOLE), (MIB, DATA), (MIB, HOLE), (4096, DATA), (MIB - 4096, HOLE)]
    assert asyncio.run(look(0, SIZE, 100)) == expected
    assert asyncio.run(look(0, SIZE, 2)) == expected[:2]
    assert asyncio.run(look(MIB + 512, 1024, 100)) == [(1024, DATA)]
    file.zero(MIB, MIB, punch=True)
    assert asyncio.run(look(0, 3 * MIB, 100)) == [(3 * MIB, HOLE)]


@pytest.mark.root
def test_a_device_is_not_in_memory_because_its_node_is(short_dir):
    """/dev is a tmpfs; what a node in it stands for is a disk, and reads of that may take their time."""
    need_mounts()
    image = short_dir / "image"
    image.write_bytes(bytes(SIZE))
    device = run("losetup", "--find", "--show", image).strip()
    try:
        file = BlockFile.open(device)
        try:
            assert not file.in_memory
            file.forget_cache()
            assert file.read_now(0, 4096) is None
            assert file.read(0, 4096) == bytes(4096)
            assert file.read_now(0, 4096) == bytes(4096)
        finally:
            file.close()
    finally:
        run("losetup", "--detach", device)
