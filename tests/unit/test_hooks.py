"""Hooks: what they are told, their queue, and the processes that they are on this machine."""

import asyncio
import fcntl
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from replica import programs
from replica.config import Config, load_config
from replica.hooks import MAX_TIMEOUT_S, MAX_WAITING, Event, Hooks, HookSettings, environment
from replica.resource import Resource
from replica.runtime import HostRuntime
from replica.session import HANDSHAKE_TIMEOUT_S
from replica.states import Role
from tests.processes import StuckProgram, gone

#: Longer than anything here takes.
PATIENCE_S = 30.0


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test on the loop that the daemon uses."""

    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await test()

    uvloop.run(bounded())


class Script:
    """A shell script that is a hook, and what it has printed."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.lines: list[str] = []
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    async def run(self, *arguments: str, timeout_s: float = PATIENCE_S, **variables: str) -> str:
        return (await programs.run([str(self.path), *arguments], variables, timeout_s, self.lines.append)).problem


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Script]:
    return lambda text: Script(tmp_path / "hook", text)


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[int]:
    """The descriptor of the FIFO "fifo": open at both ends, so that whoever opens it does not wait."""
    os.mkfifo(tmp_path / "fifo")
    descriptor = os.open(tmp_path / "fifo", os.O_RDWR | os.O_NONBLOCK)
    yield descriptor
    os.close(descriptor)


async def readable(descriptor: int) -> None:
    """Return when something can be read."""
    there = asyncio.Event()
    asyncio.get_running_loop().add_reader(descriptor, there.set)
    await there.wait()
    asyncio.get_running_loop().remove_reader(descriptor)


# ── what a hook is told ──────────────────────────────────────────────────────────────────────────────────────────

STATUS = {
    "name": "r0",
    "node": "node1",
    "role": "Primary",
    "connection": "Connected",
    "replication": "SyncSource",
    "peer": {"name": "node2", "address": "192.0.2.2", "role": "Secondary", "disk": "Inconsistent"},
    "volumes": [{"disk": "UpToDate", "peer_disk": "Inconsistent", "size_bytes": 1 << 30, "backing": "/dev/vg0/r0"}],
}


def test_the_environment_of_an_event() -> None:
    reason = "the data of node2 are older:\n\0node2 is\x1b[31m synced."
    assert environment(Event.PEER_LOST, reason, STATUS, cluster="web", config_path="/etc/replica/replica.toml") == {
        "REPLICA_EVENT": "peer-lost",
        "REPLICA_CLUSTER": "web",
        "REPLICA_RESOURCE": "r0",
        "REPLICA_NODE": "node1",
        "REPLICA_PEER": "node2",
        "REPLICA_PEER_ADDRESS": "192.0.2.2",
        "REPLICA_ROLE": "Primary",
        "REPLICA_PEER_ROLE": "Secondary",
        "REPLICA_CONNECTION": "Connected",
        "REPLICA_REPLICATION": "SyncSource",
        "REPLICA_DISK": "UpToDate",
        "REPLICA_PEER_DISK": "Inconsistent",
        "REPLICA_BACKING": "/dev/vg0/r0",
        "REPLICA_SIZE_BYTES": "1073741824",
        "REPLICA_REASON": "the data of node2 are older:  node2 is [31m synced.",
        "REPLICA_CONFIG": "/etc/replica/replica.toml",
    }


def test_the_longest_hook_and_its_end_fit_into_the_handshake_that_waits_for_it() -> None:
    assert MAX_TIMEOUT_S + 2 * programs.GRACE_S < HANDSHAKE_TIMEOUT_S


# ── the process ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "problem"), [("exit 0", ""), ("exit 3", "returned 3"), ("kill -9 $$", "was ended by signal 9")]
)
def test_how_it_ends(script: Callable[[str], Script], text: str, problem: str) -> None:
    async def test() -> None:
        assert await script(text).run() == problem

    run(test)


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (lambda path: path.unlink(), "No such file or directory"),
        (lambda path: path.write_text("#!/no/such/shell\n"), "No such file or directory"),
        (lambda path: path.write_text("no program\n"), "Exec format error"),
        (lambda path: path.chmod(0o644), "Permission denied"),
    ],
)
def test_what_cannot_be_started_is_one_clause(
    script: Callable[[str], Script], prepare: Callable[[Path], None], why: str
) -> None:
    async def test() -> None:
        hook = script("exit 0")
        prepare(hook.path)
        assert await hook.run() == f"cannot be started ({hook.path}: {why})"

    run(test)


