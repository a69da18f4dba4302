"""Clients: what an NBD connection does to an export, with unique values in every sector they write."""

import asyncio
import contextlib
import itertools
import random
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from nbdserver.extents import HOLE
from tests.sim.disk import SECTOR
from tests.sim.loop import MachineDied
from tests.sim.oracle import Entry, Oracle

if TYPE_CHECKING:
    from replica.export import ResourceExport
    from tests.sim.node import Incarnation, Machine
    from tests.sim.scenario import Scenario


def payload(value: int, first: int, count: int) -> bytes:
    """Sectors that say which write they are of and where they belong; value 0 is zeroes."""
    if value == 0:
        return bytes(count * SECTOR)
    head = value.to_bytes(8, "little")
    return b"".join((head + (first + at).to_bytes(8, "little")) * (SECTOR // 16) for at in range(count))


class Connection:
    """`nbdserver.export.ExportClient`: one connection to the export of one incarnation."""

    def __init__(self, workload: "Workload", incarnation: "Incarnation", export: "ResourceExport") -> None:
        self._workload = workload
        self.incarnation = incarnation
        self.export = export
        self.pending: dict[int, list[Entry]] = {}
        self._idle: list[asyncio.Future[None]] = []
        self.draining = False
        self.reads = 0
        self.peer_name = "simulated"

    def __hash__(self) -> int:
        return self.incarnation.number  # the order of a set of them must not depend on addresses

    def __eq__(self, other: object) -> bool:
        return self is other

    async def drain(self) -> None:
        self.draining = True
        if self.pending:
            future: asyncio.Future[None] = self.incarnation.loop.create_future()
            self._idle.append(future)
            await future
        self.export.closed(self)
        self.incarnation.client = None

    def abort(self) -> None:
        """Not used by the node."""

    def begin(self, entries: list[Entry]) -> int:
        self._workload.numbers += 1
        self.pending[self._workload.numbers] = entries
        return self._workload.numbers

    def end(self, number: int) -> list[Entry] | None:
        """The entries of a request that has been answered; None when its answer cannot reach anybody any more."""
        if self.incarnation.dead:
            return None
        entries = self.pending.pop(number)
        if not self.pending:
            waiting, self._idle = self._idle, []
            for future in waiting:
                if not future.done():
                    future.set_result(None)
        return entries


class Workload:
    """Draws requests and judges the answers."""

    def __init__(self, scenario: "Scenario", oracle: Oracle, rng: random.Random) -> None:
        self.scenario = scenario
        self.oracle = oracle
        self.rng = rng
        self.numbers = 0
        self.values = 0
        self.requests = 0
        self.answers = 0
        self.errors = 0
        self._busy: dict[int, int] = {}  # sector -> writes in flight
        self._hot = 0
        self._sectors = scenario.size_bytes // SECTOR
        self._names = [name for name, _ in scenario.mix]
        self._weights = list(itertools.accumulate(weight for _, weight in scenario.mix))

    @property
    def idle(self) -> bool:
        return not self._busy

    def connection(self, machine: "Machine") -> Connection | None:
        """The open connection to this machine's export; opens one if the export allows it."""
        incarnation = machine.incarnation
        if incarnation is None or incarnation.resource is None:
            return None
        client = incarnation.client
        if client is None:
            export = incarnation.resource.export
            if export.refusal() is not None:
                return None
            client = incarnation.client = Connection(self, incarnation, export)
            export.opened(client)
        return None if client.draining else client

    def died(self, incarnation: "Incarnation") -> None:
        """What was under way there has an unknown end."""
        client = incarnation.client
        if client is not None:
            for entries in client.pending.values():
                if entries:
                    self.oracle.failed(entries)
                    self._release(entries)
            client.pending.clear()
            self.oracle.active_reads -= client.reads

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────

    def step(self, machine: "Machine") -> None:
        """One request (or a few) to this machine."""
        client = self.connection(machine)
        if client is None or len(client.pending) >= self.scenario.depth:
            return
        if self.scenario.room_bytes:  # the volume may have grown
            self._sectors = client.export.size_bytes // SECTOR
        (name,) = self.rng.choices(self._names, cum_weights=self._weights)
        machine.world.enter(client.incarnation.loop, getattr(self, f"_{name}"), machine, client)

    def _place(self, longest: int) -> tuple[int, int] | None:
        """(first sector, sectors) that no write in flight touches (or any, where the scenario allows overlaps)."""
        rng, total = self.rng, self._sectors
        if rng.random() < 0.05:
            self._hot = rng.randrange(total)
        count = min(1 + int(rng.expovariate(1.0) * longest / 4), longest, total)
        near = rng.random() < self.scenario.locality
        first = (self._hot + rng.randrange(32)) % total if near else rng.randrange(total)
        if rng.random() < 0.4:
            first &= ~7
        first = min(first, total - count)
        if not self.scenario.overlap and not self._busy.keys().isdisjoint(range(first, first + count)):
            return None
        return first, count

    def _take(self, machine: "Machine", first: int, count: int, *, zero: bool = False) -> tuple[int, list[Entry]]:
        if zero:
            value = 0
        else:
            self.values += 1
            value = self.values
        entries = self.oracle.issue(machine, first, count, value)
        busy = self._busy
        for sector in range(first, first + count):
            busy[sector] = busy.get(sector, 0) + 1
        self.requests += 1
        return value, entries

    def _release(self, entries: list[Entry]) -> None:
        for entry in entries:
            left = self._busy[entry.sector] - 1
            if left:
                self._busy[entry.sector] = left
            else:
                del self._busy[entry.sector]

    def _answered(self, machine: "Machine", entries: list[Entry], error: object, *, durable: bool = False) -> None:
        self._release(entries)
        self.answers += 1
        if error:
            self.errors += 1
            self.oracle.failed(entries)
        else:
            self.oracle.acknowledged(machine, entries, durable=durable)

    def _write(self, machine: "Machine", client: Connection) -> None:
        batch: list[tuple[int, memoryview]] = []
        requests: list[tuple[int, list[Entry]]] = []
        buffers: list[bytearray] = []
        for _ in range(1 if self.rng.random() < 0.5 else self.rng.randint(2, 5)):
            place = self._place(self.scenario.longest_sectors)
            if place is None:
                continue
            if len(self.scenario.extents(*place)) > self.scenario.most_extents:
                continue
            value, entries = self._take(machine, *place)
            buffer = bytearray(payload(value, *place))
            buffers.append(buffer)
            batch.append((place[0] * SECTOR, memoryview(buffer)))
            requests.append((client.begin(entries), entries))
        if not batch:
            return

        def done(errors: Mapping[int, int]) -> None:
            for index, (number, entries) in enumerate(requests):
                if client.end(number) is not None:
                    self._answered(machine, entries, errors.get(index))

        if not client.export.write_batch(batch, done):
            # As nbdserver does: the memory is used again at once.
            for buffer in buffers:
                buffer[:] = b"\xee" * len(buffer)

    def _run(
        self,
        machine: "Machine",
        client: Connection,
        entries: list[Entry],
        work: Coroutine[Any, Any, Any],
        *,
        durable: bool = False,
    ) -> None:
        number = client.begin(entries)

        async def request() -> None:
            error: OSError | None = None
            try:
                await work
            except OSError as failure:
                error = failure
            except MachineDied:
                return
            if client.end(number) is not None:
                self._answered(machine, entries, error, durable=durable)

        self._spawn(client, request())

    @staticmethod
    def _spawn(client: Connection, work: Coroutine[Any, Any, Any]) -> None:
        from replica.tasks import spawn

        spawn(work, "client")

    def _fua(self, machine: "Machine", client: Connection) -> None:
        place = self._place(self.scenario.longest_sectors)
        if place is None or len(self.scenario.extents(*place)) > self.scenario.most_extents:
            return
        value, entries = self._take(machine, *place)
        work = client.export.write_durable(place[0] * SECTOR, payload(value, *place))
        self._run(machine, client, entries, work, durable=True)

    def _trim(self, machine: "Machine", client: Connection) -> None:
        self._clear(machine, client, True)

    def _zero(self, machine: "Machine", client: Connection) -> None:
        self._clear(machine, client, self.rng.random() < 0.3)

    def _clear(self, machine: "Machine", client: Connection, punch: bool) -> None:
        place = self._place(self.scenario.longest_sectors * 2)
        if place is None or len(self.scenario.extents(*place)) > self.scenario.most_extents:
            return
        _, entries = self._take(machine, *place, zero=True)
        offset, length = place[0] * SECTOR, place[1] * SECTOR
        work = client.export.trim(offset, length) if punch else client.export.zero(offset, length, False)
        self._run(machine, client, entries, work)

    def _flush(self, machine: "Machine", client: Connection) -> None:
        covered = self.oracle.flush_issued(machine)
        number = client.begin([])
        self.requests += 1

        async def request() -> None:
            try:
                await client.export.flush()
            except (OSError, MachineDied):
                client.end(number)
                return
            if client.end(number) is not None:
                self.answers += 1
                self.oracle.flush_done(machine, covered)

        self._spawn(client, request())

    def _read(self, machine: "Machine", client: Connection) -> None:
        total = self._sectors
        count = min(self.rng.randint(1, 16), total)
        first = (self._hot + self.rng.randrange(16)) % total if self.rng.random() < 0.5 else self.rng.randrange(total)
        first = min(first, total - count)
        offset, length, began = first * SECTOR, count * SECTOR, self.oracle.clock
        self.requests += 1
        try:
            data = client.export.read_now(offset, length)
        except OSError:
            return
        if data is not None:
            self.answers += 1
            self.oracle.read_done(machine, began, first, data)
            return
        number = client.begin([])
        self.oracle.active_reads += 1
        client.reads += 1

        async def request() -> None:
            found = b""
            with contextlib.suppress(OSError, MachineDied):
                found = await client.export.read(offset, length)
            if client.end(number) is None:
                return
            client.reads -= 1
            self.oracle.active_reads -= 1
            if found:
                self.answers += 1
                self.oracle.read_done(machine, began, first, found)

        async def block_status() -> None:
            at, found = first, []
            with contextlib.suppress(OSError, MachineDied):
                found = await client.export.block_status(offset, length, 3)
            if client.end(number) is None:
                return
            client.reads -= 1
            self.oracle.active_reads -= 1
            for extent_bytes, flags in found:  # a hole is a read that has shown zeroes
                self.answers += 1
                if flags == HOLE:
                    self.oracle.read_done(machine, began, at, bytes(extent_bytes))
                at += extent_bytes // SECTOR

        self._spawn(client, request() if self.requests % 4 else block_status())
