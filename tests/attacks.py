"""What clients do to an NBD server that no client should: known classes of attacks, one function each.

Each takes a `Target` and comes back when it is over; what stays open, because that is the attack, is in `Target.held`.
It checks the answers that the protocol asks for; whoever calls it checks what the server has become.
"""

import contextlib
import random
import select
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests import raw_nbd as nbd
from tests.raw_nbd import Connect, Ended, RawClient, info, option, request

MIB = 1 << 20
_ERROR = 1 << 31


@dataclass
class Target:
    """A server's export of `size_bytes`; attackers that stay are in `held`."""

    connect: Connect
    size_bytes: int
    tls: ssl.SSLContext | None = None
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def client(self) -> RawClient:
        """A new connection, not greeted."""
        return RawClient(self.connect, self.tls)

    def stays(self) -> RawClient:
        """A new connection that is open until the attack is over."""
        return self.held.enter_context(self.client())


def _refused(client: RawClient, number: int, data: bytes) -> None:
    """The option is refused, and haggling goes on."""
    client.send(option(number, data))
    answered, kind, _ = client.option_reply()
    assert (answered, kind & _ERROR) == (number, _ERROR), (number, data[:40], kind)


# ── the handshake ────────────────────────────────────────────────────────────────────────────────────────────────


def lengths_inside_an_option_do_not_fit(target: Target) -> None:
    wrong = (
        b"",
        b"\0",
        info(b"", name_length=1),
        info(b"x", name_length=0xFFFFFFFF),
        info(b"x", name_length=0x7FFFFFFF),
        info(b"", count=1),
        info(b"", count=0xFFFF),
        info(b"", 1, count=0),
        info(b"") + b"more",
    )
    with target.client().greet() as client:
        for number in (nbd.OPT_INFO, nbd.OPT_GO):
            for data in wrong:
                _refused(client, number, data)
        _refused(client, nbd.OPT_LIST, b"data where none is due")
        for number in (9, 10):  # meta contexts: a name, a number of queries, queries with a length each
            for data in (b"", b"\xff" * 8, struct.pack(">III", 0, 1, 0xFFFFFFFF), struct.pack(">II", 0, 0xFFFFFFFF)):
                _refused(client, number, data)
        client.send(option(nbd.OPT_LIST))
        assert client.option_reply()[1] == 2


def names_that_are_no_names(target: Target) -> None:
    with target.client().greet() as client:
        for name in (b"n" * 4097, b"n" * 60_000, b"a\0b", b"\xff\xfe", b"../../etc/passwd", b"%s%n%x", b"\x1b[2J\n"):
            _refused(client, nbd.OPT_GO, info(name))
    with target.client().greet() as client:
        client.send(option(nbd.OPT_EXPORT_NAME, b"n" * 4097))
        assert client.receive_all() == b""


def options_that_are_too_long(target: Target) -> None:
    for length in (64 * 1024 + 1, MIB, 0x7FFFFFFF, 0xFFFFFFFF):
        for number in (nbd.OPT_EXPORT_NAME, nbd.OPT_GO, 77):
            with target.client().greet() as client:
                client.send(option(number, b"", length=length))
                assert client.receive_all() == b""


def too_many_options(target: Target) -> None:
    with target.client().greet() as client, contextlib.suppress(Ended):
        client.send(option(77) * 1000)
        answers = client.receive_all()
        assert len(answers) < 1000 * 20


def option_replies_that_nobody_reads(target: Target) -> None:
    client = target.stays().greet()
    with contextlib.suppress(Ended):
        client.send(option(nbd.OPT_LIST) * 250)


def messages_out_of_order(target: Target) -> None:
    orders = (
        struct.pack(">I", 3) + request(nbd.READ, 1, 0, 512),  # a request before an export is open
        request(nbd.READ, 1, 0, 512),  # and instead of the flags
        option(nbd.OPT_GO, info(b"")),
        struct.pack(">I", 3) + option(nbd.OPT_ABORT) + option(nbd.OPT_GO, info(b"")),
    )
    for data in orders:
        with target.client() as client:
            client.send(data)
            sent = client.receive_all()[18:]
            assert sent == b"" or sent == struct.pack(">QIII", 0x0003E889045565A9, nbd.OPT_ABORT, 1, 0)
    with target.client().open() as client, contextlib.suppress(Ended):
        client.send(option(nbd.OPT_LIST), bytes(64))  # an option where requests are due
        assert client.receive_all() == b""


def unknown_client_flags(target: Target) -> None:
    for flags in (4, 1 << 31, 0xFFFFFFFF):
        with target.client().greet(flags) as client:
            assert client.receive_all() == b""


def idle_handshakes(target: Target) -> None:
    """As many as may connect at all: they must not keep anybody else out."""
    for number in range(100):
        client = target.stays()
        with contextlib.suppress(Ended):
            if number % 3:
                client.greet()
            if number % 3 == 2:
                client.send(option(nbd.OPT_GO, info(b""))[:-1])


def thousands_of_connections(target: Target) -> None:
    for _ in range(2000):
        try:
            target.stays()
        except (ConnectionError, TimeoutError, BlockingIOError):
            continue  # that is its right


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────


