"""Commands of the administrator's own: start, stop, and (or else nothing is watched) monitor."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from replica import config_values as values
from replica.heartbeat.agents.base import AgentError, Kind, Option, Surroundings
from replica.heartbeat.agents.service import Seen, Service, State
from replica.heartbeat.agents.threads import in_thread
from replica.heartbeat.settings import ResourceSettings

_STARTING: Final = "starting"
_STARTED: Final = "started"


class ExecuteAgent(Service):
    """A monitor that ends with 0 says that the service runs.

    Whether it was started here since the last boot is kept in a file of the run directory: without a monitor nothing
    else is known, and with one a service that fails it may still have to be stopped.
    """

    def __init__(self, settings: ResourceSettings, surroundings: Surroundings) -> None:
        options = settings.options
        self._start: tuple[str, ...] = options["start"]
        self._stop: tuple[str, ...] = options["stop"]
        self._monitor: tuple[str, ...] | None = options["monitor"]
        identity = repr((options["exec"], self._start, self._stop, self._monitor))
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._note_path: Path = surroundings.settings.run_dir / "exec" / digest
        super().__init__(settings, surroundings)

    async def run_start(self) -> None:
        await in_thread(self._note, _STARTING)
        result = await self.execute("start", self._start)
        if result.status != 0:
            raise AgentError(f"cannot be started: its start {result.said}")
        await in_thread(self._note, _STARTED)

    async def run_stop(self) -> None:
        result = await self.execute("stop", self._stop)
        if result.status != 0:
            raise AgentError(f"cannot be stopped: its stop {result.said}")
        await in_thread(self._note_path.unlink, missing_ok=True)

    async def look(self, *, probe: bool) -> Seen:
        if self._monitor is not None:
            result = await self.execute("monitor", self._monitor, quiet=True)
            if result.status == 0:
                return Seen(State.RUNNING)
            problem = f"does not run as it should: its monitor {result.said}"
            if result.status is None:
                return Seen(State.UNKNOWN, problem)
        else:
            problem = "was not started here, or not to the end"
        noted = await in_thread(self._noted)
        if not noted:
            return Seen(State.STOPPED, problem)
        known_by_note_alone = self._monitor is None and noted == _STARTED
        return Seen(State.RUNNING) if known_by_note_alone else Seen(State.BROKEN, problem)

    def missing(self) -> str:
        return ""  # they may lie on a file system that the group itself mounts

    def absent(self) -> str:
        needed = (self._start, self._stop, *((self._monitor,) if self._monitor is not None else ()))
        lacking = [program for program, *_ in needed if not os.access(program, os.X_OK)]
        return f"there is no program {lacking[0]}" if lacking and not self._noted() else ""

    def _note(self, what: str) -> None:
        self._note_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._note_path.write_text(what)

    def _noted(self) -> str:
        try:
            return self._note_path.read_text() or _STARTING
        except FileNotFoundError:
            return ""


def _title(options: Mapping[str, Any]) -> str:
    unwatched = " (not watched: it has no monitor)" if options["monitor"] is None else ""
    return f"exec {options['exec']}{unwatched}"


KINDS: Final = (
    Kind(
        "exec",
        {
            "exec": Option(values.name),
            "start": Option(values.command),
            "stop": Option(values.command),
            "monitor": Option(values.command, None),
        },
        _title,
        ExecuteAgent,
    ),
)
