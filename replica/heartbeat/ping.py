"""Ping nodes: real ICMP echoes (RFC 792, RFC 4443) to addresses that tell whether this node's network works.

A node whose pings are answered by fewer than those of the other is worse connected. Each keepalive one echo is sent
to each address; an address is alive while an answer came within deadping.
"""

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Final

from nbdserver.log_limit import FewAlike
from replica.errors import ReplicaError
from replica.heartbeat.clock import now
from replica.heartbeat.settings import PingSettings, Timing
from replica.heartbeat.sockets import family_of, interface_index
from replica.tasks import spawn

log = logging.getLogger("replica.heartbeat.ping")

_HEADER: Final = struct.Struct("!BBHHH")  # type, code, checksum, identifier, sequence
_TOKEN_BYTES: Final = 16
_BATCH: Final = 64
_RESOLVE_AGAIN_S: Final = 10.0
#: Of deadping: longer between two looks at the answers, and this process was asleep.
_PAUSE_PART: Final = 0.6
# What only lets answers through to a raw socket: linux/icmp.h, linux/icmpv6.h.
_ICMP_FILTER: Final = 1
_ICMPV6_FILTER: Final = 1
_SOL_RAW: Final = 255
_ECHO: Final = {socket.AF_INET: (8, 0), socket.AF_INET6: (128, 129)}  # request, reply
_PROTOCOL: Final = {socket.AF_INET: socket.IPPROTO_ICMP, socket.AF_INET6: socket.IPPROTO_ICMPV6}


class PingError(ReplicaError):
    """This process may not ping."""


@dataclass(slots=True)
class _Target:
    """One address; `answered_s` is when its last answer came."""

    configured: str
    address: str = ""  # in numbers, once it is resolved
    interface: int | None = None  # of a link-local address: the index
    answered_s: float | None = None


@dataclass(slots=True)
class _Node:
    name: str
    targets: list[_Target] = field(default_factory=list)
    alive: bool = False


