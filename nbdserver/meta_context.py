"""Metadata contexts: the data of LIST_META_CONTEXT and SET_META_CONTEXT, and what their queries select (pure).

Source: NetworkBlockDevice/nbd, doc/proto.md, "Metadata querying". This server has one context, `base:allocation`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nbdserver.constants import MAX_STRING_BYTES
from nbdserver.handshake_coding import U32

BASE_ALLOCATION = "base:allocation"
#: The number that BLOCK_STATUS replies carry for it. Any will do; not 0, which is what LIST sends and means nothing.
BASE_ALLOCATION_ID = 1

#: More queries than this in one option are refused (the protocol's ERR_TOO_BIG).
MAX_QUERIES = 128

_NAMESPACE = "base:"


class MetaContextError(ValueError):
    """The option's data is malformed; the text is one sentence. `too_big`: well formed, but over a bound."""

    def __init__(self, text: str, *, too_big: bool = False) -> None:
        super().__init__(text)
        self.too_big = too_big


@dataclass(frozen=True)
class Request:
    """The data of one of the two options; the export's name is not checked yet."""

    export_name: bytes
    queries: tuple[bytes, ...]


def parse(data: bytes) -> Request:
    """Take the option's data apart. Raises MetaContextError; every length is held against what is there."""
    name, at = _string(data, 0)
    (count,) = U32.unpack_from(_slice(data, at, U32.size))
    at += U32.size
    if count > MAX_QUERIES:
        raise MetaContextError(f"the option has {count} queries (at most {MAX_QUERIES})", too_big=True)
    queries: list[bytes] = []
    for _ in range(count):
        query, at = _string(data, at)
        if len(query) > MAX_STRING_BYTES:
            raise MetaContextError(f"a query has {len(query)} bytes (at most {MAX_STRING_BYTES})", too_big=True)
        queries.append(query)
    if at != len(data):
        raise MetaContextError("the lengths inside the option do not fit its length")
    return Request(name, tuple(queries))


def _slice(data: bytes, at: int, length: int) -> bytes:
    if at + length > len(data):
        raise MetaContextError("the lengths inside the option do not fit its length")
    return data[at : at + length]


def _string(data: bytes, at: int) -> tuple[bytes, int]:
    (length,) = U32.unpack(_slice(data, at, U32.size))
    at += U32.size
    return _slice(data, at, length), at + length


def lists_allocation(queries: Sequence[bytes]) -> bool:
    """Whether LIST_META_CONTEXT names `base:allocation`: for no query at all, and for a wildcard, too.

    A query that matches nothing, of whatever namespace, is passed over, as the protocol wants it.
    """
    wanted = {b"", _NAMESPACE.encode(), BASE_ALLOCATION.encode()}
    return not queries or not wanted.isdisjoint(queries)


def selects_allocation(queries: Sequence[bytes]) -> bool:
    """Whether SET_META_CONTEXT selects `base:allocation`: only by its full name."""
    return BASE_ALLOCATION.encode() in queries
