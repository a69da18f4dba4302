"""Keeps one kernel device connected to whichever node is Primary.

The kernel holds I/O back while a device's connections are dead. The keeper learns of that in two ways: a connection
of its own making hangs up (it keeps a second descriptor of each), or the driver announces it. Then it ends all
connections of the device, finds the Primary, opens a new generation of connections there
(`nbdserver.client_identity`), and hands them over.
"""

import asyncio
import contextlib
import logging
import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nbdserver.client_identity import ClientIdentity
from replica.errors import ReplicaError
from replica.kernel_device import finder, netlink, places
from replica.kernel_device.finder import Link, NobodyServes
from replica.kernel_device.messages import Settings
from replica.kernel_device.netlink import DeviceError, Driver, device_path
from replica.kernel_device.places import Backend, Place, Trust

log = logging.getLogger("replica")

PROBE_INTERVAL_S = 5.0
#: 512 as nbd-client has it: a file system made for larger sectors could not be mounted over the other.
BLOCK_SIZE_BYTES = 512
#: While the kernel does not take a connection: how often it is offered without an announcement.
_OFFER_INTERVAL_S = 0.5


@dataclass(frozen=True)
class Wish:
    """What to attach: times in whole seconds, `index` None for any free device."""

    cluster: str
    resource: str
    candidates: tuple[Place, ...]
    index: int | None
    adopt: bool
    connections: int
    request_timeout_s: int
    dead_timeout_s: int


class _Detached(Exception):
    """The device was detached by `detach`: nothing is to be kept any more."""


