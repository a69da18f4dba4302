"""`python -m nbdserver FILE`: serve one file or block device."""

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from urllib.parse import quote

import uvloop

from nbdserver.activation import passed_sockets
from nbdserver.blockfile import BlockFile, BlockFileError
from nbdserver.constants import MAX_STRING_BYTES
from nbdserver.file_export import FileExport
from nbdserver.handshake import TlsMode
from nbdserver.log_limit import limit_log
from nbdserver.server import DEFAULT_PORT, ListenError, Server
from nbdserver.tls import ServerTls, TlsFileError, TlsFiles, server_tls


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 stopped by a signal, 1 refused with one sentence, 2 usage."""
    options = _parse(arguments)
    logging.basicConfig(format="nbdserver: %(message)s", level=logging.WARNING)
    limit_log()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(options))
    except TlsFileError as error:
        print(f"nbdserver: --tls-{error.which}: {error}", file=sys.stderr)
        return 1
    except (BlockFileError, ListenError) as error:
        print(f"nbdserver: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nbdserver", description="Serve a file or block device over NBD.")
    parser.add_argument("file", help="regular file or block device")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--listen",
        metavar="HOST:PORT",
        type=_host_and_port,
        default=("127.0.0.1", DEFAULT_PORT),
        help=f"TCP address; port 0 takes a free one (default: 127.0.0.1:{DEFAULT_PORT})",
    )
    where.add_argument("--unix", metavar="PATH", type=os.path.abspath, help="unix socket instead of TCP")
    parser.add_argument("--read-only", action="store_true", help="refuse to change anything")
    parser.add_argument(
        "--export", metavar="NAME", type=_export_name, default="", help="name of the export; it is also the default"
    )
    tls = parser.add_argument_group("TLS")
    tls.add_argument(
        "--tls", type=TlsMode, choices=tuple(TlsMode), default=TlsMode.OFF, help="whether clients may or must use it"
    )
    tls.add_argument("--tls-cert", metavar="FILE", type=Path, help="certificate of this server (PEM)")
    tls.add_argument("--tls-key", metavar="FILE", type=Path, help="its private key (PEM), readable by nobody else")
    tls.add_argument("--tls-ca", metavar="FILE", type=Path, help="demand client certificates that this CA has signed")
    options = parser.parse_args(arguments)
    files = [f"--tls-{name}" for name in ("cert", "key", "ca") if getattr(options, f"tls_{name}") is not None]
    if options.tls is TlsMode.OFF and files:
        parser.error(f"{files[0]} needs --tls require or --tls allow")
    if options.tls is not TlsMode.OFF and (options.tls_cert is None or options.tls_key is None):
        parser.error(f"--tls {options.tls} needs --tls-cert and --tls-key")
    return options


def _tls(options: argparse.Namespace) -> ServerTls | None:
    if options.tls is TlsMode.OFF:
        return None
    files = TlsFiles(options.tls_cert, options.tls_key, options.tls_ca)
    files.check()
    return server_tls(options.tls, files)


def _export_name(text: str) -> str:
    if len(os.fsencode(text)) > MAX_STRING_BYTES:
        raise argparse.ArgumentTypeError(f"the name is longer than {MAX_STRING_BYTES} bytes")
    return text


def _host_and_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, for example 127.0.0.1:{DEFAULT_PORT}")
    return host.removeprefix("[").removesuffix("]") or "0.0.0.0", int(port)


async def _serve(options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    tls = _tls(options)
    file = BlockFile.open(options.file, read_only=options.read_only)
    try:
        export = FileExport(file, name=options.export, read_only=options.read_only)
        server = Server(default=export, tls=tls)
        print(f"serving {options.file} at {' and '.join(await _listen(server, options))}", flush=True)
        await stop.wait()
        for number in (signal.SIGTERM, signal.SIGINT):  # again: do not wait for clients
            loop.add_signal_handler(number, server.abort)
        await server.stop()
        if not options.read_only:
            await export.flush()
    finally:
        file.close()


async def _listen(server: Server, options: argparse.Namespace) -> list[str]:
    """Start listening and return the URIs for clients."""
    sockets = passed_sockets()
    if sockets:
        for sock in sockets:
            await server.listen_socket(sock)
        return [_uri(options, sock.getsockname()) for sock in sockets]
    if options.unix is not None:
        await server.listen_unix(options.unix)
        return [_uri(options, options.unix)]
    return [_uri(options, (await server.listen_tcp(*options.listen))[0])]


def _uri(options: argparse.Namespace, address: str | bytes | tuple[str, int]) -> str:
    """How clients name the export at the address of a listening socket."""
    name = quote(options.export, safe="")
    scheme = "nbds" if options.tls is TlsMode.REQUIRE else "nbd"
    if isinstance(address, str | bytes):
        return f"{scheme}+unix:///{name}?socket={quote(address)}"
    host, port = address[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/{name}"


if __name__ == "__main__":
    sys.exit(main())
