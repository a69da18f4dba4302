"""Kind "mount": a file system, mounted where the group is."""

import asyncio
import contextlib
import logging
import os
import posixpath
import signal
from pathlib import Path
from typing import Any, Final

from replica.config_values import name as parse_name
from replica.config_values import text
from replica.heartbeat.agents import mounts
from replica.heartbeat.agents.base import AgentError, Kind, Option, Start, Surroundings
from replica.heartbeat.agents.commands import run
from replica.heartbeat.agents.nbdfuse import Bridge
from replica.heartbeat.agents.threads import in_thread
from replica.heartbeat.node_state import Readiness, Ready
from replica.heartbeat.settings import ResourceSettings

log = logging.getLogger("replica.heartbeat")

#: `device = "nbd:r0"`: the resource r0 by nbdfuse.
BRIDGED: Final = "nbd:"
#: Those whose checker mends what a crash leaves, at no cost when there is nothing (e2fsck(8) -p). Others replay their
#: journal when they are mounted, or have no such checker.
_CHECKED: Final = ("ext2", "ext3", "ext4")
#: Of fsck: nothing was wrong; errors were corrected.
_CHECK_GOOD: Final = (0, 1)
#: Between asking the users of a file system to end, and killing them.
GRACE_S: Final = 3.0
_RETRY_S: Final = 0.1
#: What is left of the time for a stop, when a server that does not answer is given up.
_GIVE_UP_SHARE: Final = 0.5
_BROKEN: Final = ("ro", "emergency_ro", "shutdown")


def parse_folder(value: object) -> str:
    """The path of a folder, in its plain form."""
    path = text(value)
    plain = posixpath.normpath(path)
    if not path.startswith("/") or plain in ("/", "//") or "\0" in path:
        raise ValueError(f'must be the absolute path of a folder such as "/data", not {value!r}')
    return plain


def parse_device(value: object) -> str:
    """A block device, or ``nbd:`` and the name of a resource."""
    device = text(value)
    if device.startswith(BRIDGED):
        return BRIDGED + parse_name(device.removeprefix(BRIDGED))
    if not device.startswith("/") or "\0" in device:
        raise ValueError(
            f'must be a block device such as "/dev/nbd0", or a resource by nbdfuse, "nbd:r0", not {value!r}'
        )
    return device


def _parse_word(value: object) -> str:
    word = text(value)
    if word.startswith("-") or any(map(str.isspace, word)):
        raise ValueError(f"must be what mount(8) takes, without blanks, not {value!r}")
    return word