def test_it_gets_its_arguments_and_variables_and_little_else(
    script: Callable[[str], Script], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_DAEMON", "x")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("HOME", "/root")
    monkeypatch.delenv("LANG", raising=False)

    async def test() -> None:
        hook = script(
            'echo "$# $1"; pwd; readlink /proc/self/fd/0; env | grep -v -e ^PWD= -e ^SHLVL= -e ^_= -e ^OLDPWD='
        )
        assert await hook.run("a b", REPLICA_EVENT="promoted") == ""
        assert hook.lines[:3] == ["1 a b", "/", "/dev/null"]
        assert sorted(hook.lines[3:]) == ["HOME=/root", "LANG=C.UTF-8", "PATH=/usr/bin:/bin", "REPLICA_EVENT=promoted"]

    run(test)


def test_it_inherits_no_descriptor_and_no_signal_setting_and_has_a_session_of_its_own(
    script: Callable[[str], Script], tmp_path: Path
) -> None:
    """Even a descriptor that the daemon would pass on by mistake; a lock would live on with it."""
    with (tmp_path / "locked").open("w") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        os.set_inheritable(locked.fileno(), True)

        async def test() -> None:
            # grep in the shell's place: a shell that waits for a child plays with its own signal mask
            hook = script(
                "ls /proc/$$/fd; echo $$ $(cut -d' ' -f5,6 /proc/$$/stat)\n"
                "exec grep -e SigBlk -e SigIgn /proc/self/status"
            )
            assert await hook.run() == ""
            *descriptors, identities, blocked, ignored = hook.lines
            # 10: dash reads the script through it
            assert {"0", "1", "2"} <= set(descriptors) <= {"0", "1", "2", "10", "255"}
            assert len(set(identities.split())) == 1  # process, group and session
            # All but 32 and 33: the C library keeps them to itself, and make's children have them ignored.
            masks = [int(line.split()[1], 16) & ~(3 << 31) for line in (blocked, ignored)]
            assert masks == [0, 0], (blocked, ignored)

        run(test)


def test_one_that_runs_too_long_is_killed_with_its_children(script: Callable[[str], Script]) -> None:
    async def test() -> None:
        hook = script("trap '' TERM\n(trap '' TERM; echo child; sleep 1000) &\necho $! $$\nwait; sleep 1000")
        assert await hook.run(timeout_s=0.5) == "ran longer than 0.5 s and was killed"
        pids = next(line for line in hook.lines if line != "child")
        for pid in pids.split():
            gone(int(pid))

    run(test)


def test_one_that_runs_too_long_may_tidy_up(script: Callable[[str], Script]) -> None:
    async def test() -> None:
        hook = script("trap 'echo tidied; exit 0' TERM\nsleep 1000 & wait")
        assert await hook.run(timeout_s=0.5) == "ran longer than 0.5 s and was killed"
        assert hook.lines == ["tidied"]

    run(test)


def test_when_nobody_waits_for_it_any_more_it_is_ended(
    script: Callable[[str], Script], tmp_path: Path, fifo: int
) -> None:
    async def test() -> None:
        task = asyncio.create_task(script(f"echo $$ > {tmp_path}/fifo; exec sleep 1000").run())
        await readable(fifo)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gone(int(os.read(fifo, 100)))

    run(test)


def test_what_it_leaves_in_the_background_is_left_alone_and_not_waited_for(
    script: Callable[[str], Script], tmp_path: Path, fifo: int
) -> None:
    async def test() -> None:
        hook = script(f"(read line < {tmp_path}/go; echo $line > {tmp_path}/fifo) & echo started")
        os.mkfifo(tmp_path / "go")
        assert await hook.run() == ""
        assert hook.lines == ["started"]
        with (tmp_path / "go").open("w") as go:
            go.write("alive\n")
        await readable(fifo)
        assert os.read(fifo, 100) == b"alive\n"

    run(test)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("echo one; echo; printf 'two\\r\\n'; echo three >&2; printf four", ["one", "two", "three", "four"]),
        ("seq 64", [str(n) for n in range(1, 65)]),
        ("seq 65", [*(str(n) for n in range(1, 65)), "(the rest of its output is not logged)"]),
        ("head -c 9000 /dev/zero | tr '\\0' x", ["x" * 8192, "(the rest of its output is not logged)"]),
        ("printf 'a\\377b\\n'", ["a\ufffdb"]),
    ],
)
def test_what_it_prints_is_taken_line_by_line_up_to_a_limit(
    script: Callable[[str], Script], text: str, lines: list[str]
) -> None:
    async def test() -> None:
        hook = script(text)
        assert await hook.run() == ""
        assert hook.lines == lines

    run(test)


