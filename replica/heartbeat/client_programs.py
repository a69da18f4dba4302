"""Programs that are kept running beside the daemon (ha.cf: respawn)."""

import asyncio
import contextlib
import logging
import os
import pwd
import subprocess
from collections.abc import Sequence
from typing import Final

from replica.heartbeat.agents.threads import in_thread
from replica.heartbeat.settings import Respawn

log = logging.getLogger("replica.heartbeat")

#: The exit status that means: do not start me again (Heartbeat's).
ENOUGH: Final = 100
_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 60.0
_GRACE_S: Final = 5.0


class ClientPrograms:
    """They are started with the daemon, restarted when they end, and ended with it."""

    def __init__(self, programs: Sequence[Respawn]) -> None:
        self._programs = programs
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Keep them running from now on."""
        self._tasks = [asyncio.create_task(self._keep(program)) for program in self._programs]

    async def stop(self) -> None:
        """End them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _keep(self, program: Respawn) -> None:
        name, pause_s = program.command[0], _PAUSE_S
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            try:
                status = await self._run(program)
            except (OSError, KeyError, subprocess.SubprocessError) as error:
                log.warning("respawn: %s cannot be started as %s (%s).", name, program.user, error)
            else:
                if status == ENOUGH:
                    log.info("respawn: %s has ended, and is not to be started again.", name)
                    return
                log.warning("respawn: %s has ended (status %d): starting it again.", name, status)
            pause_s = next_pause_s(pause_s, loop.time() - began_s)
            await asyncio.sleep(pause_s)

    async def _run(self, program: Respawn) -> int:
        starting = asyncio.ensure_future(in_thread(_start, program))
        try:
            process = await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(_discard)
            raise
        log.info("respawn: %s runs (pid %d).", program.command[0], process.pid)
        ended = asyncio.Event()
        loop, descriptor = asyncio.get_running_loop(), os.pidfd_open(process.pid)
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        except asyncio.CancelledError:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GRACE_S):
                    await ended.wait()
            process.kill()
            raise
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        return process.wait()


def next_pause_s(pause_s: float, ran_s: float) -> float:
    """Before a program that ran for so long is started again, after a pause of `pause_s` the last time: one that ends
    at once is not worth more and more of the machine. Pure.
    """
    return min(pause_s * 2, _LONGEST_PAUSE_S) if ran_s < _LONGEST_PAUSE_S else _PAUSE_S


def _start(program: Respawn) -> "subprocess.Popen[bytes]":
    """Blocks. (Not asyncio's own: on uvloop a program cannot be started as another user.) OSError, KeyError."""
    user = pwd.getpwnam(program.user)
    return subprocess.Popen(
        program.command,
        stdin=subprocess.DEVNULL,
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=[],
        start_new_session=True,
    )


def _discard(starting: "asyncio.Future[subprocess.Popen[bytes]]") -> None:
    if not starting.cancelled() and starting.exception() is None:
        starting.result().kill()
