"""A group's runner with agents that do what a test says: what is mended, and in which order."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from replica.heartbeat import clock
from replica.heartbeat.agents.base import AgentError, Start
from replica.heartbeat.group import GroupRunner, Resource
from replica.heartbeat.node_state import Ready, Status
from replica.heartbeat.settings import GroupSettings, ResourceSettings
from tests.processes import PATIENCE_S


class Service:
    """Runs or not, and what it stands on has to run. If it `mends` itself, then when it is looked at, and that takes
    until `mended` is set.
    """

    def __init__(self, below: "Service | None" = None, mends: bool = False) -> None:
        self.below = below
        self.mends = mends
        self.mending, self.mended, self.failed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.runs = False
        self.starts = 0

    def _demand(self) -> None:
        if self.below is not None and not self.below.runs:
            self.failed.set()
            raise AgentError("has nothing to stand on")

    async def start(self, start: Start) -> None:
        self._demand()
        self.runs = True
        self.starts += 1

    async def stop(self) -> None:
        self.runs = False

    async def monitor(self) -> None:
        if not self.runs and self.mends:
            self.mending.set()
            await self.mended.wait()
            self.runs = True
        self._demand()
        if not self.runs:
            raise AgentError("has ended")

    async def active(self) -> bool:
        return self.runs

    def ready(self) -> Ready:
        return Ready()

    def hold(self, until_s: float) -> None: ...

    def let_go(self) -> None: ...

    async def close(self) -> None: ...


def _group(*services: Service) -> tuple[GroupRunner, Callable[[Callable[[], bool]], Coroutine[Any, Any, None]]]:
    """The runner, and what waits until something is so."""
    changed = asyncio.Event()
    resources = [
        Resource(ResourceSettings("exec", f"service {number}", {}, "test:1", monitor_interval_s=0.01), service)
        for number, service in enumerate(services)
    ]
    settings = GroupSettings("web", "node1", tuple(one.settings for one in resources))
    group = GroupRunner(settings, resources, clock.now, changed.set)

    async def until(reached: Callable[[], bool]) -> None:
        while not reached():
            changed.clear()
            await changed.wait()

    return group, until


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, PATIENCE_S))


def test_what_a_failed_resource_stands_on_is_mended_first() -> None:
    """A volume whose server has ended, and a file system on it: its own monitor starts the server again, and may be in
    the middle of that when the file system fails.
    """

    async def work() -> None:
        volume = Service(mends=True)
        folder = Service(below=volume)
        group, until = _group(volume, folder)
        group.begin(held=False)
        await until(lambda: group.status is Status.STOPPED)
        group.start(peer_is_dead=False)
        await until(lambda: group.status is Status.STARTED)
        volume.runs = False
        await volume.mending.wait()
        await folder.failed.wait()
        for _ in range(100):  # whatever is done about it at once is done
            await asyncio.sleep(0)
        volume.mended.set()
        await until(lambda: folder.starts > 1 and group.status is Status.STARTED)
        assert volume.runs and folder.runs and volume.starts == 1
        assert len(group._failures) == 1
        await group.close()

    run(work())
