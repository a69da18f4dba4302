"""The one place of raw file calls: a regular file or a block device, opened for exclusive use."""

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Self

_FALLOC_KEEP_SIZE = 0x01
_FALLOC_PUNCH_HOLE = 0x02
_FALLOC_ZERO_RANGE = 0x10

_ZEROES = bytes(1024 * 1024)
# More than this is copied by a thread, while the loop does something else.
_NOW_BYTES = 256 * 1024

_UNSUPPORTED = frozenset((errno.EOPNOTSUPP, errno.ENOSYS))
# Block devices answer EINVAL to ranges that are not aligned to their sectors.
_CANNOT_FALLOCATE = _UNSUPPORTED | {errno.EINVAL, errno.ENODEV}

_WOULD_BLOCK = frozenset((errno.EAGAIN, errno.EWOULDBLOCK))

_TMPFS_MAGIC = 0x01021994
_RAMFS_MAGIC = 0x858458F6


class BlockFileError(Exception):
    """A file cannot be used; the text is one sentence for the user."""


class LostWriteError(OSError):
    """Data that was written before did not reach stable storage, and the kernel may have dropped it.

    Trying again proves nothing: the next flush succeeds although the data is gone.
    """


def _load_fallocate() -> Callable[[int, int, int, int], int]:
    libc = ctypes.CDLL(None, use_errno=True)
    function = getattr(libc, "fallocate64", None) or libc.fallocate
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int
    return function


_fallocate = _load_fallocate()


