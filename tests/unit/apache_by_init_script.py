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
    processes = [path for path in Path("/proc").glob("[0-9]*/comm") if path.read_text() == "apache2\n"]
    for path in processes:
        os.kill(int(path.parent.name), signal.SIGKILL)
    for path in processes:
        gone(int(path.parent.name))
    try:
        await agent.monitor()
    except AgentError:
        print("killed", flush=True)
    await agent.start(START)
    await tell()
    await agent.stop()
    await tell()


asyncio.run(_main(Path(sys.argv[1])))
