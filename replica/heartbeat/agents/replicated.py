"""Kind "replica": the group's data, a replicated resource that is Primary where the group is."""

import asyncio
import contextlib
import logging
from typing import Any, Final

from replica.config_values import name as parse_name
from replica.control import NotRunning
from replica.errors import ReplicaError
from replica.heartbeat import clock
from replica.heartbeat.agents.base import AgentError, Kind, Option, Start, Surroundings
from replica.heartbeat.agents.replicad import ANSWER_TIMEOUT_S, Replicad, Status
from replica.heartbeat.node_state import Readiness, Ready
from replica.heartbeat.settings import ResourceSettings
from replica.states import SYNC_TARGETS, Connection, Disk, Replication, Role

log = logging.getLogger("replica.heartbeat")

#: How long a replicad that has just started may take to find its peer, which is not known to be dead, before this node
#: is promoted without it: the copies differ for a while then, and no more than that.
CONNECT_WAIT_S: Final = 0.5

#: A replicad that ends more often than that is a failure of the group.
MEND_INTERVAL_S: Final = 60.0
#: After that a link whose peer is dead is known to be (the default of its key `timeout-s` is 6).
LINK_VERDICT_S: Final = 10.0

ENDED: Final = "is not served: its replicad has ended"
_IN_TOUCH: Final = (Replication.ESTABLISHED, Replication.SYNC_SOURCE, Replication.PAUSED_SYNC_S)


def readiness(status: Status) -> Ready:
    """Whether a node whose replicad says this could be Primary, and would then have the newest data. Pure."""
    name, peer, node, volume = status["name"], status["peer"]["name"], status["node"], status["volumes"][0]
    disk, connection, replication = volume["disk"], status["connection"], status["replication"]
    if status["role"] == Role.PRIMARY:
        problem = trouble(status)
        return Ready(Readiness.NO, f"{name} {problem}") if problem else Ready()
    if replication in SYNC_TARGETS:
        return Ready(Readiness.NO, f"its copy of {name} is being resynced from {peer}")
    if disk not in (Disk.UP_TO_DATE, Disk.CONSISTENT):
        return Ready(Readiness.NO, f"its copy of {name} is {disk}")
    if replication in _IN_TOUCH:
        return Ready()
    if connection == Connection.STAND_ALONE and status["last_error"]:
        return Ready(Readiness.NO, f"{name} is StandAlone: {status['last_error']}")
    if replication == Replication.NEGOTIATING:
        return Ready(Readiness.NO, f"{name} is negotiating with {peer}")
    if volume["peer_outdated"] or (disk == Disk.UP_TO_DATE and connection == Connection.CONNECTED):
        return Ready()
    return Ready(Readiness.IF_ALONE, f"the copy of {name} on {node} is not in touch with that of {peer}")


def trouble(status: Status) -> str:
    """Why a resource that should be Primary here does not serve its clients, as the end of a sentence; "": it does."""
    if status["role"] != Role.PRIMARY:
        return f"is {status['role']} on {status['node']}"
    volume = status["volumes"][0]
    if volume["disk"] in (Disk.FAILED, Disk.DISKLESS) and not volume["through_peer"]:
        return (
            f"has no usable disk on {status['node']} ({volume['disk']}), and {status['peer']['name']} does not stand in"
        )
    return ""


def _link(status: Status) -> tuple[str, str]:
    return status["connection"], status["replication"]


