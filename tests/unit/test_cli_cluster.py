"""The commands of the cluster manager, and Heartbeat's own, against a daemon whose answers are written down."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from replica.cli._cluster_text import cluster_lines
from replica.errors import ReplicaError
from tests.unit.scripted_daemon import ScriptedDaemon, replicactl, running

MakeConfig = Callable[..., Path]

HEARTBEAT = """\
[heartbeat]
deadtime = 5
ping = ["10.2.0.1"]
log-file = "/var/log/heartbeat.log"
paths = [ { interface = "lo", address = "127.0.0.1" }, { interface = "lo", address = "127.0.0.2" } ]
"""


def document(**changes: Any) -> dict[str, Any]:
    """A node that has both groups, the other node is there and could not take one of them."""
    return {
        "cluster": "test",
        "node": "node1",
        "phase": "up",
        "sentence": "All is where it should be.",
        "uptime_s": 12.5,
        "peer": "node2",
        "peer_alive": True,
        "peer_phase": "up",
        "paths": [{"name": "ucast lo 127.0.0.2", "state": "up", "problem": "", "heard_s_ago": 0.31}],
        "pings": [{"name": "10.2.0.1", "alive": True}],
        "groups": [
            {
                "name": "web",
                "preferred": "node1",
                "holder": "node1",
                "status": "started",
                "term": 3,
                "by_operator": False,
                "sentence": "",
                "ready": {"node1": "yes", "node2": "its copy of r0 is Inconsistent"},
                "resources": [
                    {"name": "replica r0", "status": "running", "problem": ""},
                    {"name": "ip 10.3.0.50/24", "status": "running", "problem": ""},
                ],
            },
            {
                "name": "mail",
                "preferred": "node2",
                "holder": "node1",
                "status": "started",
                "term": 4,
                "by_operator": True,
                "sentence": "mail stays on node1: an operator put it there",
                "ready": {"node1": "yes", "node2": None},
                "resources": [{"name": "lsb postfix", "status": "stopped", "problem": "ends with status 1"}],
            },
        ],
        "fencing": {"node1": {"configured": False, "last": ""}, "node2": {"configured": True, "last": "off at 12:00"}},
        "warnings": ["no fencing of node1"],
        **changes,
    }


TEXT = """\
node1 is up; node2 is up
  All is where it should be.
  group web: started on node1
    replica r0: running
    ip 10.3.0.50/24: running
    not ready on node2: its copy of r0 is Inconsistent
  group mail: started on node1, preferred node2, put there by an operator
    mail stays on node1: an operator put it there
    lsb postfix: stopped: ends with status 1
  path ucast lo 127.0.0.2: up, heard 0.3 s ago
  ping 10.2.0.1: answers
  fencing of node1: not configured
  fencing of node2: configured; last: off at 12:00
  warning: no fencing of node1
