"""Units of systemd, by `systemctl`: it waits for the jobs, and is there wherever systemd is."""

import contextlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from replica.config_values import CLUSTER_MANAGER
from replica.heartbeat.agents.base import AgentError, Kind, Option, Surroundings
from replica.heartbeat.agents.service import Seen, Service, State
from replica.heartbeat.agents.threads import in_thread
from replica.heartbeat.settings import ResourceSettings

log = logging.getLogger("replica.heartbeat.agents")

#: sd_booted(3): whether systemd is the init system.
BOOTED: Final = Path("/run/systemd/system")

_UNIT = re.compile(r"[A-Za-z0-9:_.\\@-]+", re.ASCII)
_SUFFIXES: Final = ("service", "socket", "mount", "automount", "swap", "target", "path", "timer", "slice", "scope")
_PROPERTIES: Final = ("LoadState", "ActiveState", "SubState", "Result", "UnitFileState", "DropInPaths")
#: org.freedesktop.systemd1(5): what runs, and what is stopped. The others are on their way, or (maintenance) stuck.
_RUNNING: Final = ("active", "reloading", "refreshing")
_STOPPED: Final = ("inactive", "failed")
#: When the machine is shut down, systemd stops everything at once, but for what is ordered. A unit that is started here
#: is to be left to its group, which stops it in the group's order: so it comes after the end of the cluster manager.
#: Written where the next boot finds nothing of it.
_ORDER_FILE: Final = "50-replica-heartbeat.conf"
_ORDER: Final = f"[Unit]\nBefore={CLUSTER_MANAGER}.service\n"
#: UnitFileState of a unit that systemd starts by itself.
_AT_BOOT: Final = ("enabled", "enabled-runtime")


class SystemdAgent(Service):
    """One unit. It must not be enabled: then systemd would start it, too, and on both nodes."""

    def __init__(self, settings: ResourceSettings, surroundings: Surroundings) -> None:
        self._unit: str = settings.options["systemd"]
        self._warned = False
        super().__init__(settings, surroundings)

    async def check_start(self) -> None:
        problem = unusable(self._unit, await self._show())
        if problem:
            raise AgentError(f"cannot be started: {problem}")

    async def run_start(self) -> None:
        result = await self.execute("start", ("systemctl", "start", self._unit))
        if result.status != 0:
            raise AgentError(f"cannot be started: systemctl {result.said}")
        await self._have_order(True)

    async def run_stop(self) -> None:
        if (await self._show())["LoadState"] == "not-found":
            return
        # In the middle of a shutdown it would wait for the end of this program otherwise, as would whoever stops it.
        await self._have_order(False)
        result = await self.execute("stop", ("systemctl", "stop", self._unit))
        if result.status != 0:
            raise AgentError(f"cannot be stopped: systemctl {result.said}")

    async def look(self, *, probe: bool) -> Seen:
        properties = await self._show()
        if properties["UnitFileState"] in _AT_BOOT and not self._warned:
            self._warned = True
            log.warning(
                "%s: systemd starts it at boot, too, on whichever node that is: run `systemctl disable %s` on both.",
                self.settings.name,
                self._unit,
            )
        return judge(properties)

    def missing(self) -> str:
        return self.absent()

    def absent(self) -> str:
        return "" if BOOTED.is_dir() else "this node was not booted with systemd"

    async def _have_order(self, wanted: bool) -> None:
        """What fails here matters in a shutdown only. (Looked at is what systemd knows, not what was changed here: this
        may have been cut short before.)
        """
        path = BOOTED / f"{self._unit}.d" / _ORDER_FILE
        try:
            await in_thread(_write_order if wanted else _remove_order, path)
        except OSError as error:
            log.warning("%s: its order in a shutdown cannot be changed (%s).", self.settings.name, error)
            return
        if (str(path) in (await self._show())["DropInPaths"].split()) != wanted:
            result = await self.execute("order", ("systemctl", "daemon-reload"), quiet=True)
            if result.status != 0:
                log.warning("%s: systemctl daemon-reload %s.", self.settings.name, result.said)

    async def _show(self) -> dict[str, str]:
        options = [f"--property={name}" for name in _PROPERTIES]
        result = await self.execute("show", ("systemctl", "show", *options, "--", self._unit), quiet=True)
        properties = dict(line.split("=", 1) for line in result.lines if "=" in line)
        if result.status != 0 or not properties.keys() >= {"LoadState", "ActiveState"}:
            raise AgentError(f"has an unknown status: systemctl {result.said or 'does not know it'}")
        return {name: properties.get(name, "") for name in _PROPERTIES}


def _write_order(path: Path) -> None:
    """Blocks; OSError."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(_ORDER)


def _remove_order(path: Path) -> None:
    """Blocks; OSError."""
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.parent.rmdir()  # unless somebody else has a file there


def unusable(unit: str, properties: Mapping[str, str]) -> str:
    """Why systemd cannot start a unit, as a sentence; "" when it can. Pure."""
    match properties["LoadState"]:
        case "loaded":
            return ""
        case "not-found":
            return f"this node has no unit {unit}"
        case "masked":
            return f"the unit {unit} is masked (see `systemctl unmask`)"
    return f"systemd cannot load the unit {unit} (see `systemctl status {unit}`)"


def judge(properties: Mapping[str, str]) -> Seen:
    """What the properties of a unit mean. Pure."""
    active = properties["ActiveState"]
    described = f"{active} ({properties['SubState']})" if properties["SubState"] not in ("", active) else active
    result = properties["Result"]
    reason = f", because of: {result}" if result not in ("", "success") else ""
    if active in _RUNNING:
        return Seen(State.RUNNING)
    if active in _STOPPED:
        return Seen(State.STOPPED, f"is {described}{reason}")
    return Seen(State.BROKEN, f"is {described}{reason}")


def _unit(value: object) -> str:
    if not isinstance(value, str) or not _UNIT.fullmatch(value) or value.startswith("-"):
        raise ValueError(f'must be the name of a unit, as in "apache2.service", not {value!r}')
    return value if value.rpartition(".")[2] in _SUFFIXES else f"{value}.service"


def _title(options: Mapping[str, Any]) -> str:
    return f"systemd {options['systemd']}"


KINDS: Final = (Kind("systemd", {"systemd": Option(_unit)}, _title, SystemdAgent),)
