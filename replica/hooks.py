"""Hooks: the operator's own programs, told of events (DRBD's handlers); one of them is also asked.

A hook runs in the background and holds nothing up: the hooks of one resource run one after the other, in the order of
their events, with the facts as they were at that moment. `before-resync-target` is asked instead, by the node whose
copy is about to be overwritten: it runs at once, beside whatever runs in the background, and the node waits for it.
"""

import asyncio
import collections
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from replica.tasks import spawn

if TYPE_CHECKING:
    from replica.resource import Resource
    from replica.runtime import Runtime

log = logging.getLogger("replica.hooks")

DEFAULT_TIMEOUT_S: Final = 10.0
MIN_TIMEOUT_S: Final = 0.1
#: The handshake that waits for a hook has 60 s in all (`replica.session.HANDSHAKE_TIMEOUT_S`), on both nodes.
MAX_TIMEOUT_S: Final = 45.0
#: Events that wait while a hook runs; more are dropped.
MAX_WAITING: Final = 64

Command = tuple[str, ...]
Environment = dict[str, str]


class Event(StrEnum):
    """What a hook can be told of: the keys of ``[hooks]``."""

    SPLIT_BRAIN = "split-brain"
    BEFORE_RESYNC_TARGET = "before-resync-target"
    AFTER_RESYNC_TARGET = "after-resync-target"
    BEFORE_RESYNC_SOURCE = "before-resync-source"
    AFTER_RESYNC_SOURCE = "after-resync-source"
    DISK_FAILED = "disk-failed"
    PEER_LOST = "peer-lost"
    PEER_CONNECTED = "peer-connected"
    PROMOTED = "promoted"
    DEMOTED = "demoted"
    OUT_OF_SYNC = "out-of-sync"


@dataclass(frozen=True, slots=True)
class HookSettings:
    """``[hooks]`` with ``[resource.X.hooks]`` applied."""

    timeout_s: float = DEFAULT_TIMEOUT_S
    commands: Mapping[Event, Command] = field(default_factory=dict)


def environment(event: Event, reason: str, status: Mapping[str, Any], *, cluster: str, config_path: str) -> Environment:
    """The variables that a hook gets, from the status document of its resource. Pure."""
    peer, volume = status["peer"], status["volumes"][0]
    return {
        "REPLICA_EVENT": str(event),
        "REPLICA_CLUSTER": cluster,
        "REPLICA_RESOURCE": status["name"],
        "REPLICA_NODE": status["node"],
        "REPLICA_PEER": peer["name"],
        "REPLICA_PEER_ADDRESS": peer["address"],
        "REPLICA_ROLE": status["role"],
        "REPLICA_PEER_ROLE": peer["role"],
        "REPLICA_CONNECTION": status["connection"],
        "REPLICA_REPLICATION": status["replication"],
        "REPLICA_DISK": volume["disk"],
        "REPLICA_PEER_DISK": volume["peer_disk"],
        "REPLICA_BACKING": volume["backing"],
        "REPLICA_SIZE_BYTES": str(volume["size_bytes"]),
        "REPLICA_REASON": one_line(reason),
        "REPLICA_CONFIG": config_path,
    }


def one_line(text: str) -> str:
    """`text` without what would end a line, a variable or a terminal's good mood. (A reason can be the peer's words,
    and a hook can print anything.)
    """
    return "".join(letter if letter.isprintable() else " " for letter in text)


class Hooks:
    """The hooks of one resource on this node."""

    def __init__(self, resource: "Resource", settings: HookSettings, runtime: "Runtime") -> None:
        self._resource = resource
        self._settings = settings
        self._runtime = runtime
        self._waiting: collections.deque[tuple[Event, Environment]] = collections.deque()
        self._worker: asyncio.Task[None] | None = None
        self._dropping = False

    def fire(self, event: Event, reason: str) -> None:
        """Run the event's hook, if there is one, in the background after those of earlier events."""
        if event not in self._settings.commands:
            return
        if len(self._waiting) >= MAX_WAITING:
            if not self._dropping:
                self._dropping = True
                log.warning(
                    "%s: %d hooks wait already: %s and what comes until they are through is dropped.",
                    self._resource.name,
                    MAX_WAITING,
                    event,
                )
            return
        self._waiting.append((event, self._environment(event, reason)))
        if self._worker is None:
            self._worker = spawn(self._work(), "hooks")

    async def ask(self, event: Event, reason: str) -> str:
        """Run the event's hook, if there is one, now: what was wrong ("returned 1"), or "" when it agrees. When the
        caller is cancelled, so is the hook.
        """
        if event not in self._settings.commands:
            return ""
        return await self._run(event, self._environment(event, reason))

    async def stop(self) -> None:
        """Return when no hook runs any more: what runs or waits has the time of one hook, in all."""
        worker = self._worker
        if worker is None:
            return
        _, running = await asyncio.wait([worker], timeout=self._settings.timeout_s)
        if running:
            log.warning(
                "%s: a hook is ended because replicad stops, and %d that wait are dropped.",
                self._resource.name,
                len(self._waiting),
            )
            self._waiting.clear()
            worker.cancel()
            await asyncio.wait([worker])

    async def _work(self) -> None:
        try:
            while self._waiting:
                await self._run(*self._waiting.popleft())
            self._dropping = False
        finally:
            self._worker = None

    async def _run(self, event: Event, variables: Environment) -> str:
        name, command = self._resource.name, self._settings.commands[event]
        log.info("%s: hook %s: runs %s", name, event, command[0])

        def on_line(line: str) -> None:
            log.info("%s: hook %s: %s", name, event, one_line(line))

        problem = await self._runtime.run_hook(command, variables, self._settings.timeout_s, on_line)
        if problem:
            log.warning("%s: the hook %s %s.", name, event, problem)
        return problem

    def _environment(self, event: Event, reason: str) -> Environment:
        config = self._resource.config
        return environment(
            event, reason, self._resource.status(), cluster=config.cluster.name, config_path=str(config.path)
        )