def lengths_and_offsets_that_wrap(target: Target) -> None:
    size = target.size_bytes
    ranges = (
        (size, 1),
        (size - 1, 2),
        (0, 0xFFFFFFFF),
        (1, 0xFFFFFFFF),
        ((1 << 32) - 4096, 8192),
        ((1 << 63) - 1, 1),
        (1 << 63, 4096),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 4096, 4096),
        ((1 << 64) - 4096, 8192),
    )
    with target.client().open() as client:
        for offset, length in ranges:
            for command, error in ((nbd.READ, nbd.EINVAL), (nbd.TRIM, nbd.EINVAL), (nbd.WRITE_ZEROES, nbd.ENOSPC)):
                assert client.ask(command, offset, length) == error, (command, offset, length)
            if length <= 8192:
                assert client.ask(nbd.WRITE, offset, length, b"x" * length) == nbd.ENOSPC
                assert client.ask(nbd.WRITE, offset, length, b"x" * length, flags=nbd.FUA) == nbd.ENOSPC
        assert client.ask(nbd.READ, 0, 512) == 0


def empty_requests_everywhere(target: Target) -> None:
    with target.client().open() as client:
        for command in (nbd.READ, nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES):
            for flags in (0, nbd.FUA):
                for offset in (0, 1, 4096, target.size_bytes - 1, target.size_bytes):
                    assert client.ask(command, offset, 0, flags=flags) == 0, (command, flags, offset)


def commands_and_flags_that_do_not_exist(target: Target) -> None:
    with target.client().open() as client:
        for command in (9, 77, 0x8000, 0xFFFF):
            assert client.ask(command, 0, 512) == nbd.EINVAL
        for command in (nbd.READ, nbd.TRIM, nbd.WRITE_ZEROES):
            assert client.ask(command, 0, 512, flags=0x8000) == nbd.EINVAL
        assert client.ask(nbd.WRITE, 0, 512, b"x" * 512, flags=0xFFE0) == nbd.EINVAL
        assert client.ask(nbd.FLUSH, 1, 1) == nbd.EINVAL
        assert client.ask(nbd.READ, 0, 512) == 0


def block_status_of_huge_ranges(target: Target) -> None:
    """Without having negotiated it; and with, where it can be: over and over, and the answers unread."""
    with target.client().open() as client:
        for length in (4096, 0xFFFFFFFF):
            assert client.ask(nbd.BLOCK_STATUS, 0, length) == nbd.EINVAL
    client = target.stays().greet()
    client.send(option(8))
    if client.option_reply()[1] & _ERROR:
        return
    query = b"base:allocation"
    client.send(option(10, struct.pack(">III", 0, 1, len(query)) + query))
    assert client.option_reply()[1] == 4
    assert client.option_reply()[1] == 1
    client.send(option(nbd.OPT_GO, info(b"")))
    while client.option_reply()[1] != 1:
        pass
    for offset in range(0, target.size_bytes, 8192):  # every other block is data
        client.send(request(nbd.WRITE, 1, offset, data=b"d" * 4096))
        client.receive(16)
    for length in (0xFFFFFFFF, target.size_bytes + 1):
        client.send(request(nbd.BLOCK_STATUS, 2, 0, length))
        magic, flags, kind, cookie, size = struct.unpack(">IHHQI", client.receive(20))
        assert (magic, flags, kind, cookie) == (0x668E33EF, 1, 0x8001, 2)
        client.receive(size)
    client.push(request(nbd.BLOCK_STATUS, 3, 0, target.size_bytes) * 100, 2000)


def payloads_that_never_come(target: Target) -> None:
    for number in range(16):
        client = target.stays().open()
        length = min(32 * MIB, target.size_bytes)
        client.send(request(nbd.WRITE, number, 0, length), b"p" * 100_000)


def rejected_payloads_of_four_gigabytes(target: Target) -> None:
    """What is announced is thrown away as it comes; that it does not come harms nobody."""
    for flags in (0, nbd.FUA):
        client = target.stays().open()
        client.send(request(nbd.WRITE, 1, 0, 0xFFFFFFFF, flags=flags))
        for _ in range(64):
            client.send(bytes(MIB))


def replies_that_nobody_reads(target: Target) -> None:
    for _ in range(2):
        client = target.stays().open()
        length = min(8 * MIB, target.size_bytes)
        client.send(*(request(nbd.READ, cookie, 0, length) for cookie in range(500)))


