"""Fencing: a node of which it is not known whether it runs is switched off, and the device says that it is off.

Devices are tried in their order; the first that succeeds is enough. A node is fenced by one call at a time: whoever
asks meanwhile gets the same result.
"""

import asyncio
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from replica.heartbeat.fence_device import Device, FenceError
from replica.heartbeat.settings import HeartbeatSettings
from replica.heartbeat.stonith import device_from_stonith, stonith_target
from replica.tasks import spawn

__all__ = ["DeviceAnswer", "Fenced", "Fencer", "device_from_stonith", "stonith_target"]

log = logging.getLogger("replica.heartbeat.fencing")


class Fenced(NamedTuple):
    """`ok`: the node is off for certain. `sentence` says how, or why not and what to do."""

    ok: bool
    sentence: str


class DeviceAnswer(NamedTuple):
    """What one device answered to a test."""

    device: str
    ok: bool
    sentence: str


@dataclass(slots=True)
class _Fencing:
    """A fencing under way."""

    task: "asyncio.Task[Fenced] | None" = None
    callers: int = 0
    #: Something was asked of a device: from then on it is carried through, whoever still waits.
    begun: bool = field(default=False)


class Fencer:
    """Fences the nodes of the settings."""

    def __init__(self, settings: HeartbeatSettings) -> None:
        relative_to = settings.config_path.parent if settings.config_path is not None else Path("/")
        self._devices = {
            node: tuple(Device(device, node, relative_to) for device in devices)
            for node, devices in settings.fencing.items()
        }
        self._under_way: dict[str, _Fencing] = {}
        self._switching_on: set[asyncio.Task[None]] = set()
        self._last: dict[str, Fenced] = {}

    def configured(self, node: str) -> bool:
        """Whether there is a device for the node."""
        return bool(self._devices.get(node))

    def last(self, node: str) -> str:
        """The sentence of the last fencing of the node that ended; "" if there was none."""
        fenced = self._last.get(node)
        return fenced.sentence if fenced is not None else ""

    async def fence(self, node: str, *, why: str, delayed: bool = True) -> Fenced:
        """Switch the node off. With action "reboot" it is switched on again in the background (`settled`). Without
        `delayed` no device's delay is waited: nobody else would shoot at the same time.

        When all callers are cancelled before a device was asked for anything (during its delay), nothing happens;
        later than that it is carried through.
        """
        if not self.configured(node):
            return Fenced(False, f"{node} cannot be fenced: no fencing is configured for it, add [fencing.{node}].")
        fencing = self._under_way.get(node)
        if fencing is None:
            fencing = self._under_way[node] = _Fencing()
            log.warning("fencing %s, %s.", node, why)
            fencing.task = spawn(self._fence(node, fencing, delayed), f"fencing of {node}")
        assert fencing.task is not None
        fencing.callers += 1
        try:
            return await asyncio.shield(fencing.task)
        except asyncio.CancelledError:
            fencing.callers -= 1
            if not fencing.callers and not fencing.begun and not fencing.task.done():
                log.warning("fencing %s: given up before anything was done.", node)
                self._under_way.pop(node, None)
                fencing.task.cancel()
            raise

    async def test(self, node: str) -> list[DeviceAnswer]:
        """Ask each device of the node whether it answers, and what it says about the node. Nothing is switched."""
        return [await self._test(device, node) for device in self._devices.get(node, ())]

    async def settled(self) -> None:
        """Return when no node is being switched on again."""
        while self._switching_on:
            await asyncio.wait(self._switching_on)

    async def _fence(self, node: str, fencing: _Fencing, delayed: bool) -> Fenced:
        try:
            fenced = await self._try_devices(node, fencing, delayed)
            self._last[node] = fenced
        finally:
            if self._under_way.get(node) is fencing:
                del self._under_way[node]
        log.log(logging.WARNING if fenced.ok else logging.ERROR, "%s", fenced.sentence)
        return fenced

    async def _try_devices(self, node: str, fencing: _Fencing, delayed: bool) -> Fenced:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        problems = []
        for device in self._devices[node]:
            if delayed and device.settings.delay_s:
                log.info("fencing %s: waits %g s before %s.", node, device.settings.delay_s, device.name)
                await asyncio.sleep(device.settings.delay_s)
            fencing.begun = True
            try:
                await device.switch_off()
            except FenceError as error:
                problems.append(f"{device.name} {error}")
                continue
            if device.settings.action == "reboot":
                self._switch_on(node, device)
            took_s = loop.time() - began_s
            return Fenced(True, f"{node} is fenced: {device.name} switched it off and confirms it ({took_s:.1f} s).")
        return Fenced(
            False,
            f"{node} could not be fenced: {'; '.join(problems)}. See `replicactl fence-test {node}`; if you are sure "
            f"that it is off, run `replicactl fence {node} --done`.",
        )

    def _switch_on(self, node: str, device: Device) -> None:
        task = spawn(self._on(node, device), f"switching {node} on again")
        self._switching_on.add(task)
        task.add_done_callback(self._switching_on.discard)

    async def _on(self, node: str, device: Device) -> None:
        try:
            await device.switch_on()
        except FenceError as error:
            log.warning("%s is fenced, but could not be switched on again: %s %s.", node, device.name, error)
        else:
            log.info("fencing %s: %s switched it on again.", node, device.name)

    async def _test(self, device: Device, node: str) -> DeviceAnswer:
        try:
            power = await device.test()
        except FenceError as error:
            return DeviceAnswer(device.name, False, f"{device.name} {error}")
        return DeviceAnswer(device.name, True, f"{device.name} answers: {node} is {power}")
