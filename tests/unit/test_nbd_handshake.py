"""The handshake, line by line of the protocol text (doc/proto.md of NetworkBlockDevice/nbd)."""

import struct
from collections.abc import Iterable

import pytest

from nbdserver import constants as c
from nbdserver.export import Export
from nbdserver.handshake import GREETING, Ended, Handshake, Opened, transmission_flags
from nbdserver.transmission import Dialect

SIZE = 5 * 1024 * 1024
FIXED = struct.pack(">I", c.FLAG_FIXED_NEWSTYLE)
FIXED_NO_ZEROES = struct.pack(">I", c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES)


class Disk(Export):
    """Enough of an export for haggling about it."""

    name: str
    description: str
    size_bytes: int
    read_only: bool

    def __init__(self, name, description="", read_only=False, refused=None):
        self.name, self.description, self.size_bytes = name, description, SIZE
        self.read_only, self.refused = read_only, refused

    def refusal(self):
        return self.refused

    def write_batch(self, writes, done):
        raise NotImplementedError

    def read_now(self, offset, length):
        raise NotImplementedError

    async def read(self, offset, length):
        raise NotImplementedError

    async def write_durable(self, offset, data):
        raise NotImplementedError

    async def flush(self):
        raise NotImplementedError

    async def trim(self, offset, length):
        raise NotImplementedError

    async def zero(self, offset, length, punch):
        raise NotImplementedError


class Shelf:
    """A directory of exports."""

    def __init__(self, *exports: Export, default: Export | None = None) -> None:
        self.exports = {export.name: export for export in exports}
        self.default = default
        self.shutting_down = False

    def find(self, name: str) -> Export | None:
        return self.exports.get(name) or (self.default if name == "" else None)

    def listing(self) -> Iterable[Export]:
        return self.exports.values()


@pytest.fixture
def shelf() -> Shelf:
    web = Disk("web", "pages of the site")
    return Shelf(web, Disk("logs", read_only=True), default=web)


def option(number: int, data: bytes = b"", magic: int = c.OPTION_MAGIC) -> bytes:
    return struct.pack(">QII", magic, number, len(data)) + data


def info(name: bytes, *wanted: int) -> bytes:
    head = struct.pack(">I", len(name)) + name + struct.pack(">H", len(wanted))
    return head + b"".join(struct.pack(">H", number) for number in wanted)


def replies(output: bytes) -> list[tuple[int, int, bytes]]:
    """[(option, reply type, data)]; fails when the output is anything else."""
    found = []
    while output:
        magic, number, kind, length = struct.unpack_from(">QIII", output)
        assert magic == 0x3E889045565A9
        assert len(output) >= 20 + length
        found.append((number, kind, output[20 : 20 + length]))
        output = output[20 + length :]
    return found


def kinds(output: bytes) -> list[int]:
    return [kind for _, kind, _ in replies(output)]


def test_greeting_is_fixed_newstyle_with_no_zeroes():
    assert GREETING == b"NBDMAGICIHAVEOPT\x00\x03"


@pytest.mark.parametrize("flags", [4, 0x80000000, 7])
def test_unknown_client_flag_ends_the_connection(shelf, flags):
    handshake = Handshake(shelf)
    assert handshake.feed(struct.pack(">I", flags) + option(c.OPT_LIST)) == b""
    assert isinstance(handshake.outcome, Ended)
    assert "flags" in handshake.outcome.reason


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_known_client_flags_are_accepted(shelf, flags):
    handshake = Handshake(shelf)
    assert kinds(handshake.feed(struct.pack(">I", flags) + option(c.OPT_LIST)))[-1] == c.REP_ACK


def test_wrong_option_magic_ends_the_connection(shelf):
    handshake = Handshake(shelf)
    assert handshake.feed(FIXED + option(c.OPT_LIST, magic=c.INIT_MAGIC)) == b""
    assert isinstance(handshake.outcome, Ended)


