"""Services that scripts start and stop: init scripts (LSB), and Heartbeat's own resource scripts (resource.d).

The exit statuses of an init script are those of the Linux Standard Base Core 5.0, 22.2 "Init Script Actions". A
resource script is called, and its words are judged, as Heartbeat's ResourceManager does it.
"""

import abc
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from replica.heartbeat.agents.base import AgentError, Kind, Option, Surroundings
from replica.heartbeat.agents.leftovers import Daemon, end_leftovers, find_daemon
from replica.heartbeat.agents.service import Result, Seen, Service, State
from replica.heartbeat.agents.threads import in_thread
from replica.heartbeat.settings import ResourceSettings

log = logging.getLogger("replica.heartbeat.agents")

INIT_DIRS: Final = (Path("/etc/init.d"), Path("/etc/rc.d/init.d"))
RESOURCE_DIRS: Final = (Path("/etc/ha.d/resource.d"), Path("/etc/heartbeat/resource.d"))

_DEAD = {1: "is dead, and its PID file is left", 2: "is dead, and its lock file is left", 3: "is not running"}
_NAME = re.compile(r"[A-Za-z0-9_.@+-]+", re.ASCII)
_USAGE = re.compile(r"\W*usage\b", re.IGNORECASE)
# ResourceManager, we_own_resource(): "not running" before "running" and "OK"
_SAYS_STOPPED = re.compile(r"[Nn][Oo][Tt] .*[Rr]unning|[Ss]topped", re.DOTALL)
_SAYS_RUNNING = re.compile(r"[Rr]unning|OK")


class _Script(Service):
    """A script with ``start``, ``stop`` and ``status`` as its last argument."""

    def __init__(
        self,
        settings: ResourceSettings,
        surroundings: Surroundings,
        script: str,
        arguments: Sequence[str],
        directories: Iterable[Path],
    ) -> None:
        self._script = script
        self._arguments = tuple(arguments)
        self._directories = tuple(directories)
        #: Its first process when it was last seen to run.
        self._daemon: Daemon | None = None
        super().__init__(settings, surroundings)

    async def run_start(self) -> None:
        result = await self._run("start")
        if result.status != 0:
            raise AgentError(f"cannot be started: {self._path()} start {result.said}")

    async def run_stop(self) -> None:
        result = await self._run("stop")
        await self._end_leftovers()
        if result.status == 0:
            return
        # Many scripts fail when there is nothing to stop, which the LSB forbids.
        if (await self.look(probe=True)).state is not State.STOPPED:
            raise AgentError(f"cannot be stopped: {self._path()} stop {result.said}")
        log.warning("%s: its stop %s, but it does not run any more.", self.settings.name, result.problem)

    async def look(self, *, probe: bool) -> Seen:
        seen = self.judge(await self._run("status", quiet=True))
        if seen.state is State.RUNNING:
            self._daemon = await in_thread(find_daemon, Path(self._script).name)
        return seen

    async def _end_leftovers(self) -> None:
        """A script that has lost its daemon's first process does not stop the others."""
        if self._daemon is None:
            return
        count = await in_thread(end_leftovers, self._daemon)
        if count:
            log.warning("%s: %d processes were left of it, and have been ended.", self.settings.name, count)

    @abc.abstractmethod
    def judge(self, result: Result) -> Seen:
        """What its ``status`` means. Pure."""

    def missing(self) -> str:
        # An absolute path may lie on a file system that the group itself mounts.
        return "" if self._script.startswith("/") else self.absent()

    def absent(self) -> str:
        if os.access(self._path(), os.X_OK):
            return ""
        if self._script.startswith("/"):
            return f"there is no script {self._script}"
        return f"there is no script {self._script} in {' or '.join(map(str, self._directories))}"

    def _path(self) -> str:
        if self._script.startswith("/"):
            return self._script
        candidates = [str(directory / self._script) for directory in self._directories]
        return next((path for path in candidates if os.path.isfile(path) and os.access(path, os.X_OK)), candidates[0])

    async def _run(self, action: str, *, quiet: bool = False) -> Result:
        return await self.execute(action, (self._path(), *self._arguments, action), quiet=quiet)


class LsbAgent(_Script):
    """An init script."""

    def __init__(self, settings: ResourceSettings, surroundings: Surroundings) -> None:
        super().__init__(settings, surroundings, settings.options["lsb"], (), INIT_DIRS)

    def judge(self, result: Result) -> Seen:
        return judge_lsb(result)


class ResourceScriptAgent(_Script):
    """A script of Heartbeat's resource.d, or an init script that is used like one."""

    def __init__(self, settings: ResourceSettings, surroundings: Surroundings) -> None:
        ha_dir = surroundings.settings.ha_dir
        first = () if ha_dir is None else (ha_dir / "resource.d",)
        options = settings.options
        directories = dict.fromkeys((*first, *RESOURCE_DIRS, *INIT_DIRS))
        super().__init__(settings, surroundings, options["resource.d"], options["args"], directories)

    def judge(self, result: Result) -> Seen:
        return judge_resource_script(result)


def judge_lsb(result: Result) -> Seen:
    """What the end of ``script status`` means. Pure."""
    if _USAGE.match(result.last_line):
        # Debian's old skeleton ends with 3, "not running", when it does not know an action.
        problem = "its script has no action `status`: use an exec resource with a monitor of its own"
        return Seen(State.UNKNOWN, problem)
    if result.status == 0:
        return Seen(State.RUNNING)
    if result.status in _DEAD:
        return Seen(State.STOPPED, _DEAD[result.status])
    return Seen(State.UNKNOWN, f"has an unknown status: its status {result.said}")


def judge_resource_script(result: Result) -> Seen:
    """What ``script args status`` means: by its words, and by its exit status where these say nothing. Pure."""
    text = "\n".join(result.lines)
    if _SAYS_STOPPED.search(text):
        return Seen(State.STOPPED, "is not running")
    if result.status is not None and _SAYS_RUNNING.search(text):
        return Seen(State.RUNNING)
    return judge_lsb(result)


def _script(value: object) -> str:
    if not isinstance(value, str) or not (_NAME.fullmatch(value) or (value.startswith("/") and "\0" not in value)):
        raise ValueError(f"must be the name of a script or its absolute path, not {value!r}")
    return value


def _arguments(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) and "\0" not in one for one in value):
        raise ValueError(f"must be a list of strings, not {value!r}")
    return tuple(value)


def _resource_title(options: Mapping[str, Any]) -> str:
    return "resource.d " + "::".join((options["resource.d"], *options["args"]))


KINDS: Final = (
    Kind("lsb", {"lsb": Option(_script)}, lambda options: f"lsb {options['lsb']}", LsbAgent),
    Kind(
        "resource.d",
        {"resource.d": Option(_script), "args": Option(_arguments, ())},
        _resource_title,
        ResourceScriptAgent,
    ),
)
