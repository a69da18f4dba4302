"""In a guest, in its agent's process: `replicad`, and its operator. Arguments and results are values of JSON."""

import contextlib
import io
import json
import os
import select
import socket
import subprocess
import sys
from pathlib import Path
from signal import SIGKILL
from typing import Any

from replica import control
from replica.cli import main as replicactl

RESOURCE = "r0"
_FOLDER = Path("/run/replica")
_CONFIG = _FOLDER / "replica.toml"
_daemons: dict[str, "subprocess.Popen[bytes]"] = {}
_programs: dict[str, "subprocess.Popen[bytes]"] = {}


class _Reached(Exception):
    """Ends a `watch` from within."""


def configure(config: str, secret: str | None) -> None:
    """Write the configuration (paths in it are relative to /run/replica) and the secret, cluster.key, if any."""
    _FOLDER.mkdir(exist_ok=True)
    _CONFIG.write_text(config)
    if secret is None:
        return
    key = _FOLDER / "cluster.key"
    key.touch(mode=0o600)
    key.write_text(secret + "\n")


def cli(node: str | None, arguments: list[str]) -> str:
    """`replicactl`, on a machine that is no node for None; RuntimeError with its words unless it ends with status 0."""
    who = [] if node is None else ["--node", node]
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = replicactl(["--config", str(_CONFIG), *who, *arguments])
    if status != 0:
        raise RuntimeError(f"replicactl {' '.join(arguments)}: {errors.getvalue().strip()}")
    return output.getvalue()


def start(node: str, log: str, patience_s: float) -> None:
    """Start `replicad` and return when it is up; it writes its log to the end of the file `log`."""
    notify_path = _FOLDER / "notify"
    notify_path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "replica.daemon", RESOURCE, "--config", str(_CONFIG), "--node", node]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, open(log, "ab") as file:
        notify.bind(str(notify_path))
        environment = {**os.environ, "NOTIFY_SOCKET": str(notify_path)}
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)
        _daemons[node] = daemon
        exit_fd = os.pidfd_open(daemon.pid)
        try:
            ready, _, _ = select.select([notify, exit_fd], [], [], patience_s)
        finally:
            os.close(exit_fd)
        if notify not in ready:
            raise RuntimeError(f"replicad did not start: {Path(log).read_text()[-2000:]}")


def ctl(node: str, verb: str, args: dict[str, Any], patience_s: float) -> Any:
    """Ask the daemon through its control socket."""
    return control.call(_FOLDER / "run" / node / f"{RESOURCE}.sock", verb, args, timeout_s=patience_s)


def wait(node: str, wanted: dict[str, list[Any]], patience_s: float) -> dict[str, Any]:
    """The first status in which each of these keys has one of these values ("volume.disk": one of the volume's)."""
    seen: list[dict[str, Any]] = []

    def look(status: dict[str, Any]) -> None:
        seen[:] = [status]
        flat = status | {f"volume.{key}": value for key, value in status["volumes"][0].items()}
        if all(flat[key] in values for key, values in wanted.items()):
            raise _Reached

    try:
        control.call(_FOLDER / "run" / node / f"{RESOURCE}.sock", "watch", on_event=look, timeout_s=patience_s)
    except _Reached:
        return seen[0]
    except control.ControlTimeout:
        pass
    raise RuntimeError(f"{wanted} does not come about: {json.dumps(seen)[:1500]}")


def signal(node: str, number: int) -> None:
    """Send a signal to a node's daemon; after SIGKILL it is over."""
    _daemons[node].send_signal(number)
    if number == SIGKILL:
        _daemons[node].wait()


def begin(name: str, command: list[str]) -> None:
    """Start a program; `end` waits for it."""
    log = (_FOLDER / f"{name}.log").open("wb")
    _programs[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    log.close()


def end(name: str, patience_s: float) -> str:
    """What it printed; RuntimeError with that unless it ends with status 0."""
    program = _programs.pop(name)
    try:
        status = program.wait(patience_s)
    except subprocess.TimeoutExpired:
        program.kill()
        status = -SIGKILL
    output = (_FOLDER / f"{name}.log").read_text(errors="replace")
    if status != 0:
        raise RuntimeError(f"{name} ended with {status}: {output[-3000:]}")
    return output
