"""One of Debian's resource agents, started, broken and stopped; in namespaces that the test has made."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

from replica.heartbeat.agents.base import AgentError
from tests.processes import gone
from tests.unit.agent_bench import START, make, settings_in


def _remove_address() -> None:
    subprocess.run(["ip", "addr", "del", "192.0.2.50/24", "dev", "d0"], check=True)


def _kill_apache() -> None:
    processes = [path for path in Path("/proc").glob("[0-9]*/comm") if path.read_text() == "apache2\n"]
    for path in processes:
        os.kill(int(path.parent.name), signal.SIGKILL)
    for path in processes:
        gone(int(path.parent.name))


_CASES = {
    "address": ({"ocf": "heartbeat:IPaddr2", "params": {"ip": "192.0.2.50", "cidr_netmask": 24}}, _remove_address),
    "apache": ({"ocf": "heartbeat:apache", "params": {"configfile": ""}}, _kill_apache),
}
_APACHE = """
ServerRoot {0}
PidFile {0}/pid
ErrorLog {0}/error.log
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule status_module /usr/lib/apache2/modules/mod_status.so
ServerName test
Listen 127.0.0.1:80
<Location /server-status>
SetHandler server-status
</Location>
"""


async def _main(case: str, directory: Path) -> None:
    given, harm = _CASES[case]
    if case == "apache":
        (directory / "apache.conf").write_text(_APACHE.format(directory))
        given["params"] = {"configfile": str(directory / "apache.conf")}
    agent = make("ocf", given, settings_in(directory))

    async def tell() -> None:
        print("running" if await agent.active() else "stopped", flush=True)

    await tell()
    await agent.start(START)
    await agent.monitor()
    await tell()
    harm()
    try:
        await agent.monitor()
    except AgentError:
        print("failed", flush=True)
    await agent.start(START)
    await tell()
    await agent.stop()
    await tell()


asyncio.run(_main(sys.argv[1], Path(sys.argv[2])))
