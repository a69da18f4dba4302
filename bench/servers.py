"""Starts what is measured, each on a TCP port of 127.0.0.1: Replica's pair, and other people's NBD servers.

Images are sparse files of one size; the folder decides what they are on (see `image_folder`).
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.cluster import Cluster, free_port

SIZE_BYTES = 1 << 30
HOST = "127.0.0.1"
#: The defaults of replica.config; the tests' harness has faster ones.
_DEFAULTS = {"timeout": "6", "connect-interval": "1", "settle-interval": "5"}
_START_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Target:
    """A server that runs. ``resident_bytes`` of the process that serves the clients."""

    name: str
    uri: str
    resident_bytes: Callable[[], int] = field(default=lambda: 0, repr=False)


@contextlib.contextmanager
def image_folder() -> Iterator[Path]:
    """An empty folder, in memory where there is /dev/shm: then the software is measured and not the disk."""
    parent = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="rb-", dir=parent) as name:
        yield Path(name)


@contextlib.contextmanager
def replica(folder: Path, protocol: str = "C", *, alone: bool = False) -> Iterator[Target]:
    """Two nodes in sync; ``alone``: and then the Secondary is stopped."""
    port = free_port(HOST)
    on = {"node1": {"nbd": f'"{HOST}:{port}"'}}
    settings = {**_DEFAULTS, "protocol": f'"{protocol}"'}
    with Cluster(folder, size_bytes=SIZE_BYTES, on=on, **settings) as cluster:
        cluster.up()
        if alone:
            cluster.node2.stop()
            cluster.node1.wait_alone()
        name = f"Replica {protocol}" + (" alone" if alone else "")
        yield Target(name, f"nbd://{HOST}:{port}/{cluster.resource}", cluster.node1.resident_bytes)


@contextlib.contextmanager
def c_mirror(folder: Path) -> Iterator[Target]:
    """A synchronous mirror in C: qemu-storage-daemon writes to a file and to a qemu-nbd, and answers when both did."""
    far, near = folder / "mirror-far.img", folder / "mirror-near.img"
    near_port = free_port(HOST)
    _sparse(near)
    with qemu_nbd(folder, far, export="r", connections=4) as other:
        far_port = other.uri.rpartition(":")[2].partition("/")[0]
        command = [
            "qemu-storage-daemon",
            *("--blockdev", f"driver=file,node-name=l,filename={near}"),
            "--blockdev",
            f"driver=nbd,node-name=r,server.type=inet,server.host={HOST},server.port={far_port},export=r",
            "--blockdev",
            "driver=quorum,node-name=q,vote-threshold=2,read-pattern=fifo,children.0=l,children.1=r",
            *("--nbd-server", f"addr.type=inet,addr.host={HOST},addr.port={near_port}"),
            *("--export", "type=nbd,id=e,node-name=q,name=q,writable=on"),
        ]
        with _process(command, near_port) as process:
            yield Target("C mirror", f"nbd://{HOST}:{near_port}/q", lambda: _resident_bytes(process.pid))


@contextlib.contextmanager
def qemu_nbd(folder: Path, image: Path | None = None, export: str = "", connections: int = 1) -> Iterator[Target]:
    """QEMU's server for one image, unreplicated."""
    image, port = image or folder / "qemu-nbd.img", free_port(HOST)
    _sparse(image)
    options = ["-b", HOST, "-p", str(port), "-f", "raw", "-x", export, "--persistent", "-e", str(connections)]
    with _process(["qemu-nbd", *options, str(image)], port) as process:
        yield Target("qemu-nbd", f"nbd://{HOST}:{port}/{export}", lambda: _resident_bytes(process.pid))


@contextlib.contextmanager
def nbdkit(folder: Path) -> Iterator[Target]:
    """nbdkit's file plugin, unreplicated."""
    image, port = folder / "nbdkit.img", free_port(HOST)
    _sparse(image)
    with _process(["nbdkit", "-f", "-i", HOST, "-p", str(port), "file", str(image)], port) as process:
        yield Target("nbdkit", f"nbd://{HOST}:{port}/", lambda: _resident_bytes(process.pid))


@contextlib.contextmanager
def nbd_server(folder: Path) -> Iterator[Target]:
    """The reference server, unreplicated."""
    image, port, settings = folder / "nbd-server.img", free_port(HOST), folder / "nbd-server.conf"
    _sparse(image)
    settings.write_text(
        f"[generic]\nlistenaddr = {HOST}\nport = {port}\n[x]\nexportname = {image}\nflush = true\nfua = true\n"
    )
    # In the foreground it would end with its first client, so it becomes a daemon and says who it is.
    process_file = folder / "nbd-server.pid"
    subprocess.run(
        ["nbd-server", "-C", str(settings), "-p", str(process_file)], capture_output=True, timeout=20, check=True
    )
    try:
        if not _listens(port):
            raise RuntimeError("nbd-server did not start")
        process_id = int(process_file.read_text())
        yield Target("nbd-server", f"nbd://{HOST}:{port}/x", lambda: _resident_bytes(process_id))
    finally:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(process_file.read_text()), signal.SIGTERM)


#: Who Replica is compared with: the starter, and the programs that it needs.
PEERS: dict[str, tuple[Callable[[Path], AbstractContextManager[Target]], tuple[str, ...]]] = {
    "C mirror": (c_mirror, ("qemu-storage-daemon", "qemu-nbd")),
    "qemu-nbd": (qemu_nbd, ("qemu-nbd",)),
    "nbdkit": (nbdkit, ("nbdkit",)),
    "nbd-server": (nbd_server, ("nbd-server",)),
}


def missing(programs: tuple[str, ...]) -> list[str]:
    """Those of the programs that are not installed."""
    return [program for program in programs if shutil.which(program) is None]


def _sparse(image: Path) -> None:
    with image.open("xb") as file:
        file.truncate(SIZE_BYTES)


@contextlib.contextmanager
def _process(command: list[str], port: int) -> Iterator["subprocess.Popen[bytes]"]:
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            if not _listens(port, process):
                output.seek(0)
                raise RuntimeError(f"{command[0]} did not start: {output.read().decode(errors='replace')}")
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _listens(port: int, process: "subprocess.Popen[bytes] | None" = None) -> bool:
    """Wait for the port: these programs have no other common way to say that they are up."""
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s and (process is None or process.poll() is None):
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return True
        time.sleep(0.01)
    return False


def _resident_bytes(process_id: int) -> int:
    for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    return 0
