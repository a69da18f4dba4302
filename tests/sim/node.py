"""A simulated machine, and the incarnations of `replicad` that live and die on it: the real `Resource` over a
simulated `replica.runtime.Runtime`.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import replica.tasks
from replica import config as cfg
from replica.errors import ReplicaError
from replica.hooks import Event
from replica.metadata import Metadata
from replica.resource import Resource
from replica.states import Role
from replica.superblock import PeerRecord, Superblock
from tests.sim.disk import BLOCK, SECTOR, DiskFaults, SimBacking, SimDisk, SimMetadataFile
from tests.sim.loop import MachineDied, NodeLoop, World
from tests.sim.network import Network
from tests.sim.trace import Trace

if TYPE_CHECKING:
    from tests.sim.client import Connection

RESOURCE = "r0"


class Incarnation:
    """One process: dead or alive."""

    def __init__(self, machine: "Machine", number: int) -> None:
        self.machine = machine
        self.world = machine.world
        self.number = number
        self.dead = False
        self.loop = NodeLoop(machine.world, f"{machine.name}#{number}")
        self.files: dict[Any, None] = {}
        self.resource: Resource | None = None
        self.started = False
        self.stopping = False
        self.client: Connection | None = None
        #: Operations on disks and connections until the machine dies in the middle of one; 0: it does not.
        self.fuse = 0
        self.fuse_power = False

    def burn(self) -> None:
        """Before each effect of the node's code on the outside."""
        if self.fuse:
            self.fuse -= 1
            if not self.fuse:
                self.machine.die(power=self.fuse_power, why="in the middle of a step")
                raise MachineDied


class SimRuntime:
    """`replica.runtime.Runtime`."""

    def __init__(self, incarnation: Incarnation, rng: random.Random) -> None:
        self._incarnation = incarnation
        self._rng = rng

    def open_backing(self, path: object) -> SimBacking:
        return SimBacking(self._incarnation, self._incarnation.machine.data)

    def open_metadata(self, path: object) -> SimMetadataFile:
        file = SimMetadataFile(self._incarnation, self._incarnation.machine.metadata)
        self._incarnation.files[file] = None
        return file

    async def listen(self, host: str, port: int, factory: Callable[[], asyncio.BaseProtocol]) -> "_Listener":
        network = self._incarnation.machine.network
        network.listeners[(host, port)] = (self._incarnation, factory)
        return _Listener(network, (host, port))

    async def dial(self, host: str, port: int, local_host: str, factory: Callable[[], asyncio.BaseProtocol]) -> None:
        await self._incarnation.machine.network.dial(self._incarnation, host, port, factory)

    def clock_s(self) -> float:
        return self._incarnation.loop.time()

    def random_bytes(self, count: int) -> bytes:
        return self._rng.randbytes(count)

    def random_id(self) -> int:
        return self._rng.getrandbits(64) or 1

    async def run_hook(
        self, command: Sequence[str], variables: Mapping[str, str], timeout_s: float, on_line: Callable[[str], None]
    ) -> str:
        return await self._incarnation.machine.run_hook(self._incarnation, Event(variables["REPLICA_EVENT"]), timeout_s)


class _Listener:
    def __init__(self, network: Network, key: tuple[str, int]) -> None:
        self._network = network
        self._key = key

    def close(self) -> None:
        self._network.listeners.pop(self._key, None)


