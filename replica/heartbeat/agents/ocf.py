"""Services by the system's OCF resource agents (Debian: resource-agents), as Pacemaker calls them.

Open Cluster Framework Resource Agent API 1.1: parameters are variables ``OCF_RESKEY_…``, and the exit statuses are
those of its section "Return Codes".
"""

import logging
import os
import re
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, Final

from replica.heartbeat.agents.base import AgentError, Kind, Option, Surroundings
from replica.heartbeat.agents.service import Result, Seen, Service, State
from replica.heartbeat.settings import ResourceSettings

log = logging.getLogger("replica.heartbeat.agents")

OCF_ROOT: Final = "/usr/lib/ocf"

_WORD = re.compile(r"[A-Za-z0-9_.-]+", re.ASCII)
_REASON: Final = "ocf-exit-reason:"


class Exit(IntEnum):
    """The exit statuses of an agent."""

    SUCCESS = 0
    ERR_GENERIC = 1
    ERR_ARGS = 2
    ERR_UNIMPLEMENTED = 3
    ERR_PERM = 4
    ERR_INSTALLED = 5
    ERR_CONFIGURED = 6
    NOT_RUNNING = 7
    RUNNING_PROMOTED = 8
    FAILED_PROMOTED = 9


_MEANINGS: Final = {
    Exit.ERR_ARGS: "the parameters do not suit this node",
    Exit.ERR_UNIMPLEMENTED: "the agent does not know this action",
    Exit.ERR_PERM: "the agent lacks a permission",
    Exit.ERR_INSTALLED: "a program or a file that it takes is not installed here",
    Exit.ERR_CONFIGURED: "the parameters are wrong",
    Exit.NOT_RUNNING: "it is not running",
    Exit.FAILED_PROMOTED: "it runs promoted, and has failed",
}
#: Those of ``validate-all`` after which a start is not even tried.
_REFUSALS: Final = (Exit.ERR_ARGS, Exit.ERR_PERM, Exit.ERR_INSTALLED, Exit.ERR_CONFIGURED)


class OcfAgent(Service):
    """A resource agent in ``/usr/lib/ocf/resource.d/PROVIDER/TYPE``."""

    def __init__(self, settings: ResourceSettings, surroundings: Surroundings) -> None:
        self._provider, self._type = settings.options["ocf"]
        self._path = f"{OCF_ROOT}/resource.d/{self._provider}/{self._type}"
        super().__init__(settings, surroundings)

    async def check_start(self) -> None:
        checked = await self._run("validate-all", self.settings.start_timeout_s)
        if checked.status in _REFUSALS:
            raise AgentError(f"cannot be started: validate-all {_said(checked)}")

    async def run_start(self) -> None:
        result = await self._run("start", self.settings.start_timeout_s)
        if result.status != Exit.SUCCESS:
            raise AgentError(f"cannot be started: its start {_said(result)}")

    async def run_stop(self) -> None:
        # An agent's stop of what is stopped succeeds. One that fails leaves it open what still runs, whatever its
        # monitor says.
        result = await self._run("stop", self.settings.stop_timeout_s)
        if result.status == Exit.SUCCESS:
            return
        never_ran = result.status in _REFUSALS and not self.ran and (await self.look(probe=True)).state is State.STOPPED
        if not never_ran:
            raise AgentError(f"cannot be stopped: its stop {_said(result)}")
        log.warning("%s: its stop %s, but it does not run.", self.settings.name, _said(result))

    async def look(self, *, probe: bool) -> Seen:
        # An interval of 0 is what tells a probe from a monitor (ocf_is_probe): there, what is missing is no failure.
        interval_s = 0.0 if probe else self.settings.monitor_interval_s
        result = await self._run("monitor", self.settings.monitor_timeout_s, interval_s, quiet=True)
        return judge(result)

    def missing(self) -> str:
        return self.absent()

    def absent(self) -> str:
        if os.access(self._path, os.X_OK):
            return ""
        return f"there is no agent {self._path} (Debian's are in the package resource-agents)"

    async def _run(self, action: str, timeout_s: float, interval_s: float = 0.0, *, quiet: bool = False) -> Result:
        variables = environment(self.settings, timeout_s=timeout_s, interval_s=interval_s)
        return await self.execute(action, (self._path, action), variables, quiet=quiet)


