"""Group commit: many callers, few flushes."""

import asyncio
import errno
from collections.abc import Callable


class GroupCommit:
    """Lets any number of callers share flushes, each covered by one that *began* after it asked.

    A failed flush is final: the kernel has dropped the pages it could not write and would report success the next
    time (Rebello et al., "Can Applications Recover from fsync Failures?", 2020), so it is never tried again.
    """

    def __init__(self, flush: Callable[[], "asyncio.Future[None]"]) -> None:
        self._flush = flush
        self._running: asyncio.Future[None] | None = None
        self._next: asyncio.Future[None] | None = None
        self._failure: BaseException | None = None

    @property
    def running(self) -> bool:
        """Whether a flush is under way."""
        return self._running is not None

    async def flush(self) -> None:
        """Wait for a flush that began after this call. Raises what it, or any before it, raised."""
        if self._failure is not None:
            raise self._failure
        if self._running is None:
            await asyncio.shield(self._start())
            return
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._next)

    def flush_at_once(self, flush: Callable[[], None]) -> None:
        """Carry out a flush that takes no time. Raises what it, or any before it, raised."""
        if self._failure is not None:
            raise self._failure
        try:
            flush()
        except OSError as error:
            self._failure = error
            raise

    def _start(self) -> "asyncio.Future[None]":
        self._running = self._flush()
        self._running.add_done_callback(self._finished)
        return self._running

    def _finished(self, done: "asyncio.Future[None]") -> None:
        self._running = None
        waiting, self._next = self._next, None
        self._failure = None if done.cancelled() else done.exception()
        if waiting is None:
            return
        if self._failure is not None:
            waiting.set_exception(self._failure)
            return
        try:
            following = self._start()
        except (OSError, RuntimeError) as error:
            # What is flushed has been closed since (found by the simulator); who waited may be gone as well.
            self._failure = OSError(errno.EBADF, f"nothing more can be flushed ({error})")
            waiting.set_exception(self._failure)
            waiting.exception()
            return
        following.add_done_callback(lambda result: _copy_result(result, waiting))


def _copy_result(source: "asyncio.Future[None]", target: "asyncio.Future[None]") -> None:
    if target.done():
        return
    if source.cancelled():
        target.cancel()
    elif (error := source.exception()) is not None:
        target.set_exception(error)
    else:
        target.set_result(None)
