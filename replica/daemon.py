"""`replicad RESOURCE`: one resource in the foreground, until SIGTERM or SIGINT."""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import uvloop

from nbdserver.activation import passed_sockets
from nbdserver.limits import Limits
from nbdserver.log_limit import limit_log
from nbdserver.server import ListenError, Server
from nbdserver.tls import ServerTls, TlsFileError, server_tls
from replica import config as cfg
from replica.config_tls import Tls
from replica.control import ControlServer, SendEvent
from replica.errors import ReplicaError
from replica.link_tls import LinkTls
from replica.resource import Resource
from replica.runtime import HostRuntime
from replica.supervisor import notify_supervisor
from replica.verbs import Verbs

log = logging.getLogger("replica")

#: A watcher sees progress at least this often while a resync or a verification runs.
PROGRESS_INTERVAL_S: Final = 0.5
#: Certificates that expire sooner are warned of, each day.
EXPIRY_WARNING: Final = timedelta(days=30)
_DAY_S: Final = 86400.0


class Daemon:
    """One resource with its NBD server and its control socket."""

    def __init__(self, config: cfg.Config, resource: cfg.Resource) -> None:
        self._config = config
        self._cfg = resource
        link_tls, nbd_tls = _make_tls(config, resource)
        self.resource = Resource(config, resource, HostRuntime(link_tls))
        self._control = ControlServer(config.control_socket(resource.name), self._handle)
        settings = resource.local
        limits = Limits(max_connections=settings.max_nbd_connections, in_flight_bytes=settings.nbd_inflight_bytes)
        self._nbd = Server(default=self.resource.export, limits=limits, tls=nbd_tls)
        #: Listening sockets that systemd has passed, in place of the configured address.
        self._sockets: list[socket.socket] = []
        self._verbs = self._make_verbs()
        self._up = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`. Raises ReplicaError when it cannot start."""
        try:
            self._sockets = passed_sockets()
        except ListenError as error:
            raise ReplicaError(str(error)) from None
        # The control socket first: its lock says that no other replicad serves this resource on this node.
        await self._control.start()
        try:
            await self.resource.start()
            try:
                address = await self._listen()
                self._look_at_certificates()
                self._up.set()
                notify_supervisor("READY=1")
                log.info("%s: %s is up, NBD at %s", self.resource.name, self.resource.node_name, address)
                await stop.wait()
                notify_supervisor("STOPPING=1")
            finally:
                self._nbd.close_listeners()
                await self.resource.stop()
                await self._nbd.stop()
        finally:
            await self._control.stop()

    def _look_at_certificates(self) -> None:
        """Now, and each day."""
        _warn_of_expiry(self.resource.name, "the peer link", self._config.tls)
        _warn_of_expiry(self.resource.name, "the NBD server", self._cfg.tls)
        asyncio.get_running_loop().call_later(_DAY_S, self._look_at_certificates)

    async def _listen(self) -> str:
        """Listen for clients, and return where, for the log."""
        listen = self._cfg.local.nbd
        try:
            if self._sockets:
                for sock in self._sockets:
                    await self._nbd.listen_socket(sock)
                return " and ".join(f"{sock.getsockname()} (a socket passed to it)" for sock in self._sockets)
            if listen.unix_path is not None:
                await self._nbd.listen_unix(listen.unix_path)
            else:
                await self._nbd.listen_tcp(listen.host, listen.port)
        except ListenError as error:
            raise ReplicaError(str(error)) from None
        return str(listen)

    # ── control ──────────────────────────────────────────────────────────────────────────────────────────────

    def _make_verbs(self) -> dict[str, Callable[[dict[str, Any]], Awaitable[None]]]:
        verbs = self.resource.verbs
        return {
            "promote": lambda args: verbs.promote(
                force=bool(args.get("force")), peer_is_dead=bool(args.get("peer_is_dead"))
            ),
            "demote": lambda args: verbs.demote(force=bool(args.get("force"))),
            "takeover": lambda args: verbs.takeover(),
            "connect": lambda args: verbs.connect(discard_my_data=bool(args.get("discard_my_data"))),
            "disconnect": lambda args: verbs.disconnect(),
            "attach": lambda args: verbs.attach(),
            "detach": lambda args: verbs.detach(),
            "invalidate": lambda args: verbs.invalidate(),
            "invalidate-remote": lambda args: verbs.invalidate_remote(),
            "outdate": lambda args: verbs.outdate(),
            "pause-sync": lambda args: verbs.pause_sync(paused=True),
            "resume-sync": lambda args: verbs.pause_sync(paused=False),
            "verify": _verify_action(verbs),
            "resize": lambda args: verbs.resize(assume_clean=bool(args.get("assume_clean"))),
        }

    async def _handle(self, verb: str, args: dict[str, Any], send_event: SendEvent) -> Any:
        if verb == "status":
            return self.resource.status()
        # Until its disk is there it looks like a resource that has lost it.
        await self._up.wait()
        if verb == "watch":
            return await self._watch(send_event)
        action = self._verbs.get(verb)
        if action is None:
            raise ReplicaError(f"replicad does not know the verb {verb!r}: is replicactl of a newer version?")
        log.info("%s: operator: %s %s", self.resource.name, verb, args or "")
        try:
            await action(args)
        except OSError as error:
            self.resource.disk_failed(error)
            raise ReplicaError(f"{verb} failed: the disk reports an error ({error.strerror or error}).") from error
        return self.resource.status()

    async def _watch(self, send_event: SendEvent) -> None:
        """Stream the status: at once, at each change, and regularly while a resync or a verification runs. Ends with
        the client.
        """
        async with self.resource.watch() as changed:
            while True:
                changed.clear()
                await send_event(self.resource.status())
                with contextlib.suppress(TimeoutError):
                    moving = self.resource.syncing or self.resource.verify_progress is not None
                    async with asyncio.timeout(PROGRESS_INTERVAL_S if moving else None):
                        await changed.wait()


def _verify_action(verbs: Verbs) -> Callable[[dict[str, Any]], Awaitable[None]]:
    """The verb `verify`, whose arguments are more than flags."""

    def offset(args: dict[str, Any], name: str) -> int | None:
        value = args.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ReplicaError(f"verify takes a number of bytes as {name!r}, not {value!r}.")
        return value

    async def act(args: dict[str, Any]) -> None:
        if args.get("stop"):
            await verbs.stop_verify()
        else:
            start, stop = offset(args, "from_bytes") or 0, offset(args, "to_bytes")
            await verbs.verify(start=start, stop=stop, repair=bool(args.get("repair")))

    return act


def _make_tls(config: cfg.Config, resource: cfg.Resource) -> tuple[LinkTls | None, ServerTls | None]:
    """TLS of the peer link and of the clients, from files that were checked with the configuration."""
    try:
        return (
            None if config.tls is None else LinkTls(config.tls.files, config.node.name, config.peer.name),
            None if resource.tls is None else server_tls(resource.tls.mode, resource.tls.files),
        )
    except TlsFileError as error:
        raise ReplicaError(str(error)) from None


def _warn_of_expiry(name: str, what: str, tls: Tls | None) -> None:
    """(Those that have expired are refused by the other side.)"""
    if tls is None or tls.not_after is None:
        return
    left = tls.not_after - datetime.now(UTC)
    if left < EXPIRY_WARNING:
        day = f"{tls.not_after:%Y-%m-%d}"
        days = max(left.days, 0)
        log.warning(
            "%s: a certificate of %s expires on %s, in %d days: renew it and restart replicad", name, what, day, days
        )


async def _serve(config: cfg.Config, resource: cfg.Resource) -> None:
    stop = asyncio.Event()
    # Ignoring it is inherited, and would hide the exit status of hooks.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await Daemon(config, resource).run(stop)


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit status: 0 stopped, 1 could not start (one sentence on stderr), 2 usage."""
    parser = argparse.ArgumentParser(
        prog="replicad", description="Runs one Replica resource in the foreground, until SIGTERM."
    )
    parser.add_argument("resource", metavar="RESOURCE", help="name of a [resource.NAME] section")
    parser.add_argument("--config", help="configuration file ($REPLICA_CONFIG, /etc/replica/replica.toml)")
    parser.add_argument("--node", help="this node's name ($REPLICA_NODE, uname -n)")
    parser.add_argument("--log-level", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    args = parser.parse_args(argv)
    under_systemd = "JOURNAL_STREAM" in os.environ
    logging.basicConfig(
        level=args.log_level,
        stream=sys.stderr,
        format="%(levelname)s %(message)s" if under_systemd else "%(asctime)s %(levelname)s %(message)s",
    )
    limit_log()
    try:
        config = cfg.load_config(args.config, args.node)
        uvloop.run(_serve(config, config.resource(args.resource)))
    except ReplicaError as error:
        print(f"replicad: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
