"""Simulated TCP: bytes arrive in order or not at all, late, in any pieces; ends close, reset or fall silent."""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.sim.loop import MachineDied, World

if TYPE_CHECKING:
    from tests.sim.node import Incarnation, Machine


@dataclass
class NetworkFaults:
    """How the network behaves; drawn per seed."""

    latency_s: float = 0.001
    split: float = 0.2
    socket_bytes: int = 1 << 16


class Network:
    """The cable between the two machines, and the connections over it."""

    def __init__(self, world: World, rng: random.Random, faults: NetworkFaults) -> None:
        self.world = world
        self.rng = rng
        self.faults = faults
        self.listeners: dict[tuple[str, int], tuple[Incarnation, Callable[[], asyncio.BaseProtocol]]] = {}
        self.hosts: dict[str, Machine] = {}
        self._blocked: set[tuple[str, str]] = set()
        self._ends: dict[int, End] = {}
        self._count = 0

    def latency_s(self) -> float:
        return self.faults.latency_s * (0.3 + 1.4 * self.rng.random())

    # ── faults ───────────────────────────────────────────────────────────────────────────────────────────────

    def passes(self, source: str, target: str) -> bool:
        return (source, target) not in self._blocked

    def cut(self, source: str, target: str) -> None:
        self._blocked.add((source, target))

    @property
    def healthy(self) -> bool:
        return not self._blocked

    def heal(self) -> None:
        """Packets pass again; what waited comes late, as retransmissions do."""
        self._blocked.clear()
        for end in list(self._ends.values()):
            end.pump(self.rng.random() * self.rng.choice((0.05, 0.3, 1.0)))

    def host_is_back(self, host: str) -> None:
        for end in list(self._ends.values()):
            if end.peer.host == host:
                end.pump(self.rng.random() * 0.3)

    def reset_all(self) -> None:
        """A middlebox (or a bug) resets every connection, in the middle of whatever is under way."""
        for end in list(self._ends.values()):
            end.broken(ConnectionResetError(104, "simulated reset"), self.rng.random() * self.faults.latency_s * 4)

    def died(self, incarnation: "Incarnation", *, silent: bool) -> None:
        for key in [key for key, (owner, _) in self.listeners.items() if owner is incarnation]:
            del self.listeners[key]
        graceful = self.rng.random() < 0.5
        for end in list(self._ends.values()):
            if end.incarnation is incarnation:
                end.owner_died(silent=silent, graceful=graceful)

    # ── connections ──────────────────────────────────────────────────────────────────────────────────────────

    def register(self, end: "End") -> int:
        self._count += 1
        self._ends[self._count] = end
        return self._count

    def forget(self, number: int) -> None:
        self._ends.pop(number, None)

    def dial(
        self, incarnation: "Incarnation", host: str, port: int, factory: Callable[[], asyncio.BaseProtocol]
    ) -> "asyncio.Future[None]":
        future: asyncio.Future[None] = incarnation.loop.create_future()
        self.world.after(self.latency_s(), self._syn, incarnation, host, port, factory, future, 0.1)
        return future

    def _syn(
        self,
        incarnation: "Incarnation",
        host: str,
        port: int,
        factory: Callable[[], asyncio.BaseProtocol],
        future: "asyncio.Future[None]",
        retry_s: float,
    ) -> None:
        if incarnation.dead or future.done():
            return
        here = incarnation.machine.name
        there = self.hosts[host]
        if not (self.passes(here, there.name) and self.passes(there.name, here)) or not there.powered:
            self.world.after(retry_s, self._syn, incarnation, host, port, factory, future, retry_s * 2)
            return
        listener = self.listeners.get((host, port))
        if listener is None or listener[0].dead:
            error = ConnectionRefusedError(111, "Connection refused")
            self.world.after(self.latency_s(), self._refused, incarnation, future, error)
            return
        server = End(self, listener[0])
        client = End(self, incarnation)
        server.peer, client.peer = client, server
        server.attach(listener[1])
        self.world.after(self.latency_s(), self._connected, client, factory, future)

    @staticmethod
    def _refused(incarnation: "Incarnation", future: "asyncio.Future[None]", error: OSError) -> None:
        if not incarnation.dead and not future.done():
            future.set_exception(error)

    @staticmethod
    def _connected(client: "End", factory: Callable[[], asyncio.BaseProtocol], future: "asyncio.Future[None]") -> None:
        if client.incarnation.dead or future.done():
            client.gone = True
            client.abort()
            return
        client.attach(factory)
        future.set_result(None)