"""


def test_the_words() -> None:
    assert cluster_lines(document()) == TEXT.splitlines()


def test_the_resources_of_a_group_are_shown_by_the_node_that_has_it() -> None:
    lines = cluster_lines(document(node="node2", peer="node1"))
    assert "  group web: started on node1" in lines
    assert not [line for line in lines if "replica r0" in line or "postfix" in line]


def test_the_words_when_the_other_node_is_gone() -> None:
    path = {"name": "bcast eth0", "state": "dead", "problem": "no such interface", "heard_s_ago": None}
    group = document()["groups"][0] | {
        "holder": None,
        "status": "stopped",
        "ready": {"node1": "r0 is down", "node2": None},
    }
    lines = cluster_lines(document(peer_alive=False, peer_phase=None, paths=[path], groups=[group]))
    assert lines[0] == "node1 is up; node2 is not heard"
    assert lines[2] == "  group web: stopped on no node, preferred node1"
    assert lines[5] == "    not ready on node1: r0 is down"
    assert lines[6] == "  path bcast eth0: dead, nothing heard yet; no such interface"
    path |= {"heard_s_ago": 200.0}
    assert "heard 3 min 20 s ago" in cluster_lines(document(paths=[path]))[-5]


@pytest.fixture
def config(make_config: MakeConfig) -> Path:
    return make_config("r0", extra=HEARTBEAT)


@pytest.fixture
def daemon(config: Path) -> Iterator[ScriptedDaemon]:
    with running(config.parent / "run/node1/heartbeat.sock") as daemon:
        daemon.answers["status"] = document()
        yield daemon


def cluster_command(config: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return replicactl("--config", config, "--node", "node1", *args)


def test_cluster(config: Path, daemon: ScriptedDaemon) -> None:
    done = cluster_command(config, "cluster")
    assert (done.returncode, done.stdout, done.stderr) == (0, TEXT, "")
    done = cluster_command(config, "cluster", "--json")
    assert json.loads(done.stdout) == document()


def test_failures_are_forgotten_on_request(config: Path, daemon: ScriptedDaemon) -> None:
    done = cluster_command(config, "cluster", "--clear")
    assert (done.returncode, done.stderr) == (0, "")
    assert [verb for verb, _ in daemon.requests] == ["clear", "status"]


def test_cluster_without_a_daemon(config: Path) -> None:
    done = cluster_command(config, "cluster")
    assert done.returncode == 1
    assert done.stderr == (
        f"replicactl: replica-heartbeat is not running on node1 (nobody serves {config.parent}/run/node1/"
        "heartbeat.sock): "
        "start it with `systemctl start replica-heartbeat` or `replica-heartbeat`\n"
    )


def test_cluster_of_heartbeats_directory(make_config: MakeConfig) -> None:
    config = make_config()
    folder = config.parent / "ha.d"
    folder.mkdir()
    (folder / "ha.cf").write_text("node node1 node2\nbcast eth0\ndeadtime 5\n")
    (folder / "haresources").write_text("")
    with running(config.parent / "run/node1/heartbeat.sock") as daemon:
        daemon.answers["status"] = document()
        done = cluster_command(config, "cluster", "--ha-dir", str(folder))
        assert (done.returncode, done.stdout) == (0, TEXT)
        done = cluster_command(config, "standby", "--ha-dir", str(folder))
        assert done.returncode == 0
    assert [verb for verb, _ in daemon.requests] == ["status", "standby"]


def test_cluster_without_a_cluster(make_config: MakeConfig) -> None:
    file = make_config()
    done = cluster_command(file, "cluster")
    assert done.returncode == 1
    assert done.stderr.startswith(f"replicactl: {file}: there is no [heartbeat]: describe")


def _watch(config: Path, *args: str) -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-m",
        "replica.cli",
        "--config",
        str(config),
        "--node",
        "node1",
        "cluster",
        "--watch",
        *args,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_watching_shows_what_has_changed(config: Path, daemon: ScriptedDaemon) -> None:
    later = document(uptime_s=14.0, sentence="node2 is silent for 2.6 s.", peer_alive=False)
    later["paths"][0]["heard_s_ago"] = 2.6
    daemon.events = [document(), document(uptime_s=13.0), later]
    with _watch(config) as watching:
        assert watching.stdout is not None
        lines = [watching.stdout.readline().split(" ", 1)[1] for _ in range(16)]
        watching.terminate()
    assert lines[0] == "node1 is up; node2 is up\n"
    assert lines[9] == "path ucast lo 127.0.0.2: up\n"
    assert lines[14:] == ["node1 is up; node2 is not heard\n", "node2 is silent for 2.6 s.\n"]


def test_watching_as_json(config: Path, daemon: ScriptedDaemon) -> None:
    daemon.events = [document(), document(uptime_s=13.0), document(peer_alive=False)]
    with _watch(config, "--json") as watching:
        assert watching.stdout is not None
        first, second = (json.loads(watching.stdout.readline()) for _ in range(2))
        watching.terminate()
    assert (first, second["peer_alive"]) == (document(), False)


def test_watching_on_a_terminal(config: Path, daemon: ScriptedDaemon) -> None:
    daemon.events = [document()]
    control, terminal = pty.openpty()
    command = [sys.executable, "-m", "replica.cli", "--config", str(config), "--node", "node1", "cluster", "--watch"]
    with subprocess.Popen(command, stdout=terminal, env={**os.environ, "COLUMNS": "120"}) as watching:
        os.close(terminal)
        shown = b""
        while b"lsb postfix: stopped" not in shown:
            shown += os.read(control, 4096)
        watching.terminate()
    os.close(control)
    assert b"group web: started on node1" in shown


# ── switching over ────────────────────────────────────────────────────────────────────────────────────────────────


class _Mover(ScriptedDaemon):
    """Tells two steps before it answers."""

    async def handle(self, verb: str, args: dict[str, Any], send_event: Any) -> Any:
        if verb in ("standby", "takeover-node"):
            await send_event({"done": "web released"})
            await send_event({"done": "web acquired by node2"})
        return await super().handle(verb, args, send_event)


@pytest.fixture
def mover(config: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedDaemon]:
    monkeypatch.setattr("tests.unit.scripted_daemon.ScriptedDaemon", _Mover)
    with running(config.parent / "run/node1/heartbeat.sock") as daemon:
        daemon.answers["status"] = document()
        yield daemon


STEPS = "web released\nweb acquired by node2\n"


@pytest.mark.parametrize(
    ("args", "request_"),
    [
        (("standby",), ("standby", {"which": "all"})),
        (("standby", "local", "--timeout", "20"), ("standby", {"which": "local"})),
        (("standby", "foreign"), ("standby", {"which": "foreign"})),
        (("standby", "failback"), ("standby", {"which": "failback"})),
        (("takeover-node",), ("takeover-node", {})),
    ],
)
def test_moving(
    config: Path, mover: ScriptedDaemon, args: tuple[str, ...], request_: tuple[str, dict[str, Any]]
) -> None:
    done = cluster_command(config, *args)
    assert (done.returncode, done.stdout, done.stderr) == (0, STEPS, "")
    assert mover.requests == [request_]


def test_moving_refused(config: Path, daemon: ScriptedDaemon) -> None:
    daemon.answers["standby"] = ReplicaError("node2 cannot take web: its copy of r0 is Inconsistent.")
    done = cluster_command(config, "standby")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "replicactl: node2 cannot take web: its copy of r0 is Inconsistent.\n"
    done = cluster_command(config, "standby", "some")
    assert done.returncode == 2
    assert "invalid choice: 'some'" in done.stderr


# ── Heartbeat's own commands ──────────────────────────────────────────────────────────────────────────────────────


def tool(config: Path, name: str, *args: str) -> subprocess.CompletedProcess[str]:
    function = name.removeprefix("hb_")
    code = f"import sys; from replica.heartbeat.tools import {function}; sys.exit({function}())"
    env = {**os.environ, "REPLICA_CONFIG": str(config), "REPLICA_NODE": "node1"}
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=env)


@pytest.mark.parametrize(
    ("words", "request_"),
    [
        (("hb_standby",), ("standby", {"which": "all"})),
        (("hb_standby", "failback"), ("standby", {"which": "failback"})),
        (("hb_takeover",), ("takeover-node", {})),
        (("hb_takeover", "all"), ("takeover-node", {})),
    ],
)
def test_hb_commands(
    config: Path, mover: ScriptedDaemon, words: tuple[str, ...], request_: tuple[str, dict[str, Any]]
) -> None:
    done = tool(config, *words)
    assert (done.returncode, done.stdout, done.stderr) == (0, STEPS, "")
    assert mover.requests == [request_]


def test_hb_commands_used_wrongly(config: Path, daemon: ScriptedDaemon) -> None:
    for words in (("hb_standby", "some"), ("hb_takeover", "all", "all")):
        done = tool(config, *words)
        assert (done.returncode, done.stderr) == (1, f"usage: {words[0]} [all|foreign|local|failback]\n")
    done = tool(config, "hb_takeover", "local")
    assert done.returncode == 1
    assert done.stderr == "hb_takeover: only all groups are taken over: run `hb_standby` on node2 for local ones\n"
    assert daemon.requests == []


CL_STATUS = [
    ("hbstatus", "Heartbeat is running on this machine.\n"),
    ("listnodes", "node1\nnode2\n10.2.0.1\n"),
    ("listnodes -n", "node1\nnode2\n"),
    ("listnodes -p", "10.2.0.1\n"),
    ("listnodes -m -p", "The nodes are as follow:\n\t10.2.0.1\n"),
    (
        "listnodes -v",
        "node1\tactive\t(nodetype: normal)\n\tlo\tup\nnode2\tactive\t(nodetype: normal)\n\tlo\tup\n"
        "10.2.0.1\tping\t(nodetype: ping)\n\t10.2.0.1\tup\n",
    ),
    ("nodestatus node2", "active\n"),
    ("nodestatus -m node2", "The cluster node node2 is active.\n"),
    ("nodetype 10.2.0.1", "ping\n"),
    ("listhblinks node2", "lo\n"),
    ("hblinkstatus node2 lo", "up\n"),
    ("hblinkstatus -m node2 lo", "The node node2's heartbeat link lo is up.\n"),
    ("rscstatus", "all\n"),
    ("rscstatus -m", "This node is holding all resources.\n"),
    ("hbparameter -p deadtime", "5\n"),
    ("parameter -p auto_failback", "on\n"),
    ("parameter -m -p logfile", "Heartbeat parameter logfile's value: /var/log/heartbeat.log\n"),
]


@pytest.mark.parametrize(("words", "answer"), CL_STATUS)
def test_cl_status(config: Path, daemon: ScriptedDaemon, words: str, answer: str) -> None:
    done = tool(config, "cl_status", *words.split())
    assert (done.returncode, done.stdout, done.stderr) == (0, answer, "")


@pytest.mark.parametrize(
    ("holders", "held"),
    [
        (("node1", "node2"), "local"),
        (("node2", "node1"), "foreign"),
        (("node2", None), "none"),
        (("node1", "node1"), "all"),
    ],
)
def test_which_resources_are_held(config: Path, daemon: ScriptedDaemon, holders: tuple[str, str], held: str) -> None:
    status = document()
    for group, holder in zip(status["groups"], holders, strict=True):
        group["holder"] = holder
    daemon.answers["status"] = status
    assert tool(config, "cl_status", "rscstatus").stdout == f"{held}\n"


def test_cl_status_of_what_is_not_there(config: Path, daemon: ScriptedDaemon) -> None:
    daemon.answers["status"] = document(peer_alive=False, paths=[{"name": "x", "state": "dead"}])
    assert tool(config, "cl_status", "nodestatus", "node2").stdout == "dead\n"
    assert tool(config, "cl_status", "hblinkstatus", "node2", "lo").stdout == "dead\n"
    for words, code in (
        (("nodestatus", "node3"), 1),
        (("hblinkstatus", "node2", "eth9"), 1),
        (("parameter", "-p", "nothing"), 1),
        (("nodestatus",), 11),
        (("bogus",), 11),
    ):
        done = tool(config, "cl_status", *words)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
        assert done.stderr.startswith("cl_status: ")


def test_cl_status_without_a_daemon(config: Path) -> None:
    done = tool(config, "cl_status", "hbstatus")
    assert (done.returncode, done.stdout) == (1, "Heartbeat is stopped on this machine.\n")
    done = tool(config, "cl_status", "listnodes")
    assert done.returncode == 1
    assert "replica-heartbeat is not running on node1" in done.stderr
    assert tool(config, "cl_status").stdout.startswith("Usage: cl_status <sub-command>")