class BlockFile:
    """An open backing file. Sizes and offsets in bytes; all I/O methods raise OSError.

    The methods whose name ends in `_now` do not wait for a device (a page-cache write can be throttled by
    the kernel when too much is dirty; that is accepted). All others may block: call them in a thread. They
    can be called from several threads at once.
    """

    def __init__(self, path: str, fd: int, size_bytes: int, is_block_device: bool) -> None:
        self.path = path
        self.fd = fd
        self.size_bytes = size_bytes
        self.is_block_device = is_block_device
        self._scratch = memoryview(bytearray(_NOW_BYTES))
        #: Held in memory: no call waits for a device. (A device node says what /dev is on, which is a tmpfs.)
        self.in_memory = not is_block_device and _filesystem_magic(fd) in (_TMPFS_MAGIC, _RAMFS_MAGIC)
        self._has_nowait = True
        self._has_dsync = True
        self._unsupported_modes: set[int] = set()
        #: Whether `zero` with `punch`, on whole 4 KiB blocks, is sure to be quicker than writing zeroes.
        self.punches_fast = _device_zeroes_fast(fd) if is_block_device else self._can_punch()
        self._exact_fd = _opened_anew(fd)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, read_only: bool = False, exclusive: bool = True) -> Self:
        """Open and lock. A read-only user shares the lock with other readers. Raises BlockFileError."""
        name = os.fspath(path)
        access = os.O_RDONLY if read_only else os.O_RDWR
        try:
            kind = os.stat(name).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
                raise BlockFileError(f"{name} is neither a regular file nor a block device; give one of these")
            is_block_device = stat.S_ISBLK(kind)
            if is_block_device and exclusive and not read_only:
                access |= os.O_EXCL  # refused while it is mounted or used by another driver
            fd = os.open(name, access | os.O_CLOEXEC)
        except OSError as error:
            raise BlockFileError(_open_sentence(name, read_only, error)) from None
        try:
            if exclusive:
                fcntl.flock(fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            size_bytes = os.lseek(fd, 0, os.SEEK_END)
            return cls(name, fd, size_bytes, is_block_device)
        except OSError as error:
            os.close(fd)
            if error.errno in _WOULD_BLOCK:
                raise BlockFileError(f"{name} is in use by another process; stop that one first") from None
            raise BlockFileError(_open_sentence(name, read_only, error)) from None

    def close(self) -> None:
        """Close; the lock goes with it. Can be called more than once."""
        if self.fd >= 0:
            for fd in {self.fd, self._exact_fd}:
                os.close(fd)
            self.fd = self._exact_fd = -1

    def refresh_size(self) -> int:
        """Look at the size again (the file or device may have been grown) and return it."""
        self.size_bytes = os.lseek(self.fd, 0, os.SEEK_END)
        return self.size_bytes

    def write_now(self, offset: int, data: bytes | memoryview) -> None:
        """Write to the page cache."""
        written = os.pwrite(self.fd, data, offset)
        if written != len(data):
            self._write_rest(offset, memoryview(data), written)

    def _write_rest(self, offset: int, view: memoryview, written: int) -> None:
        while written < len(view):
            count = os.pwrite(self.fd, view[written:], offset + written)
            if count == 0:
                raise OSError(errno.EIO, "nothing more could be written")
            written += count

    def read_now(self, offset: int, length: int, *, ahead: bool = True) -> bytes | None:
        """Exactly `length` bytes when they are in the page cache and not too many, else None. `ahead`: as for `read`
        (for the kernel begins to read what is not there).
        """
        if length > _NOW_BYTES:
            return None
        if self.in_memory:
            data = os.pread(self.fd, length, offset)
            return data if len(data) == length else None
        if not self._has_nowait:
            return None
        view = self._scratch[:length]
        try:
            count = os.preadv(self.fd if ahead else self._exact_fd, (view,), offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                self._has_nowait = False
            elif error.errno not in _WOULD_BLOCK:
                raise
            return None
        return bytes(view) if count == length else None

    def read(self, offset: int, length: int, *, ahead: bool = True) -> bytes:
        """Exactly `length` bytes; OSError EIO when the file ends before. Not `ahead`: the kernel reads nothing that was
        not asked for (of what it takes for a stream it may read megabytes, and who wants something else has to wait).
        """
        fd = self.fd if ahead else self._exact_fd
        data = os.pread(fd, length, offset)
        if len(data) == length:
            return data
        pieces = [data]
        have = len(data)
        while have < length:
            data = os.pread(fd, length - have, offset + have)
            if not data:
                raise OSError(errno.EIO, f"{self.path} ends before byte {offset + length}")
            pieces.append(data)
            have += len(data)
        return b"".join(pieces)

    def read_medium(self, offset: int, length: int) -> bytes:
        """Like `read`, but pages that are not about to be written are read from the medium anew.

        Without effect on tmpfs, and on pages that somebody else has mapped.
        """
        os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_DONTNEED)
        return self.read(offset, length, ahead=False)  # the next call would drop what was read ahead

    def write_durable(self, offset: int, data: bytes | memoryview) -> None:
        """Write and wait until it is on stable storage. Raises LostWriteError when only the wait failed."""
        view = memoryview(data)
        while view and self._has_dsync:
            try:
                count = os.pwritev(self.fd, (view,), offset, os.RWF_DSYNC)
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    self._has_dsync = False
                    break
                self._write_rest(offset, view, 0)  # fails as well when it was the write that failed
                raise LostWriteError(error.errno, error.strerror) from None
            if count == 0:
                raise OSError(errno.EIO, "nothing more could be written")
            view = view[count:]
            offset += count
        if view:
            self._write_rest(offset, view, 0)
            self.flush()

    def flush(self) -> None:
        """Make everything written so far durable. Raises LostWriteError."""
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            raise LostWriteError(error.errno, error.strerror) from None

    def forget_cache(self) -> None:
        """Flush, then let the page cache go, so that what is read is what the medium has. Raises LostWriteError.

        After a failed flush the kernel shows pages that it has not written and counts as clean. Without effect on
        tmpfs, and on pages that somebody else has mapped.
        """
        self.flush()
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def zero(self, offset: int, length: int, punch: bool) -> None:
        """Make the range read as zeroes, giving the space back (`punch`) or keeping it allocated."""
        if length == 0:
            return
        mode = (_FALLOC_PUNCH_HOLE if punch else _FALLOC_ZERO_RANGE) | _FALLOC_KEEP_SIZE
        if not self._fallocate(mode, offset, length):
            end = offset + length
            while offset < end:
                piece = memoryview(_ZEROES)[: end - offset]
                self._write_rest(offset, piece, 0)
                offset += len(piece)

    def _can_punch(self) -> bool:
        """Whether the file system knows holes. Asked by punching one behind the end of the file: nothing changes."""
        behind = (self.size_bytes + 4095) // 4096 * 4096
        try:
            return self._fallocate(_FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, behind, 4096)
        except OSError:  # opened for reading only, for instance
            return False

    def prefetch(self, offset: int, length: int) -> None:
        """Have the kernel begin to read the range into the page cache."""
        os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_WILLNEED)

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """False when this file or device cannot do it."""
        if mode in self._unsupported_modes:
            return False
        while _fallocate(self.fd, mode, offset, length) != 0:
            number = ctypes.get_errno()
            if number == errno.EINTR:
                continue
            if number in _UNSUPPORTED:
                self._unsupported_modes.add(mode)
            if number in _CANNOT_FALLOCATE:
                return False
            raise OSError(number, os.strerror(number))
        return True

    def next_data(self, offset: int, end: int) -> tuple[int, int]:
        """Next (start, stop) of data in [offset, end); (end, end) when the rest is a hole."""
        if offset >= end:
            return end, end
        try:
            start = os.lseek(self.fd, offset, os.SEEK_DATA)
            if start >= end:
                return end, end
            stop = os.lseek(self.fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end of the file
                return end, end
            if error.errno in _CANNOT_FALLOCATE:
                return offset, end
            raise
        return start, min(stop, end)


def _device_zeroes_fast(fd: int) -> bool:
    """Whether a block device has a command of its own for zeroes; without one the kernel writes them."""
    number = os.fstat(fd).st_rdev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    for queue in (device / "queue", device.resolve().parent / "queue"):  # a partition has its disk's
        try:
            return int((queue / "write_zeroes_max_bytes").read_text()) > 0
        except (OSError, ValueError):
            continue
    return False


def _filesystem_magic(fd: int) -> int:
    """f_type of the filesystem; os.statvfs does not tell it. 0 when unknown."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = (ctypes.c_long * 64)()  # struct statfs begins with f_type, a word, and is shorter than this
    if libc.fstatfs(ctypes.c_int(fd), ctypes.byref(buffer)) != 0:
        return 0
    return int(buffer[0])


def _opened_anew(fd: int) -> int:
    """Another description of the same file, for reads without read-ahead; the same one where that is not to be had."""
    try:
        anew = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return fd
    os.posix_fadvise(anew, 0, 0, os.POSIX_FADV_RANDOM)
    return anew


def _open_sentence(name: str, read_only: bool, error: OSError) -> str:
    what = "for reading" if read_only else "for reading and writing"
    if error.errno == errno.ENOENT:
        directory = Path(name).parent
        hint = "create it first" if directory.is_dir() else f"the directory {directory} does not exist"
        return f"cannot open {name}: there is no such file; {hint}"
    if error.errno == errno.EBUSY:
        return f"cannot open {name}: the device is in use (mounted?); unmount or release it first"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot open {name} {what}: {error.strerror}; check its permissions and the user"
    return f"cannot open {name} {what}: {error.strerror}"