class ReplicatedAgent:
    """One replicated resource: promoted and demoted."""

    def __init__(self, settings: ResourceSettings, surroundings: Surroundings) -> None:
        self._name: str = settings.options["replica"]
        self._news = surroundings.changed
        self._seen: tuple[Any, ...] = ()
        self._serves = False  # between start and stop
        self._until_s = 0.0
        self._mended_s = float("-inf")
        heartbeat = surroundings.settings
        self._replicad = Replicad(self._name, heartbeat.config_path, heartbeat.node, self._changed)

    async def start(self, start: Start) -> None:
        try:
            while not await self._promote(start.peer_is_dead):
                pass
        except ReplicaError as error:
            raise AgentError(f"cannot be promoted: {error}") from None
        self._serves = True

    async def _promote(self, peer_is_dead: bool) -> bool:
        """False: the link came or went in the middle of it, or replicad has ended, and it is to be tried again. (When
        that has to end is for the caller to know.) ReplicaError with replicad's refusal.
        """
        before = _link(await self._replicad.wait_until_it_answers())
        if not peer_is_dead:
            before = _link(await self._settle())
        try:
            await self._replicad.call("promote", {"peer_is_dead": peer_is_dead})
        except NotRunning:
            return False
        except ReplicaError:
            if _link(await self._replicad.wait_until_it_answers()) != before or await self._link_changes(before):
                return False
            raise
        return True

    async def _link_changes(self, before: tuple[str, str]) -> bool:
        """A peer whose word a refusal rests on may be dead, and the link not know it yet; one that lives keeps it."""
        if before[0] == Connection.CONNECTED:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINK_VERDICT_S):
                    await self._replicad.wait_for(lambda status: _link(status) != before)
                    return True
        return False

    async def _settle(self) -> Status:
        """Wait until it is known whether the peer is there, whose consent is asked then."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_WAIT_S):
                await self._replicad.wait_for(lambda status: status["connection"] != Connection.CONNECTING)
        return await self._replicad.wait_for(lambda status: status["replication"] != Replication.NEGOTIATING)

    async def stop(self) -> None:
        self._serves = False
        try:
            await self._replicad.ask_status()
        except NotRunning:
            return  # nothing serves; when it is started again, it is Secondary
        except TimeoutError:
            await self._replicad.kill()
            return
        except ReplicaError as error:
            raise AgentError(f"cannot be demoted: {error}") from None
        try:
            # By force: whoever still is a client has nobody to wait for any more.
            await self._replicad.call("demote", {"force": True})
        except NotRunning:
            return
        except ReplicaError as error:
            raise AgentError(f"cannot be demoted: {error}") from None

    async def monitor(self) -> None:
        """A replicad that has ended, and was started again as Secondary, is promoted again from here: what stands on
        it (a kernel device, a file system) sees a pause. Were the group to stop that first, it would wait for a server.
        For the same reason one that hangs is ended here.
        """
        try:
            problem = trouble(await self._replicad.ask_status())
        except NotRunning:
            problem = ENDED
        except TimeoutError:
            problem = f"is not served: its replicad hung for {ANSWER_TIMEOUT_S:g} s, and was killed"
            await self._replicad.kill()
        except ReplicaError as error:  # it is about to end, say
            problem = f"is not served: {error}"
        if not problem:
            return
        now = clock.now()
        may_mend = self._serves and now < self._until_s and now - self._mended_s > MEND_INTERVAL_S
        if not may_mend:
            raise AgentError(problem)
        self._mended_s = now
        log.warning("%s %s: it is promoted again.", self._name, problem)
        await self.start(Start(peer_is_dead=False))

    async def active(self) -> bool:
        """One that hangs may be Primary: it counts as running, and `stop` ends it."""
        self._replicad.begin()
        try:
            return bool((await self._replicad.ask_status())["role"] == Role.PRIMARY)
        except NotRunning:
            return False
        except TimeoutError:
            return True
        except ReplicaError as error:
            raise AgentError(f"is unknown: {error}") from None

    def ready(self) -> Ready:
        self._replicad.begin()
        status = self._replicad.status
        return Ready(Readiness.NO, self._replicad.problem) if status is None else readiness(status)

    def hold(self, until_s: float) -> None:
        self._until_s = until_s

    def let_go(self) -> None:
        self._until_s = 0.0  # no more mending; its clients take an orderly `stop`

    async def close(self) -> None:
        await self._replicad.close()

    def _changed(self) -> None:
        status = self._replicad.status
        seen = (self.ready(), "does not run" if status is None else trouble(status))
        if seen != self._seen:
            self._seen = seen
            self._news()


KINDS: Final = (
    Kind(
        name="replica",
        options={"replica": Option(parse_name)},
        title=lambda options: f"replica {options['replica']}",
        make=ReplicatedAgent,
    ),
)
