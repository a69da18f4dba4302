"""``replicactl map``: attach a resource as a device of this machine's kernel, and keep it attached."""

import argparse
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from replica import control
from replica.cli._common import Command, load
from replica.cli._kernel_device import ask_all, device_text
from replica.cli._wait import positive_seconds
from replica.config import Config
from replica.detached import last_sentence, start_detached
from replica.errors import ReplicaError
from replica.kernel_device.agent import add_options

_CONNECT_INTERVAL_S = 0.1


class _Ready(Exception):
    """Ends a `watch` from within."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("resource", metavar="RESOURCE", nargs="?", help="may be left out where only one is configured")
    add_options(parser)
    parser.add_argument("--timeout", metavar="S", type=positive_seconds, help="give up waiting after S seconds")
    parser.add_argument("--list", action="store_true", help="show what is attached on this machine")


def _run(args: argparse.Namespace) -> int:
    config = load(args, may_be_client=True)
    if args.list:
        for status in ask_all(config):
            print(device_text(status))
        return 0
    name = config.resource(args.resource).name
    socket = config.map_run_dir / f"{name}.sock"
    try:
        device = control.call(socket, "status")["device"]
    except control.NotRunning:
        pass
    else:
        raise ReplicaError(f"{name} is mapped already{device and f' ({device})'}: see `replicactl map --list`")
    agent = _start(args, config, name)
    print(_wait_ready(agent, socket, name, args.timeout))
    return 0


def _start(args: argparse.Namespace, config: Config, name: str) -> "subprocess.Popen[bytes]":
    """Start `replicad-map` in a session of its own."""
    if os.geteuid() != 0:
        raise ReplicaError("attaching kernel devices takes root: run this as root")
    log = _log_path(config, name)
    command = [sys.executable, "-m", "replica.kernel_device.agent", name, *([args.device] if args.device else [])]
    command += ["--config", str(config.path), *(["--node", config.node.name] if config.is_member else [])]
    command += ["--connections", str(args.connections), *(["--adopt"] if args.adopt else [])]
    command += ["--request-timeout", str(args.request_timeout), "--dead-timeout", str(args.dead_timeout)]
    command += ["--mount", os.path.abspath(args.mount)] if args.mount else []
    command += ["--type", args.type] if args.type else []
    for option, path in (("--tls-ca", args.tls_ca), ("--tls-cert", args.tls_cert), ("--tls-key", args.tls_key)):
        command += [option, os.path.abspath(path)] if path else []
    return start_detached(command, log, mode="wb", without=("NOTIFY_SOCKET",))


def _wait_ready(agent: "subprocess.Popen[bytes]", socket: Path, name: str, timeout_s: float | None) -> str:
    """The device's path; raises `ReplicaError` when the agent ends, or after `timeout_s` (and then ends it)."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    last: dict[str, Any] = {}

    def look(status: dict[str, Any]) -> None:
        last.update(status)
        if status["ready"]:
            raise _Ready

    agent_end = os.pidfd_open(agent.pid)
    try:
        while not select.select([agent_end], [], [], _CONNECT_INTERVAL_S)[0]:
            left_s = None if deadline is None else max(deadline - time.monotonic(), 0.001)
            try:
                control.call(socket, "watch", on_event=look, timeout_s=left_s)
            except control.ControlTimeout:
                raise _too_late(agent, last, name, timeout_s) from None
            except control.NotRunning:  # it starts, or has ended
                if left_s is not None and left_s <= _CONNECT_INTERVAL_S:
                    raise _too_late(agent, last, name, timeout_s) from None
            except _Ready:
                return str(last["device"])
            except ReplicaError:  # it ends: its own words say why
                agent.wait()
    finally:
        os.close(agent_end)
    raise ReplicaError(
        last_sentence(socket.with_suffix(".log"), "replicad-map") or f"replicad-map {name} ended: see its log"
    )


def _too_late(
    agent: "subprocess.Popen[bytes]", last: dict[str, Any], name: str, timeout_s: float | None
) -> ReplicaError:
    agent.terminate()
    agent.wait()
    why = last.get("last_error") or "replicad-map does not answer"
    return ReplicaError(f"{name} is not mapped after {timeout_s:g} s: {why}")


def _log_path(config: Config, name: str) -> Path:
    return config.map_run_dir / f"{name}.log"


COMMAND = Command("attach a resource as a kernel device (/dev/nbdN) here, and keep it attached", _run, _add_arguments)