class Keeper:
    """The device of one resource. `changed` is called whenever `status` has."""

    def __init__(self, wish: Wish, driver: Driver, changed: Callable[[], None]) -> None:
        self._wish = wish
        self._driver = driver
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._links: list[Link] = []
        self._index: int | None = None
        self._backend: Backend | None = None
        self._client = os.urandom(16)
        self._connections = wish.connections
        self._size_bytes = 0
        self._trust = Trust()
        self._detaching = False
        self.is_new = False  # attached by this program, which did not find it attached
        self._wake = asyncio.Event()
        self._listener = driver.listen()
        # Only the ends of the connections, not the kernel's own traffic on them, wake this process.
        self._ends = select.epoll()
        self._loop.add_reader(self._listener, self._announced)
        self._loop.add_reader(self._ends, self._hung_up)
        self.state = "searching"
        self.last_error = ""
        self.reconnects = 0

    # ── what others see ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def device(self) -> str:
        """/dev/nbd0; empty while there is none."""
        return "" if self._index is None else device_path(self._index)

    @property
    def is_usable(self) -> bool:
        """The device is there, and I/O goes on."""
        return self.state == "attached" or (self.state == "waiting" and self._wish.adopt)

    def status(self) -> dict[str, Any]:
        """`state` is "searching" (for a Primary: I/O waits), "waiting" (for the kernel to give its old connections up)
        or "attached".
        """
        return {
            "resource": self._wish.resource,
            "device": self.device,
            "state": self.state,
            "server": str(self._trust.last or ""),
            "connections": self._connections,
            "size_bytes": self._size_bytes,
            "reconnects": self.reconnects,
            "last_error": self.last_error,
        }

    def _set(self, state: str, error: str = "") -> None:
        if (state, error) != (self.state, self.last_error):
            self.state, self.last_error = state, error
            log.info("%s: %s: %s%s", self._wish.resource, self.device or "no device yet", state, error and f": {error}")
            self._changed()

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def attach(self) -> None:
        """Attach the device (waits for a Primary), or go on with one that is attached. Raises `DeviceError`."""
        found = netlink.find_backend(places.backend_prefix(self._wish.cluster, self._wish.resource))
        if found is not None:
            self._resume(*found)
        elif self._wish.adopt:
            self._adopt()
        else:
            await self._connect()

    def _resume(self, index: int, text: str) -> None:
        self._index, self._backend = index, Backend.parse(text)
        self._client, self._connections = self._backend.client, self._backend.connections
        if self._wish.index not in (None, index):
            raise DeviceError(f"{self._wish.resource} is attached to {device_path(index)} already: unmap it first")
        log.info("%s: going on with %s, which is attached already", self._wish.resource, self.device)

    def _adopt(self) -> None:
        index = self._wish.index
        if index is None or not netlink.is_attached(index):
            which = "a device" if index is None else device_path(index)
            raise DeviceError(f"{which} is not attached: name one that nbd-client has attached, or leave --adopt out")
        self._driver.reconfigure(index, Settings(**self._timeouts()))
        self._index = index

    async def _connect(self) -> None:
        if self._wish.index is not None and netlink.is_attached(self._wish.index):
            raise DeviceError(
                f"{device_path(self._wish.index)} is in use already: choose another device, or detach it "
                f"first (`nbd-client -d {device_path(self._wish.index)}`)"
            )
        links = await self._open()
        backend = Backend(self._wish.cluster, self._wish.resource, self._client, self._connections)
        settings = Settings(
            sockets=[link.socket.fileno() for link in links],
            size_bytes=links[0].info.size_bytes,
            block_size_bytes=BLOCK_SIZE_BYTES,
            server_flags=links[0].info.flags,
            backend=str(backend),
            **self._timeouts(),
        )
        try:
            self._index = self._driver.connect(self._wish.index, settings)
        except BaseException:
            for link in links:
                link.drop()
            raise
        self._backend = backend
        self.is_new = True
        self._use(links)

    async def run(self) -> None:
        """Until cancelled, or `detach`; raises `DeviceError` when the device is detached by somebody else."""
        with contextlib.suppress(_Detached):
            await self._run()

    async def _run(self) -> None:
        watchdog = places.Watchdog()
        while True:
            if self.state != "attached":
                await self._reconnect()
                watchdog = places.Watchdog()
            self._wake.clear()
            if self._any_dead():
                self._give_up("the connection has ended")
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROBE_INTERVAL_S):
                    await self._wake.wait()
                continue
            if watchdog.probed(answered=await self._probe()):
                self._give_up("the server does not answer")

    async def detach(self) -> None:
        """Detach the device. Raises `DeviceError` while somebody uses it."""
        index = self._index
        if index is None:
            return
        users = await asyncio.to_thread(netlink.users_sentence, index)
        if users is not None:
            raise DeviceError(users)
        self._detaching = True
        await asyncio.to_thread(self._driver.disconnect, index)
        self._index = None
        self._drop_links()

    def close(self) -> None:
        """Let go of everything but the device: it stays attached as it is."""
        self._loop.remove_reader(self._listener)
        self._loop.remove_reader(self._ends)
        self._listener.close()
        self._ends.close()
        for link in self._links:
            link.socket.close()

    # ── parts of it ──────────────────────────────────────────────────────────────────────────────────────────

    async def _reconnect(self) -> None:
        started = time.monotonic()
        while True:
            links = await self._open()
            if await self._hand_over(links):
                break
        self.reconnects += 1
        self._use(links)
        log.info("%s: %s goes on after %.1f s", self._wish.resource, self.device, time.monotonic() - started)

    async def _open(self) -> list[Link]:
        """A new generation of connections, however long it takes."""
        delay_s = 0.0
        while True:
            self._check_attached()
            # The device lives no longer than the kernel, and so does this clock, which never goes back.
            identity = ClientIdentity(self._client, time.clock_gettime_ns(time.CLOCK_BOOTTIME))
            try:
                return await self._open_at_primary(identity)
            except NobodyServes as error:
                self._set("searching", str(error))
                delay_s = places.next_delay_s(delay_s)
                await asyncio.sleep(delay_s)

    async def _open_at_primary(self, identity: ClientIdentity) -> list[Link]:
        """Raises `NobodyServes`, also when what is served is smaller than the device."""
        candidates, resource, count = list(self._wish.candidates), self._wish.resource, self._connections
        before = self._trust.copy()
        place = await asyncio.to_thread(finder.find, candidates, resource, self._trust)
        try:
            links = await asyncio.to_thread(finder.open_links, place, resource, identity, count)
            refusal = self._refusal(links[0])
            if refusal is not None:
                self._end(links)
                raise NobodyServes(refusal)
        except NobodyServes:
            self._trust = before  # nothing was written there: the client's past is where it was
            raise
        return links

    def _refusal(self, link: Link) -> str | None:
        if self._index is None:
            return None
        return places.too_small(link.place, link.info.size_bytes, self.device, netlink.size_of(self._index))

    async def _hand_over(self, links: list[Link]) -> bool:
        """Let the kernel take them in place of its dead ones; False when one of them ends meanwhile."""
        assert self._index is not None
        self._watch(links)
        for link in links:
            while True:
                self._wake.clear()
                self._check_attached()
                self._reconfigure(sockets=[link.socket.fileno()], **self._timeouts())
                if link.is_taken():
                    break
                # It still believes that its old connections live: after a restart of this program, or right now.
                self._set("waiting", "the kernel has not given its old connection up yet")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_OFFER_INTERVAL_S):
                        await self._wake.wait()
                if self._hangs_up(links):
                    self._end(links)
                    return False
        self._grow(links[0].info.size_bytes)
        return True

    def _grow(self, size_bytes: int) -> None:
        """The volume may be larger than it was. Only now, with connections that live: newer kernels let what is under
        way end first, and it ends only over them.
        """
        assert self._index is not None
        device_bytes = netlink.size_of(self._index)
        if size_bytes > device_bytes:
            self._reconfigure(size_bytes=size_bytes)
            log.info("%s: %s had %d bytes and now has %d", self._wish.resource, self.device, device_bytes, size_bytes)

    def _reconfigure(self, **settings: Any) -> None:
        assert self._index is not None
        backend = None if self._backend is None else str(self._backend)
        self._driver.reconfigure(self._index, Settings(backend=backend, **settings))

    async def _probe(self) -> bool:
        """Whether the machine of the server answers at all. Looks whether nodes that were left have ceased to serve."""
        for place in list(self._trust.left):
            if await asyncio.to_thread(finder.is_idle, place, self._wish.resource):
                self._trust.seen_idle(place)
                log.info("%s: %s does not serve any more, and may be used again", self._wish.resource, place)
        last = self._trust.last
        return last is None or await asyncio.to_thread(finder.answers, last, self._wish.resource)

    def _use(self, links: list[Link]) -> None:
        self._links = links
        self._size_bytes = links[0].info.size_bytes
        self._watch(links)
        self._set("attached")

    def _watch(self, links: list[Link]) -> None:
        for link in links:
            with contextlib.suppress(FileExistsError):
                self._ends.register(link.socket, select.EPOLLRDHUP | select.EPOLLET)

    def _give_up(self, why: str) -> None:
        log.warning("%s: %s: %s (%s)", self._wish.resource, self.device, why, self._trust.last)
        self._drop_links()
        self._set("searching", why)

    def _drop_links(self) -> None:
        self._end(self._links)
        self._links = []

    def _end(self, links: list[Link]) -> None:
        for link in links:
            with contextlib.suppress(FileNotFoundError):
                self._ends.unregister(link.socket)
            link.drop()

    def _any_dead(self) -> bool:
        return self._hangs_up(self._links)

    @staticmethod
    def _hangs_up(links: list[Link]) -> bool:
        poll = select.poll()
        for link in links:
            poll.register(link.socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def _check_attached(self) -> None:
        if self._detaching:
            raise _Detached
        if self._index is not None and not netlink.is_attached(self._index):
            raise DeviceError(f"{self.device} was detached by somebody else: map {self._wish.resource} again")

    def _timeouts(self) -> dict[str, Any]:
        return {"timeout_s": self._wish.request_timeout_s, "dead_conn_timeout_s": self._wish.dead_timeout_s}

    def _announced(self) -> None:
        if self._index in netlink.dead_links(self._listener):
            self._wake.set()

    def _hung_up(self) -> None:
        self._ends.poll(0)
        self._wake.set()


def keep_out_of_the_way() -> None:
    """This process must not wait for memory that only it can free: the device's dirty pages. Best effort, as root."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mlockall(1 | 2 | 4)  # MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT
    libc.prctl(57, 1, 0, 0, 0)  # PR_SET_IO_FLUSHER


def ensure_root() -> None:
    """Raises ReplicaError."""
    if os.geteuid() != 0:
        raise ReplicaError("attaching kernel devices takes root: run this as root")
