"""Who else on a network has an address, and telling the network that it is here now: ARP (RFC 826, 5227) and IPv6
neighbour discovery (RFC 4861, 4862), as Ethernet frames over a packet socket.
"""

import asyncio
import contextlib
import ctypes
import socket
import struct
from collections.abc import Collection
from ipaddress import IPv4Address, IPv6Address
from typing import Final

Address = IPv4Address | IPv6Address

#: When a question is sent, in seconds from the start, and when the last answer is waited for: a takeover waits for it.
#: (RFC 5227 takes seconds, for networks that have yet to come up.)
PROBES_S: Final = (0.0, 0.05, 0.1)
PROBE_END_S: Final = 0.15

_ARP: Final = 0x0806
_IPV6: Final = 0x86DD
_EVERYBODY: Final = b"\xff" * 6
_ALL_NODES: Final = IPv6Address("ff02::1")
_ETHERNET: Final = struct.Struct("!6s6sH")
_ARP_BODY: Final = struct.Struct("!HHBBH6s4s6s4s")
_ARP_HEAD: Final = (1, 0x0800, 6, 4)
_REQUEST, _REPLY = 1, 2
_IPV6_HEADER: Final = struct.Struct("!IHBB16s16s")
_ICMPV6: Final = 58
_SOLICITATION, _ADVERTISEMENT = 135, 136
_OVERRIDE: Final = 0x20000000
_TARGET_MAC: Final = 2
_NEIGHBOUR: Final = struct.Struct("!BBHI16s")
_RECEIVE_BYTES: Final = 2048
#: What one turn of the event loop reads at most.
_FRAMES_AT_ONCE: Final = 32
_SO_ATTACH_FILTER: Final = 26
# linux/if_packet.h
_SOL_PACKET: Final = 263
_PACKET_ADD_MEMBERSHIP: Final = 1
_PACKET_MR_MULTICAST: Final = 0
_PACKET_MREQ: Final = struct.Struct("iHH8s")


def question(mac: bytes, address: Address) -> bytes:
    """Asks who has the address, without claiming it: an ARP probe, or the solicitation of IPv6's own check."""
    if isinstance(address, IPv4Address):
        return _arp(mac, _REQUEST, bytes(4), bytes(6), address)
    group = IPv6Address(int(IPv6Address("ff02::1:ff00:0")) | int(address) & 0xFFFFFF)
    body = _NEIGHBOUR.pack(_SOLICITATION, 0, 0, 0, address.packed)
    return _icmp(mac, IPv6Address(0), group, body)


def announcements(mac: bytes, address: Address) -> tuple[bytes, ...]:
    """Says that the address is here: gratuitous ARP as request and as reply (some take only one of them), or an
    unsolicited neighbour advertisement.
    """
    if isinstance(address, IPv4Address):
        return (
            _arp(mac, _REQUEST, address.packed, bytes(6), address),
            _arp(mac, _REPLY, address.packed, mac, address),
        )
    option = struct.pack("!BB6s", _TARGET_MAC, 1, mac)
    body = _NEIGHBOUR.pack(_ADVERTISEMENT, 0, 0, _OVERRIDE, address.packed) + option
    return (_icmp(mac, address, _ALL_NODES, body),)


def holder(frame: bytes, address: Address) -> bytes | None:
    """The MAC of who says in this frame that it has the address; None when the frame says nothing of the kind."""
    if len(frame) < _ETHERNET.size:
        return None
    _, source, kind = _ETHERNET.unpack_from(frame)
    body = frame[_ETHERNET.size :]
    if isinstance(address, IPv4Address):
        if kind != _ARP or len(body) < _ARP_BODY.size:
            return None
        *head, _, mac, sender, _, _ = _ARP_BODY.unpack_from(body)
        return mac if tuple(head) == _ARP_HEAD and sender == address.packed else None
    if kind != _IPV6 or len(body) < _IPV6_HEADER.size + _NEIGHBOUR.size:
        return None
    _, _, following, hops, _, _ = _IPV6_HEADER.unpack_from(body)
    message, _, _, _, target = _NEIGHBOUR.unpack_from(body, _IPV6_HEADER.size)
    # 255 hops: it comes from this very network (RFC 4861, 7.1.2).
    told = (following, hops, message, target) == (_ICMPV6, 255, _ADVERTISEMENT, address.packed)
    return bytes(source) if told else None


def contender(frame: bytes, address: Address) -> bytes | None:
    """The MAC of who sends such a `question` about the address, to take it if nobody has it; None for other frames."""
    if len(frame) < _ETHERNET.size:
        return None
    _, source, _ = _ETHERNET.unpack_from(frame)
    expected = question(source, address)  # which is the same whoever sends it, but for the sender
    return bytes(source) if frame[: len(expected)] == expected else None


