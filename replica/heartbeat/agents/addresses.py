"""The kernel's addresses and interfaces, over netlink. Calls block for as long as the kernel takes (milliseconds, or
longer while it is busy with another change of the network): they belong into threads.

An address gets a lifetime: the kernel removes it when that is over, whatever has become of this program.
"""

import asyncio
import contextlib
import errno
import math
import os
import socket
import struct
import threading
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_address, ip_network
from typing import Any, Final, NamedTuple

from pyroute2 import IPRoute
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

from replica.heartbeat import clock

Address = IPv4Address | IPv6Address
Interface = IPv4Interface | IPv6Interface

_ROUTE: Final = 0  # NETLINK_ROUTE
_LINK_GROUPS: Final = 0x1 | 0x10 | 0x100  # RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_NEW_LINK, _DEL_LINK, _NEW_ADDRESS, _DEL_ADDRESS = 16, 17, 20, 21
_ERROR: Final = 2
_REQUEST, _ACK, _REPLACE, _CREATE = 0x1, 0x4, 0x100, 0x400
_PERMANENT, _NO_DAD = 0x80, 0x02  # IFA_F_…
_UP, _LOOPBACK, _NO_ARP, _LOWER_UP = 0x1, 0x8, 0x80, 0x10000  # IFF_…
_MAIN_TABLE: Final = 254
_HEADER: Final = struct.Struct("=IHHII")
_ERRNO: Final = struct.Struct("=i")
_RECEIVE_BYTES: Final = 64 << 10
_ANSWER_TIMEOUT_S: Final = 30.0


class Link(NamedTuple):
    """A network interface."""

    ifindex: int
    name: str
    mac: bytes
    up: bool
    carrier: bool
    loopback: bool
    #: Whether its neighbours are asked by ARP or neighbour discovery: not on tunnels.
    neighbours: bool


class Configured(NamedTuple):
    """An address as the kernel has it."""

    ifindex: int
    prefix: int
    #: Without a lifetime: put there by an administrator, and not by us.
    permanent: bool


def links() -> list[Link]:
    """All interfaces."""
    with IPRoute() as route:
        return [_link(message) for message in route.get_links()]


def _link(message: Any) -> Link:
    flags = message["flags"]
    mac = bytes.fromhex((message.get_attr("IFLA_ADDRESS") or "").replace(":", ""))
    return Link(
        ifindex=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        mac=mac,
        up=bool(flags & _UP),
        carrier=bool(flags & _LOWER_UP),
        loopback=bool(flags & _LOOPBACK),
        neighbours=not flags & (_NO_ARP | _LOOPBACK) and len(mac) == 6,
    )


def attached_networks(address: Address) -> list[tuple[int, int]]:
    """Interface and prefix length of the networks without a gateway that the address is in, the smallest first."""
    found: list[tuple[int, int]] = []
    with IPRoute() as route:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        for message in route.get_routes(family=family, table=_MAIN_TABLE):
            to, index = message.get_attr("RTA_DST"), message.get_attr("RTA_OIF")
            if to is None or index is None or message.get_attr("RTA_GATEWAY") is not None:
                continue
            if address in ip_network(f"{to}/{message['dst_len']}"):
                found.append((index, message["dst_len"]))
    return sorted(found, key=lambda one: -one[1])


