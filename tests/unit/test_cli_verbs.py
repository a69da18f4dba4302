"""The form of the command line, its exit codes, and the commands that only pass a verb on."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from replica import cli
from replica.errors import ReplicaError
from tests.unit.scripted_daemon import replicactl, running, status

MakeConfig = Callable[..., Path]


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ([], "required: COMMAND"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["promote", "--forc"], "unrecognized arguments: --forc"),
        (["promote", "r0", "r1"], "unrecognized arguments: r1"),
        (["wait-sync", "--timeout", "soon"], "must be a positive number of seconds, not 'soon'"),
        (["wait-connect", "--timeout", "-1"], "must be a positive number of seconds, not '-1'"),
        (["create-md", "--size", "1Q"], "must be a size in bytes"),
        (["create-md", "--size", "5000"], "must be a positive multiple of 4096 bytes, not '5000'"),
        (["--config"], "--config: expected one argument"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(args: list[str], part: str) -> None:
    done = replicactl(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert part in done.stderr
    assert done.stderr.startswith("replicactl")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", [None, *cli.VERBS])
def test_every_command_has_help(verb: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"] if verb else ["--help"])
    assert caught.value.code == 0
    assert "--config" in capsys.readouterr().out


@pytest.mark.parametrize(
    "before", [[], ["--node", "status"], ["--config=status"], ["--config", "status", "--node=certs"]]
)
def test_only_the_command_that_is_run_is_imported(before: list[str]) -> None:
    """A failover by hand waits for the start of `replicactl`."""
    script = "import sys; from replica import cli; cli.main(); print(*(name for name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script, *before, "secret"], capture_output=True, text=True, check=True, timeout=60
    )
    imported = {name for name in done.stdout.split() if name.startswith("replica.cli.") and "._" not in name}
    assert imported == {"replica.cli.secret"}


def test_the_secret_is_new_each_time() -> None:
    first, second = replicactl("secret"), replicactl("secret")
    assert (first.returncode, first.stderr) == (0, "")
    assert re.fullmatch(r"[0-9a-f]{64}\n", first.stdout)
    assert first.stdout != second.stdout


def test_a_wrong_configuration_is_one_sentence_and_exit_code_1(make_config: MakeConfig) -> None:
    file = make_config(extra="[resource.r1]\nport = 0\n")
    done = replicactl("--config", file, "--node", "node1", "promote", "r0")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"replicactl: {file}:\d+: resource\.r1\.port: must be .*\n", done.stderr)


def test_no_daemon_is_one_sentence_and_exit_code_1(make_config: MakeConfig) -> None:
    done = replicactl("promote", "r0", "--config", make_config(), "--node", "node1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("replicactl: replicad r0 is not running on this node")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def main(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process as node1; returns exit code, standard output and standard error."""
    monkeypatch.setenv("REPLICA_CONFIG", str(make_config()))
    monkeypatch.setenv("REPLICA_NODE", "node1")

    def run(*args: str) -> tuple[int, str, str]:
        code = cli.main(args)
        return code, *capsys.readouterr()

    return run


VERBS: list[tuple[list[str], dict[str, Any]]] = [
    (["promote"], {"force": False, "peer_is_dead": False}),
    (["promote", "--force"], {"force": True, "peer_is_dead": False}),
    (["promote", "--peer-is-dead"], {"force": False, "peer_is_dead": True}),
    (["demote"], {"force": False}),
    (["demote", "--force"], {"force": True}),
    (["connect"], {"discard_my_data": False}),
    (["connect", "--discard-my-data"], {"discard_my_data": True}),
    *(
        ([verb], {})
        for verb in (
            *("takeover", "disconnect", "attach", "detach", "invalidate", "invalidate-remote"),
            *("outdate", "pause-sync", "resume-sync"),
        )
    ),
]


@pytest.mark.parametrize(("args", "sent"), VERBS, ids=str)
def test_a_verb_reaches_the_daemon(main: Any, short_dir: Path, args: list[str], sent: dict[str, Any]) -> None:
    with running(short_dir / "run/node1/r0.sock") as daemon:
        assert main(*args) == (0, "", "")
        daemon.answers[args[0]] = "r0 did it"
        assert main(args[0], "r0", *args[1:]) == (0, "r0 did it\n", "")
        daemon.answers[args[0]] = ReplicaError("r0 cannot: wait")
        assert main(*args) == (1, "", "replicactl: r0 cannot: wait\n")
    assert daemon.requests == [(args[0], sent)] * 3


def test_global_options_before_and_after_the_verb(
    main: Any, make_config: MakeConfig, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(make_config())
    monkeypatch.setenv("REPLICA_CONFIG", "/nonexistent")
    monkeypatch.setenv("REPLICA_NODE", "nobody")
    with running(short_dir / "run/node2/r0.sock") as daemon:
        assert main("--config", file, "--node", "node2", "disconnect") == (0, "", "")
        assert main("disconnect", "--config", file, "--node", "node2") == (0, "", "")
        assert main("--node", "node2", "disconnect", "r0", "--config", file) == (0, "", "")
    assert len(daemon.requests) == 3


def test_the_resource_must_be_named_when_there_are_several(main: Any, make_config: MakeConfig) -> None:
    make_config("r0", "r1")
    code, out, err = main("promote")
    assert (code, out) == (1, "")
    assert "has several resources: name one of r0, r1" in err
    assert "there is no [resource.r3]" in main("promote", "r3")[2]


def test_facts_for_scripts(main: Any, short_dir: Path) -> None:
    with running(short_dir / "run/node1/r0.sock") as daemon:
        daemon.answers["status"] = status(volume={"peer_disk": "Outdated"}, connection="Connecting")
        assert main("role") == (0, "Primary/Secondary\n", "")
        assert main("cstate") == (0, "Connecting\n", "")
        assert main("dstate", "r0") == (0, "UpToDate/Outdated\n", "")


def test_a_fault_of_the_command_shows_no_traceback(main: Any, short_dir: Path) -> None:
    with running(short_dir / "run/node1/r0.sock") as daemon:
        daemon.answers["status"] = {"no": "status"}
        code, out, err = main("role")
    assert (code, out) == (1, "")
    assert err == ("replicactl: this is a fault of replicactl itself (KeyError: 'role'): REPLICA_DEBUG=1 shows where\n")


def test_an_interrupt_is_silent_and_exit_code_130(make_config: MakeConfig, short_dir: Path) -> None:
    with running(short_dir / "run/node1/r0.sock") as daemon:
        daemon.events = [status()]
        command = [sys.executable, "-m", "replica.cli", "status", "--watch"]
        environment = os.environ | {"REPLICA_CONFIG": str(make_config()), "REPLICA_NODE": "node1"}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("r0 node1: Primary")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "")


def test_a_reader_that_has_enough_is_no_error(make_config: MakeConfig) -> None:
    command = f"{sys.executable} -m replica.cli secret | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.strip() in ("0", "1")
    assert done.stderr == ""