def the_longest_replies_that_nobody_reads(target: Target) -> None:
    """All that one client may have under way, in as few requests as possible."""
    length = min(48 * MIB, target.size_bytes)
    clients = [target.stays().open() for _ in range(2)]
    for client in clients:
        client.send(*(request(nbd.READ, cookie, 0, size) for cookie, size in enumerate((length, length // 3, length))))
    for client in clients:
        client.receive(16)  # the first reply has begun


def tiny_replies_that_nobody_reads(target: Target) -> None:
    client = target.stays().open()
    tiny = b"".join(request(command, 1, 0, 1) for command in (nbd.READ, nbd.READ, 99)) * 300
    client.push(tiny, 1000)


def tiny_slow_requests_whose_replies_nobody_reads(target: Target) -> None:
    client = target.stays().open()
    client.push(request(nbd.FLUSH, 1) * 1000, 100)


def a_hundred_thousand_tiny_requests(target: Target) -> None:
    """In one go, every reply is taken, and each comes once."""
    total = 100_000
    rng = random.Random(7)
    odd = (nbd.WRITE, nbd.WRITE_ZEROES, 99)
    kinds = [rng.choice(odd) if rng.random() < 0.02 else nbd.READ for _ in range(total)]
    stream = b"".join(_tiny(kind, cookie) for cookie, kind in enumerate(kinds))
    with target.client().open() as client:
        answers = _converse(client, stream, sum(16 + (kind == nbd.READ) for kind in kinds))
    at, seen = 0, bytearray(total)
    while at < len(answers):
        _, error, cookie = struct.unpack_from(">IIQ", answers, at)
        assert error == (nbd.EINVAL if kinds[cookie] == 99 else 0)
        seen[cookie] += 1
        at += 16 + (kinds[cookie] == nbd.READ)
    assert seen.count(1) == total


def _tiny(kind: int, cookie: int) -> bytes:
    return request(kind, cookie, cookie % 4096, 1, b"t" if kind == nbd.WRITE else b"")


def _converse(client: RawClient, stream: bytes, answer_bytes: int) -> bytes:
    """Send and receive at the same time."""
    connection, view, answers = client.socket, memoryview(stream), bytearray()
    connection.setblocking(False)
    poll = select.poll()
    while len(answers) < answer_bytes:
        poll.register(connection, select.POLLIN | (select.POLLOUT if view else 0))
        events = poll.poll(nbd.PATIENCE_S * 1000)
        assert events, "the server has stopped answering"
        if events[0][1] & select.POLLOUT:
            with contextlib.suppress(BlockingIOError):
                view = view[connection.send(view[: 1 << 18]) :]
        if events[0][1] & select.POLLIN:
            piece = connection.recv(1 << 18)
            assert piece, "the server hung up"
            answers += piece
    return bytes(answers)


def a_wrong_magic_in_the_middle(target: Target) -> None:
    with target.client().open() as client:
        good = (request(nbd.WRITE, 1, 0, data=b"w" * 512), request(nbd.READ, 2, 0, 512))
        client.send(*good, request(nbd.READ, 3, 0, 512, magic=0xDEADBEEF), request(nbd.WRITE, 4, 0, data=b"!" * 512))
        answers = client.receive_all()
    # What came before it is answered, what came behind it is not.
    write_reply, read_reply = (struct.pack(">IIQ", nbd.SIMPLE_REPLY_MAGIC, 0, cookie) for cookie in (1, 2))
    data = b"w" * 512
    assert answers in (write_reply + read_reply + data, read_reply + data + write_reply)


def resets_in_the_middle(target: Target) -> None:
    whole = request(nbd.WRITE, 1, 0, data=b"r" * 300_000)
    rng = random.Random(5)
    for _ in range(100):
        with target.client() as client:
            if rng.random() < 0.3:
                client.greet()
                client.send(option(nbd.OPT_GO, info(b""))[: rng.randrange(1, 22)])
            else:
                client.open()
                client.send(request(nbd.READ, 2, 0, 4096), whole[: rng.randrange(1, len(whole))])
            # Closing resets the connection, and what the server has sent is lost.
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


ATTACKS: tuple[Callable[[Target], None], ...] = (
    lengths_inside_an_option_do_not_fit,
    names_that_are_no_names,
    options_that_are_too_long,
    too_many_options,
    option_replies_that_nobody_reads,
    messages_out_of_order,
    unknown_client_flags,
    idle_handshakes,
    thousands_of_connections,
    lengths_and_offsets_that_wrap,
    empty_requests_everywhere,
    commands_and_flags_that_do_not_exist,
    block_status_of_huge_ranges,
    payloads_that_never_come,
    rejected_payloads_of_four_gigabytes,
    replies_that_nobody_reads,
    the_longest_replies_that_nobody_reads,
    tiny_replies_that_nobody_reads,
    tiny_slow_requests_whose_replies_nobody_reads,
    a_hundred_thousand_tiny_requests,
    a_wrong_magic_in_the_middle,
    resets_in_the_middle,
)

#: Those of them that TLS, which has memory of its own, could make worse.
GREEDY: tuple[Callable[[Target], None], ...] = (
    option_replies_that_nobody_reads,
    payloads_that_never_come,
    rejected_payloads_of_four_gigabytes,
    replies_that_nobody_reads,
    the_longest_replies_that_nobody_reads,
    tiny_replies_that_nobody_reads,
    tiny_slow_requests_whose_replies_nobody_reads,
)


@contextlib.contextmanager
def under(
    attack: Callable[[Target], None], connect: Connect, size_bytes: int, tls: ssl.SSLContext | None = None
) -> Iterator[Target]:
    """The attack has been made; what it holds open is held until the end."""
    target = Target(connect, size_bytes, tls)
    with target.held:
        attack(target)
        yield target
