"""Two real nodes on this machine: `replicad` processes on 127.0.0.1 and 127.0.0.2, driven as an operator would.

Also the ground under the benchmarks and the soak test. Nothing here sleeps: a started daemon says so (sd_notify), a
state is awaited on the daemon's own verb `watch`, a dead process on its descriptor.
"""

import contextlib
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from replica import control
from replica.cli import main as replicactl
from tests.processes import passing

#: Longer than anything takes; only a test that has failed waits for so long.
PATIENCE_S = float(os.environ.get("REPLICA_TEST_PATIENCE", "30"))
MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
_CHUNK_BYTES = 4 * MIB
_LAST_LINES = 40

Status = dict[str, Any]


class _Reached(Exception):
    """Ends a `watch` from within."""


def free_port(address: str) -> int:
    """A TCP port that nobody uses on this address just now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


def open_nbd(node: "Node") -> Any:
    """A libnbd handle connected to the node's export; raises nbd.Error. It is closed when the last reference goes."""
    import nbd

    handle = nbd.NBD()
    handle.set_export_name(node.cluster.resource)
    handle.connect_unix(str(node.nbd_path))
    return handle


class Node:
    """One node: its files, its `replicad` process when it runs, its operator."""

    def __init__(self, cluster: "Cluster", name: str, address: str) -> None:
        self.cluster = cluster
        self.name = name
        self.address = address
        self.config = cluster.folder / "replica.toml"
        self.image = cluster.folder / f"{name}.img"
        self.nbd_path = cluster.folder / f"{name}.nbd"
        self.metadata = cluster.folder / "state" / name / f"{cluster.resource}-0.md"
        self.socket = cluster.folder / "run" / name / f"{cluster.resource}.sock"
        self.log_path = cluster.folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        #: Listening sockets that `replicad` gets as systemd would pass them.
        self.passed: list[socket.socket] = []

    @property
    def peer(self) -> "Node":
        """The other node."""
        return self.cluster.node2 if self is self.cluster.node1 else self.cluster.node1

    # ── the daemon ───────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> "Node":
        """Start `replicad` and return when it is up; AssertionError with its log when it does not come up."""
        with self.starting():
            return self

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Start `replicad`, do something else meanwhile, and leave when it is up."""
        notify_path = self.cluster.folder / f"{self.name}.notify"
        notify_path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, self.log_path.open("ab") as log:
            notify.bind(str(notify_path))
            environment = {**self.environment(), "NOTIFY_SOCKET": str(notify_path)}
            command, options = self.daemon_command(), {}
            if self.passed:
                command, options = passing(self.passed, command)
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, **options)
            yield
            exit_fd = os.pidfd_open(self.process.pid)
            try:
                ready, _, _ = select.select([notify, exit_fd], [], [], PATIENCE_S)
            finally:
                os.close(exit_fd)
            assert notify in ready, f"{self.name} did not start:\n{self.last_words()}"

    def run_until_exit(self) -> "subprocess.CompletedProcess[str]":
        """Start `replicad` where it is expected to refuse; its exit status and standard error."""
        return subprocess.run(
            self.daemon_command(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            env=self.environment(),
            check=False,
        )

    def daemon_command(self) -> list[str]:
        """The command line of `replicad`."""
        return [sys.executable, "-m", "replica.daemon", self.cluster.resource, *self.options()]

    def kill9(self) -> "Node":
        """End the process as a crash would, and wait for its end."""
        self.signal(signal.SIGKILL)
        return self.reap()

    def stop(self) -> "Node":
        """SIGTERM, and wait for the end; AssertionError unless it ends with status 0."""
        self.signal(signal.SIGTERM)
        process = self._running()
        self.reap()
        assert process.returncode == 0, f"{self.name} ended with {process.returncode}:\n{self.last_words()}"
        return self

    def freeze(self) -> None:
        """SIGSTOP: the host hangs, its kernel still answers TCP."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the running daemon."""
        self._running().send_signal(number)

    def reap(self) -> "Node":
        """Wait for the end of the process."""
        self._running().wait(PATIENCE_S)
        self.process = None
        return self

    def resident_bytes(self) -> int:
        """Memory that the daemon holds now."""
        pages = int(Path(f"/proc/{self._running().pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def log(self) -> str:
        """Everything that the daemon has written to its standard error so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def last_words(self) -> str:
        """The end of the log, for messages."""
        return f"── {self.name}\n" + "\n".join(self.log().splitlines()[-_LAST_LINES:]) + "\n"

    def _running(self) -> "subprocess.Popen[bytes]":
        assert self.process is not None, f"{self.name} does not run"
        return self.process

    def environment(self) -> dict[str, str]:
        """The environment of what this node's operator starts."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("REPLICA_", "NOTIFY_"))}
        # Nothing is imported from the current directory: that may be another revision than the one to be run.
        return {**inherited, "PYTHONPATH": str(self.cluster.root), "PYTHONSAFEPATH": "1"}

    def options(self) -> list[str]:
        """What tells a program which node it is for."""
        return ["--config", str(self.config), "--node", self.name]

    # ── the operator ─────────────────────────────────────────────────────────────────────────────────────────

    def ctl(self, verb: str, **args: Any) -> Status:
        """Ask the daemon through its control socket; ReplicaError with its sentence when it refuses."""
        answer: Status = control.call(self.socket, verb, args, timeout_s=PATIENCE_S)
        return answer

    def cli(self, verb: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run the real `replicactl`."""
        command = [sys.executable, "-m", "replica.cli", *self.options(), verb, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE_S, env=self.environment(), check=False
        )

    def status(self) -> Status:
        """The status document."""
        return self.ctl("status")

    def volume(self) -> Status:
        """The part of the status about the volume."""
        volume: Status = self.status()["volumes"][0]
        return volume

    def generations(self) -> dict[str, Any]:
        """Current, base and history, as hexadecimal ids."""
        generations: dict[str, Any] = self.volume()["generations"]
        return generations

    def wait_for(self, reached: Callable[[Status], bool]) -> Status:
        """The first status for which `reached` holds; AssertionError when it does not come."""
        seen: list[Status] = []

        def look(status: Status) -> None:
            seen[:] = [status]
            if reached(status):
                raise _Reached

        try:
            control.call(self.socket, "watch", on_event=look, timeout_s=PATIENCE_S)
        except _Reached:
            return seen[0]
        except control.ControlTimeout:
            raise AssertionError(
                f"{self.name} stays {_summary(seen[0]) if seen else 'silent'}\n{self.last_words()}"
            ) from None
        raise AssertionError(f"{self.name} went away\n{self.last_words()}")

    def wait_in_sync(self) -> Status:
        """Until both copies are the same and every write goes to both."""
        return self.wait_for(in_sync)

    def wait_connection(self, state: str) -> Status:
        """Until the connection is in this state ("Connected", "Connecting", "StandAlone")."""
        return self.wait_for(lambda status: status["connection"] == state)

    def wait_replication(self, *states: str) -> Status:
        """Until the replication is in one of these states."""
        return self.wait_for(lambda status: status["replication"] in states)

    def wait_alone(self) -> Status:
        """Until this node knows that its peer is gone."""
        return self.wait_for(lambda status: status["connection"] != "Connected")

    def dump_md(self) -> dict[str, Any]:
        """What `replicactl dump-md` says."""
        done = self.cli("dump-md")
        assert done.returncode == 0, done.stderr
        content: dict[str, Any] = json.loads(done.stdout)
        return content

    # ── clients ──────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def uri(self) -> str:
        """The export, for programs that take an NBD URI."""
        return f"nbd+unix:///{self.cluster.resource}?socket={self.nbd_path}"

    @contextlib.contextmanager
    def nbd(self) -> Iterator[Any]:
        """A connected libnbd handle, disconnected gracefully at the end unless it died."""
        handle = open_nbd(self)
        yield handle
        if handle.aio_is_ready():
            handle.shutdown()

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        """Write through NBD with a connection of its own; pieces of at most 1 MiB."""
        with self.nbd() as handle:
            for start in range(0, len(data), MIB):
                handle.pwrite(data[start : start + MIB], offset + start, flags)

    def read(self, offset: int, length: int) -> bytes:
        """Read through NBD with a connection of its own."""
        with self.nbd() as handle:
            return bytes(handle.pread(length, offset))


class Cluster:
    """Two nodes with one resource in `folder` (whose path must be short: it holds Unix sockets).

    `settings` are keys of [resource.NAME], as TOML values ('"C"', "true", "0.1"); what the file says for one node
    only goes in `on`: {"node2": {"port": "7790"}}. `hooks` are keys of [hooks], `tls` is that of [cluster].
    `root` is the checkout whose programs are run: another revision than this one, to compare them.
    """

    resource = "r0"

    def __init__(
        self,
        folder: Path,
        *,
        size_bytes: int = 16 * MIB,
        on: Mapping[str, Mapping[str, str]] | None = None,
        hooks: Mapping[str, str] | None = None,
        tls: str | None = None,
        root: Path = ROOT,
        **settings: str,
    ) -> None:
        self.folder = folder
        self.root = root
        self.size_bytes = size_bytes
        self.port = free_port("127.0.0.2")
        self.key = folder / "cluster.key"
        self.key.write_text("0123456789abcdef" * 4 + "\n")
        self.key.chmod(0o600)
        self.settings = {
            "protocol": '"C"',
            "timeout": "1",
            "connect-interval": "0.1",
            "settle-interval": "0.2",
            **{name.replace("_", "-"): value for name, value in settings.items()},
        }
        self.hooks = dict(hooks or {})
        self.tls = tls
        self.on = {node: dict(values) for node, values in (on or {}).items()}
        self.node1 = Node(self, "node1", "127.0.0.1")
        self.node2 = Node(self, "node2", "127.0.0.2")
        self.write_config()

    @property
    def nodes(self) -> tuple[Node, Node]:
        """Both."""
        return self.node1, self.node2

    # ── configuration ────────────────────────────────────────────────────────────────────────────────────────

    def configuration(self, **changes: str) -> str:
        """The TOML file's text; `changes` of the resource's settings, and cluster_name, secret_file, tls, port."""
        changes = {name.replace("_", "-"): value for name, value in changes.items()}
        cluster_name = changes.pop("cluster-name", '"test"')
        key = changes.pop("secret-file", '"cluster.key"')
        tls = changes.pop("tls", self.tls)
        common = {"port": str(self.port), **self.settings, **changes}
        parts = [
            f'[cluster]\nname = {cluster_name}\nsecret-file = {key}\nstate-dir = "state"\nrun-dir = "run"',
            f"tls = {tls}" if tls else "",
            f"[hooks]\n{_toml(self.hooks)}",
            *(f'[node.{node.name}]\naddress = "{node.address}"' for node in self.nodes),
            f"[resource.{self.resource}]\n" + _toml(common),
        ]
        for node in self.nodes:
            own = {"nbd": f'"unix:{node.nbd_path}"', "backing": f'"{node.image}"', **self.on.get(node.name, {})}
            parts.append(f"[resource.{self.resource}.on.{node.name}]\n" + _toml(own))
        return "\n".join(parts) + "\n"

    def write_config(self, node: Node | None = None, **changes: str) -> None:
        """Write the file that both nodes read; with `node`: one that only this node reads from now on."""
        if node is not None:
            node.config = self.folder / f"{node.name}.toml"
        path = self.folder / "replica.toml" if node is None else node.config
        path.write_text(self.configuration(**changes))

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────

    def create(self, *options: str) -> "Cluster":
        """Metadata and sparse images on both nodes, by `replicactl create-md` (in this process: that is quicker)."""
        for node in self.nodes:
            size = () if node.image.exists() else ("--size", str(self.size_bytes))
            if self.root != ROOT:
                done = node.cli("create-md", *size, *options)
                assert done.returncode == 0, done.stderr
                continue
            with contextlib.redirect_stdout(io.StringIO()):
                status = replicactl([*node.options(), "create-md", *size, *options])
            assert status == 0, "create-md failed; the reason is on standard error"
        return self

    def start(self) -> "Cluster":
        """Both daemons, at the same time."""
        with self.node1.starting(), self.node2.starting():
            return self

    def up(self) -> "Cluster":
        """From nothing to a pair in sync with node1 as Primary."""
        return self.create().begin().wait_in_sync()

    def begin(self) -> "Cluster":
        """Start a new pair; node1 is Primary, and the first resync has begun."""
        self.start()
        self.node1.wait_connection("Connected")
        self.node1.wait_for(lambda status: status["peer"]["disk"] == "Inconsistent")
        self.node1.ctl("promote", force=True)
        return self

    def wait_in_sync(self) -> "Cluster":
        """Until both nodes say that both copies are the same."""
        for node in self.nodes:
            node.wait_in_sync()
        return self

    def quiesce(self) -> "Cluster":
        """Everything that clients wrote is on both disks: flushed through the Primary, if there is one."""
        for node in self.nodes:
            if node.status()["role"] == "Primary":
                with node.nbd() as handle:
                    handle.flush()
        return self

    def close(self) -> None:
        """End what still runs, at once."""
        for node in self.nodes:
            if node.process is not None:
                node.thaw()
                node.kill9()

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *ignored: object) -> None:
        self.close()

    # ── the copies ───────────────────────────────────────────────────────────────────────────────────────────

    def first_difference(self) -> int | None:
        """The offset of the first byte in which the images differ; None when they are identical."""
        return first_difference(self.node1.image, self.node2.image)

    def check_identical(self) -> None:
        """AssertionError with both logs unless the images are the same, byte for byte."""
        at = self.first_difference()
        assert at is None, f"the images differ at {at}\n{self.logs()}"

    def logs(self) -> str:
        """The ends of both nodes' logs, for messages."""
        return "".join(node.last_words() for node in self.nodes)


def in_sync(status: Status) -> bool:
    """What `replicactl wait-sync` waits for."""
    disks = {disk for volume in status["volumes"] for disk in (volume["disk"], volume["peer_disk"])}
    return status["replication"] == "Established" and disks == {"UpToDate"}


def first_difference(one: Path, other: Path) -> int | None:
    """Compare two files byte for byte, skipping what is a hole in both."""
    with one.open("rb") as first, other.open("rb") as second:
        size = os.fstat(first.fileno()).st_size
        if size != os.fstat(second.fileno()).st_size:
            return min(size, os.fstat(second.fileno()).st_size)
        position = 0
        while (
            position := min(_next_data(first.fileno(), position, size), _next_data(second.fileno(), position, size))
        ) < size:
            length = min(_CHUNK_BYTES, size - position)
            mine, theirs = (os.pread(file.fileno(), length, position) for file in (first, second))
            if mine != theirs:
                return position + next(at for at in range(length) if mine[at] != theirs[at])
            position += length
    return None


def _next_data(fd: int, position: int, size: int) -> int:
    try:
        return os.lseek(fd, position, os.SEEK_DATA) if position < size else size
    except OSError:  # ENXIO: only a hole is left
        return size


def _toml(settings: Mapping[str, str]) -> str:
    return "\n".join(f"{name} = {value}" for name, value in settings.items())


def _summary(status: Status) -> str:
    volume = status["volumes"][0]
    return (
        f"{status['role']} {status['connection']} {status['replication']} {volume['disk']}/{volume['peer_disk']} "
        f"({status['last_error']})"
    )
