"""Starts what is measured, each on a Unix socket: Replica's pair, its bound, and other people's NBD servers.

Unix sockets because TCP costs some pairs of client and server far more than others: libnbd at depth 16 got 1,450
requests per second from qemu-nbd over TCP and 23,000 over a Unix socket, while fio got about 20,000 either way (why was
not looked into). The comparison would measure that. The link between Replica's two nodes is TCP.

Images are sparse files of one size; the folder decides what they are on (see `image_folder`).
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bench.floor import Steps
from tests.cluster.cluster import ROOT, Cluster, free_port

SIZE_BYTES = 1 << 30
HOST = "127.0.0.1"
#: The defaults of replica.config; the tests' harness has faster ones.
DEFAULTS = {"timeout": "6", "connect-interval": "1", "settle-interval": "5"}
_START_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Target:
    """A server that runs: all of its processes, first the one that serves the clients."""

    name: str
    uri: str
    process_ids: tuple[int, ...] = ()

    def resident_bytes(self) -> int:
        """Memory that the process that serves the clients holds now."""
        for line in Path(f"/proc/{self.process_ids[0]}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) << 10
        return 0


@contextlib.contextmanager
def image_folder() -> Iterator[Path]:
    """An empty folder, in memory where there is /dev/shm: then the software is measured and not the disk."""
    parent = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="rb-", dir=parent) as name:
        yield Path(name)


@contextlib.contextmanager
def replica(
    folder: Path,
    protocol: str = "C",
    *,
    alone: bool = False,
    name: str = "",
    root: Path = ROOT,
    size_bytes: int = SIZE_BYTES,
) -> Iterator[Target]:
    """Two nodes in sync; ``alone``: and then the Secondary is stopped. ``root``: of another revision's checkout."""
    settings = {**DEFAULTS, "protocol": f'"{protocol}"'}
    with Cluster(folder, size_bytes=size_bytes, root=root, **settings) as cluster:
        cluster.up()
        if alone:
            cluster.node2.stop()
            cluster.node1.wait_alone()
        processes = [node.process for node in cluster.nodes if node.process is not None]
        own_name = name or f"Replica {protocol}" + (" alone" if alone else "")
        yield Target(own_name, cluster.node1.uri, tuple(process.pid for process in processes))


@contextlib.contextmanager
def floor(folder: Path) -> Iterator[Target]:
    """The least that two processes in Python can do: see `bench.floor`."""
    near, far, path, port = folder / "floor-1.img", folder / "floor-2.img", folder / "floor.nbd", free_port(HOST)
    _sparse(near)
    _sparse(far)
    command = [sys.executable, "-m", "bench.floor", "--port", str(port)]
    with (
        _process([*command, "--image", str(far)], port) as secondary,
        _process([*command, "--image", str(near), "--serve", str(path)], path) as primary,
    ):
        yield Target("floor", _uri(path), (primary.pid, secondary.pid))


@contextlib.contextmanager
def part_of_floor(folder: Path, steps: Steps) -> Iterator[Target]:
    """The same with less to do, and without the Secondary."""
    image, path = folder / f"{steps}.img", folder / f"{steps}.nbd"
    _sparse(image)
    command = [sys.executable, "-m", "bench.floor", "--steps", steps, "--image", str(image), "--serve", str(path)]
    with _process(command, path) as process:
        yield Target(str(steps), _uri(path), (process.pid,))


@contextlib.contextmanager
def c_mirror(folder: Path, *, tcp: bool = False) -> Iterator[Target]:
    """A synchronous mirror in C: qemu-storage-daemon writes to a file and to a qemu-nbd, and answers when both did.

    Between the two a Unix socket or, as between two machines, TCP.
    """
    own = folder / ("mirror-tcp" if tcp else "mirror-unix")
    own.mkdir()
    near, far, path, link = own / "near.img", own / "far.img", own / "nbd", own / "link"
    _sparse(near)
    _sparse(far)
    port = free_port(HOST)
    listen = ["-b", HOST, "-p", str(port)] if tcp else ["-k", str(link)]
    server = (
        f"server.type=inet,server.host={HOST},server.port={port}" if tcp else f"server.type=unix,server.path={link}"
    )
    far_end = ["qemu-nbd", *listen, "-f", "raw", "-x", "r", "--persistent", "-e", "4", str(far)]
    near_end = [
        "qemu-storage-daemon",
        *("--blockdev", f"driver=file,node-name=l,filename={near}"),
        *("--blockdev", f"driver=nbd,node-name=r,{server},export=r"),
        "--blockdev",
        "driver=quorum,node-name=q,vote-threshold=2,read-pattern=fifo,children.0=l,children.1=r",
        *("--nbd-server", f"addr.type=unix,addr.path={path}"),
        *("--export", "type=nbd,id=e,node-name=q,name=q,writable=on"),
    ]
    with _process(far_end, port if tcp else link) as secondary, _process(near_end, path) as primary:
        name = "C mirror, TCP" if tcp else "C mirror"
        yield Target(name, _uri(path, "q"), (primary.pid, secondary.pid))


