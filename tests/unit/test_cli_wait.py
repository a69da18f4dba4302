"""``replicactl wait-connect`` and ``wait-sync``."""

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.scripted_daemon import replicactl, running, status, syncing

MakeConfig = Callable[..., Path]

CONNECTING = status(connection="Connecting", replication="Off", last_error="connection refused")
STANDALONE = status(connection="StandAlone", replication="Off", last_error="split brain")
NEW_PAIR = status(volume={"disk": "Inconsistent", "peer_disk": "Inconsistent"})


@pytest.fixture
def options(make_config: MakeConfig) -> list[str]:
    return ["--config", str(make_config()), "--node", "node1"]


@pytest.mark.parametrize(
    ("verb", "events"),
    [
        ("wait-connect", [status()]),
        ("wait-connect", [CONNECTING, CONNECTING, syncing(1.0)]),
        ("wait-sync", [status()]),
        ("wait-sync", [CONNECTING, NEW_PAIR, syncing(1.0), syncing(99.9), status()]),
    ],
)
def test_it_waits_until_the_state_is_there(
    options: list[str], short_dir: Path, verb: str, events: list[dict[str, Any]]
) -> None:
    with running(short_dir / "run/node1/r0.sock") as daemon:
        daemon.events = events
        done = replicactl(verb, "r0", *options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("verb", "last", "sentence"),
    [
        ("wait-connect", CONNECTING, "not connected after 0.3 s (Connecting, Off (connection refused)): see"),
        ("wait-sync", syncing(50.0), "r0 is not in sync after 0.3 s (Connected, SyncSource): see"),
        ("wait-sync", NEW_PAIR, "r0 is not in sync after 0.3 s (Connected, Established): see"),
    ],
)
def test_a_timeout_says_what_the_state_is(
    options: list[str], short_dir: Path, verb: str, last: dict[str, Any], sentence: str
) -> None:
    with running(short_dir / "run/node1/r0.sock") as daemon:
        daemon.events = [last]
        done = replicactl(verb, *options, "--timeout", "0.3")
    assert (done.returncode, done.stdout) == (1, "")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", ["wait-connect", "wait-sync"])
def test_what_cannot_come_is_not_waited_for(options: list[str], short_dir: Path, verb: str) -> None:
    done = replicactl(verb, *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert "is not running" in done.stderr
    with running(short_dir / "run/node1/r0.sock") as daemon:
        daemon.events = [CONNECTING, STANDALONE]
        done = replicactl(verb, *options)
        assert (done.returncode, done.stdout) == (1, "")
        assert "r0 is StandAlone (split brain)" in done.stderr
        assert "replicactl connect r0" in done.stderr
        daemon.events, daemon.ends = [CONNECTING], True
        done = replicactl(verb, *options)
        assert (done.returncode, done.stdout) == (1, "")
        assert "replicad r0 stopped before it was" in done.stderr


def test_wait_sync_shows_a_bar_on_a_terminal(options: list[str], short_dir: Path) -> None:
    ours, theirs = pty.openpty()
    with running(short_dir / "run/node1/r0.sock") as daemon:
        daemon.events = [syncing(43.0), status()]
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "150"}
        command = [sys.executable, "-m", "replica.cli", "wait-sync", *options]
        done = subprocess.run(command, stderr=theirs, env=environment, timeout=30, check=False)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:
            break
    os.close(ours)
    assert done.returncode == 0
    assert b"r0 SyncSource" in shown
    assert b"43.0 % done" in shown
