"""`replica-heartbeat`: this node's part of the cluster, in the foreground.

SIGTERM hands everything over to the other node and ends. SIGHUP starts the daemon anew in the same process (another
version of it, another configuration) and moves nothing; while the settings have an error, it changes nothing. When it
is killed, addresses that it holds run out in the kernel by themselves; the next daemon finds what runs and goes on with
it.
"""

import argparse
import asyncio
import contextlib
import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import uvloop

from nbdserver.log_limit import limit_log
from replica.config_values import CLUSTER_MANAGER
from replica.control import ClientGone, ControlServer, SendEvent
from replica.errors import ReplicaError
from replica.heartbeat import clock, host
from replica.heartbeat.agents.ip import held_elsewhere
from replica.heartbeat.agents.threads import in_thread
from replica.heartbeat.client_programs import ClientPrograms
from replica.heartbeat.consent import FencingJudge
from replica.heartbeat.fencing import Fencer
from replica.heartbeat.group import build_group
from replica.heartbeat.held import Held
from replica.heartbeat.links import Links
from replica.heartbeat.logs import set_up_logging
from replica.heartbeat.manager import Manager
from replica.heartbeat.ping import Pinger
from replica.heartbeat.report import report
from replica.heartbeat.settings import GroupSettings, HeartbeatSettings
from replica.heartbeat.source import load_settings, settings_digest
from replica.supervisor import notify_supervisor

log = logging.getLogger("replica.heartbeat")

PROGRAM = CLUSTER_MANAGER
#: What came while a daemon ended that is to start anew.
_late: set[int] = set()
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Daemon:
    """The node with its sockets, its control socket and its logs. `reread` reads the settings again; ReplicaError."""

    def __init__(self, settings: HeartbeatSettings, reread: Callable[[], object]) -> None:
        self._settings = settings
        self._reread = reread
        self._fencer = Fencer(settings)
        judge = FencingJudge(settings, self._fencer, functools.partial(_held_elsewhere, settings))
        self._manager = Manager(
            settings,
            lambda changed: {group.name: build_group(group, settings, clock.now, changed) for group in settings.groups},
            judge,
            Held(settings.state_dir, settings.run_dir),
            host.reboot if settings.on_stop_failure == "reboot" else _stay,
            settings_digest(settings),
        )
        self._links = Links(settings, self._manager.heard)
        self._pinger = Pinger(settings.pings, settings.timing, _addresses(settings), self._manager.wake)
        self._control = ControlServer(settings.control_socket, self._handle)
        self._watchdog = host.Watchdog(settings.watchdog) if settings.watchdog else None
        self._clients = ClientPrograms(settings.respawn)
        self._verbs: dict[str, Callable[[dict[str, Any], SendEvent], Awaitable[Any]]] = {
            "status": self._status,
            "watch": self._watch,
            "standby": self._standby,
            "takeover-node": self._takeover,
            "clear": self._clear,
            "fence": self._fence,
            "fence-test": self._fence_test,
        }

    async def run(self, leave: asyncio.Event, restart: asyncio.Event) -> bool:
        """Until everything is handed over (False), or the daemon is to start anew (True). ReplicaError: no start."""
        # The control socket first: its lock says that no other daemon runs for this node.
        await self._control.start()
        try:
            await self._links.open()
            await self._pinger.open()
            if self._watchdog is not None:
                self._watchdog.open()
            self._manager.begin(self._links, self._pinger)
            self._clients.start()
            notify_supervisor("READY=1")
            log.info(
                "%s is up in cluster %s, with %s.", self._settings.node, self._settings.cluster, self._settings.peer
            )
            for warning in self._settings.warnings:
                log.warning("%s", warning)
            return await self._until_the_end(leave, restart)
        finally:
            await self._clients.stop()
            await self._manager.close()
            await self._pinger.close()
            await self._links.close()
            if self._watchdog is not None:
                self._watchdog.close()
            await self._control.stop()

    async def _until_the_end(self, leave: asyncio.Event, restart: asyncio.Event) -> bool:
        running = asyncio.create_task(self._manager.run(), name="heartbeats")
        feeding = asyncio.create_task(self._feed(), name="watchdog")
        leaving = asyncio.create_task(leave.wait())
        restarting = asyncio.create_task(self._told_to_restart(restart))
        tasks: set[asyncio.Task[Any]] = {running, leaving, restarting}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done() and not running.done() and not restarting.done():
                notify_supervisor("STOPPING=1")
                log.info("Leaving the cluster: handing everything over.")
                self._manager.leave()
                await asyncio.wait({running})
            if running.done():
                await running
                return False
            # Here, where heartbeats still go: they may take their time to end.
            await self._clients.stop()
            return True
        finally:
            for task in (*tasks, feeding):
                task.cancel()
            await asyncio.gather(*tasks, feeding, return_exceptions=True)

    async def _told_to_restart(self, restart: asyncio.Event) -> None:
        """Return when the daemon is to start anew, and can."""
        while True:
            await restart.wait()
            restart.clear()
            try:
                await in_thread(self._reread)
            except ReplicaError as error:
                log.error("Not starting anew, since that would fail: %s", error)
            else:
                return

    async def _feed(self) -> None:
        while self._watchdog is not None:
            self._watchdog.feed()
            await asyncio.sleep(self._settings.timing.keepalive_s)

    # ── control ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _handle(self, verb: str, args: dict[str, Any], send_event: SendEvent) -> Any:
        action = self._verbs.get(verb)
        if action is None:
            raise ReplicaError(f"{PROGRAM} does not know the verb {verb!r}: is replicactl of a newer version?")
        if verb not in ("status", "watch"):
            log.info("operator: %s %s", verb, args or "")
        return await action(args, send_event)

    def _report(self) -> dict[str, Any]:
        settings = self._settings
        warnings = list(settings.warnings)
        if settings.promote_without_fencing:
            warnings.append("promote-without-fencing is on: a cut cable between the nodes leads to a split brain.")
        if self._manager.settings_differ():
            warnings.append(f"{settings.peer} has other groups or times than {settings.node}: make them the same.")
        fencing = {
            node: {"configured": self._fencer.configured(node), "last": self._fencer.last(node)}
            for node in settings.nodes
        }
        return report(self._manager, self._links.peer(), self._pinger.status(), fencing, warnings)

    async def _status(self, _args: dict[str, Any], _send: SendEvent) -> Any:
        return self._report()

    async def _watch(self, _args: dict[str, Any], send: SendEvent) -> Any:
        while True:
            await send(self._report())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.timing.keepalive_s):
                    await self._manager.next_change()

    async def _standby(self, args: dict[str, Any], send: SendEvent) -> Any:
        which = args.get("which", "all")
        if which not in ("all", "local", "foreign", "failback"):
            raise ReplicaError(f"standby takes all, local, foreign or failback, not {which!r}")
        await self._manager.standby(which, functools.partial(_tell, send))

    async def _takeover(self, _args: dict[str, Any], send: SendEvent) -> Any:
        await self._manager.takeover(functools.partial(_tell, send))

    async def _clear(self, _args: dict[str, Any], _send: SendEvent) -> Any:
        self._manager.clear_failures()

    async def _fence(self, args: dict[str, Any], _send: SendEvent) -> Any:
        node = args.get("node")
        if node not in self._settings.nodes:
            raise ReplicaError(f"there is no node {node!r}: the nodes are {' and '.join(self._settings.nodes)}")
        if args.get("done"):
            if node != self._settings.peer:
                raise ReplicaError(f"--done is for the other node, {self._settings.peer}")
            self._manager.vouch_dead()
            return f"{node} is taken for dead."
        if not self._fencer.configured(node):
            raise ReplicaError(f"no fencing is configured for {node}: add [fencing.{node}]")
        fenced = await self._fencer.fence(node, why="an operator asked for it", delayed=False)
        if not fenced.ok:
            raise ReplicaError(fenced.sentence)
        return fenced.sentence

    async def _fence_test(self, args: dict[str, Any], _send: SendEvent) -> Any:
        node = args.get("node")
        nodes = [node] if node else list(self._settings.nodes)
        return {name: [tested._asdict() for tested in await self._fencer.test(name)] for name in nodes}