def test_one_that_prints_without_end_comes_to_its_own_end(script: Callable[[str], Script]) -> None:
    async def test() -> None:
        hook = script("head -c 4000000 /dev/zero | tr '\\0' '\\n'; yes | head -n 1000000; exit 7")
        assert await hook.run() == "returned 7"
        assert len(hook.lines) == programs.MAX_LINES + 1 or hook.lines == ["(the rest of its output is not logged)"]

    run(test)


def test_one_whose_start_hangs_does_not_hold_the_event_loop(script: Callable[[str], Script]) -> None:
    async def test() -> None:
        hook = script("echo started")
        stuck = StuckProgram(hook.path)
        task = asyncio.create_task(hook.run())
        await readable(stuck.asked)  # the loop turns while exec waits
        assert not task.done()
        stuck.release()
        assert await task == ""
        assert hook.lines == ["started"]

    run(test)


def test_many_may_be_started_at_the_same_moment(script: Callable[[str], Script], tmp_path: Path) -> None:
    """Only starts that were given up are limited in number: all the monitors of a node may be due at once."""

    async def test() -> None:
        slow, other = script("exit 0"), Script(tmp_path / "other", "exit 0")
        stuck = StuckProgram(slow.path)
        starting = [asyncio.create_task(slow.run()) for _ in range(programs.MAX_HANGING)]
        await readable(stuck.asked)
        assert await other.run() == ""
        stuck.release()
        assert await asyncio.gather(*starting) == [""] * programs.MAX_HANGING

    run(test)


def test_one_without_a_time_limit_is_ended_by_cancelling_its_caller(
    script: Callable[[str], Script], tmp_path: Path, fifo: int
) -> None:
    async def test() -> None:
        hook = script(f"echo $$ > {tmp_path}/fifo; exec sleep 1000")
        task = asyncio.create_task(programs.run([str(hook.path)], {}, None, hook.lines.append))
        await readable(fifo)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gone(int(os.read(fifo, 100)))

    run(test)


def test_starts_that_hang_are_given_up_in_time_and_do_not_add_up(
    script: Callable[[str], Script], tmp_path: Path, fifo: int
) -> None:
    async def test() -> None:
        hook = script(f"echo $$ > {tmp_path}/fifo; exec sleep 1000")
        stuck = StuckProgram(hook.path)
        for _ in range(programs.MAX_HANGING):
            assert await hook.run(timeout_s=0.1) == "could not be started within 0.1 s"
        assert "hang in their start" in await hook.run(timeout_s=0.1)
        stuck.release()
        for thread in list(programs._given_up):
            await asyncio.to_thread(thread.join)
        # What began to run after all was ended at once.
        os.write(fifo, b"\n")
        for pid in os.read(fifo, 1000).split():
            gone(int(pid))
        assert await Script(hook.path, "exit 0").run() == ""

    run(test)


# ── the queue ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def config(make_config: Callable[..., Path]) -> Config:
    return load_config(make_config(), "node1")


def hooks_of(config: Config, timeout_s: float, **scripts: Script) -> tuple[Resource, Hooks]:
    """A resource (not started) and hooks of it."""
    commands = {Event(name.replace("_", "-")): (str(script.path),) for name, script in scripts.items()}
    resource = Resource(config, config.resource(), HostRuntime())
    return resource, Hooks(resource, HookSettings(timeout_s, commands), HostRuntime())


