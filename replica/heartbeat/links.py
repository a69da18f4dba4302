"""Heartbeats on all paths: sent when told, received at any time, whatever happens to interfaces and addresses.

A path that does not work (no such interface yet, no address, a port that is taken) is tried again with each packet and
says why in the status. Nothing on the event loop blocks: names are resolved, and numbers kept, in threads.
"""

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from nbdserver.log_limit import FewAlike
from replica.heartbeat import sockets, start_number
from replica.heartbeat.clock import now
from replica.heartbeat.membership import Event, Membership, PeerView
from replica.heartbeat.node_state import NodeState
from replica.heartbeat.packet import MAX_BYTES, NONCE_BYTES, check_fits
from replica.heartbeat.settings import HeartbeatSettings, PathKind, PathSettings
from replica.heartbeat.sockets import Arrival, Bind
from replica.tasks import spawn

log = logging.getLogger("replica.heartbeat.links")

#: Datagrams taken at once, before anything else gets its turn.
_BATCH: Final = 64
#: More than any socket's buffer holds, so that draining ends also while somebody floods it.
_DRAINED_AT_MOST: Final = 4096
#: Of deadtime: who has not sent for so long may have been paused.
_PAUSE_PART: Final = 0.5
_RESOLVE_AGAIN_S: Final = 10.0
#: How often the newest accepted packet is kept while the other node's start number stays the same.
_KEEP_INTERVAL_S: Final = 60.0
_LINES_ALIKE: Final = 10
_LINES_WINDOW_S: Final = 60.0


class _NotNowError(Exception):
    """Why a path cannot be sent on."""