class MountAgent:
    """One mounted file system."""

    def __init__(self, settings: ResourceSettings, surroundings: Surroundings) -> None:
        heartbeat, options = surroundings.settings, settings.options
        self._folder: str = options["mount"]
        self._device: str = options["device"]
        self._type: str = options["type"]
        self._options: str = options["options"]
        self._stop_timeout_s = settings.stop_timeout_s
        self._bridge: Bridge | None = None
        self._missing = ""
        self._looking: asyncio.Task[None] | None = None
        if self._device.startswith(BRIDGED):
            resource = self._device.removeprefix(BRIDGED)
            folder = Path(os.path.realpath(heartbeat.run_dir)) / f"nbdfuse-{resource}"
            self._bridge = Bridge(resource, folder, heartbeat.config_path, heartbeat.node, surroundings.changed)
            self._missing = Bridge.missing()

    async def start(self, start: Start) -> None:
        mount = await in_thread(mounts.mounted_at, self._folder)
        if mount is not None:
            if not await self._is_ours(mount):
                raise AgentError(f"is in use: {mount.source} is mounted there")
            await self.monitor()
            return
        device = self._device if self._bridge is None else await self._bridge.attach()
        await in_thread(os.makedirs, self._folder, exist_ok=True)
        await self._check(device)
        kind = ["-t", self._type] if self._type else []
        options = ["-o", self._options] if self._options else []
        await run("mount", *kind, *options, device, self._folder)

    async def _check(self, device: str) -> None:
        kind = self._type or (await run("blkid", "-o", "value", "-s", "TYPE", device, good=(0, 2))).strip()
        if kind in _CHECKED and "ro" not in self._options.split(","):
            await run(f"fsck.{kind}", "-p", device, good=_CHECK_GOOD)

    async def stop(self) -> None:
        """(A lazy unmount would return earlier, and prove nothing: whoever has a file open writes on.)"""
        mount = await in_thread(mounts.mounted_at, self._folder)
        if mount is not None and await self._is_ours(mount):
            if self._bridge is None:
                await self._unmount()
            else:
                await self._unmount_or_break(self._bridge)
        if self._bridge is not None:
            await self._bridge.detach()

    async def _unmount_or_break(self, bridge: Bridge) -> None:
        """A server that does not answer would be waited for without an end: without nbdfuse everything fails at once,
        and the unmount is through. What was not written by then was not acknowledged to anybody who flushed.
        """
        unmounting = asyncio.create_task(self._unmount())
        try:
            await asyncio.wait([unmounting], timeout=self._stop_timeout_s * _GIVE_UP_SHARE)
            if not unmounting.done():
                log.error("%s cannot be unmounted in good order: its server does not answer.", self._folder)
                await bridge.kill()
            await unmounting
        finally:
            unmounting.cancel()

    async def _unmount(self) -> None:
        began_s = asyncio.get_running_loop().time()
        told: set[int] = set()
        while folders := await in_thread(mounts.mounted_within, self._folder):
            try:
                await run("umount", folders[0])
                continue
            except AgentError as error:
                problem = error
            if not await in_thread(mounts.mounted_at, folders[0]):
                continue
            users = await in_thread(mounts.users_of, folders[0])
            late = asyncio.get_running_loop().time() - began_s > GRACE_S
            if late and not users:
                raise problem  # the kernel itself uses it: swap, a loop device, an export over NFS
            for user in users:
                if late or user.pid not in told:
                    number = signal.SIGKILL if late else signal.SIGTERM
                    log.warning("%s: %s (%d) uses it and gets %s.", self._folder, user.name, user.pid, number.name)
                    told.add(user.pid)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(user.pid, number)
            await asyncio.sleep(_RETRY_S)

    async def monitor(self) -> None:
        mount = await in_thread(mounts.mounted_at, self._folder)
        if mount is None or not await self._is_ours(mount):
            raise AgentError("is not mounted")
        if self._bridge is not None and not await self._bridge.alive():
            raise AgentError("has lost its device: nbdfuse has ended")
        if "ro" not in self._options.split(",") and mount.options & set(_BROKEN):
            raise AgentError("has become read-only after an error (see dmesg)")
        await self._answers()

    async def _answers(self) -> None:
        """One question at a time: those that hang stay, for as long as the file system hangs."""
        if self._looking is None:
            self._looking = asyncio.create_task(in_thread(os.stat, self._folder))  # type: ignore[arg-type]
        looking = self._looking
        await asyncio.wait([looking])
        self._looking = None
        if error := looking.exception():
            raise AgentError(f"cannot be read ({getattr(error, 'strerror', None) or error})")

    async def active(self) -> bool:
        mount = await in_thread(mounts.mounted_at, self._folder)
        if mount is not None and await self._is_ours(mount):
            return True
        return self._bridge is not None and await self._bridge.present()

    def ready(self) -> Ready:
        return Ready(Readiness.NO, f"{self._folder} cannot be mounted: {self._missing}") if self._missing else Ready()

    def hold(self, until_s: float) -> None:
        pass  # it is this machine's alone

    def let_go(self) -> None:
        pass  # nobody sees it from outside

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        if self._bridge is not None:
            self._bridge.forget()

    async def _is_ours(self, mount: mounts.Mount) -> bool:
        if self._bridge is not None:
            return mount.source in await in_thread(mounts.loops_of, self._bridge.volume)
        return await in_thread(os.path.realpath, mount.source) == await in_thread(os.path.realpath, self._device)


def _title(options: Any) -> str:
    return f"mount {options['mount']}"


KINDS: Final = (
    Kind(
        name="mount",
        options={
            "mount": Option(parse_folder),
            "device": Option(parse_device),
            "type": Option(_parse_word, ""),
            "options": Option(_parse_word, ""),
        },
        title=_title,
        make=MountAgent,
    ),
)
