"""``replicactl status``: the words, the JSON, and watching."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from replica.cli._status_text import bytes_text, duration_text, status_lines
from tests.unit.scripted_daemon import replicactl, running, status, syncing

MakeConfig = Callable[..., Path]


def test_a_healthy_resource_is_one_line() -> None:
    assert status_lines(status()) == [
        "r0 node1: Primary, Connected to node2 (Secondary), Established; disk UpToDate / peer UpToDate; 1.0 GiB"
    ]


def test_a_sync_has_a_line_of_progress() -> None:
    assert status_lines(syncing(43.25)) == [
        "r0 node1: Primary, Connected to node2 (Secondary), SyncSource; disk UpToDate / peer Inconsistent; 1.0 GiB",
        "  SyncSource: 43.2 % done, 581.1 MiB to go, 80.0 MiB/s, about 3 min 20 s left",
    ]
    paused = syncing(50.0)
    paused["volumes"][0] |= {"eta_seconds": None, "resync_rate_bytes_s": None}
    assert status_lines(paused)[1] == "  SyncSource: 50.0 % done, 512.0 MiB to go"


def test_a_lost_peer_and_what_it_lacks() -> None:
    volume = {"out_of_sync_bytes": 4096, "peer_disk": "DUnknown"}
    lost = status(volume=volume, connection="Connecting", replication="Off", last_error="connection refused")
    assert status_lines(lost) == [
        "r0 node1: Primary, Connecting to node2; disk UpToDate / peer DUnknown; 1.0 GiB; 4.0 KiB out of sync",
        "  last error: connection refused",
    ]
    alone = status(connection="StandAlone", replication="Off", role="Secondary")
    assert status_lines(alone)[0].startswith("r0 node1: Secondary, StandAlone; disk")


def test_a_verification_has_a_line() -> None:
    running_now = {
        **{"done_percent": 43.25, "rate_bytes_s": 80 << 20, "eta_seconds": 8.0, "found_bytes": 0},
        **{"repair": False, "repaired_bytes": 0},
    }
    assert status_lines(status(volume={"verify": running_now, "last_verify": None}))[1] == (
        "  verify: 43.2 % done, 80.0 MiB/s, about 8 s left, nothing found"
    )
    just_begun = running_now | {"done_percent": 0.0, "rate_bytes_s": 0, "eta_seconds": None, "found_bytes": 8192}
    assert status_lines(status(volume={"verify": just_begun}))[1] == "  verify: 0.0 % done, 8.0 KiB found to differ"
    last = {
        **{"seconds_ago": 185.0, "took_seconds": 14.0, "from_bytes": 0, "position_bytes": 1 << 30, "complete": True},
        **{"reason": "", "found_bytes": 12288, "repair": True, "repaired_bytes": 12288},
    }
    assert status_lines(status(volume={"verify": None, "last_verify": last}))[1] == (
        "  last verify: 3 min 5 s ago, 1.0 GiB compared in 14 s, 12.0 KiB found to differ, 12.0 KiB repaired"
    )
    part = last | {"from_bytes": 1 << 20, "complete": False, "reason": "the cable was cut", "position_bytes": 3 << 20}
    assert status_lines(status(volume={"last_verify": part}))[1].endswith(
        "2.0 MiB from 1.0 MiB on compared in 14 s, 12.0 KiB found to differ, 12.0 KiB repaired, "
        "not complete: the cable was cut (go on with --from 3145728)"
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1.5 * 2**40, "1.5 TiB"), (2**63, "8192.0 PiB")],
)
def test_bytes(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.7, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_status_of_all_or_of_one(make_config: MakeConfig, short_dir: Path) -> None:
    options = ["--config", make_config("r0", "r1"), "--node", "node1"]
    with running(short_dir / "run/node1/r0.sock") as r0, running(short_dir / "run/node1/r1.sock") as r1:
        r0.answers["status"], r1.answers["status"] = status(), status("r1")
        both = replicactl("status", *options)
        assert (both.returncode, both.stderr) == (0, "")
        assert [line[:10] for line in both.stdout.splitlines()] == ["r0 node1: ", "r1 node1: "]
        one = replicactl("status", "r1", *options)
        assert one.stdout.splitlines() == both.stdout.splitlines()[1:]
        documents = json.loads(replicactl("status", "--json", *options).stdout)
        assert documents == [status(), status("r1")]
        unknown = replicactl("status", "r2", *options)
        assert (unknown.returncode, unknown.stdout) == (1, "")


def test_a_daemon_that_is_down_is_said_and_exit_code_1(make_config: MakeConfig, short_dir: Path) -> None:
    options = ["--config", make_config("r0", "r1"), "--node", "node1"]
    with running(short_dir / "run/node1/r1.sock") as r1:
        r1.answers["status"] = status("r1")
        done = replicactl("status", *options)
        assert done.returncode == 1
        assert done.stdout.startswith("r1 node1: Primary")
        assert done.stderr.startswith("replicactl: r0 node1: replicad r0 is not running on this node")
        assert done.stderr.count("\n") == 1
        assert replicactl("status", "r1", *options).returncode == 0
        done = replicactl("status", "--json", *options)
        down, up = json.loads(done.stdout)
        assert (done.returncode, up) == (1, status("r1"))
        assert down.keys() == {"name", "node", "error"}


def test_status_needs_no_secret(make_config: MakeConfig, short_dir: Path) -> None:
    options = ["--config", make_config(), "--node", "node1"]
    (short_dir / "cluster.key").unlink()
    with running(short_dir / "run/node1/r0.sock") as daemon:
        daemon.answers["status"] = status()
        assert replicactl("status", *options).returncode == 0


def watch(*args: str | Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "replica.cli", "status", "--watch", *map(str, args)]
    return subprocess.Popen(command, text=True, **options)


def test_watching_into_a_pipe_is_a_line_for_each_change(make_config: MakeConfig, short_dir: Path) -> None:
    file = make_config()
    with running(short_dir / "run/node1/r0.sock") as daemon:
        daemon.events = [status(), status(), syncing(10.0), status()]
        with watch("--config", file, "--node", "node1", stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(3)]
            process.terminate()
    healthy = status_lines(status())[0] + "\n"
    assert (lines[0], lines[2]) == (healthy, healthy)
    assert "1.0 GiB; SyncSource: 10.0 % done" in lines[1]


def test_watching_goes_on_over_a_restart_of_the_daemon(make_config: MakeConfig, short_dir: Path) -> None:
    file, socket = make_config(), short_dir / "run/node1/r0.sock"
    with watch("--json", "--config", file, "--node", "node1", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        documents = map(json.loads, process.stdout)
        assert "is not running" in next(documents)["error"]
        with running(socket) as daemon:
            daemon.events = [status()]
            assert next(documents) == status()
        assert "error" in next(documents)
        with running(socket) as daemon:
            daemon.events = [status()]
            assert status() in documents
        process.terminate()


def terminal_output(descriptor: int) -> Iterator[str]:
    """Everything shown on the pseudo-terminal so far, each time there is more, until it is closed."""
    shown = ""
    while True:
        try:
            shown += os.read(descriptor, 4096).decode(errors="replace")
        except OSError:
            return
        yield shown


def test_watching_on_a_terminal_is_redrawn(make_config: MakeConfig, short_dir: Path) -> None:
    file = make_config()
    ours, theirs = pty.openpty()
    with running(short_dir / "run/node1/r0.sock") as daemon:
        daemon.events = [syncing(10.0), status(role="Secondary")]
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "150"}
        with watch("--config", file, "--node", "node1", stdout=theirs, env=environment) as process:
            os.close(theirs)
            assert any("SyncSource: 10.0 %" in text and "Secondary, C" in text for text in terminal_output(ours))
            process.terminate()
    os.close(ours)
