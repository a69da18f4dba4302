"""Both nodes in this process, on one event loop: what a write costs without clients, sockets of theirs, and schedulers.

The link between the nodes is a TCP connection as ever, and the disks are files.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvloop

from bench.load import offsets
from bench.servers import DEFAULTS, SIZE_BYTES
from replica import config as cfg
from replica.resource import Resource
from replica.runtime import HostRuntime
from tests.cluster.cluster import Cluster, in_sync

_PATIENCE_S = 30.0
_FILL_BYTES = 1 << 20


class InProcess:
    """node1, which is Primary, and node2."""

    def __init__(self, loop: asyncio.AbstractEventLoop, resources: list[Resource]) -> None:
        self._loop = loop
        self._primary, self._secondary = resources

    def write(self, places: list[int], data: bytes, batch: int = 1) -> None:
        """Write to each of these places, `batch` requests at a time; returns when all are answered."""
        self._loop.run_until_complete(self._write(places, memoryview(data), batch))

    async def _write(self, places: list[int], data: memoryview, batch: int) -> None:
        write_batch = self._primary.export.write_batch
        for start in range(0, len(places), batch):
            answered = self._loop.create_future()
            write_batch([(offset, data) for offset in places[start : start + batch]], answered.set_result)
            errors = await answered
            if errors:
                raise OSError(f"writes failed: {errors}")

    async def start(self, *, alone: bool) -> None:
        """To a pair in sync; ``alone``: and then node2 goes away."""
        for each in (self._primary, self._secondary):
            await each.start()
        await _until(self._primary, lambda status: status["peer"]["disk"] == "Inconsistent")
        await self._primary.verbs.promote(force=True)
        await _until(self._primary, in_sync)
        if alone:
            await self._secondary.stop()
            await _until(self._primary, lambda status: status["connection"] != "Connected")

    async def stop(self, *, alone: bool) -> None:
        """End both."""
        for each in (self._primary,) if alone else (self._primary, self._secondary):
            await each.stop()


async def _until(resource: Resource, reached: Callable[[dict[str, Any]], bool]) -> None:
    async with asyncio.timeout(_PATIENCE_S), resource.watch() as changed:
        while not reached(resource.status()):
            changed.clear()
            await changed.wait()


@contextlib.contextmanager
def pair(folder: Path, protocol: str, *, alone: bool) -> Iterator[InProcess]:
    """Both nodes, with the whole span written once."""
    cluster = Cluster(folder, size_bytes=SIZE_BYTES, **{**DEFAULTS, "protocol": f'"{protocol}"'}).create()
    loop = uvloop.new_event_loop()
    configs = [cfg.load_config(str(node.config), node.name) for node in cluster.nodes]
    resources = [Resource(config, config.resource(cluster.resource), HostRuntime()) for config in configs]
    both = InProcess(loop, resources)
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(both.start(alone=alone))
        both.write(sorted(set(offsets(_FILL_BYTES))), random.Random(3).randbytes(_FILL_BYTES))
        yield both
        loop.run_until_complete(both.stop(alone=alone))
    finally:
        asyncio.set_event_loop(None)
        loop.close()
