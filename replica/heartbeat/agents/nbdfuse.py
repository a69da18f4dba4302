"""A resource as a block device without the kernel's NBD: nbdfuse shows it as a file, with a loop device on that."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import quote

from nbdserver.handshake import TlsMode
from replica.config import Config, load_config
from replica.errors import ReplicaError
from replica.heartbeat import clock
from replica.heartbeat.agents import mounts
from replica.heartbeat.agents.base import AgentError
from replica.heartbeat.agents.commands import run
from replica.heartbeat.agents.threads import in_thread

_LOOK_INTERVAL_S: Final = 0.02
#: How long nbdfuse may take to end once nothing uses it any more.
_END_TIMEOUT_S: Final = 3.0
_EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class Bridge:
    """nbdfuse and loop device of one resource. AgentError from everything that does not say otherwise."""

    def __init__(
        self, resource: str, folder: Path, config_path: Path | None, node: str, ended: Callable[[], None]
    ) -> None:
        """`folder` is this bridge's own. `ended` is called when nbdfuse ends, of itself or not."""
        self._resource = resource
        self._folder = str(folder)
        self._output = folder.with_suffix(".log")
        self._config_path = config_path
        self._node = node
        self._ended = ended
        self._process: subprocess.Popen[bytes] | None = None
        self._watched: tuple[int, int] | None = None  # process and its descriptor
        #: The export, as a file.
        self.volume = f"{folder}/volume"

    @staticmethod
    def missing() -> str:
        """What this machine lacks for it, as a sentence; "" when nothing. Raises nothing."""
        if shutil.which("nbdfuse") is None:
            return "nbdfuse is not installed (Debian: libnbd-bin)"
        if not os.path.exists("/dev/fuse"):
            return "/dev/fuse is missing: the kernel's module fuse is not loaded"
        return ""

    async def attach(self) -> str:
        """The block device; what is there already is used."""
        if why := self.missing():
            raise AgentError(f"cannot be mounted: {why}")
        if not await self.alive():
            await self.detach()
            await self._start()
        self._watch((await in_thread(self._processes))[0])
        loops = await in_thread(mounts.loops_of, self.volume)
        return loops[0] if loops else (await run("losetup", "--find", "--show", self.volume)).strip()

    async def detach(self) -> None:
        """Nothing of it is left. What uses the loop device must have ended."""
        give_up_s = clock.now() + _END_TIMEOUT_S
        while await self._busy():
            if clock.now() > give_up_s:
                await self._take_away()  # its own words say what is in the way
                raise AgentError(f"is still used through {self.volume}")
            # The kernel lets go of a loop device a moment after its last user.
            with contextlib.suppress(AgentError):
                await self._take_away()
            await asyncio.sleep(_LOOK_INTERVAL_S)
        await self._end_process()

    async def _busy(self) -> bool:
        loops = await in_thread(mounts.loops_of, self.volume)
        return bool(loops) or await in_thread(mounts.mounted_at, self._folder) is not None

    async def _take_away(self) -> None:
        for loop in await in_thread(mounts.loops_of, self.volume):
            await run("losetup", "--detach", loop)
        if await in_thread(mounts.mounted_at, self._folder):
            await run("umount", self._folder)

    async def kill(self) -> None:
        """Make everything that waits for the server fail."""
        for pid in await in_thread(self._processes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def alive(self) -> bool:
        """Whether nbdfuse runs, and shows the export."""
        if not await in_thread(self._processes):
            return False
        return await in_thread(mounts.mounted_at, self._folder) is not None

    async def present(self) -> bool:
        """Whether anything of it is there."""
        return await self._busy() or bool(await in_thread(self._processes))

    def forget(self) -> None:
        """Look after it no more; it goes on."""
        if self._watched is not None:
            asyncio.get_running_loop().remove_reader(self._watched[1])
            os.close(self._watched[1])
            self._watched = None

    # ── nbdfuse ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _start(self) -> None:
        try:
            config = await in_thread(load_config, self._config_path, self._node, need_secret=False)
            uri = export_uri(config, self._resource)
        except ReplicaError as error:
            raise AgentError(f"cannot be mounted: {error}") from None
        process = self._process = await in_thread(self._spawn, uri)
        while not await in_thread(mounts.mounted_at, self._folder):
            if process.poll() is not None:
                words = (await in_thread(self._output.read_text, errors="replace")).strip().splitlines()
                raise AgentError(f"cannot be mounted: nbdfuse ended ({words[-1] if words else process.returncode})")
            await asyncio.sleep(_LOOK_INTERVAL_S)

    def _spawn(self, uri: str) -> "subprocess.Popen[bytes]":
        Path(self._folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        # nbdfuse 1.14 meets the end of its server with abort(), for which nobody needs a core dump.
        command = ["prlimit", "--core=0", "nbdfuse", self.volume, uri]
        with self._output.open("wb") as output:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, cwd="/"
            )

    def _processes(self) -> list[int]:
        if self._process is not None:
            self._process.poll()  # so that a dead one is none
        return mounts.running("nbdfuse", self.volume)

    async def _end_process(self) -> None:
        give_up_s = clock.now() + _END_TIMEOUT_S
        while await in_thread(self._processes):
            if clock.now() > give_up_s:
                await self.kill()
            await asyncio.sleep(_LOOK_INTERVAL_S)
        self.forget()

    def _watch(self, pid: int) -> None:
        if self._watched is not None and self._watched[0] == pid:
            return
        self.forget()
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            self._watched = (pid, descriptor)
            asyncio.get_running_loop().add_reader(descriptor, self._process_ended)

    def _process_ended(self) -> None:
        self.forget()
        self._ended()


def export_uri(config: Config, name: str) -> str:
    """Where this node serves a resource, as an NBD URI. ReplicaError."""
    resource = config.resource(name)
    if resource.tls is not None and resource.tls.mode is TlsMode.REQUIRE:
        raise ReplicaError(f"{name} takes clients with TLS only (nbd-tls), and nbdfuse is not given certificates here")
    listen = resource.local.nbd
    if listen.unix_path is not None:
        return f"nbd+unix:///{quote(name)}?socket={quote(listen.unix_path)}"
    host = _EVERYWHERE.get(listen.host, listen.host)
    return f"nbd://{f'[{host}]' if ':' in host else host}:{listen.port}/{quote(name)}"
