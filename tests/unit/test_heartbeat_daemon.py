"""Two real daemons on addresses of this machine, with real programs as their groups."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from replica import control
from replica.errors import ReplicaError
from tests.processes import StuckProgram

pytestmark = pytest.mark.timeout(40)

SCRIPT = """#!/bin/sh
up=$(dirname $0)/up-$1-$2
echo "$3 $2" >> $(dirname $0)/log-$1
case $3 in
    start) touch $up ;;
    stop) rm -f $up ;;
    monitor) [ -e $up ] ;;
esac
"""
CONFIG = """
[cluster]
name = "test"
secret-file = "secret"
state-dir = "state"
run-dir = "run"
[node.node1]
address = "127.0.0.1"
[node.node2]
address = "127.0.0.2"
[heartbeat]
deadtime = 2
keepalive = 0.1
initdead = 2
failback-delay = 0.2
auto-failback = false
port = {port}
on-stop-failure = "nothing"
[heartbeat.on.node1]
paths = [ {{ address = "127.0.0.2", local = "127.0.0.1" }} ]
[heartbeat.on.node2]
paths = [ {{ address = "127.0.0.1", local = "127.0.0.2" }} ]
"""
GROUP = """
[[group]]
name = "{name}"
preferred = "{preferred}"
resources = [ {{ exec = "{name}", start = ["{script}", "{node}", "{name}", "start"], \
stop = ["{script}", "{node}", "{name}", "stop"], monitor = ["{script}", "{node}", "{name}", "monitor"] }} ]
"""


class Node:
    """One daemon. (Each has a file of its own, since the programs of both lie in one folder.)"""

    def __init__(self, folder: Path, name: str, port: int) -> None:
        self.name = name
        self.folder = folder
        self.config = folder / f"{name}.toml"
        self.socket = folder / "run" / name / "heartbeat.sock"
        groups = "".join(
            GROUP.format(name=group, preferred=preferred, node=name, script=folder / "script")
            for group, preferred in (("web", "node1"), ("data", "node2"))
        )
        self.config.write_text(CONFIG.format(port=port) + groups)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "replica.heartbeat.daemon", "--config", str(self.config), "--node", self.name]
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log)
        return self.process

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(30)

    def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first status of which that is true, also over a start anew of the daemon."""
        found: list[dict[str, Any]] = []

        class Seen(Exception):
            pass

        def look(status: dict[str, Any]) -> None:
            if condition(status):
                found.append(status)
                raise Seen

        while not found:
            assert self.process is None or self.process.poll() is None, (self.folder / f"{self.name}.log").read_text()
            with contextlib.suppress(Seen, ReplicaError):
                control.call(self.socket, "watch", on_event=look, timeout_s=60)
        return found[0]

    def ask(self, verb: str, **args: Any) -> tuple[Any, list[str]]:
        """The answer, and what was told before it."""
        told: list[str] = []
        answer = control.call(self.socket, verb, args, lambda event: told.append(event["done"]), 60)
        return answer, told

    def log(self) -> list[str]:
        """What was done with programs here."""
        path = self.folder / f"log-{self.name}"
        return [line for line in path.read_text().splitlines() if not line.startswith("monitor")]


@contextlib.contextmanager
def held_back(node: Node, group: str) -> Iterator[Callable[[], None]]:
    """From now on the group's stop on this node does not end before what is given is called (or this is over)."""
    fifo = node.folder / "hold"
    os.mkfifo(fifo)
    replace_script(node, SCRIPT.replace("stop)", f"stop) [ $1-$2 = {node.name}-{group} ] && read line < {fifo};"))
    descriptor = os.open(fifo, os.O_RDWR)

    def go_on() -> None:
        os.write(descriptor, b"\n")

    try:
        yield go_on
    finally:
        os.close(descriptor)


def replace_script(node: Node, text: str) -> None:
    """Whatever runs of it goes on as it was."""
    new = node.folder / "script.new"
    new.write_text(text)
    new.chmod(0o755)
    new.replace(node.folder / "script")


def holders(status: dict[str, Any]) -> dict[str, str | None]:
    return {group["name"]: group["holder"] for group in status["groups"] if group["status"] == "started"}


def placed(web: str, data: str) -> Callable[[dict[str, Any]], bool]:
    return lambda status: holders(status) == {"web": web, "data": data}


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    """Both run, each with its group."""
    secret = tmp_path / "secret"
    secret.write_text("b" * 64)
    secret.chmod(0o600)
    script = tmp_path / "script"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = Node(tmp_path, "node1", port), Node(tmp_path, "node2", port)
    try:
        for node in nodes:
            node.start()
        for node in nodes:
            node.until(placed("node1", "node2"))
        yield nodes
    finally:
        for node in nodes:
            if node.process is not None:
                node.process.kill()
                node.process.wait()


def test_standby_and_takeover(pair: tuple[Node, Node]) -> None:
    node1, node2 = pair
    assert node1.ask("standby") == (None, ["web: released", "web: acquired by node2"])
    node1.until(placed("node2", "node2"))
    assert not list(node1.folder.glob("up-node1-*"))
    assert node1.ask("takeover-node")[1].count("data: acquired by node1") == 1
    node2.until(placed("node1", "node1"))
    with pytest.raises(ReplicaError, match="standby takes all, local, foreign or failback"):
        node1.ask("standby", which="some")
    with pytest.raises(ReplicaError, match="was heard a moment ago: it is not off"):
        node1.ask("fence", node="node2", done=True)
    with pytest.raises(ReplicaError, match=r"no fencing is configured for node2: add \[fencing.node2\]"):
        node1.ask("fence", node="node2")
    with pytest.raises(ReplicaError, match="does not know the verb"):
        node1.ask("dance")
    assert node1.ask("clear") == (None, [])


