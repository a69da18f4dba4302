"""`replicad-map RESOURCE`: keeps a resource attached as a device of this machine's kernel, in the foreground.

SIGTERM ends the program and leaves the device attached, so that a mounted file system outlives an update of this
program: a new one goes on with the device. `replicactl unmap` detaches it.
"""

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path
from typing import Any

from nbdserver.tls import TlsFileError
from replica import config as cfg
from replica.control import ControlServer, SendEvent
from replica.errors import ReplicaError
from replica.kernel_device import keeper as kernel
from replica.kernel_device.keeper import Keeper, Wish
from replica.kernel_device.netlink import Driver, device_index, is_mounted
from replica.kernel_device.places import Place, places
from replica.nbd_client_tls import ClientTls
from replica.supervisor import notify_supervisor
from replica.tasks import spawn

log = logging.getLogger("replica")

_MOUNT_TIMEOUT_S = 600.0


class Agent:
    """One keeper with its control socket, and what it has mounted."""

    def __init__(self, wish: Wish, socket: Path, mount: Path | None, file_system: str | None) -> None:
        self._wish = wish
        self._mount = mount
        self._file_system = file_system
        self._mounted = False
        self._changed = asyncio.Condition()
        self._version = 0  # counts changes, so that a watcher misses none
        self._control = ControlServer(socket, self._handle)
        self._keeper: Keeper | None = None
        self._stop = asyncio.Event()
        self._ready = False

    async def run(self) -> None:
        """Until SIGTERM or `unmap`. Raises ReplicaError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        await self._control.start()
        driver = None
        try:
            driver = Driver()
            self._keeper = Keeper(self._wish, driver, self._notify)
            await self._run_keeper(self._keeper)
        finally:
            if self._keeper is not None:
                self._keeper.close()
            if driver is not None:
                driver.close()
            await self._control.stop()

    async def _run_keeper(self, keeper: Keeper) -> None:
        async def work() -> None:
            await keeper.attach()
            async with asyncio.TaskGroup() as group:
                group.create_task(keeper.run())
                group.create_task(self._finish_start(keeper))
            await self._stop.wait()  # `unmap` ends the keeper before it has its own answer

        working = asyncio.create_task(work())
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not working.done():
            working.cancel()
        try:
            await working
        except asyncio.CancelledError:
            pass
        except BaseExceptionGroup as errors:
            raise _first(errors) from None

    async def _finish_start(self, keeper: Keeper) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: keeper.is_usable)
        if self._mount is not None and not is_mounted(keeper.device, self._mount):
            kind = [] if self._file_system is None else ["-t", self._file_system]
            try:
                await _run_program("mount", *kind, "--mkdir", keeper.device, str(self._mount))
            except ReplicaError:
                if keeper.is_new:
                    await keeper.detach()
                raise
        self._mounted = self._mount is not None
        self._ready = True
        notify_supervisor("READY=1")
        self._notify()

    async def _unmap(self) -> None:
        keeper = self._keeper
        if keeper is not None:
            if self._mount is not None and is_mounted(keeper.device, self._mount):
                await _run_program("umount", str(self._mount))
            self._mounted = False
            await keeper.detach()
        self._stop.set()

    def status(self) -> dict[str, Any]:
        """The keeper's, and "ready" (attached, and mounted where that was wished) and "mount"."""
        keeper = self._keeper
        status = {"resource": self._wish.resource, "state": "searching"} if keeper is None else keeper.status()
        return {**status, "mount": str(self._mount or "") if self._mounted else "", "ready": self._ready}

    def _notify(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        self._version += 1
        spawn(notify(), "telling the watchers")

    async def _handle(self, verb: str, args: dict[str, Any], send_event: SendEvent) -> Any:
        if verb == "status":
            return self.status()
        if verb == "watch":
            while True:
                version = self._version
                await send_event(self.status())
                async with self._changed:
                    while self._version == version:
                        await self._changed.wait()
        if verb == "unmap":
            await self._unmap()
            return self.status()
        raise ReplicaError(f"replicad-map does not know the verb {verb!r}: is replicactl of a newer version?")


def _first(errors: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _run_program(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(_MOUNT_TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        raise ReplicaError(f"`{' '.join(command)}` does not end: see dmesg") from None
    if process.returncode:
        raise ReplicaError(f"`{' '.join(command)}` failed: {' '.join(output.decode(errors='replace').split())}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `replicactl map` passes on."""
    parser.add_argument("device", metavar="DEVICE", nargs="?", help="such as /dev/nbd0; any free one without it")
    parser.add_argument("--mount", metavar="DIR", help="mount the device there")
    parser.add_argument("--type", metavar="FS", help="the file system's type, for mount")
    parser.add_argument("--connections", metavar="N", type=_number(1, 16), default=1, help="NBD connections (1)")
    parser.add_argument("--adopt", action="store_true", help="take over DEVICE, which nbd-client has attached")
    parser.add_argument(
        "--request-timeout",
        metavar="S",
        type=_number(1, 3600),
        default=5,
        help="the kernel sends a request again that is not answered in so many seconds (5)",
    )
    parser.add_argument(
        "--dead-timeout",
        metavar="S",
        type=_number(10, 10_000_000),
        default=86400,
        help="without any server for so many seconds, I/O fails (86400: a day)",
    )

    parser.add_argument("--tls-ca", metavar="FILE", help="speak TLS; the authority of the nodes' certificates, in PEM")
    parser.add_argument("--tls-cert", metavar="FILE", help="this machine's certificate for TLS")
    parser.add_argument("--tls-key", metavar="FILE", help="the key of --tls-cert")


def given_tls(args: argparse.Namespace) -> ClientTls | None:
    """What the options say of TLS; None: nothing. Raises ReplicaError."""
    ca, cert, key = (path and Path(path).absolute() for path in (args.tls_ca, args.tls_cert, args.tls_key))
    if (cert is None) != (key is None):
        raise ReplicaError("--tls-cert and --tls-key belong together: give both")
    if ca is None:
        if cert is not None:
            raise ReplicaError("--tls-cert needs --tls-ca, too: by it the nodes are known")
        return None
    return ClientTls(ca, cert, key)


def _check_tls(candidates: list[Place]) -> None:
    try:
        for tls in {place.tls for place in candidates if place.tls is not None}:
            tls.check()
    except TlsFileError as error:
        raise ReplicaError(str(error)) from None


def _number(low: int, high: int) -> Any:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, not {text!r}")
        return int(text)

    return parse


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit status: 0 stopped or unmapped, 1 failed (one sentence on stderr), 2 usage."""
    parser = argparse.ArgumentParser(
        prog="replicad-map", description="Keeps a resource attached as a kernel device, in the foreground."
    )
    parser.add_argument("resource", metavar="RESOURCE", help="name of a [resource.NAME] section")
    add_options(parser)
    parser.add_argument("--config", help="configuration file ($REPLICA_CONFIG, /etc/replica/replica.toml)")
    parser.add_argument("--node", help="this node's name ($REPLICA_NODE, uname -n); a mere client needs none")
    args = parser.parse_args(argv)
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    try:
        kernel.ensure_root()
        config = cfg.load_config(args.config, args.node, need_secret=False, may_be_client=True)
        resource = config.resource(args.resource)
        candidates = places(config, resource, given_tls(args))
        _check_tls(candidates)
        wish = Wish(
            cluster=config.cluster.name,
            resource=resource.name,
            candidates=tuple(candidates),
            index=None if args.device is None else device_index(args.device),
            adopt=args.adopt,
            connections=args.connections,
            request_timeout_s=args.request_timeout,
            dead_timeout_s=args.dead_timeout,
        )
        kernel.keep_out_of_the_way()
        mount = None if args.mount is None else Path(args.mount).absolute()
        asyncio.run(_serve(wish, config.map_run_dir / f"{resource.name}.sock", mount, args.type))
    except ReplicaError as error:
        print(f"replicad-map: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(wish: Wish, socket: Path, mount: Path | None, file_system: str | None) -> None:
    await Agent(wish, socket, mount, file_system).run()


if __name__ == "__main__":
    sys.exit(main())