class Machine:
    """Two disks, a cable, and at most one living incarnation."""

    def __init__(
        self,
        world: World,
        trace: Trace,
        network: Network,
        config: cfg.Config,
        rng: Callable[[str], random.Random],
        faults: tuple[DiskFaults, DiskFaults],
        size_bytes: int,
        room_bytes: int = 0,
    ) -> None:
        self.world = world
        self.trace = trace
        self.network = network
        self.config = config
        self.name = config.node.name
        self.host = config.node.address
        self.bit = 1 if self.name < config.peer.name else 2
        self.powered = True
        self.faults_off = False
        self.incarnation: Incarnation | None = None
        self.incarnations = 0
        self.size_bytes = size_bytes
        self._ids = rng(f"{self.name}/ids")
        self._hooks = rng(f"{self.name}/hooks")
        self.rng = rng(f"{self.name}/machine")
        self.data = SimDisk(rng(f"{self.name}/data"), size_bytes + room_bytes, faults[0])
        self.layout = self._superblock()
        largest = replace(self.layout, size_bytes=self.data.size_bytes)
        self.metadata = SimDisk(rng(f"{self.name}/metadata"), sum(largest.bitmap_region()), faults[1])
        #: Called whenever a state of the living incarnation changes.
        self.observe: Callable[[Machine], None] = lambda machine: None
        self.died: Callable[[Machine, Incarnation | None], None] = lambda machine, incarnation: None
        #: A hook begins, and ends: with what was wrong, or "".
        self.hook_begins: Callable[[Machine, Event], None] = lambda machine, event: None
        self.hook_ended: Callable[[Machine, Event, str], None] = lambda machine, event, problem: None
        network.hosts[self.host] = self

    def _superblock(self) -> Superblock:
        local = self.config.resource(RESOURCE).local
        return Superblock(
            cluster=self.config.cluster.name,
            resource=RESOURCE,
            volume=0,
            node=self.name,
            device_id=self._ids.getrandbits(64),
            size_bytes=self.size_bytes,
            al_slots=local.al_extents,
            backing_fingerprint=f"sim:{self.name}",
            peers=[PeerRecord(self.config.peer.name)],
        )

    def format(self, generation: int) -> None:
        """Make the metadata: of a new copy (0), or of one that is in sync with the other as this generation."""
        superblock = self._superblock()
        if generation:
            superblock.just_created = superblock.inconsistent = False
            superblock.generations = type(superblock.generations)(current=generation)
        self.layout = superblock
        disk = self.metadata

        class Plain:
            async def read(self, offset: int, length: int) -> bytes:
                return disk.read(offset, length)

            async def write(self, offset: int, data: bytes) -> None:
                disk.write(offset, data)

            async def flush(self) -> None:
                disk.flushed(disk.snapshot())

        try:
            Metadata.format(Plain(), superblock).send(None)  # type: ignore[arg-type]
        except StopIteration:
            return
        raise AssertionError("formatting was suspended")

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def resource(self) -> Resource | None:
        """The living resource that has started, or None."""
        incarnation = self.incarnation
        return incarnation.resource if incarnation is not None and incarnation.started else None

    @property
    def alive(self) -> bool:
        return self.incarnation is not None

    @property
    def is_primary(self) -> bool:
        resource = self.resource
        return resource is not None and resource.state.role is Role.PRIMARY

    def boot(self) -> None:
        """Power on if need be, and start replicad."""
        if self.incarnation is not None:
            return
        if not self.powered:
            self.powered = True
            self.network.host_is_back(self.host)
        self.incarnations += 1
        incarnation = self.incarnation = Incarnation(self, self.incarnations)
        self.trace.note(f"{self.name}#{incarnation.number} starts")
        self.world.enter(incarnation.loop, self._begin, incarnation)

    def _begin(self, incarnation: Incarnation) -> None:
        runtime = SimRuntime(incarnation, self._ids)
        resource = Resource(self.config, self.config.resource(RESOURCE), runtime)  # type: ignore[arg-type]
        changed = resource.state.on_change

        def on_change() -> None:
            changed()
            if not incarnation.dead:
                self.observe(self)

        resource.state.on_change = on_change
        incarnation.resource = resource
        self._start(incarnation, resource.start(), "start", self._started)

    def _started(self, error: Exception | None) -> None:
        assert self.incarnation is not None
        self.incarnation.started = True
        if error is not None:
            if not isinstance(error, ReplicaError):  # replicad would end with a traceback instead of a sentence
                self.world.complain(self.incarnation.loop, error)
            self.die(power=False, why=f"it could not start: {error}")

    def die(self, *, power: bool, why: str) -> None:
        """Kill the process, or cut the power. Nothing of the incarnation has any effect from here on."""
        incarnation = self.incarnation
        if incarnation is not None:
            incarnation.dead = incarnation.loop.dead = True
            self.incarnation = None
            for file in list(incarnation.files):
                file.abandon()
            self.network.died(incarnation, silent=power)
            running = replica.tasks._running
            running.difference_update([task for task in running if task.get_loop() is incarnation.loop])
        elif not power or not self.powered:
            return
        lost = 0
        if power:
            self.powered = False
            lost = self.data.power_cut() + self.metadata.power_cut()
        kind = "power-cut" if power else "kill"
        self.trace.fault(kind, f"{self.name} ({why}){f', {lost} sectors lost' if power else ''}")
        self.died(self, incarnation)

    def stop(self) -> None:
        """`systemctl stop`: a clean end, or a kill after a while."""
        incarnation = self.incarnation
        if incarnation is None or incarnation.resource is None or incarnation.stopping:
            return
        incarnation.stopping = True
        self.trace.fault("stop", self.name)

        def stopped(error: Exception | None) -> None:
            self.die(power=False, why="stopped cleanly" if error is None else f"stopped: {error}")

        self._start(incarnation, incarnation.resource.stop(), "stop", stopped)
        self.world.after(5.0, self._kill_if, incarnation)

    def _kill_if(self, incarnation: Incarnation) -> None:
        if not incarnation.dead:
            self.die(power=False, why="it did not stop in time")

    def rot(self) -> None:
        """While down: damage one copy of something that the format promises to outlive."""
        from replica import superblock as superblocks
        from replica.activity_log import ActivityLog

        layout, disk = self.layout, self.metadata
        copies = [disk.read(at * 4096, 4096) for at in range(2)]
        logs = [disk.read(layout.al_offset + at * layout.al_copy_bytes, layout.al_copy_bytes) for at in range(4)]
        if any(superblocks._open_copy(copy) is None for copy in copies):
            return
        if any(any(log) and ActivityLog.decode(log) is None for log in logs):
            return
        what = self.rng.randrange(3)
        if what == 0:
            place = (self.rng.randrange(2) * 4096, 256)
        elif what == 1:
            written = [at for at in range(4) if any(logs[at])]
            place = (layout.al_offset + self.rng.choice(written) * layout.al_copy_bytes, 40)
        else:
            offset, length = layout.bitmap_region()
            sectors = length // SECTOR
            place = (offset + (self.rng.randrange(sectors) * SECTOR if sectors > 1 else 0), SECTOR)
            if not any(disk.read(*place)):
                return  # a hole does not rot
        disk.rot(*place)
        self.trace.fault("rot", f"{self.name} {('superblock', 'activity log', 'bitmap')[what]}")

    # ── work on the node ─────────────────────────────────────────────────────────────────────────────────────

    def run(
        self, work: Callable[[Resource], Coroutine[Any, Any, Any]], done: Callable[[Exception | None], None]
    ) -> None:
        """Run something on the living incarnation; `done` with its error, never when the node dies first."""
        incarnation = self.incarnation
        if incarnation is not None and incarnation.resource is not None:
            resource = incarnation.resource
            self.world.enter(incarnation.loop, self._start, incarnation, work(resource), "verb", done)

    async def run_hook(self, incarnation: Incarnation, event: Event, timeout_s: float) -> str:
        """Takes its time; now and then too much of it, or it fails."""
        incarnation.burn()
        self.hook_begins(self, event)
        takes_s = self._hooks.expovariate(3 / timeout_s)
        fails = self._hooks.random() < 0.15
        if self.faults_off:
            takes_s, fails = min(takes_s, timeout_s / 2), False
        await asyncio.sleep(min(takes_s, timeout_s))
        problem = "ran longer than it may" if takes_s >= timeout_s else "returned 1" if fails else ""
        self.trace.fault("hook", f"{self.name} {event} {problem or 'is done'}")
        self.hook_ended(self, event, problem)
        return problem

    def _start(
        self,
        incarnation: Incarnation,
        work: Coroutine[Any, Any, Any],
        name: str,
        done: Callable[[Exception | None], None],
    ) -> None:
        async def wrapped() -> None:
            error: Exception | None = None
            try:
                await work
            except ReplicaError as expected:
                error = expected
            except OSError as failure:
                if incarnation.resource is not None:
                    incarnation.resource.disk_failed(failure)  # as replicad does
                error = failure
            except MachineDied:
                return
            except Exception as unexpected:
                if not incarnation.dead:
                    self.world.complain(incarnation.loop, unexpected)
                error = unexpected
            if not incarnation.dead:
                self.world.soon(None, done, (error,))

        replica.tasks._running.add(task := incarnation.loop.create_task(wrapped(), name=name))
        task.add_done_callback(replica.tasks._running.discard)


assert BLOCK == 4096