def environment(settings: ResourceSettings, *, timeout_s: float, interval_s: float) -> dict[str, str]:
    """The variables that an agent gets for one action. Pure."""
    provider, kind = settings.options["ocf"]
    parameters: Mapping[str, str] = settings.options["params"]
    return {
        "OCF_ROOT": OCF_ROOT,
        "OCF_RA_VERSION_MAJOR": "1",
        "OCF_RA_VERSION_MINOR": "1",
        "OCF_RESOURCE_INSTANCE": re.sub(r"[^A-Za-z0-9_.-]", "_", settings.name.removeprefix("ocf ")),
        "OCF_RESOURCE_PROVIDER": provider,
        "OCF_RESOURCE_TYPE": kind,
        "OCF_RESKEY_CRM_meta_timeout": str(round(timeout_s * 1000)),
        "OCF_RESKEY_CRM_meta_interval": str(round(interval_s * 1000)),
        **{f"OCF_RESKEY_{name}": value for name, value in parameters.items() if name != "OCF_CHECK_LEVEL"},
        **{name: value for name, value in parameters.items() if name == "OCF_CHECK_LEVEL"},
    }


def judge(result: Result) -> Seen:
    """What the end of a ``monitor`` means. Pure."""
    match result.status:
        case Exit.SUCCESS | Exit.RUNNING_PROMOTED:
            return Seen(State.RUNNING)
        case Exit.NOT_RUNNING:
            return Seen(State.STOPPED, "is not running")
        case Exit.ERR_INSTALLED:
            return Seen(State.STOPPED, f"cannot run: its monitor {_said(result)}")
        case Exit.ERR_GENERIC | Exit.FAILED_PROMOTED:
            return Seen(State.BROKEN, f"does not run as it should: its monitor {_said(result)}")
    return Seen(State.UNKNOWN, f"has an unknown status: its monitor {_said(result)}")


def _said(result: Result) -> str:
    """ "returned 6 (the parameters are wrong): no such file"."""
    meaning = _MEANINGS.get(Exit(result.status)) if result.status in set(Exit) else None
    reasons = [line.removeprefix(_REASON) for line in result.lines if line.startswith(_REASON)]
    reason = reasons[-1] if reasons else result.last_line
    return f"{result.problem}{f' ({meaning})' if meaning else ''}{f': {reason}' if reason else ''}"


def _agent(value: object) -> tuple[str, str]:
    parts = value.removeprefix("ocf:").split(":") if isinstance(value, str) else []
    if len(parts) != 2 or not all(_WORD.fullmatch(part) and part.strip(".") for part in parts):
        raise ValueError(f'must be the provider and the type of an agent, as in "heartbeat:apache", not {value!r}')
    return parts[0], parts[1]


def _parameters(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f'must be a table such as {{ configfile = "/etc/apache2/apache2.conf" }}, not {value!r}')
    parameters = {}
    for name, given in value.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII):
            raise ValueError(f"has a name that is no parameter's: {name!r}")
        if not isinstance(given, str | int | float) or (isinstance(given, str) and "\0" in given):
            raise ValueError(f"{name} must be a string, a number, true or false, not {given!r}")
        parameters[name] = str(given).lower() if isinstance(given, bool) else str(given)
    return parameters


def _title(options: Mapping[str, Any]) -> str:
    return f"ocf {':'.join(options['ocf'])}"


KINDS: Final = (Kind("ocf", {"ocf": Option(_agent), "params": Option(_parameters, {})}, _title, OcfAgent),)
