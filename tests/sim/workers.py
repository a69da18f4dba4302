"""Work spread over processes, with its results in the order of its items."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_is_over: Callable[[], bool] = lambda: False  # noqa: E731


def is_over() -> bool:
    """In a worker: nobody wants more results. Long work asks now and then."""
    return _is_over()


def usable_cpus() -> int:
    """How many processes can run at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(work: Callable[[Item], Result], items: Iterable[Item], jobs: int, chunk: int = 1) -> Iterator[Result]:
    """`map(work, items)` by `jobs` processes; 1: by this one. Close the iterator to end them before the last item.

    BrokenProcessPool when a worker was killed. Ctrl-C reaches the caller only; a worker finishes the item it is at.
    """
    if jobs == 1:
        yield from map(work, items)
        return
    context = multiprocessing.get_context("spawn")
    over = context.Event()
    executor = ProcessPoolExecutor(jobs, context, _begin, (over,))
    try:
        source = iter(items)
        chunks = iter(lambda: tuple(itertools.islice(source, chunk)), ())
        under_way = deque(executor.submit(_unless_over, work, some) for some in itertools.islice(chunks, 4 * jobs))
        while under_way:
            yield from under_way.popleft().result()
            under_way.extend(executor.submit(_unless_over, work, some) for some in itertools.islice(chunks, 1))
    finally:
        over.set()
        executor.shutdown(cancel_futures=True)


def _unless_over(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    return [work(item) for item in items if not is_over()]  # once it is over, nobody reads them


def _begin(over: Any) -> None:
    global _is_over  # noqa: PLW0603
    _is_over = over.is_set
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller's business
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        with contextlib.suppress(OSError):
            parent.join()
        os._exit(1)