@pytest.mark.parametrize(("flags", "zeroes"), [(FIXED, 124), (FIXED_NO_ZEROES, 0)], ids=["zeroes", "no zeroes"])
def test_export_name(shelf, flags, zeroes):
    handshake = Handshake(shelf)
    output = handshake.feed(flags + option(c.OPT_EXPORT_NAME, b"web") + b"first request")
    web = shelf.exports["web"]
    assert output == struct.pack(">QH", SIZE, transmission_flags(web)) + bytes(zeroes)
    assert handshake.outcome == Opened(web, Dialect())
    assert handshake.rest == b"first request"


@pytest.mark.parametrize("name", [b"nope", b"web\0", b"\xff\xfe", b"n" * 4097])
def test_export_name_can_only_fail_by_closing(shelf, name):
    handshake = Handshake(shelf)
    assert handshake.feed(FIXED + option(c.OPT_EXPORT_NAME, name)) == b""
    assert isinstance(handshake.outcome, Ended)


def test_export_name_of_a_refused_export_closes():
    handshake = Handshake(Shelf(Disk("r0", refused="it is Secondary here; connect to node1")))
    assert handshake.feed(FIXED + option(c.OPT_EXPORT_NAME, b"r0")) == b""
    assert handshake.outcome == Ended("it is Secondary here; connect to node1")


def test_list_names_everything(shelf):
    handshake = Handshake(shelf)
    web = struct.pack(">I", 3) + b"web" + b"pages of the site"
    logs = struct.pack(">I", 4) + b"logs"
    assert replies(handshake.feed(FIXED + option(c.OPT_LIST))) == [
        (c.OPT_LIST, c.REP_SERVER, web),
        (c.OPT_LIST, c.REP_SERVER, logs),
        (c.OPT_LIST, c.REP_ACK, b""),
    ]
    assert handshake.outcome is None


@pytest.mark.parametrize("number", [c.OPT_LIST, c.OPT_ABORT, c.OPT_STRUCTURED_REPLY])
def test_data_where_none_belongs_is_invalid_and_haggling_goes_on(shelf, number):
    handshake = Handshake(shelf)
    assert kinds(handshake.feed(FIXED + option(number, b"x"))) == [c.REP_ERR_INVALID]
    assert kinds(handshake.feed(option(c.OPT_LIST)))[-1] == c.REP_ACK


def test_abort_is_acknowledged_and_ends(shelf):
    handshake = Handshake(shelf)
    assert replies(handshake.feed(FIXED + option(c.OPT_ABORT))) == [(c.OPT_ABORT, c.REP_ACK, b"")]
    assert isinstance(handshake.outcome, Ended)


@pytest.mark.parametrize("number", [c.OPT_STARTTLS, 4, 11, 99, 0, 0xFFFFFFFF])
@pytest.mark.parametrize("data", [b"", b"some data"])
def test_unknown_options_are_drained_and_unsupported(shelf, number, data):
    handshake = Handshake(shelf)
    output = handshake.feed(FIXED + option(number, data) + option(c.OPT_ABORT))
    assert [(number, kind) for number, kind, _ in replies(output)] == [
        (number, c.REP_ERR_UNSUP),
        (c.OPT_ABORT, c.REP_ACK),
    ]


def test_go_sends_the_export_before_the_acknowledgement(shelf):
    handshake = Handshake(shelf)
    web = shelf.exports["web"]
    export_info = struct.pack(">HQH", c.INFO_EXPORT, SIZE, transmission_flags(web))
    assert replies(handshake.feed(FIXED + option(c.OPT_GO, info(b"web")) + b"rest")) == [
        (c.OPT_GO, c.REP_INFO, export_info),
        (c.OPT_GO, c.REP_ACK, b""),
    ]
    assert handshake.outcome == Opened(web, Dialect())
    assert handshake.rest == b"rest"


def test_info_answers_what_was_asked_and_haggling_goes_on(shelf):
    handshake = Handshake(shelf)
    wanted = (c.INFO_NAME, 77, c.INFO_DESCRIPTION, c.INFO_BLOCK_SIZE, c.INFO_NAME)
    output = replies(handshake.feed(FIXED + option(c.OPT_INFO, info(b"", *wanted))))
    assert [kind for _, kind, _ in output] == [c.REP_INFO] * 4 + [c.REP_ACK]
    assert [data for _, _, data in output[1:4]] == [
        struct.pack(">H", c.INFO_NAME) + b"web",
        struct.pack(">H", c.INFO_DESCRIPTION) + b"pages of the site",
        struct.pack(">HIII", c.INFO_BLOCK_SIZE, 1, 4096, 32 * 1024 * 1024),
    ]
    assert handshake.outcome is None


