"""Structured replies and metadata contexts in the handshake, line by line of the protocol text."""

import struct

import pytest

from nbdserver import constants as c
from nbdserver.handshake import Handshake, Opened, transmission_flags
from nbdserver.meta_context import MAX_QUERIES
from nbdserver.transmission import Dialect
from tests.unit.test_nbd_handshake import FIXED_NO_ZEROES, Disk, Shelf, info, kinds, option, replies

LIST, SET = c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT
ALLOCATION = b"base:allocation"


@pytest.fixture
def shelf() -> Shelf:
    web = Disk("web")
    return Shelf(web, Disk("logs"), Disk("r0", refused="it is Secondary here; connect to node1"), default=web)


def query(name: bytes, *queries: bytes) -> bytes:
    head = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
    return head + b"".join(struct.pack(">I", len(one)) + one for one in queries)


def haggled(shelf: Shelf, *, structured: bool = True) -> Handshake:
    handshake = Handshake(shelf)
    handshake.feed(FIXED_NO_ZEROES)
    if structured:
        assert kinds(handshake.feed(option(c.OPT_STRUCTURED_REPLY))) == [c.REP_ACK]
    return handshake


def context(number: int, identity: int) -> tuple[int, int, bytes]:
    return number, c.REP_META_CONTEXT, struct.pack(">I", identity) + ALLOCATION


@pytest.mark.parametrize("structured", [False, True])
def test_df_is_advertised_only_with_structured_replies(shelf, structured):
    handshake = haggled(shelf, structured=structured)
    ((_, _, data), _) = replies(handshake.feed(option(c.OPT_GO, info(b"web"))))
    (flags,) = struct.unpack_from(">H", data, 10)
    assert bool(flags & c.EXPORT_SEND_DF) == structured
    assert handshake.outcome == Opened(shelf.exports["web"], Dialect(structured_replies=structured))


@pytest.mark.parametrize("queries", [(), (b"",), (b"base:",), (ALLOCATION,), (b"x-a:b", ALLOCATION, b"base:")])
def test_list_names_the_context_once(shelf, queries):
    output = haggled(shelf).feed(option(LIST, query(b"web", *queries)))
    assert replies(output) == [context(LIST, 0), (LIST, c.REP_ACK, b"")]


@pytest.mark.parametrize("queries", [(b"x-a:b",), (b"base:other",), (b"nocolon",), (b"base",)])
@pytest.mark.parametrize("number", [LIST, SET])
def test_queries_that_match_nothing_are_passed_over(shelf, number, queries):
    assert replies(haggled(shelf).feed(option(number, query(b"web", *queries)))) == [(number, c.REP_ACK, b"")]


@pytest.mark.parametrize("queries", [(), (b"",), (b"base:",)])
def test_set_knows_no_wildcards(shelf, queries):
    assert replies(haggled(shelf).feed(option(SET, query(b"web", *queries)))) == [(SET, c.REP_ACK, b"")]


@pytest.mark.parametrize("name", [b"web", b""])
@pytest.mark.parametrize("last", [option(c.OPT_GO, info(b"web")), option(c.OPT_EXPORT_NAME, b"")])
def test_set_selects_for_the_export_that_is_opened(shelf, name, last):
    handshake = haggled(shelf)
    output = replies(handshake.feed(option(SET, query(name, b"x-a:b", ALLOCATION, ALLOCATION))))
    assert output == [context(SET, 1), (SET, c.REP_ACK, b"")]
    handshake.feed(last)
    assert handshake.outcome == Opened(shelf.exports["web"], Dialect(structured_replies=True, base_allocation=True))


@pytest.mark.parametrize(
    "then",
    [
        option(SET, query(b"web")),
        option(SET, query(b"logs", ALLOCATION)),
        option(SET, query(b"nope", ALLOCATION)),
        option(SET, query(b"web", ALLOCATION)[:-1]),
    ],
)
def test_a_later_set_replaces_the_selection_even_when_it_fails(shelf, then):
    handshake = haggled(shelf)
    handshake.feed(option(SET, query(b"web", ALLOCATION)) + then + option(c.OPT_GO, info(b"web")))
    assert handshake.outcome == Opened(shelf.exports["web"], Dialect(structured_replies=True))