@contextlib.contextmanager
def _saying(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _NotNowError(f"{what}: {error.strerror}") from error


class Way:
    """A path as it is at the moment."""

    def __init__(self, settings: PathSettings, bind_all: bool) -> None:
        self.settings = settings
        self._bind_address = "" if bind_all else settings.local
        #: In numbers; "" until its name is resolved.
        self.address = sockets.BROADCAST if settings.kind is PathKind.BROADCAST else _in_numbers(settings.address)
        #: Index of the interface, 0 for none or unknown.
        self.interface = 0
        self.joined: tuple[socket.socket, int] | None = None

    @property
    def bind(self) -> Bind:
        """ValueError while the address is not resolved."""
        return Bind(sockets.family_of(self.address), self._bind_address, self.settings.port)

    @property
    def own(self) -> bool:
        """Whether it leads to this node itself: ha.cf, the same on both nodes, names both of them."""
        if self.settings.kind is not PathKind.UNICAST or not self.address:
            return False
        if self.settings.local:
            return self.address == self.settings.local
        return sockets.is_own_address(self.address, self.interface)

    def brought(self, arrival: Arrival) -> bool:
        """Whether a packet came by it."""
        if self.settings.interface and arrival.interface != self.interface:
            return False
        if self.settings.kind is PathKind.UNICAST:
            return arrival.source == self.address and not arrival.to_many
        return arrival.destination == self.address


def way_of(arrival: Arrival, ways: Iterable[Way]) -> int | None:
    """The index of the path that brought it: by interface and address; else the only unicast path of the interface
    (the other node may send from a second address of its own).
    """
    alike = []
    for index, way in enumerate(ways):
        if way.brought(arrival):
            return index
        if way.settings.kind is PathKind.UNICAST and way.interface and way.interface == arrival.interface:
            alike.append(index)
    return alike[0] if len(alike) == 1 and not arrival.to_many else None


class Links:
    """The node's heartbeats. ``heard`` is called, on the event loop, when there is news of the other node; and when
    packets have arrived while this node has not sent any for long, before they are looked at.

    PacketError when the state of so many groups can never be sent.
    """

    #: From `open` on.
    membership: Membership

    def __init__(self, settings: HeartbeatSettings, heard: Callable[[], None]) -> None:
        check_fits(settings.cluster, settings.nodes, (group.name for group in settings.groups), settings.auth)
        self._settings = settings
        self._heard = heard
        # A socket for each address would not get what is sent to all, one for all would take what is sent to each.
        bind_all = {path.port for path in settings.paths if not path.local}
        self._ways = [Way(path, path.port in bind_all) for path in settings.paths]
        self._sockets: dict[Bind, socket.socket] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._keeping: asyncio.Task[None] | None = None
        self._kept_s = 0.0
        self._sent_s: float | None = None
        self._opened = False
        self._few_alike = FewAlike(_LINES_ALIKE, _LINES_WINDOW_S)

    async def open(self) -> None:
        """Begin to listen."""
        settings, folder = self._settings, self._settings.state_dir
        start = await asyncio.to_thread(start_number.next_start, folder, time.time())
        seen = await asyncio.to_thread(start_number.read_seen, folder, settings.peer)
        self.membership = Membership(settings, now(), start, lambda: os.urandom(NONCE_BYTES), seen)
        self._kept_start, self._kept_seen = start, seen
        self._opened = True
        for way in self._ways:
            if not way.address:
                self._tasks.append(spawn(self._resolve(way), f"address of {way.settings.address}"))
        self._know_addresses()
        for index, way in enumerate(self._ways):
            self._log(self._send_on(index, way, b""))

    def send(self, state: NodeState) -> None:
        """One heartbeat on all paths, now."""
        now_s = self._sent_s = now()
        self._log(self.membership.check(now_s))
        data = self.membership.pack_next(state, now_s)
        for index, way in enumerate(self._ways):
            self._log(self._send_on(index, way, data))

    def peer(self) -> PeerView:
        """The other node, as it was heard."""
        return self.membership.view()

    def renew(self) -> None:
        """After a pause of this process: what waits in the sockets is the past, and a new session begins."""
        for receiver in self._sockets.values():
            with contextlib.suppress(OSError):
                for _ in range(_DRAINED_AT_MOST):
                    receiver.recv(1)
        self.membership.renew(now())

    async def close(self) -> None:
        """Hear and send no more."""
        loop = asyncio.get_running_loop()
        for one in self._sockets.values():
            loop.remove_reader(one.fileno())
            one.close()
        self._sockets.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._keeping is not None:
            await self._keeping
        if self._opened:
            await self._keep()

    # Sending

    def _send_on(self, index: int, way: Way, data: bytes) -> tuple[Event, ...]:
        """On one path; with no data only what has to be ready for that."""
        problem = ""
        try:
            sender = self._ready(way)
            if sender is None:
                return self.membership.sending(index, "", now(), unused=True)
            if data:
                path = way.settings
                ttl = path.ttl if path.kind is PathKind.MULTICAST else None
                sockets.send(sender, data, way.address, path.port, way.interface, ttl)
        except _NotNowError as error:
            problem = str(error)
        except OSError as error:
            problem = error.strerror or str(error)
        return self.membership.sending(index, problem, now())

    def _ready(self, way: Way) -> socket.socket | None:
        """The socket to send on; None when the path leads to this node itself; _NotNowError, OSError."""
        path = way.settings
        if not way.address:
            raise _NotNowError(f"the address of {path.address} is not known")
        bind = way.bind
        with _saying(f"listening on {bind.address} port {bind.port}".replace("  ", " ")):
            made = self._sockets.get(bind) or self._open(bind)
        way.interface = 0
        if path.interface:
            with _saying(f"interface {path.interface}"):
                way.interface = sockets.interface_index(path.interface)
        if way.own:
            return None
        if path.kind is PathKind.MULTICAST and way.joined != (made, way.interface):
            with _saying(f"joining group {way.address}"):
                sockets.join(made, way.address, way.interface)
            way.joined = (made, way.interface)
        return made

    def _open(self, bind: Bind) -> socket.socket:
        made = sockets.open_socket(bind)
        asyncio.get_running_loop().add_reader(made.fileno(), self._receive, made)
        self._sockets[bind] = made
        return made

    async def _resolve(self, way: Way) -> None:
        loop, path = asyncio.get_running_loop(), way.settings
        family = sockets.family_of(path.local) if path.local else 0
        while True:
            try:
                found = await loop.getaddrinfo(path.address, None, family=family, type=socket.SOCK_DGRAM)
            except OSError:
                await asyncio.sleep(_RESOLVE_AGAIN_S)
                continue
            way.address = _in_numbers(str(found[0][4][0]))
            self._know_addresses()
            return

    def _know_addresses(self) -> None:
        unicast = (way for way in self._ways if way.settings.kind is PathKind.UNICAST and not way.own)
        self.membership.peer_addresses = frozenset(way.address for way in unicast if way.address)

    # Receiving

    def _receive(self, receiver: socket.socket) -> None:
        if self._sent_s is not None and now() - self._sent_s > self._settings.timing.deadtime_s * _PAUSE_PART:
            # This process may have been asleep, and what waits here with it: whoever is told notices that, and calls
            # `renew`, before any of it is looked at.
            self._heard()
        newer = False
        for _ in range(_BATCH):
            try:
                arrival = sockets.receive(receiver, MAX_BYTES)
            except OSError:  # nothing more; or an error that the network reported, which is no end
                break
            way = way_of(arrival, self._ways)
            verdict = self.membership.accept(arrival.data, now(), arrival.source, way)
            self._log(verdict.events)
            newer = newer or verdict.newer
        if newer:
            self._keep_soon()
            self._heard()

    def _keep_soon(self) -> None:
        changed = self.membership.number.start, self.membership.seen.start
        due = now() - self._kept_s > _KEEP_INTERVAL_S or changed != (self._kept_start, self._kept_seen.start)
        if due and (self._keeping is None or self._keeping.done()):
            self._keeping = spawn(self._keep(), "keeping the numbers of heartbeats")

    async def _keep(self) -> None:
        folder, peer = self._settings.state_dir, self._settings.peer
        self._kept_s = now()
        start, seen = self.membership.number.start, self.membership.seen
        if start != self._kept_start:
            await asyncio.to_thread(start_number.keep_start, folder, start)
            self._kept_start = start
        if seen != self._kept_seen:
            await asyncio.to_thread(start_number.keep_seen, folder, peer, seen)
            self._kept_seen = seen

    def _log(self, events: Iterable[Event]) -> None:
        for level, template, arguments in events:
            record = log.makeRecord(log.name, level, "", 0, template, arguments, None)
            if log.isEnabledFor(level) and self._few_alike.filter(record):
                log.handle(record)


def _in_numbers(address: str) -> str:
    """In the one form the kernel prints, without a scope; "" for a name."""
    try:
        return str(ipaddress.ip_address(address.partition("%")[0]))
    except ValueError:
        return ""