def test_hooks_run_one_after_the_other_with_the_facts_of_their_moment(
    script: Callable[[str], Script], tmp_path: Path, config: Config, fifo: int
) -> None:
    async def test() -> None:
        os.mkfifo(tmp_path / "go")
        hook = script(
            f'echo "$REPLICA_EVENT $REPLICA_ROLE $REPLICA_REASON" >> {tmp_path}/told; echo > {tmp_path}/fifo\n'
            f"test $REPLICA_EVENT = demoted || read _ < {tmp_path}/go"
        )
        resource, hooks = hooks_of(config, PATIENCE_S, promoted=hook, demoted=hook)
        resource.state.change(role=Role.PRIMARY)
        hooks.fire(Event.PROMOTED, "one")
        hooks.fire(Event.PEER_LOST, "nobody wants to know")
        resource.state.change(role=Role.SECONDARY)
        hooks.fire(Event.DEMOTED, "two")
        await readable(fifo)
        assert (tmp_path / "told").read_text() == "promoted Primary one\n"
        with (tmp_path / "go").open("w") as go:
            go.write("go\n")
        await hooks.stop()
        assert (tmp_path / "told").read_text() == "promoted Primary one\ndemoted Secondary two\n"

    run(test)


def test_the_one_that_is_asked_does_not_wait_for_the_others(
    script: Callable[[str], Script], tmp_path: Path, config: Config, fifo: int
) -> None:
    async def test() -> None:
        slow = script(f"echo $$ > {tmp_path}/fifo; exec sleep 1000")
        asked = Script(tmp_path / "asked", 'test "$REPLICA_EVENT" = before-resync-target || exit 2; exit 5')
        _, hooks = hooks_of(config, 1.0, promoted=slow, before_resync_target=asked)
        hooks.fire(Event.PROMOTED, "")
        await readable(fifo)
        assert await hooks.ask(Event.BEFORE_RESYNC_TARGET, "") == "returned 5"
        assert await hooks.ask(Event.SPLIT_BRAIN, "") == ""  # there is none
        os.kill(int(os.read(fifo, 100)), 0)  # the slow one still runs
        await hooks.stop()

    run(test)


def test_the_queue_is_bounded(
    script: Callable[[str], Script], tmp_path: Path, config: Config, fifo: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        hook = script(f"echo $$ > {tmp_path}/fifo; test -e {tmp_path}/fast || exec sleep 1000")
        _, hooks = hooks_of(config, PATIENCE_S, promoted=hook)
        hooks.fire(Event.PROMOTED, "")
        await readable(fifo)  # it runs, and does not count as waiting
        for _ in range(MAX_WAITING + 5):
            hooks.fire(Event.PROMOTED, "")
        (tmp_path / "fast").touch()
        os.kill(int(os.read(fifo, 100)), signal.SIGKILL)
        await hooks.stop()
        assert os.read(fifo, 1 << 16).count(b"\n") == MAX_WAITING
        dropped = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
        assert len(dropped) == 1
        assert "64 hooks wait already" in dropped[0]

    with caplog.at_level(logging.INFO, "replica.hooks"):
        run(test)


def test_stop_gives_all_of_them_the_time_of_one(
    script: Callable[[str], Script], tmp_path: Path, config: Config, fifo: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        hook = script(f"trap '' TERM; echo $$ > {tmp_path}/fifo; sleep 1000")
        _, hooks = hooks_of(config, 0.4, promoted=hook)
        for _ in range(20):
            hooks.fire(Event.PROMOTED, "")
        await readable(fifo)
        await hooks.stop()
        pids = os.read(fifo, 1 << 16).split()
        assert 1 <= len(pids) <= 2  # the first ends on its own account, the second because of the stop
        for pid in pids:
            gone(int(pid))
        assert "because replicad stops, and 1" in caplog.text

    with caplog.at_level(logging.INFO, "replica.hooks"):
        run(test)


def test_what_it_prints_and_how_it_failed_is_in_the_log(
    script: Callable[[str], Script], config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        hook = script("printf 'snap\\033[31mshot\\n'; exit 1")
        _, hooks = hooks_of(config, PATIENCE_S, demoted=hook)
        hooks.fire(Event.DEMOTED, "")
        await hooks.stop()
        assert [record.getMessage() for record in caplog.records] == [
            f"r0: hook demoted: runs {hook.path}",
            "r0: hook demoted: snap [31mshot",
            "r0: the hook demoted returned 1.",
        ]

    with caplog.at_level(logging.INFO, "replica.hooks"):
        run(test)