async def _tell(send: SendEvent, words: str) -> None:
    # Whoever asked may have gone: what was begun is carried through all the same.
    with contextlib.suppress(ClientGone):
        await send({"done": words})


async def _held_elsewhere(settings: HeartbeatSettings, group: GroupSettings) -> str:
    """Who answers for an address of the group, as the begin of a sentence; "" when nobody does."""
    for resource in group.resources:
        if resource.kind == "ip":
            holder = await held_elsewhere(resource)
            if holder:
                return f"{resource.name} is answered for by {holder}"
    return ""


def _addresses(settings: HeartbeatSettings) -> list[str]:
    """Of the cluster: pinging them says nothing of the network."""
    resources = (resource for group in settings.groups for resource in group.resources)
    return [resource.options["ip"].split("/")[0] for resource in resources if resource.kind == "ip"]


def _stay(why: str) -> None:
    """on-stop-failure = "nothing": said once by the group itself, and shown by every status."""


async def _serve(settings: HeartbeatSettings, reread: Callable[[], object]) -> bool:
    leave, restart = asyncio.Event(), asyncio.Event()
    # Ignoring it is inherited, and would hide the exit status of what is started.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave.set)
    loop.add_signal_handler(signal.SIGHUP, restart.set)
    # What came while the daemon before this one ended is heard now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    again = await Daemon(settings, reread).run(leave, restart)
    if again:
        for number in _SIGNALS:
            signal.signal(number, _come_late)
        await in_thread(lambda: None)  # what came before that has reached the loop now
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, _come_late)
        if leave.is_set():
            _late.add(signal.SIGTERM)
    return again


def _come_late(number: int, _frame: object) -> None:
    _late.add(number)


def _start_anew(arguments: Sequence[str]) -> NoReturn:
    """In this process. A SIGTERM that nobody was there for any more is for the one that follows."""
    log.info("Starting anew.")
    logging.shutdown()
    # Nothing that takes time from here on: a thread that is left may still get a signal, which is noted in `_late`.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    if _late - {signal.SIGHUP}:
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    os.execv(sys.executable, [sys.executable, "-m", "replica.heartbeat.daemon", *arguments])


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit status: 0 stopped, 1 could not start (one sentence on stderr), 2 usage."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Runs this node's part of the cluster in the foreground, until SIGTERM."
    )
    parser.add_argument("--config", help="configuration file ($REPLICA_CONFIG, /etc/replica/replica.toml)")
    parser.add_argument("--ha-dir", type=Path, help="a directory with ha.cf, haresources and authkeys instead")
    parser.add_argument("--node", help="this node's name ($REPLICA_NODE, uname -n)")
    parser.add_argument("--log-level", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    args = parser.parse_args(argv)
    try:
        read = functools.partial(load_settings, args.config, args.ha_dir, args.node)
        settings = read()
        set_up_logging(settings.logging, args.log_level)
        limit_log()
        host.be_in_time()
        again = uvloop.run(_serve(settings, read))
    except ReplicaError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    if again:
        _start_anew(argv or sys.argv[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
