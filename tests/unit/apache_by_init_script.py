"""Debian's Apache, started, killed and stopped by the agent of init scripts; in namespaces that the test has made."""

import asyncio
import os
import signal
import sys
from pathlib import Path

from replica.heartbeat.agents.base import AgentError
from tests.processes import gone
from tests.unit.agent_bench import START, make, settings_in


async def _main(directory: Path) -> None:
    agent = make("lsb", {"lsb": "apache2"}, settings_in(directory))

    async def tell() -> None:
        print("running" if await agent.active() else "stopped", flush=True)

    await tell()
    await agent.start(START)
    await tell()
    # Only the first process: its workers live on, and keep the port.
    pid = int(Path("/run/apache2/apache2.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    gone(pid)
    try:
        await agent.monitor()
    except AgentError:
        print("killed", flush=True)
    await agent.stop()  # as a group does before it starts a resource again
    await agent.start(START)
    await tell()
    await agent.stop()
    await tell()


asyncio.run(_main(Path(sys.argv[1])))