@contextlib.contextmanager
def qemu_nbd(folder: Path) -> Iterator[Target]:
    """QEMU's server for one image, unreplicated."""
    image, path = folder / "qemu-nbd.img", folder / "qemu-nbd.nbd"
    _sparse(image)
    with _process(["qemu-nbd", "-k", str(path), "-f", "raw", "--persistent", str(image)], path) as process:
        yield Target("qemu-nbd", _uri(path), (process.pid,))


@contextlib.contextmanager
def nbdkit(folder: Path) -> Iterator[Target]:
    """nbdkit's file plugin, unreplicated."""
    image = folder / "nbdkit.img"
    _sparse(image)
    with nbdkit_of(image) as target:
        yield target


@contextlib.contextmanager
def nbdkit_of(image: Path) -> Iterator[Target]:
    """The same for an image that is there."""
    path = image.with_suffix(".nbdkit")
    path.unlink(missing_ok=True)  # nbdkit leaves it behind
    with _process(["nbdkit", "-f", "-U", str(path), "file", str(image)], path) as process:
        yield Target("nbdkit", _uri(path), (process.pid,))


@contextlib.contextmanager
def nbd_server(folder: Path) -> Iterator[Target]:
    """The reference server, unreplicated."""
    image, path, settings = folder / "nbd-server.img", folder / "nbd-server.nbd", folder / "nbd-server.conf"
    _sparse(image)
    settings.write_text(
        f"[generic]\nlistenaddr = {HOST}\nport = {free_port(HOST)}\nunixsock = {path}\n"
        f"[x]\nexportname = {image}\nflush = true\nfua = true\n"
    )
    # In the foreground it would end with its first client, so it becomes a daemon and says who it is.
    process_file = folder / "nbd-server.pid"
    subprocess.run(
        ["nbd-server", "-C", str(settings), "-p", str(process_file)], capture_output=True, timeout=20, check=True
    )
    try:
        if not _listens(path):
            raise RuntimeError("nbd-server did not start")
        process_id = int(process_file.read_text())
        yield Target("nbd-server", _uri(path, "x"), (process_id,))
    finally:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(process_file.read_text()), signal.SIGTERM)


#: Who Replica is compared with: the starter, and the programs that it needs.
PEERS: dict[str, tuple[Callable[[Path], AbstractContextManager[Target]], tuple[str, ...]]] = {
    "floor": (floor, ()),
    "C mirror": (c_mirror, ("qemu-storage-daemon", "qemu-nbd")),
    "C mirror, TCP": (lambda folder: c_mirror(folder, tcp=True), ("qemu-storage-daemon", "qemu-nbd")),
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
def _process(command: list[str], place: Path | int) -> Iterator["subprocess.Popen[bytes]"]:
    """A server in the foreground that listens at ``place`` (a Unix socket, or a TCP port)."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            if not _listens(place, process):
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


def _listens(place: Path | int, process: "subprocess.Popen[bytes] | None" = None) -> bool:
    """Wait until somebody listens there: these programs have no other common way to say that they are up."""
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    family = socket.AF_UNIX if isinstance(place, Path) else socket.AF_INET
    address = str(place) if isinstance(place, Path) else (HOST, place)
    while time.monotonic() < deadline_s and (process is None or process.poll() is None):
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.connect(address)
            return True
        time.sleep(0.01)
    return False


def _uri(path: Path, export: str = "") -> str:
    return f"nbd+unix:///{export}?socket={path}"
