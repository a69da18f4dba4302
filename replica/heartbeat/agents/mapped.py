"""Kind "map": a replicated resource as a device of the kernel (`replicactl map`), where the group is."""

import asyncio
import contextlib
import os
import sys
from pathlib import Path
from typing import Any, Final

from replica import control_client
from replica.config import Config, load_config
from replica.config_values import name as parse_name
from replica.config_values import text
from replica.control import NotRunning
from replica.errors import ReplicaError
from replica.heartbeat.agents.base import AgentError, Kind, Option, Start, Surroundings
from replica.heartbeat.agents.commands import run
from replica.heartbeat.agents.threads import in_thread
from replica.heartbeat.node_state import Readiness, Ready
from replica.heartbeat.settings import ResourceSettings
from replica.kernel_device import netlink
from replica.kernel_device.netlink import Driver, device_index
from replica.kernel_device.places import backend_prefix
from replica.tasks import spawn

#: What can be done where the kernel has no network block devices.
INSTEAD: Final = 'without them, leave `map` out and mount `device = "nbd:NAME"`'
_ANSWER_TIMEOUT_S: Final = 5.0


def parse_device(value: object) -> str:
    """/dev/nbd0, and so on."""
    try:
        device_index(text(value))
    except ReplicaError as error:
        raise ValueError(str(error)) from None
    return text(value)


class MapAgent:
    """One kernel device, kept by a `replicad-map` that outlives this program."""

    def __init__(self, settings: ResourceSettings, surroundings: Surroundings) -> None:
        self._name: str = settings.options["map"]
        self._device: str = settings.options["device"]
        self._timeout_s = settings.start_timeout_s
        self._config_path = surroundings.settings.config_path
        self._node = surroundings.settings.node
        self._changed = surroundings.changed
        self._ready = Ready(Readiness.NO, "whether this kernel has network block devices was not looked at yet")
        self._looking: asyncio.Task[None] | None = None

    async def start(self, start: Start) -> None:
        config = await self._load()
        with contextlib.suppress(NotRunning):
            status = await self._status(config)
            if self._device and status["device"] not in ("", self._device):
                raise AgentError(f"is {status['device']} already, and not {self._device}: `replicactl unmap` it")
            if status["ready"]:
                return
            await self._ask(config, "unmap")  # it has waited for a Primary, with whatever options
        device = [self._device] if self._device else []
        await self._replicactl(config, "map", *device, "--timeout", f"{self._timeout_s:g}")

    async def stop(self) -> None:
        config = await self._load()
        try:
            await self._ask(config, "unmap")
        except NotRunning:
            await in_thread(_detach, config.cluster.name, self._name)

    async def monitor(self) -> None:
        """(One that looks for its server is well: what waits for it waits on, and whether there is a server is not
        this resource's concern.)
        """
        config = await self._load()
        try:
            status = await self._status(config)
        except NotRunning:
            raise AgentError("is not looked after: its replicad-map has ended") from None
        if not status["ready"]:
            raise AgentError(f"is not attached ({status.get('last_error') or status['state']})")

    async def active(self) -> bool:
        config = await self._load()
        try:
            await self._status(config)
        except NotRunning:
            return await in_thread(_find, config.cluster.name, self._name) is not None
        return True

    def ready(self) -> Ready:
        if self._looking is None:
            self._looking = spawn(self._look(), "network block devices of this kernel")
        return self._ready

    def hold(self, until_s: float) -> None:
        pass  # it is this machine's alone

    def let_go(self) -> None:
        pass  # nobody sees it from outside

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()

    async def _look(self) -> None:
        try:
            await in_thread(_load_driver)
            self._ready = Ready()
        except ReplicaError as error:
            self._ready = Ready(Readiness.NO, f"{error}; {INSTEAD}")
        self._changed()

    async def _load(self) -> Config:
        try:
            config: Config = await in_thread(load_config, self._config_path, self._node, need_secret=False)
            config.resource(self._name)
        except ReplicaError as error:
            raise AgentError(f"cannot be found: {error}") from None
        return config

    async def _status(self, config: Config) -> dict[str, Any]:
        """Raises NotRunning, and AgentError for everything else."""
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                status: dict[str, Any] = await self._ask(config, "status")
        except TimeoutError:
            raise AgentError(f"is unknown: its replicad-map does not answer for {_ANSWER_TIMEOUT_S:g} s") from None
        return {"device": "", "ready": False, "state": "searching", **status}

    async def _ask(self, config: Config, verb: str) -> Any:
        try:
            return await control_client.call(self._socket(config), verb)
        except NotRunning:
            raise
        except ReplicaError as error:
            raise AgentError(f"cannot be asked to {verb}: {error}") from None

    def _socket(self, config: Config) -> Path:
        return config.map_run_dir / f"{self._name}.sock"

    async def _replicactl(self, config: Config, verb: str, *arguments: str) -> None:
        options = ("--config", str(config.path), "--node", config.node.name)
        variables = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        command = (sys.executable, "-m", "replica.cli", *options, verb, self._name, *arguments)
        await run(*command, variables=variables)


def _load_driver() -> None:
    """Raises DeviceError where the kernel has no network block devices, even after their module was loaded."""
    Driver().close()


def _find(cluster: str, name: str) -> int | None:
    """The device of the resource that is attached, whoever looks after it."""
    found = netlink.find_backend(backend_prefix(cluster, name))
    return None if found is None else found[0]


def _detach(cluster: str, name: str) -> None:
    """Detach what a replicad-map has left behind. AgentError while it is in use."""
    index = _find(cluster, name)
    if index is None:
        return
    if why := netlink.users_sentence(index):
        raise AgentError(f"cannot be detached: {why}")
    driver = Driver()
    try:
        driver.disconnect(index)
    finally:
        driver.close()


KINDS: Final = (
    Kind(
        name="map",
        options={"map": Option(parse_name), "device": Option(parse_device, "")},
        title=lambda options: f"map {options['map']}",
        make=MapAgent,
    ),
)