_FIN = b""


class End(asyncio.Transport):
    """One end of a connection, as `PeerLink` uses a transport."""

    def __init__(self, network: Network, incarnation: "Incarnation") -> None:
        super().__init__()
        self.network = network
        self.incarnation = incarnation
        self.host = incarnation.machine.host
        self.peer: End
        self.number = network.register(self)
        self.gone = False  # nothing is delivered here any more, and nobody is told
        self._protocol: Any = None
        self._early: list[bytes] = []
        self._reading = True
        self._unread: list[bytes] = []  # arrived while nothing was read; _FIN comes last
        self._waiting: deque[memoryview] = deque()  # not yet in the kernel
        self._kernel: deque[bytes] = deque()  # taken by the kernel, not yet delivered
        self._kernel_bytes = 0
        self._closing = False
        self._fin_sent = False
        self._scheduled = False
        self._paused = False

    def attach(self, factory: Callable[[], asyncio.BaseProtocol]) -> None:
        """The connection is made at this end."""

        def made() -> None:
            self._protocol = factory()
            self._protocol.connection_made(self)

        self.network.world.enter(self.incarnation.loop, made)
        early, self._early = self._early, []
        for data in early:
            self._arrived(data)

    # ── transport ────────────────────────────────────────────────────────────────────────────────────────────

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        self.incarnation.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        while self._unread and self._reading and not self.gone:
            data = self._unread.pop(0)
            if data is _FIN:
                self._end_of_stream()
            else:
                self._receive(data)

    def get_write_buffer_size(self) -> int:
        return sum(len(view) for view in self._waiting)

    def is_closing(self) -> bool:
        return self._closing

    def write(self, data: Any) -> None:
        self.writelines((data,))

    def writelines(self, buffers: Iterable[Any]) -> None:
        if self.incarnation.dead:
            raise MachineDied
        self.incarnation.burn()
        if self._closing or self.gone:
            return
        for buffer in buffers:
            self._waiting.append(memoryview(buffer))
        self._to_kernel()
        if self._waiting and not self._paused:
            self._paused = True
            self._protocol.pause_writing()

    def _to_kernel(self) -> None:
        room = self.network.faults.socket_bytes - self._kernel_bytes
        while self._waiting and room > 0:
            view = self._waiting.popleft()
            if len(view) > room:
                self._waiting.appendleft(view[room:])
                view = view[:room]
            # Copied when the kernel takes it: the node may use the memory again only then.
            self._kernel.append(bytes(view))
            self._kernel_bytes += len(view)
            room -= len(view)
        self.pump(0.0)

    def close(self) -> None:
        if self.incarnation.dead or self._closing:
            return
        self._closing = True
        if not self._waiting:
            self._send_fin()
            self._tell_lost(None)

    def abort(self) -> None:
        if self.incarnation.dead:
            return
        if self._waiting or not self._closing:
            self._waiting.clear()
            self._kernel.clear()
            self._kernel_bytes = 0
            self._reset_peer()
            if not self._closing or not self._fin_sent:
                self._tell_lost(None)
            self._closing = True
            self.gone = True
        elif self._kernel:
            # Closed before: the kernel is still trying to deliver. The descriptor is gone, so nothing changes.
            pass

    def _send_fin(self) -> None:
        if not self._fin_sent:
            self._fin_sent = True
            self._kernel.append(_FIN)
            self.pump(0.0)

    def _tell_lost(self, error: Exception | None) -> None:
        protocol, self._protocol = self._protocol, None
        if protocol is not None:
            self.incarnation.loop.call_soon(protocol.connection_lost, error)

    # ── the wire ─────────────────────────────────────────────────────────────────────────────────────────────

    def pump(self, extra_s: float) -> None:
        """Have the next bytes arrive at the other end in a while."""
        if self._kernel and not self._scheduled:
            self._scheduled = True
            self.network.world.after(self.network.latency_s() + extra_s, self._deliver)

    def _deliver(self) -> None:
        self._scheduled = False
        network, peer = self.network, self.peer
        here, there = self.incarnation.machine, peer.incarnation.machine
        if not self._kernel or not network.passes(here.name, there.name):
            return
        if not here.powered and not self._kernel:
            return
        if peer.incarnation.dead or peer.gone:
            if there.powered:
                # No such connection there: the answer is a reset.
                self._kernel.clear()
                self.broken(ConnectionResetError(104, "Connection reset by peer"), network.latency_s())
            return
        rng = network.rng
        data = self._take(rng)
        if data:
            peer._arrived(data)
        if self._kernel and self._kernel[0] == _FIN:
            self._kernel.clear()
            if not peer.gone and not peer.incarnation.dead:
                peer._fin_arrived()
            network.forget(self.number)
            return
        self._room()
        if self._kernel:
            self._scheduled = True
            network.world.after(network.latency_s() * 0.2, self._deliver)

    def _take(self, rng: random.Random) -> bytes:
        pieces: list[bytes] = []
        while self._kernel and self._kernel[0] != _FIN:
            pieces.append(self._kernel.popleft())
        data = b"".join(pieces)
        if len(data) > 1 and rng.random() < self.network.faults.split:
            count = rng.randrange(1, len(data))
            self._kernel.appendleft(data[count:])
            data = data[:count]
        self._kernel_bytes -= len(data)
        return data

    def _room(self) -> None:
        """The kernel has room again."""
        if self.incarnation.dead or self.gone or not self._waiting:
            return
        self._to_kernel()
        if not self._waiting:
            if self._closing:
                self._send_fin()
                self._tell_lost(None)
            elif self._paused and self._protocol is not None:
                self._paused = False
                self.network.world.enter(self.incarnation.loop, self._protocol.resume_writing)

    def _arrived(self, data: bytes) -> None:
        if self._protocol is None and not self._closing:
            self._early.append(data)
            return
        if self._unread:
            self._unread.append(data)
            return
        self.network.world.enter(self.incarnation.loop, self._receive, data)

    def _receive(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            if self._closing or self.gone:
                # Unread data at a closed socket: the other end is reset.
                self.gone = True
                self._reset_peer()
                return
            if not self._reading:
                self._unread.insert(0, data[at:])
                return
            protocol = self._protocol
            if not hasattr(protocol, "get_buffer"):
                protocol.data_received(data[at:])
                return
            view = protocol.get_buffer(-1)
            count = min(len(view), len(data) - at)
            view[:count] = data[at : at + count]
            at += count
            protocol.buffer_updated(count)

    def _fin_arrived(self) -> None:
        if self._closing or self._protocol is None:
            return
        if self._unread:
            self._unread.append(_FIN)
        else:
            self.network.world.enter(self.incarnation.loop, self._end_of_stream)

    def _end_of_stream(self) -> None:
        if self._protocol is not None and not self._closing and not self._protocol.eof_received():
            self.close()

    def _reset_peer(self) -> None:
        peer = self.peer
        if self.network.passes(self.incarnation.machine.name, peer.incarnation.machine.name):
            peer.broken(ConnectionResetError(104, "Connection reset by peer"), self.network.latency_s())

    def broken(self, error: Exception, delay_s: float) -> None:
        """A reset arrives in a while."""
        self.network.world.after(delay_s, self._break, error)

    def _break(self, error: Exception) -> None:
        if self.gone or self.incarnation.dead:
            self.network.forget(self.number)
            return
        self.gone = True
        self._waiting.clear()
        self._kernel.clear()
        self._kernel_bytes = 0
        self.network.forget(self.number)
        if self._protocol is not None:
            self._closing = True
            self._tell_lost(error)

    def owner_died(self, *, silent: bool, graceful: bool) -> None:
        """Process killed: the kernel sends what it has and a FIN, or resets. Power cut: silence."""
        rng = self.network.rng
        self._waiting.clear()
        if silent:
            # What is on the wire already may still arrive.
            if self._kernel and self._scheduled and rng.random() < 0.5:
                kept = bytes(self._kernel[0])
                self._kernel.clear()
                if kept:
                    self._kernel.append(kept)
            else:
                self._kernel.clear()
        elif self._fin_sent or graceful:
            self._send_fin()
        else:
            self._kernel.clear()
            self._reset_peer()