def mac_text(mac: bytes) -> str:
    """ "02:00:00:00:00:01" """
    return mac.hex(":")


def _arp(mac: bytes, operation: int, sender: bytes, target_mac: bytes, target: IPv4Address) -> bytes:
    body = _ARP_BODY.pack(*_ARP_HEAD, operation, mac, sender, target_mac, target.packed)
    return _ETHERNET.pack(_EVERYBODY, mac, _ARP) + body


def _icmp(mac: bytes, source: IPv6Address, group: IPv6Address, body: bytes) -> bytes:
    pseudo = source.packed + group.packed + struct.pack("!II", len(body), _ICMPV6)
    total = sum(value for (value,) in struct.iter_unpack("!H", pseudo + body))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    body = body[:2] + struct.pack("!H", ~total & 0xFFFF) + body[4:]
    ethernet = _ETHERNET.pack(b"\x33\x33" + group.packed[-4:], mac, _IPV6)
    return ethernet + _IPV6_HEADER.pack(6 << 28, len(body), _ICMPV6, 255, source.packed, group.packed) + body


def open_network(interface: str, address: Address) -> socket.socket:
    """A non-blocking socket for the frames of this module on an interface. Raises OSError; takes CAP_NET_RAW."""
    kind = _ARP if isinstance(address, IPv4Address) else _IPV6
    # Protocol 0 until it is bound: nothing of other interfaces is received.
    network = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
    try:
        if kind == _IPV6:
            _only_neighbour_discovery(network)
        network.bind((interface, kind))
        if isinstance(address, IPv6Address):
            _hear_questions(network, interface, address)
    except BaseException:
        network.close()
        raise
    return network


def announce(network: socket.socket, mac: bytes, address: Address) -> None:
    """Send `announcements` once; what cannot be sent now is not sent."""
    for frame in announcements(mac, address):
        with contextlib.suppress(OSError):
            network.send(frame)


async def find_holder(interface: str, mac: bytes, address: Address, ours: Collection[bytes]) -> bytes | None:
    """Ask the network who has the address: a MAC that is none of `ours`, as soon as it answers; None when nobody does
    within `PROBE_END_S`. Of two that ask at the same time, the one with the lower MAC gets None, the other one that MAC
    (RFC 5227, 2.1.1 and RFC 4862, 5.4.3 would have both give way). Raises OSError.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[bytes] = loop.create_future()
    frame = question(mac, address)

    def receive() -> None:
        with contextlib.suppress(OSError):  # nothing more is there, or the interface went down
            for _ in range(_FRAMES_AT_ONCE):
                received = network.recv(_RECEIVE_BYTES)
                found, rival = holder(received, address), contender(received, address)
                if rival is not None and rival not in ours:
                    if rival > mac:
                        ask()  # so that it gives way, even if it has begun after our last question
                    else:
                        found = rival
                if found is not None and found not in ours and not answer.done():
                    answer.set_result(found)

    def ask() -> None:
        with contextlib.suppress(OSError):
            network.send(frame)

    with contextlib.closing(open_network(interface, address)) as network:
        loop.add_reader(network.fileno(), receive)
        network.send(frame)  # the first one has to go
        timers = [loop.call_later(at_s, ask) for at_s in PROBES_S[1:]]
        try:
            async with asyncio.timeout(PROBE_END_S):
                return await answer
        except TimeoutError:
            return None
        finally:
            for timer in timers:
                timer.cancel()
            loop.remove_reader(network.fileno())


def _only_neighbour_discovery(network: socket.socket) -> None:
    """Let the kernel drop all other IPv6 packets, of which there may be many (BPF, linux/filter.h)."""
    program = (
        (0x30, 0, 0, _ETHERNET.size + 6),  # load the byte "next header"
        (0x15, 0, 4, _ICMPV6),
        (0x30, 0, 0, _ETHERNET.size + _IPV6_HEADER.size),  # load the byte "type"
        (0x15, 1, 0, _ADVERTISEMENT),
        (0x15, 0, 1, _SOLICITATION),
        (0x06, 0, 0, 0xFFFF),  # take it
        (0x06, 0, 0, 0),  # drop it
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    network.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(code)))


def _hear_questions(network: socket.socket, interface: str, address: IPv6Address) -> None:
    """Have the card take frames for the group that questions about the address go to, as if the address were here."""
    group = question(bytes(6), address)[:6]
    membership = _PACKET_MREQ.pack(socket.if_nametoindex(interface), _PACKET_MR_MULTICAST, len(group), group)
    network.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, membership)