def test_list_and_info_leave_the_selection(shelf):
    handshake = haggled(shelf)
    handshake.feed(option(SET, query(b"web", ALLOCATION)) + option(LIST, query(b"logs", b"x-a:b")))
    handshake.feed(option(c.OPT_INFO, info(b"logs")) + option(c.OPT_GO, info(b"web")))
    assert handshake.outcome == Opened(shelf.exports["web"], Dialect(structured_replies=True, base_allocation=True))


@pytest.mark.parametrize("number", [LIST, SET])
def test_contexts_need_structured_replies_first(shelf, number):
    handshake = haggled(shelf, structured=False)
    assert kinds(handshake.feed(option(number, query(b"web", ALLOCATION)))) == [c.REP_ERR_INVALID]
    handshake.feed(option(c.OPT_STRUCTURED_REPLY) + option(c.OPT_GO, info(b"web")))
    assert handshake.outcome == Opened(shelf.exports["web"], Dialect(structured_replies=True))


GOOD = query(b"web", ALLOCATION, b"base:")


@pytest.mark.parametrize("number", [LIST, SET])
@pytest.mark.parametrize(
    ("data", "error"),
    [
        *((GOOD[:length], c.REP_ERR_INVALID) for length in range(len(GOOD))),
        (GOOD + b"x", c.REP_ERR_INVALID),
        (b"\xff" * 4 + GOOD[4:], c.REP_ERR_INVALID),
        (query(b"web")[:-4] + struct.pack(">I", MAX_QUERIES), c.REP_ERR_INVALID),
        (query(b"web", b"")[:-4] + struct.pack(">I", 2**32 - 1), c.REP_ERR_INVALID),
        (query(b"web")[:-4] + struct.pack(">I", 2**32 - 1), c.REP_ERR_TOO_BIG),
        (query(b"web", *[b"x-a:b"] * (MAX_QUERIES + 1)), c.REP_ERR_TOO_BIG),
        (query(b"web", b"q" * 4097), c.REP_ERR_TOO_BIG),
        (query(b"n" * 4097, ALLOCATION), c.REP_ERR_TOO_BIG),
        (query(b"w\0b", ALLOCATION), c.REP_ERR_INVALID),
        (query(b"\xff", ALLOCATION), c.REP_ERR_INVALID),
        (query(b"nope", ALLOCATION), c.REP_ERR_UNKNOWN),
        (query(b"r0", ALLOCATION), c.REP_ERR_UNKNOWN),
    ],
)
def test_errors_do_not_end_the_haggling(shelf, number, data, error):
    handshake = haggled(shelf)
    assert kinds(handshake.feed(option(number, data))) == [error]
    assert kinds(handshake.feed(option(number, query(b"web", ALLOCATION)))) == [c.REP_META_CONTEXT, c.REP_ACK]


def test_most_queries_of_the_greatest_length_are_fine(shelf):
    data = query(b"web", *[b"x-a:b"] * (MAX_QUERIES - 1), ALLOCATION)
    assert kinds(haggled(shelf).feed(option(SET, data))) == [c.REP_META_CONTEXT, c.REP_ACK]
    assert kinds(haggled(shelf).feed(option(SET, query(b"web", b"q" * 4096)))) == [c.REP_ACK]


def test_a_secondary_refuses_in_its_own_words(shelf):
    ((_, _, text),) = replies(haggled(shelf).feed(option(LIST, query(b"r0"))))
    assert text == b"it is Secondary here; connect to node1"


def test_shutting_down(shelf):
    handshake = haggled(shelf)
    shelf.shutting_down = True
    for number in (c.OPT_STRUCTURED_REPLY, LIST, SET):
        assert kinds(handshake.feed(option(number, query(b"web", ALLOCATION)))) == [c.REP_ERR_SHUTDOWN]


def test_flags_of_info_and_export_name_agree(shelf):
    handshake = haggled(shelf)
    web = shelf.exports["web"]
    output = handshake.feed(option(c.OPT_EXPORT_NAME, b"web"))
    assert output == struct.pack(">QH", web.size_bytes, transmission_flags(web, structured_replies=True))
