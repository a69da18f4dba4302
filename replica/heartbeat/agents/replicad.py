"""replicad of one resource on this node: found, followed, and started again whenever it does not run.

It runs on both nodes, whichever of them holds the group: a Secondary gets every write.
"""

import asyncio
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

from replica import control_client, programs
from replica.config import DEFAULT_PATH, Config, load_config
from replica.control import NotRunning
from replica.detached import last_sentence, start_detached
from replica.errors import ReplicaError
from replica.heartbeat import clock
from replica.heartbeat.agents.threads import in_thread
from replica.tasks import spawn

log = logging.getLogger("replica.heartbeat")

Status = dict[str, Any]

#: A daemon that has not answered what it can answer at once for so long hangs.
ANSWER_TIMEOUT_S: Final = 5.0
#: Before it is started again, when it ends again and again; once it has run for the last of them, from the beginning.
RETRIES_S: Final = (0.0, 0.1, 1.0, 2.0, 5.0)
_START_TIMEOUT_S: Final = 60.0
_LOOK_INTERVAL_S: Final = 0.02
_COULD_NOT_START: Final = 1  # its exit status
_UCRED: Final = struct.Struct("=iii")
_SYSTEMD: Final = Path("/run/systemd/system")  # as sd_booted(3) looks for it


class Replicad:
    """The daemon of the resource `name`. Its `status` is None while it does not run; `problem` then says why."""

    def __init__(self, name: str, config_path: Path | None, node: str, changed: Callable[[], None]) -> None:
        self.name = name
        self.status: Status | None = None
        self.problem = f"replicad {name} was not looked at yet"
        self._config_path = config_path
        self._node = node
        self._changed = changed
        self._config: Config | None = None
        self._news = asyncio.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._following: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Look after it from now on."""
        if self._following is None:
            self._following = spawn(self._follow(), f"replicad {self.name}")

    async def close(self) -> None:
        """Look after it no more; it goes on."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])
            self._following = None

    async def wait_for(self, reached: Callable[[Status], bool]) -> Status:
        """Its first status from now on for which `reached` holds."""
        self.begin()
        while self.status is None or not reached(self.status):
            self._news.clear()
            await self._news.wait()
        return self.status

    async def wait_until_it_answers(self) -> Status:
        """Its status, also when it has ended just now, and the end of its stream was not read yet. ReplicaError."""
        while True:
            await self.wait_for(lambda status: True)
            try:
                return await self.ask_status()
            except NotRunning:
                self.status = None
            except TimeoutError:
                log.warning("replicad %s does not answer for %g s", self.name, ANSWER_TIMEOUT_S)

    async def call(self, verb: str, args: dict[str, Any] | None = None) -> Any:
        """Its answer. Raises NotRunning, or ReplicaError with its refusal."""
        return await control_client.call(await self._socket(), verb, args)

    async def ask_status(self) -> Status:
        """What it answers now. TimeoutError when it hangs; raises as `call` does."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            status: Status = await self.call("status")
            return status

    async def kill(self) -> None:
        """End it when it hangs, and return when it has ended. Its disk is then as after a crash."""
        try:
            _, writer = await asyncio.open_unix_connection(await self._socket())
        except (FileNotFoundError, ConnectionRefusedError):
            return
        # Whose process listens there; the descriptor makes sure that it is that one which is killed.
        credentials = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, _, _ = _UCRED.unpack(credentials)
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        finally:
            writer.close()
        log.error("replicad %s (process %d) does not answer: it is killed", self.name, pid)
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(descriptor, ended.set)
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)

    # ── following it ─────────────────────────────────────────────────────────────────────────────────────────

    async def _socket(self) -> Path:
        return (await self._load()).control_socket(self.name)

    async def _load(self) -> Config:
        if self._config is None:
            config = await in_thread(load_config, self._config_path, self._node, need_secret=False)
            config.resource(self.name)  # raises unless there is one
            self._config = config
        return self._config

    async def _follow(self) -> None:
        starts, failure = 0, ""
        while True:
            began_s = clock.now()
            try:
                async with aclosing(control_client.events(await self._socket(), "watch")) as statuses:
                    async for status in statuses:
                        self._tell(status)
                problem = f"replicad {self.name} has ended"
            except NotRunning:
                problem = f"replicad {self.name} does not run"
            except ReplicaError as error:
                problem = str(error)
            self._tell(None, failure or await self._last_words() or problem)
            if clock.now() - began_s > RETRIES_S[-1]:
                starts = 0
            await asyncio.sleep(RETRIES_S[min(starts, len(RETRIES_S) - 1)])
            starts += 1
            failure = ""
            try:
                if not await self._runs():
                    await self._start()
            except (ReplicaError, OSError) as error:
                failure = f"replicad {self.name} cannot be started: {error}"

    async def _last_words(self) -> str:
        """Why the one that was started here has ended by itself."""
        if self._process is None or self._process.poll() != _COULD_NOT_START:
            return ""
        output = (await self._load()).node_run_dir / f"{self.name}.log"
        words = await in_thread(last_sentence, output, "replicad")
        return f"replicad {self.name} cannot be started: {words}" if words else ""

    def _tell(self, status: Status | None, problem: str = "") -> None:
        if problem and problem != self.problem:
            log.warning("%s", problem)
        self.status, self.problem = status, problem
        self._news.set()
        self._changed()

    async def _runs(self) -> bool:
        try:
            _, writer = await asyncio.open_unix_connection(await self._socket())
        except OSError:
            return False
        writer.close()
        return True

    async def _start(self) -> None:
        """Returns when it answers; ReplicaError with its own words when it does not come up."""
        config = await self._load()
        if _SYSTEMD.exists() and config.path == Path(DEFAULT_PATH):
            await self._start_by_systemd()
            return
        output = config.node_run_dir / f"{self.name}.log"
        process = self._process = await in_thread(_start_process, self._process, config, self.name, output)
        give_up_s = clock.now() + _START_TIMEOUT_S
        while process.poll() is None and not await self._runs():
            if clock.now() > give_up_s:
                raise ReplicaError(f"it does not answer, see {output}")
            await asyncio.sleep(_LOOK_INTERVAL_S)

    async def _start_by_systemd(self) -> None:
        said: list[str] = []
        unit = f"replicad@{self.name}.service"
        ended = await programs.run(("systemctl", "start", unit), {}, _START_TIMEOUT_S, said.append)
        if ended.problem:
            raise ReplicaError(f"`systemctl start {unit}` {ended.problem}: {' '.join(said)}")


def _start_process(
    old: "subprocess.Popen[bytes] | None", config: Config, name: str, output: Path
) -> "subprocess.Popen[bytes]":
    """Start it in a session of its own, so that it outlives this program."""
    if old is not None:
        old.poll()  # so that nothing is left of it
    command = [sys.executable, "-m", "replica.daemon", name, "--config", str(config.path), "--node", config.node.name]
    return start_detached(command, output, mode="ab", without=("NOTIFY_SOCKET", "JOURNAL_STREAM"))
