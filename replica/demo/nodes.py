"""Two nodes on this machine: a temporary folder, the configuration, two ``replicad``, and ``replicactl`` calls."""

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from replica import control
from replica.config import MIN_SECRET_BYTES
from replica.demo.screen import Screen

RESOURCE = "r0"
SIZE_TEXT = "1G"
SIZE_BYTES = 1 << 30
#: Slow enough to be seen: without it the demo's resync is over before a bar is drawn.
RESYNC_RATE_TEXT = "12M"

_START_TIMEOUT_S = 15.0
_STOP_TIMEOUT_S = 15.0
_COMMAND_TIMEOUT_S = 60.0
#: Leaves room for "run/node1/r0.sock" in the 107 bytes that a Unix socket's path may have.
_MAX_FOLDER_BYTES = 70

_CONFIG = """\
[cluster]
name = "demo"
secret-file = "cluster.key"
state-dir = "state"
run-dir = "run"

[node.node1]
address = "127.0.0.1"
[node.node2]
address = "127.0.0.2"

[resource.r0]
protocol = "C"
port = {port}
resync-rate = "{rate}"            # slow, so that you can watch it

[resource.r0.on.node1]
nbd = "unix:node1.nbd"
backing = "node1.img"
[resource.r0.on.node2]
nbd = "unix:node2.nbd"
backing = "node2.img"
"""


class CommandFailed(Exception):
    """A command of the story was refused; the message is what it said."""


class Node:
    """One node: its daemon and where its things are."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.image = folder / f"{name}.img"
        self.nbd = folder / f"{name}.nbd"
        self.log = folder / f"{name}.log"
        self.control_socket = folder / "run" / name / f"{RESOURCE}.sock"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, environment: dict[str, str]) -> None:
        """Start ``replicad`` and wait for its word that it is ready; raises `CommandFailed`."""
        address = self._folder / f"{self.name}.notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, self.log.open("ab") as log:
            notify.bind(str(address))
            try:
                # Its own session: Ctrl-C in the terminal is for the demo, which then stops the nodes in order.
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "replica.daemon", RESOURCE, "--node", self.name],
                    env={**environment, "NOTIFY_SOCKET": str(address)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
                self._await_ready(notify, self._process)
            finally:
                address.unlink()

    def _await_ready(self, notify: socket.socket, process: subprocess.Popen[bytes]) -> None:
        ended = os.pidfd_open(process.pid)
        try:
            readable, _, _ = select.select([notify.fileno(), ended], [], [], _START_TIMEOUT_S)
        finally:
            os.close(ended)
        if notify.fileno() not in readable or notify.recv(4096) != b"READY=1":
            raise CommandFailed(f"replicad of {self.name} did not start")

    @property
    def process_id(self) -> int:
        """The daemon's process id, 0 while it does not run."""
        return self._process.pid if self._process else 0

    def kill(self) -> None:
        """SIGKILL: what a power cut is to a process. Nothing when it does not run."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM, as systemd does; returns the exit status (0 too when it does not run)."""
        return self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> int:
        if self._process is None:
            return 0
        self._process.send_signal(number)
        status = self._process.wait(_STOP_TIMEOUT_S)
        self._process = None
        return status


class Cluster:
    """Both nodes and their folder. Leaving the context stops them; the folder goes unless ``keep`` is set."""

    def __init__(self, screen: Screen) -> None:
        self.keep = False
        self.folder = _make_folder()
        self.node1, self.node2 = Node("node1", self.folder), Node("node2", self.folder)
        self._screen = screen
        self._environment = {**os.environ, "REPLICA_CONFIG": str(self.folder / "replica.toml")}
        self._environment.pop("REPLICA_NODE", None)
        self._environment.pop("JOURNAL_STREAM", None)  # the logs are files here: with the time in each line
        text = _CONFIG.format(port=_free_port("127.0.0.2"), rate=RESYNC_RATE_TEXT)
        (self.folder / "replica.toml").write_text(text)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.node1.stop()
                self.node2.stop()
        finally:  # a second Ctrl-C, or a daemon that does not end
            self.node1.kill()
            self.node2.kill()
            if not self.keep:
                shutil.rmtree(self.folder, ignore_errors=True)

    def write_secret(self) -> None:
        """``replicactl secret > cluster.key``, readable by the owner only."""
        self._screen.command("(umask 077; replicactl secret > cluster.key)")
        secret = self._run("secret")
        assert len(secret) >= MIN_SECRET_BYTES
        descriptor = os.open(self.folder / "cluster.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secret)

    def start(self, node: Node) -> None:
        """Start a node's daemon, and show how."""
        self._screen.command(f"replicad --node {node.name} {RESOURCE} &")
        node.start(self._environment)

    def kill(self, node: Node) -> None:
        """Kill a node's daemon, and show how."""
        process_id = node.process_id
        node.kill()
        self._screen.command(f"kill -KILL {process_id}   # replicad of {node.name}")

    def stop(self, node: Node) -> None:
        """Stop a node's daemon in order, and show how; raises `CommandFailed`."""
        self._screen.command(f"kill -TERM {node.process_id}   # replicad of {node.name}")
        status = node.stop()
        if status:
            raise CommandFailed(f"replicad of {node.name} ended with status {status}")

    def ctl(self, node: Node, *arguments: str) -> None:
        """Run ``replicactl`` as the operator of ``node`` and show it with its answer; raises `CommandFailed`."""
        self._screen.command(" ".join(("replicactl", "--node", node.name, *arguments)))
        self._screen.output(self._run("--node", node.name, *arguments))

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "replica.cli", *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise CommandFailed(done.stderr.strip() or f"replicactl ended with status {done.returncode}")
        return done.stdout

    def follow(self, node: Node, seen: Callable[[dict[str, Any]], None], timeout_s: float) -> None:
        """Pass every status of ``node`` to ``seen`` until that raises: what ``replicactl status --watch`` shows."""
        control.call(node.control_socket, "watch", on_event=seen, timeout_s=timeout_s)


def _make_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="replica-demo-"))
    if len(os.fsencode(folder)) > _MAX_FOLDER_BYTES:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="replica-demo-", dir="/tmp"))
    return folder


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