class Pinger:
    """The ping nodes and groups that count: not those that are an address of the cluster itself, whose holder would
    always see itself. ``changed`` is called when one has become reachable or unreachable.
    """

    def __init__(
        self,
        pings: Collection[PingSettings],
        timing: Timing,
        cluster_addresses: Collection[str],
        changed: Callable[[], None],
    ) -> None:
        self._timing = timing
        self._changed = changed
        own = {_in_numbers(address) for address in cluster_addresses} - {""}
        self._nodes: dict[str, _Node] = {}
        for ping in pings:
            targets = []
            for address in ping.addresses:
                if _in_numbers(address) in own:
                    log.warning(
                        "ping node %s is an address of this cluster, which says nothing of the network: it does not "
                        "count; ping the gateway instead.",
                        address,
                    )
                else:
                    targets.append(_Target(address, _in_numbers(address)))
            if targets:
                self._nodes[ping.name] = _Node(ping.name, targets)
        self._sockets: dict[int, socket.socket] = {}
        self._sequence = 0
        self._token = os.urandom(_TOKEN_BYTES)
        self._identifier = int.from_bytes(self._token[:2], "big")
        self._tasks: list[asyncio.Task[None]] = []
        self._few_alike = FewAlike(10, 60.0)
        log.addFilter(self._few_alike)
        self._started_s = self._reviewed_s = now()

    @property
    def total(self) -> int:
        """How many ping nodes and groups count."""
        return len(self._nodes)

    @property
    def alive(self) -> int:
        """How many of them are reachable."""
        return sum(node.alive for node in self._nodes.values())

    @property
    def settled(self) -> bool:
        """Whether all are reachable, or have had the time to answer: before that, too few mean nothing."""
        return self.alive == self.total or now() - self._started_s >= self._timing.deadping_s

    def reachable(self, name: str) -> bool:
        """Of a ping node or group that counts; False for any other."""
        node = self._nodes.get(name)
        return node is not None and node.alive

    def status(self) -> list[dict[str, Any]]:
        """Of each that counts: name, alive, answered_s_ago (None: never)."""
        now_s, shown = now(), []
        for node in self._nodes.values():
            answered = [target.answered_s for target in node.targets if target.answered_s is not None]
            ago_s = round(now_s - max(answered), 2) if answered else None
            shown.append({"name": node.name, "alive": node.alive, "answered_s_ago": ago_s})
        return shown

    async def open(self) -> None:
        """Begin to ping; PingError when this process may not."""
        self._started_s = self._reviewed_s = now()
        for node in self._nodes.values():
            for target in node.targets:
                if target.address:
                    self._socket(target.address)
                else:
                    self._tasks.append(spawn(self._resolve(target), f"address of ping node {target.configured}"))
        if self._nodes:
            self._tasks.append(spawn(self._run(), "pings"))

    def restart(self) -> None:
        """After a pause of this process, which it also finds by itself: who did not answer meanwhile was not asked, or
        not heard.
        """
        self._started_s = self._reviewed_s = now()
        for node in self._nodes.values():
            for target in node.targets:
                if node.alive and target.answered_s is not None:
                    target.answered_s = self._started_s

    async def close(self) -> None:
        """Ping no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        loop = asyncio.get_running_loop()
        for one in self._sockets.values():
            loop.remove_reader(one.fileno())
            one.close()
        self._sockets.clear()
        log.removeFilter(self._few_alike)

    async def _run(self) -> None:
        interval_s = min(self._timing.keepalive_s, self._timing.deadping_s / 3)
        while True:
            self._sequence = (self._sequence + 1) % (1 << 16)
            for node in self._nodes.values():
                for target in node.targets:
                    self._ping(target)
            self._review()
            await asyncio.sleep(interval_s)

    def _review(self) -> None:
        now_s, changed = now(), False
        if now_s - self._reviewed_s > self._timing.deadping_s * _PAUSE_PART:
            self.restart()
        self._reviewed_s = now_s
        for node in self._nodes.values():
            alive = any(
                target.answered_s is not None and now_s - target.answered_s <= self._timing.deadping_s
                for target in node.targets
            )
            if alive != node.alive:
                node.alive, changed = alive, True
                if alive:
                    log.info("ping node %s answers.", node.name)
                else:
                    log.warning("ping node %s has not answered for %g s.", node.name, self._timing.deadping_s)
        if changed:
            self._changed()

    def _ping(self, target: _Target) -> None:
        if not target.address:
            return
        # What cannot be sent (no route, no room) is not answered: that is all there is to know.
        with contextlib.suppress(OSError, PingError):
            sender = self._socket(target.address)
            request, _ = _ECHO[family_of(target.address)]
            message = echo(request, self._identifier, self._sequence, self._token)
            if name := target.configured.partition("%")[2]:
                target.interface = interface_index(name)
                sender.sendto(message, (target.address, 0, 0, target.interface))
            else:
                sender.sendto(message, (target.address, 0))

    def _socket(self, address: str) -> socket.socket:
        family = family_of(address)
        if family not in self._sockets:
            made = _open(family)
            asyncio.get_running_loop().add_reader(made.fileno(), self._receive, made)
            self._sockets[family] = made
        return self._sockets[family]

    def _receive(self, receiver: socket.socket) -> None:
        for _ in range(_BATCH):
            try:
                data, sender = receiver.recvfrom(2048)
            except OSError:
                break
            if receiver.type == socket.SOCK_RAW and receiver.family == socket.AF_INET:
                data = data[(data[0] & 15) * 4 :] if data else data  # behind the IP header
            _, reply = _ECHO[socket.AddressFamily(receiver.family)]
            if data[:1] == bytes([reply]) and data[_HEADER.size :] == self._token:
                self._answered(str(sender[0]).partition("%")[0], sender[3] if len(sender) > 2 else None)
        self._review()

    def _answered(self, address: str, interface: int | None) -> None:
        now_s = now()
        for node in self._nodes.values():
            for target in node.targets:
                if target.address == address and ("%" not in target.configured or target.interface == interface):
                    target.answered_s = now_s

    async def _resolve(self, target: _Target) -> None:
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(OSError):
                found = await loop.getaddrinfo(target.configured, None, type=socket.SOCK_DGRAM)
                target.address = _in_numbers(str(found[0][4][0]))
                return
            await asyncio.sleep(_RESOLVE_AGAIN_S)


def echo(kind: int, identifier: int, sequence: int, data: bytes) -> bytes:
    """An ICMP message; the kernel puts in the checksum of ICMPv6 (type 128), and the identifier of a ping socket."""
    message = _HEADER.pack(kind, 0, 0, identifier, sequence) + data
    return _HEADER.pack(kind, 0, _checksum(message), identifier, sequence) + data


def _checksum(message: bytes) -> int:
    """RFC 1071."""
    padded = message + bytes(len(message) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _open(family: socket.AddressFamily) -> socket.socket:
    """A raw socket that only gets answers; or, where that is not allowed, the kernel's ping socket."""
    flags = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    try:
        made = socket.socket(family, socket.SOCK_RAW | flags, _PROTOCOL[family])
    except PermissionError:
        try:
            return socket.socket(family, socket.SOCK_DGRAM | flags, _PROTOCOL[family])
        except PermissionError as error:
            raise PingError(
                "pings need root, the capability CAP_NET_RAW, or this process's group in the sysctl "
                "net.ipv4.ping_group_range."
            ) from error
    _, reply = _ECHO[family]
    if family == socket.AF_INET:  # a set bit keeps a type out
        made.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("=I", ~(1 << reply) & 0xFFFFFFFF))
    else:
        words = [0xFFFFFFFF] * 8
        words[reply // 32] &= ~(1 << reply % 32)
        made.setsockopt(socket.IPPROTO_ICMPV6, _ICMPV6_FILTER, struct.pack("=8I", *words))
    return made


def _in_numbers(address: str) -> str:
    try:
        return str(ipaddress.ip_address(address.partition("%")[0].partition("/")[0]))
    except ValueError:
        return ""
