"""UDP sockets of heartbeats: each packet goes out of the interface that its path names, and says where it came in.

The interface goes with each packet (IP_PKTINFO, IPV6_PKTINFO), not with the socket (SO_BINDTODEVICE): one socket serves
all paths of a port, needs no privilege, and outlives an interface that goes and comes back. Nothing here blocks, apart
from joining a multicast group, which waits for whoever changes the machine's interfaces at that moment.
"""

import errno
import ipaddress
import socket
import struct
from typing import Final, NamedTuple

# Not in Python's socket module.
_SO_BINDTOIFINDEX: Final = 62
_IP_PKTINFO: Final = 8
_IP_MTU_DISCOVER: Final = 10
_IP_PMTUDISC_DONT: Final = 0

#: Before bulk traffic: network control (RFC 2474, class selector 6), and the band of pfifo_fast that goes with it.
_TRAFFIC_CLASS: Final = 0xC0
_PRIORITY: Final = 6
_IN_PKTINFO: Final = struct.Struct("=i4s4s")  # interface, local address, destination
_IN6_PKTINFO: Final = struct.Struct("=16si")  # destination, interface
_INT: Final = struct.Struct("=i")
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(_IN6_PKTINFO.size) * 2

BROADCAST: Final = "255.255.255.255"


class Bind(NamedTuple):
    """What one socket is bound to: ``address`` "" is every one of this machine."""

    family: socket.AddressFamily
    address: str
    port: int


class Arrival(NamedTuple):
    """One datagram: from whom, to which address, at which interface (its index)."""

    data: bytes
    source: str
    destination: str
    interface: int

    @property
    def to_many(self) -> bool:
        """Whether it was sent to a group, or to all."""
        return self.destination == BROADCAST or (bool(self.destination) and _is_multicast(self.destination))


def open_socket(bind: Bind) -> socket.socket:
    """Ready to send and to receive; OSError."""
    made = socket.socket(bind.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if bind.family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 0)
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, _TRAFFIC_CLASS)
        else:
            made.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            made.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
            made.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, _TRAFFIC_CLASS)
            made.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DONT)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, _PRIORITY)  # after IP_TOS, which sets its own
        made.bind((bind.address, bind.port))
    except BaseException:
        made.close()
        raise
    return made


def send(sender: socket.socket, data: bytes, address: str, port: int, interface: int, ttl: int | None) -> None:
    """One datagram out of the interface of that index (0: by the route), ``ttl`` None for the default; OSError."""
    source = sender.getsockname()[0]  # where it is bound to, which the ancillary data overrides
    if sender.family == socket.AF_INET6:
        scope = interface if ipaddress.IPv6Address(address).is_link_local or _is_multicast(address) else 0
        ancillary = [
            (
                socket.IPPROTO_IPV6,
                socket.IPV6_PKTINFO,
                _IN6_PKTINFO.pack(socket.inet_pton(sender.family, source.partition("%")[0]), interface),
            )
        ]
        if ttl is not None:
            ancillary.append((socket.IPPROTO_IPV6, socket.IPV6_HOPLIMIT, _INT.pack(ttl)))
        sender.sendmsg([data], ancillary, 0, (address, port, 0, scope))
        return
    ancillary = [(socket.IPPROTO_IP, _IP_PKTINFO, _IN_PKTINFO.pack(interface, socket.inet_aton(source), bytes(4)))]
    if ttl is not None:
        ancillary.append((socket.IPPROTO_IP, socket.IP_TTL, _INT.pack(ttl)))
    sender.sendmsg([data], ancillary, 0, (address, port))


def receive(receiver: socket.socket, max_bytes: int) -> Arrival:
    """The next datagram; one that is longer than ``max_bytes`` comes with one byte more. OSError, BlockingIOError."""
    data, ancillary, _, sender = receiver.recvmsg(max_bytes + 1, _ANCILLARY_BYTES)
    destination, interface = "", 0
    for level, kind, value in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO) and len(value) == _IN_PKTINFO.size:
            interface, _, packed = _IN_PKTINFO.unpack(value)
            destination = socket.inet_ntop(socket.AF_INET, packed)
        elif (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO) and len(value) == _IN6_PKTINFO.size:
            packed, interface = _IN6_PKTINFO.unpack(value)
            destination = socket.inet_ntop(socket.AF_INET6, packed)
    return Arrival(data, str(sender[0]).partition("%")[0], destination, interface)


def interface_index(name: str) -> int:
    """Its present number; OSError where there is none. `if_nametoindex` may load kernel modules, and wait for them."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name.encode() + b"\0")
        return probe.getsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX)


def join(receiver: socket.socket, group: str, interface: int) -> None:
    """Have the group's packets delivered, from the interface of that index; joining again is fine. OSError."""
    if receiver.family == socket.AF_INET6:
        level, option = socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP
        request = socket.inet_pton(socket.AF_INET6, group) + _INT.pack(interface)
    else:
        level, option = socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP
        request = socket.inet_pton(socket.AF_INET, group) + bytes(4) + _INT.pack(interface)
    try:
        receiver.setsockopt(level, option, request)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise


def is_own_address(address: str, interface: int = 0) -> bool:
    """Whether it is one of this machine's, as its routes have it (of 127.0.0.0/8 only 127.0.0.1)."""
    family = family_of(address)
    target = (address, 9) if family == socket.AF_INET else (address, 9, 0, interface)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(target)  # sends nothing
        except OSError:
            return False
        return str(probe.getsockname()[0]).partition("%")[0] == address


def family_of(address: str) -> socket.AddressFamily:
    """Of an address in numbers; ValueError."""
    return socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET


def _is_multicast(address: str) -> bool:
    return ipaddress.ip_address(address).is_multicast
