"""``make demo`` as a user runs it: a subprocess, its exit status, its lines, what it leaves behind."""

import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = [sys.executable, "-m", "replica.demo"]
TIMEOUT_S = 100


@pytest.fixture
def environment(short_dir: Path) -> dict[str, str]:
    """The demo makes its folder in TMPDIR, so that a test sees what it left there."""
    return {**os.environ, "TMPDIR": str(short_dir), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    folder = tmp_path_factory.mktemp("d")
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(DEMO, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    print(done.stdout)
    assert list(folder.iterdir()) == [], "the demo left its folder behind"
    return done


def test_every_check_passes(told: subprocess.CompletedProcess[str]) -> None:
    assert told.returncode == 0, told.stdout
    assert told.stderr == ""
    assert re.search(r"^All 10 checks passed in \d+ s\.$", told.stdout, re.MULTILINE)
    assert len(re.findall(r"^   ✓ ", told.stdout, re.MULTILINE)) == 10


@pytest.mark.parametrize(
    "line",
    [
        r"\$ replicactl --node node1 promote --force r0",
        r"node1 is dead: \d{4,} writes acknowledged, \d+ under way",
        r"every acknowledged write is on node2 \(read back from \d+ blocks\); of the \d+ under way (none|\d+) had",
        r"in sync again: copied \d+\.\d MiB of 1\.0 GiB \(\d\.\d%\)",
        r"the two images are the same, byte for byte, after the crash",
        r"\$ replicactl --node node1 takeover r0",
        r"the client waited \d+\.\d\d s at most, saw no error and misses no write",
    ],
)
def test_it_tells_what_was_proven(told: subprocess.CompletedProcess[str], line: str) -> None:
    assert re.search(line, told.stdout), told.stdout


def test_a_planned_switchover_needs_no_resync(told: subprocess.CompletedProcess[str]) -> None:
    assert "node1 is Primary without a resync" in told.stdout


def test_plain_text_without_a_terminal(told: subprocess.CompletedProcess[str]) -> None:
    assert "\x1b" not in told.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_stops_both_nodes_and_cleans_up(
    environment: dict[str, str], short_dir: Path, number: signal.Signals
) -> None:
    with subprocess.Popen(DEMO, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "wait-connect" in line:  # both daemons run
                break
        processes = _processes_of(short_dir)
        demo.send_signal(number)
        rest = demo.stdout.read()
        assert demo.wait(30) == 130
    assert len(processes) == 2
    assert "Interrupted: stopping both nodes." in rest
    assert _processes_of(short_dir) == []
    assert list(short_dir.iterdir()) == []


def test_a_failed_check_is_said_and_the_folder_is_kept(environment: dict[str, str], short_dir: Path) -> None:
    with subprocess.Popen(DEMO, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "wait-connect" in line:
                break
        for process in _processes_of(short_dir):
            ended = os.pidfd_open(process)
            os.kill(process, signal.SIGKILL)
            select.select([ended], [], [])
            os.close(ended)
        rest = demo.stdout.read()
        assert demo.wait(60) == 1
    (folder,) = short_dir.iterdir()
    assert re.search(r"^   ✗ .+", rest, re.MULTILINE), rest
    assert f"The logs are {folder}/node1.log and {folder}/node2.log" in rest
    assert (folder / "node1.log").exists()


def _processes_of(folder: Path) -> list[int]:
    """The replicad processes whose configuration is below ``folder``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command, variables = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            except OSError:
                continue
            if b"replica.daemon" in command and f"REPLICA_CONFIG={folder}/".encode() in variables:
                found.append(int(entry.name))
    return found