@pytest.mark.parametrize("number", [c.OPT_INFO, c.OPT_GO])
@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", c.REP_ERR_INVALID),
        (b"\0\0\0\0\0", c.REP_ERR_INVALID),
        (info(b"web") + b"x", c.REP_ERR_INVALID),
        (info(b"web", 1, 2)[:-1], c.REP_ERR_INVALID),
        (struct.pack(">I", 0xFFFFFFFF) + b"web\0\0", c.REP_ERR_INVALID),
        (struct.pack(">I", 4) + b"web" + b"\0\0", c.REP_ERR_INVALID),
        (info(b"a\0b"), c.REP_ERR_INVALID),
        (info(b"\xc3"), c.REP_ERR_INVALID),
        (info(b"n" * 4097), c.REP_ERR_TOO_BIG),
        (info(b"n" * 4096), c.REP_ERR_UNKNOWN),
        (info(b"nope"), c.REP_ERR_UNKNOWN),
    ],
)
def test_info_and_go_errors_do_not_end_the_haggling(shelf, number, data, error):
    handshake = Handshake(shelf)
    output = replies(handshake.feed(FIXED + option(number, data)))
    assert [(n, kind) for n, kind, _ in output] == [(number, error)]
    assert 0 < len(output[0][2]) <= c.MAX_STRING_BYTES
    assert kinds(handshake.feed(option(c.OPT_GO, info(b"web"))))[-1] == c.REP_ACK


def test_a_refusal_is_told_in_its_own_words():
    sentence = "r0 is Secondary on node2; connect to node1 (192.0.2.1), which is Primary"
    handshake = Handshake(Shelf(Disk("r0", refused=sentence)))
    output = replies(handshake.feed(FIXED + option(c.OPT_GO, info(b"r0"))))
    assert output == [(c.OPT_GO, c.REP_ERR_UNKNOWN, sentence.encode())]
    assert handshake.outcome is None


def test_long_error_texts_are_cut_between_characters():
    handshake = Handshake(Shelf(Disk("r0", refused="x" + "é" * 4000)))
    ((_, _, text),) = replies(handshake.feed(FIXED + option(c.OPT_GO, info(b"r0"))))
    assert len(text) == 4095
    assert text.decode() == "x" + "é" * 2047


def test_shutting_down(shelf):
    shelf.shutting_down = True
    handshake = Handshake(shelf)
    output = handshake.feed(FIXED + option(c.OPT_LIST) + option(c.OPT_GO, info(b"web")) + option(99))
    assert kinds(output) == [c.REP_ERR_SHUTDOWN] * 3
    assert kinds(handshake.feed(option(c.OPT_ABORT))) == [c.REP_ACK]
    closing = Handshake(shelf)
    assert closing.feed(FIXED + option(c.OPT_EXPORT_NAME, b"web")) == b""
    assert isinstance(closing.outcome, Ended)


def test_too_long_option_ends_the_connection_before_its_data(shelf):
    handshake = Handshake(shelf)
    assert handshake.feed(FIXED + struct.pack(">QII", c.OPTION_MAGIC, 99, c.MAX_OPTION_BYTES + 1)) == b""
    assert isinstance(handshake.outcome, Ended)


def test_too_many_options_end_the_connection(shelf):
    handshake = Handshake(shelf)
    assert len(replies(handshake.feed(FIXED + option(99) * c.MAX_OPTIONS))) == c.MAX_OPTIONS
    assert handshake.outcome is None
    assert handshake.feed(option(99)) == b""
    assert isinstance(handshake.outcome, Ended)


def test_transmission_flags(shelf):
    assert transmission_flags(shelf.exports["web"]) == 0b1101_0110_1101
    assert transmission_flags(shelf.exports["logs"]) == 0b101_0000_1111
    assert transmission_flags(shelf.exports["web"], structured_replies=True) == 0b1101_1110_1101
    assert transmission_flags(shelf.exports["logs"], structured_replies=True) == 0b101_1000_1111