def test_a_standby_is_carried_through_when_its_client_goes_away(pair: tuple[Node, Node]) -> None:
    node1, _ = pair
    node1.ask("takeover-node")

    class Gone(Exception):
        pass

    def go_away(_event: object) -> None:
        raise Gone

    with held_back(node1, "data") as go_on:
        with pytest.raises(Gone):  # it has heard that web is released
            control.call(node1.socket, "standby", on_event=go_away, timeout_s=60)
        node1.until(lambda status: holders(status) == {"web": "node2"})  # which it cannot be told any more
        go_on()
        assert holders(node1.until(lambda status: "data" in holders(status)))["data"] == "node2"


def test_a_second_daemon_is_refused_and_changes_nothing(pair: tuple[Node, Node]) -> None:
    node1, _ = pair
    first = node1.process
    second = node1.start()
    try:
        assert second.wait(60) == 1
    finally:
        node1.process = first
    log = (node1.folder / "node1.log").read_text()
    assert "replica-heartbeat: another replica-heartbeat already runs for this node" in log
    assert holders(node1.ask("status")[0]) == {"web": "node1", "data": "node2"}
    assert node1.log() == ["start web"] or node1.log()[-1] == "start web"


def test_it_leaves_in_good_order(pair: tuple[Node, Node]) -> None:
    node1, node2 = pair
    assert node1.process is not None
    node1.process.send_signal(signal.SIGTERM)
    assert node1.wait() == 0
    node2.until(placed("node2", "node2"))
    assert not list(node1.folder.glob("up-node1-*"))
    with pytest.raises(ReplicaError, match="node1 is not there to take"):
        node2.ask("standby")


def test_sighup_moves_nothing(pair: tuple[Node, Node]) -> None:
    """Twice in a row, as a second one comes while nobody listens for it."""
    node1, _ = pair
    assert node1.process is not None
    before = node1.log()
    began = node1.ask("status")[0]["uptime_s"]
    node1.until(lambda status: status["uptime_s"] > began)
    node1.process.send_signal(signal.SIGHUP)
    with contextlib.suppress(ReplicaError):
        control.call(node1.socket, "watch", on_event=lambda event: None, timeout_s=60)  # until it ends
    node1.process.send_signal(signal.SIGHUP)
    node1.until(placed("node1", "node2"))
    assert node1.process.poll() is None
    assert node1.log() == before


def test_sighup_with_an_error_in_the_settings_is_refused(pair: tuple[Node, Node]) -> None:
    node1, _ = pair
    assert node1.process is not None
    text = node1.config.read_text()
    node1.config.write_text(text.replace("keepalive", "keepalif"))
    node1.process.send_signal(signal.SIGHUP)
    log = node1.folder / "node1.log"
    node1.until(lambda status: "Not starting anew" in log.read_text())
    assert holders(node1.ask("status")[0]) == {"web": "node1", "data": "node2"}


def test_sigterm_counts_also_in_the_middle_of_a_start_anew(pair: tuple[Node, Node]) -> None:
    node1, node2 = pair
    assert node1.process is not None
    node1.process.send_signal(signal.SIGHUP)
    with contextlib.suppress(ReplicaError):
        control.call(node1.socket, "watch", on_event=lambda event: None, timeout_s=60)  # until it ends
    node1.process.send_signal(signal.SIGTERM)
    assert node1.wait() == 0
    node2.until(placed("node2", "node2"))


def test_sighup_changes_nothing_once_it_leaves(pair: tuple[Node, Node]) -> None:
    """It would hold on to what is being handed over."""
    node1, node2 = pair
    assert node1.process is not None
    with held_back(node1, "web") as go_on:
        node1.process.send_signal(signal.SIGTERM)
        node1.until(lambda status: status["phase"] == "leaving")
        reading = StuckProgram(node1.config)
        node1.process.send_signal(signal.SIGHUP)
        assert select.select([reading.asked], [], [], 30)[0]  # the settings are read again
        reading.release()
        assert node1.ask("status")[0]["phase"] == "leaving"
        go_on()
        assert node1.wait() == 0
    node2.until(placed("node2", "node2"))


def test_a_killed_daemon_goes_on_where_it_was(pair: tuple[Node, Node]) -> None:
    node1, _ = pair
    assert node1.process is not None
    before = node1.log()
    os.kill(node1.process.pid, signal.SIGKILL)
    node1.wait()
    node1.start()
    node1.until(placed("node1", "node2"))
    assert node1.log() == before


def test_what_fails_too_often_moves_and_is_cleared(pair: tuple[Node, Node]) -> None:
    node1, node2 = pair
    replace_script(node1, SCRIPT.replace("start)", "start) [ $1 = node1 ] && exit 1;"))
    with pytest.raises(ReplicaError, match=r"(has come back from|has failed on) node1"):
        node2.ask("standby")
    node2.until(placed("node1", "node2"))
    replace_script(node1, SCRIPT)
    node1.ask("clear")
    node2.until(lambda status: all(group["ready"]["node1"] == "yes" for group in status["groups"]))
    node2.ask("standby")
    node1.until(placed("node1", "node1"))