def configured(address: Address) -> list[Configured]:
    """Where the address is configured on this machine."""
    with IPRoute() as route:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        return [
            Configured(message["index"], message["prefixlen"], bool(message["flags"] & _PERMANENT))
            for message in route.get_addr(family=family)
            if ip_address(message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")) == address
        ]


def lifetime_s(remaining_s: float, keepalive_s: float) -> int:
    """The whole seconds that an address is given when it may be held for `remaining_s` more, and that is renewed each
    `keepalive_s`; 0: none.

    Rather less than more, for nobody must have the address afterwards; but so much that a renewal comes in time. (Only
    where there are no such seconds, the address stays for up to a second too long. The kernel itself is late by up to a
    quarter of a second.)
    """
    if remaining_s <= 0:
        return 0
    needed_s = 1 + math.floor(1.5 * keepalive_s)
    return min(math.ceil(remaining_s), max(math.floor(remaining_s), needed_s))


class Lease:
    """An address on an interface, for as long as it is renewed. All but `end_now` block; they raise OSError."""

    def __init__(self, ifindex: int, interface: Interface, *, label: str, broadcast: str, keepalive_s: float) -> None:
        self.ifindex = ifindex
        self.interface = interface
        self._label = label
        self._broadcast = broadcast
        self._keepalive_s = keepalive_s
        self._lock = threading.Lock()
        self._wanted = True
        self._closed = False
        self._asking = _open()
        self._asking.settimeout(_ANSWER_TIMEOUT_S)
        self._sequence = 0
        # Ready beforehand, and its own socket: when it is needed, nothing else must have to be done or waited for.
        self._ending = _open()
        self._ending.setblocking(False)
        self._delete = self._message(_DEL_ADDRESS, _REQUEST, 0, 0)

    @property
    def held(self) -> bool:
        """Whether it was not ended."""
        return self._wanted

    def renew(self, until_s: float) -> None:
        """Add the address, or give it a new lifetime, until this time of `clock`. Nothing when the lease was ended."""
        with self._lock:
            if self._closed:
                return
            # The clock is read here: this thread, too, may have been frozen, and must not add the address afterwards.
            seconds = lifetime_s(until_s - clock.now(), self._keepalive_s) if self._wanted else 0
            if seconds:
                self._ask(_NEW_ADDRESS, _CREATE | _REPLACE, seconds)
            if not self._wanted:
                self._remove()  # ended meanwhile: it must not be back

    def end(self) -> None:
        """Remove the address; nothing when it is not there."""
        self._wanted = False
        with self._lock:
            self._remove()

    def end_now(self) -> None:
        """Remove the address at once: one message to the kernel, which does it before it returns."""
        self._wanted = False
        if self._closed:
            return
        with contextlib.suppress(OSError):
            while self._ending.recv(_RECEIVE_BYTES):  # answers to earlier ones
                pass
        with contextlib.suppress(OSError):
            self._ending.send(self._delete)

    def close(self) -> None:
        """The address stays until its lifetime is over."""
        self._wanted = False
        with self._lock:
            self._closed = True
            self._asking.close()
            self._ending.close()

    def _remove(self) -> None:
        try:
            self._ask(_DEL_ADDRESS, 0, 0)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.ENODEV):
                raise

    def _ask(self, kind: int, flags: int, seconds: int) -> None:
        self._sequence += 1
        self._asking.send(self._message(kind, _REQUEST | _ACK | flags, self._sequence, seconds))
        while True:
            data = self._asking.recv(_RECEIVE_BYTES)
            _, answer, _, sequence, _ = _HEADER.unpack_from(data)
            if answer == _ERROR and sequence == self._sequence:
                break
        (code,) = _ERRNO.unpack_from(data, _HEADER.size)
        if code:
            raise OSError(-code, os.strerror(-code))

    def _message(self, kind: int, flags: int, sequence: int, seconds: int) -> bytes:
        message = ifaddrmsg()
        address = self.interface.ip
        message["family"] = socket.AF_INET if address.version == 4 else socket.AF_INET6
        message["prefixlen"] = self.interface.network.prefixlen
        message["index"] = self.ifindex
        attributes: list[tuple[str, Any]] = [("IFA_LOCAL", str(address)), ("IFA_ADDRESS", str(address))]
        if kind == _NEW_ADDRESS:
            lifetime = {"ifa_preferred": seconds, "ifa_valid": seconds, "cstamp": 0, "tstamp": 0}
            attributes.append(("IFA_CACHEINFO", lifetime))
            if self._broadcast:
                attributes.append(("IFA_BROADCAST", self._broadcast))
            if address.version == 6:
                # Whether somebody else has it was asked beforehand; the kernel's own way takes more than a second.
                message["flags"] = _NO_DAD
        if self._label:
            attributes.append(("IFA_LABEL", self._label))
        message["attrs"] = attributes
        message["header"]["type"] = kind
        message["header"]["flags"] = flags
        message["header"]["sequence_number"] = sequence
        message.encode()
        return bytes(message.data)


class Watch:
    """Calls back when interfaces or addresses of this machine have changed. In the event loop; never blocks."""

    def __init__(
        self, on_links: Callable[[], None], on_new_address: Callable[[], None], on_lost_address: Callable[[], None]
    ) -> None:
        self._on_links = on_links
        self._on_new_address = on_new_address
        self._on_lost_address = on_lost_address
        self._socket = _open(_LINK_GROUPS)
        self._socket.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._receive)

    def close(self) -> None:
        """No more calls."""
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()

    def _receive(self) -> None:
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:  # ENOBUFS: some were lost, so anything may have changed
            self._on_links()
            return
        kinds: set[int] = set()
        position = 0
        while len(data) - position >= _HEADER.size:
            length, kind, _, _, _ = _HEADER.unpack_from(data, position)
            if length < _HEADER.size:
                break
            kinds.add(kind)
            position += (length + 3) & ~3
        if kinds & {_NEW_LINK, _DEL_LINK}:
            self._on_links()
        if _NEW_ADDRESS in kinds:
            self._on_new_address()
        if _DEL_ADDRESS in kinds:
            self._on_lost_address()


def _open(groups: int = 0) -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _ROUTE)
    opened.bind((0, groups))
    return opened
