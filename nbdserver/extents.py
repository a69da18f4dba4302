"""Holes: consecutive extents as BLOCK_STATUS reports them, in `base:allocation`, and when zeroing is fast.

Every walk is bounded, in extents and in time; what is left out, a client asks for again.
"""

from collections.abc import Awaitable, Callable, Iterable

from nbdserver import constants as c

#: (length in bytes, flags of base:allocation). The first of a list begins where the question does.
Extent = tuple[int, int]

DATA = 0
HOLE = c.STATE_HOLE | c.STATE_ZERO

#: Most extents of one reply.
MAX_EXTENTS = 1024
#: A walk ends at the first extent that is found after this time.
WALK_S = 0.1


def _add(extents: list[Extent], length: int, flags: int) -> None:
    if extents and extents[-1][1] == flags:
        extents[-1] = (extents[-1][0] + length, flags)
    else:
        extents.append((length, flags))


async def walk(
    next_data: Callable[[int, int], Awaitable[tuple[int, int]]],
    offset: int,
    length: int,
    most: int,
    now_s: Callable[[], float],
) -> list[Extent]:
    """At least one and at most `most` extents from `offset` on, no two neighbours alike, of `length` bytes or less.

    `next_data` (offset, end) is the next (start, stop) of data, (end, end) when the rest is a hole. A hole of a file
    or volume always reads as zeroes. Raises what `next_data` raises.
    """
    extents: list[Extent] = []
    at, end = offset, offset + length
    deadline_s = now_s() + WALK_S
    while at < end and len(extents) < most:
        start, stop = await next_data(at, end)
        if start > at:
            _add(extents, start - at, HOLE)
        if start < end and len(extents) < most:
            if stop <= start:  # it changes under our eyes: data is never wrong
                stop = end
            _add(extents, stop - start, DATA)
        at = stop
        if now_s() > deadline_s:
            break
    return extents


def zeroes_fast(punches_fast: bool, offset: int, length: int, punch: bool) -> bool:
    """The rule for FAST_ZERO, given whether the storage punches whole blocks fast (BlockFile.punches_fast).

    Only where no hole may stay (NO_HOLE), or in blocks that are zeroed in part, may zeroes have to be written.
    """
    return punches_fast and punch and not (offset | length) % c.PREFERRED_BLOCK_BYTES


def without_small_holes(extents: Iterable[Extent], least_bytes: int) -> list[Extent]:
    """The same extents, with holes of less than `least_bytes` counted as data."""
    merged: list[Extent] = []
    for length, flags in extents:
        _add(merged, length, flags if length >= least_bytes else DATA)
    return merged
