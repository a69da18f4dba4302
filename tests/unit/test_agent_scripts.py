"""The agents of init scripts, of Heartbeat's resource scripts and of the administrator's commands; real programs."""

import asyncio
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from replica.heartbeat.agents import kinds, leftovers, scripts, service
from replica.heartbeat.agents.base import Agent, AgentError
from replica.heartbeat.agents.scripts import judge_lsb, judge_resource_script
from replica.heartbeat.agents.service import Result, State
from replica.heartbeat.node_state import Readiness
from tests.processes import gone
from tests.unit.agent_bench import START, make, options_of, program, run, settings_in

# An init script with a real daemon behind it, which is left in the background as init scripts do it.
_DAEMON = """
pid=$(cat {dir}/pid 2>/dev/null)
case $1 in
  start) echo start >> {dir}/calls
         [ -e {dir}/fails ] && {{ echo "no luck"; exit 1; }}
         sleep 1000 > /dev/null 2>&1 & echo $! > {dir}/pid ;;
  stop)  echo stop >> {dir}/calls
         [ -e {dir}/stuck ] && {{ echo "it clings"; exit 1; }}
         [ -n "$pid" ] || exit {stop_stopped}
         kill $pid; rm {dir}/pid ;;
  status) if [ -n "$pid" ] && grep -qs . /proc/$pid/cmdline; then echo "daemon {running}"; exit {status_running}
          elif [ -n "$pid" ]; then echo "daemon {stopped}"; exit {status_dead}
          else echo "daemon {stopped}"; exit {status_stopped}; fi ;;
  *) echo "Usage: daemon {{start|stop|status}}"; exit 3 ;;
esac
"""
_LSB = {"running": "", "stopped": "", "status_running": 0, "status_dead": 1, "status_stopped": 3, "stop_stopped": 0}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Path]:
    """The path for an init script; its daemon is ended after the test."""
    yield tmp_path / "daemon"
    if (tmp_path / "pid").exists():
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def lsb(daemon: Path, **different: object) -> Agent:
    program(daemon, _DAEMON.format(dir=daemon.parent, **{**_LSB, **different}))
    return make("lsb", {"lsb": str(daemon)}, settings_in(daemon.parent))


def calls(daemon: Path) -> str:
    return (daemon.parent / "calls").read_text().replace("\n", " ").strip()


def pid_of(daemon: Path) -> int:
    return int((daemon.parent / "pid").read_text())


def test_the_examples_in_the_documents() -> None:
    """Of the kinds of services; each stands in a line of its own."""
    text = (Path(__file__).resolve().parents[2] / "docs/agents.md").read_text().partition("\n## Services\n")[2]
    examples = re.findall(r"^    (\{ .* \})$", text.partition("\n## ")[0], re.MULTILINE)
    tables = [tomllib.loads(f"resource = {example}")["resource"] for example in examples]
    assert {next(iter(table)) for table in tables} == {"systemd", "lsb", "resource.d", "ocf", "exec"}
    for table in tables:
        name = next(iter(table))
        assert table.keys() <= kinds.kind(name).options.keys()
        assert kinds.kind(name).title(options_of(name, table)).startswith(f"{name} ")


# ── init scripts ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_service_is_started_watched_and_stopped_and_all_of_it_may_be_repeated(daemon: Path) -> None:
    async def test() -> None:
        agent = lsb(daemon)
        assert not await agent.active()
        with pytest.raises(AgentError, match="is not running"):
            await agent.monitor()
        await agent.start(START)
        await agent.start(START)
        await agent.monitor()
        assert await agent.active()
        assert calls(daemon) == "start"
        await agent.stop()
        await agent.stop()
        assert not await agent.active()

    run(test)


def test_a_service_that_was_killed_is_noticed_and_started_again(daemon: Path) -> None:
    async def test() -> None:
        agent = lsb(daemon)
        await agent.start(START)
        first = pid_of(daemon)
        os.kill(first, signal.SIGKILL)
        gone(first)
        with pytest.raises(AgentError, match="is dead, and its PID file is left"):
            await agent.monitor()
        await agent.start(START)
        await agent.monitor()
        assert pid_of(daemon) != first

    run(test)


def test_a_start_that_fails_says_what_the_script_said_last(daemon: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        agent = lsb(daemon)
        (daemon.parent / "fails").touch()
        with pytest.raises(AgentError, match=f"^cannot be started: {daemon} start returned 1: no luck$"):
            await agent.start(START)
        assert f"lsb {daemon}: start: no luck" in caplog.text

    with caplog.at_level(logging.INFO):
        run(test)


def test_a_stop_that_fails_is_an_error_while_the_service_runs(daemon: Path) -> None:
    async def test() -> None:
        agent = lsb(daemon)
        await agent.start(START)
        (daemon.parent / "stuck").touch()
        with pytest.raises(AgentError, match=f"cannot be stopped: {daemon} stop returned 1: it clings"):
            await agent.stop()

    run(test)


def test_a_stop_that_complains_that_nothing_runs_is_a_stop(daemon: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Many scripts do that, although the LSB forbids it."""

    async def test() -> None:
        await lsb(daemon, stop_stopped=7).stop()
        assert "its stop returned 7, but it does not run any more" in caplog.text

    run(test)


def test_a_stop_that_stops_nothing_is_an_error_however_well_it_ends(
    daemon: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "SETTLE_S", 0.3)

    async def test() -> None:
        program(daemon, "exit 0")
        with pytest.raises(AgentError, match="still runs, although its stop ended well"):
            await make("lsb", {"lsb": str(daemon)}, settings_in(daemon.parent)).stop()

    run(test)


def test_a_start_that_starts_nothing_is_an_error_however_well_it_ends(
    daemon: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "SETTLE_S", 0.3)

    async def test() -> None:
        program(daemon, 'test "$1" = start || exit 3')
        with pytest.raises(AgentError, match="is not running, although its start ended well"):
            await make("lsb", {"lsb": str(daemon)}, settings_in(daemon.parent)).start(START)

    run(test)


@pytest.mark.parametrize(
    ("status", "lines", "state"),
    [
        (0, [], State.RUNNING),
        (1, [], State.STOPPED),
        (2, [], State.STOPPED),
        (3, [], State.STOPPED),
        (4, ["no permission"], State.UNKNOWN),
        (150, [], State.UNKNOWN),
        (None, [], State.UNKNOWN),
        (-9, [], State.UNKNOWN),
        # what Debian's skeleton says when it does not know the action
        (3, ["Usage: /etc/init.d/old {start|stop|restart|force-reload}"], State.UNKNOWN),
        (0, [" * Usage: old {start|stop}"], State.UNKNOWN),
        (3, ["Nov 22 web systemd: 3 s of CPU usage"], State.STOPPED),
    ],
)
def test_the_statuses_of_an_init_script(status: int | None, lines: list[str], state: State) -> None:
    assert judge_lsb(Result(status, "" if status == 0 else "ended", lines)).state is state


def test_a_script_without_a_status_is_not_started(daemon: Path) -> None:
    async def test() -> None:
        program(daemon, f'case $1 in start) touch {daemon}.up;; *) echo "Usage: $0 {{start|stop}}"; exit 3;; esac')
        with pytest.raises(AgentError, match="its script has no action `status`: use an exec resource"):
            await make("lsb", {"lsb": str(daemon)}, settings_in(daemon.parent)).start(START)
        assert not Path(f"{daemon}.up").exists()
        program(daemon, 'test "$1" = stop || { echo "Usage: $0 {start|stop}"; exit 3; }')
        await make("lsb", {"lsb": str(daemon)}, settings_in(daemon.parent)).stop()

    run(test)


def test_a_script_is_found_by_its_name_and_a_node_without_it_is_not_ready(
    daemon: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts, "INIT_DIRS", (daemon.parent / "nowhere", daemon.parent))

    async def test() -> None:
        settings = settings_in(daemon.parent)
        readiness, why = make("lsb", {"lsb": "daemon"}, settings).ready()
        assert readiness is Readiness.NO
        assert why == f"there is no script daemon in {daemon.parent}/nowhere or {daemon.parent}"
        lsb(daemon)
        agent = make("lsb", {"lsb": "daemon"}, settings)
        assert agent.ready().readiness is Readiness.YES
        await agent.start(START)
        await agent.stop()

    run(test)


def test_a_script_that_is_installed_later_is_noticed(daemon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts, "INIT_DIRS", (daemon.parent,))
    monkeypatch.setattr(service, "_RECHECK_S", -1.0)

    async def test() -> None:
        changed = asyncio.Event()
        kind = kinds.kind("lsb")
        options = options_of("lsb", {"lsb": "daemon"})
        resource = service.ResourceSettings("lsb", "lsb daemon", options, "test")
        agent = kind.make(resource, service.Surroundings(settings_in(daemon.parent), changed.set))
        assert agent.ready().readiness is Readiness.NO
        lsb(daemon)
        agent.ready()
        await changed.wait()
        assert agent.ready().readiness is Readiness.YES

    run(test)


def test_what_is_not_installed_does_not_run_and_need_not_be_stopped(tmp_path: Path) -> None:
    """A stop that fails would be the end of a node that only lacks a script."""

    async def test() -> None:
        for agent in (
            make("lsb", {"lsb": "no-such-script"}, settings_in(tmp_path)),
            make("lsb", {"lsb": "/no/such/script"}, settings_in(tmp_path)),
            make("resource.d", {"resource.d": "no-such-script"}, settings_in(tmp_path)),
            make("exec", {"exec": "x", "start": "/no/a", "stop": "/no/b", "monitor": "/no/c"}, settings_in(tmp_path)),
        ):
            assert not await agent.active()
            with pytest.raises(AgentError, match=r"^cannot be started: there is no (script|program) "):
                await agent.start(START)
            await agent.stop()

    run(test)


def test_a_script_that_is_gone_while_its_service_runs_is_no_stop(daemon: Path) -> None:
    async def test() -> None:
        agent = lsb(daemon)
        await agent.start(START)
        daemon.unlink()
        with pytest.raises(AgentError, match="No such file or directory"):
            await agent.stop()

    run(test)


def test_a_script_that_is_not_there_is_one_clause(tmp_path: Path) -> None:
    async def test() -> None:
        agent = make("lsb", {"lsb": "/no/such/script"}, settings_in(tmp_path))
        assert agent.ready().readiness is Readiness.YES  # it may lie on a file system that is not mounted yet
        with pytest.raises(AgentError, match=r"^cannot be started: there is no script /no/such/script$"):
            await agent.start(START)

    run(test)


@pytest.mark.parametrize("name", ["", "a b", "../x", 7, None])
def test_what_is_no_name_of_a_script(name: object) -> None:
    with pytest.raises(ValueError, match="must be the name of a script or its absolute path"):
        options_of("lsb", {"lsb": name})


_HEARTBEAT = """
import asyncio, sys
from pathlib import Path
from tests.unit.agent_bench import START, make, settings_in
directory = Path(sys.argv[1])
async def main():
    agent = make("lsb", {"lsb": str(directory / "daemon")}, settings_in(directory))
    await agent.start(START)
    print("started", flush=True)
    sys.stdin.read()
asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_daemon_outlives_the_process_that_started_it_and_has_none_of_its_descriptors(
    daemon: Path, number: signal.Signals
) -> None:
    """However that ends, with its whole process group."""
    lsb(daemon)
    command = [sys.executable, "-c", _HEARTBEAT, str(daemon.parent)]
    root = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"started\n"
        os.killpg(starter.pid, number)
        starter.wait()
    pid = pid_of(daemon)
    os.kill(pid, 0)
    assert os.getsid(pid) != starter.pid
    open_files = {os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")}
    assert open_files == {"/dev/null"}


# A daemon with two workers, which go on when it dies.
_WITH_WORKERS = """
case $1 in
  start) setsid sh -c 'echo $$ > {0}/daemon.pid; sleep 1000 & sleep 1001 & echo up > {0}/fifo; wait' > /dev/null 2>&1 &
         read _ < {0}/fifo ;;
  stop) kill $(cat {0}/daemon.pid) 2>/dev/null; rm -f {0}/daemon.pid ;;
  status) test -e {0}/daemon.pid || exit 3; grep -qs . /proc/$(cat {0}/daemon.pid)/cmdline || exit 1 ;;
esac
"""


def test_what_a_killed_daemon_leaves_behind_is_ended_by_the_stop(
    daemon: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It would go on serving, and keep the port; the script knows only the process that is dead."""
    monkeypatch.setattr(leftovers, "PID_FILES", (f"{daemon.parent}/{{0}}.pid",))

    async def test() -> None:
        os.mkfifo(daemon.parent / "fifo")
        program(daemon, _WITH_WORKERS.format(daemon.parent))
        agent = make("lsb", {"lsb": str(daemon)}, settings_in(daemon.parent))
        await agent.start(START)
        found = leftovers.find_daemon("daemon")
        assert found is not None
        assert leftovers.leftovers(found) == []  # it runs
        os.kill(found.pid, signal.SIGKILL)
        gone(found.pid)
        workers = leftovers.leftovers(found)
        assert len(workers) == 2
        with pytest.raises(AgentError, match="is dead, and its PID file is left"):
            await agent.monitor()
        await agent.stop()
        for worker in workers:
            gone(worker)
        assert f"lsb {daemon}: 2 processes were left of it, and have been ended." in caplog.text
        assert leftovers.leftovers(found._replace(started=found.started + 1)) == []

    run(test)


def test_a_daemon_without_a_session_of_its_own_has_no_leftovers(daemon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What else is in its session may be anything."""
    monkeypatch.setattr(leftovers, "PID_FILES", (f"{daemon.parent}/{{0}}.pid",))
    with subprocess.Popen(["sleep", "1000"]) as sleeper:
        (daemon.parent / "daemon.pid").write_text(f"{sleeper.pid}\n")
        assert leftovers.find_daemon("daemon") is None
        sleeper.kill()
    (daemon.parent / "daemon.pid").write_text("1\n")
    assert leftovers.find_daemon("daemon") is None
    (daemon.parent / "daemon.pid").write_text("what?\n")
    assert leftovers.find_daemon("daemon") is None
    assert leftovers.find_daemon("nobody") is None


@pytest.mark.root
@pytest.mark.skipif(not Path("/etc/init.d/apache2").exists(), reason="Debian's apache2 is not installed")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: its init script does")
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare(1)")
def test_debians_apache_in_a_network_of_its_own(tmp_path: Path) -> None:
    script = (
        "set -e; ip link set lo up; mount -t tmpfs none /run; mkdir -p /run/lock; mount -t tmpfs none /var/log/apache2;"
        f" {sys.executable} -m tests.unit.apache_by_init_script {tmp_path}; exit $?"  # the shell reaps orphans
    )
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script]
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["stopped", "running", "killed", "running", "stopped"], done.stdout + done.stderr


# ── resource.d ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("lines", "status", "state"),
    [
        (["running"], 3, State.RUNNING),  # its words count
        (["apache2 is running (pid 7)."], 0, State.RUNNING),
        (["eth0: OK"], 1, State.RUNNING),
        (["not running"], 0, State.STOPPED),
        (["Apache is Not Running"], 0, State.STOPPED),
        (["stopped"], 0, State.STOPPED),
        (["it is not yet", "Running"], 0, State.STOPPED),
        (["it is NOT", "yet running"], 0, State.RUNNING),  # as the shell's pattern has it: a space must follow "not"
        ([], 3, State.STOPPED),
        ([], 0, State.RUNNING),
        (["what?"], 4, State.UNKNOWN),
        (["running"], None, State.UNKNOWN),
        (["usage: IPaddr {start|stop}"], 1, State.UNKNOWN),
    ],
)
def test_the_words_of_a_resource_script(lines: list[str], status: int | None, state: State) -> None:
    assert judge_resource_script(Result(status, "ended", lines)).state is state


def test_a_resource_script_gets_its_arguments_before_the_action_and_is_found_in_the_ha_dir_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts, "RESOURCE_DIRS", (tmp_path / "etc",))
    body = 'echo "$0 $*" >> {0}/calls\ncase $3 in start) touch {0}/up;; stop) rm -f {0}/up;;\n*) {1};; esac'
    status = f"test -e {tmp_path}/up && echo running || echo stopped"
    for directory in ("etc", "ha.d/resource.d"):
        program(tmp_path / directory / "thing", body.format(tmp_path, status))

    async def test() -> None:
        settings = settings_in(tmp_path, ha_dir=tmp_path / "ha.d")
        agent = make("resource.d", {"resource.d": "thing", "args": ["a", "b c"]}, settings)
        assert not await agent.active()
        await agent.start(START)
        await agent.monitor()
        await agent.stop()
        actions = ["status", "status", "start", "status", "status", "stop", "status"]
        expected = [f"{tmp_path}/ha.d/resource.d/thing a b c {action}" for action in actions]
        assert (tmp_path / "calls").read_text().splitlines() == expected

    run(test)


def test_the_title_of_a_resource_script_is_that_of_haresources() -> None:
    kind = kinds.kind("resource.d")
    assert kind.title(options_of("resource.d", {"resource.d": "Filesystem", "args": ["/dev/sda", "/x"]})) == (
        "resource.d Filesystem::/dev/sda::/x"
    )


@pytest.mark.skipif(not Path("/etc/ha.d/resource.d/IPaddr").exists(), reason="Debian's heartbeat is not installed")
def test_heartbeats_own_script_for_addresses(tmp_path: Path) -> None:
    async def test() -> None:
        given = {"resource.d": "IPaddr", "args": ["127.9.9.9/32/lo"]}
        agent = make("resource.d", given, settings_in(tmp_path))
        assert agent.ready().readiness is Readiness.YES
        assert not await agent.active()
        await agent.stop()

    run(test)


# ── exec ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def own(directory: Path, *, start: str, stop: str, monitor: str | None) -> Agent:
    given = {
        "exec": "own",
        "start": [str(program(directory / "start", start))],
        "stop": [str(program(directory / "stop", stop))],
    }
    if monitor is not None:
        given["monitor"] = [str(program(directory / "monitor", monitor))]
    return make("exec", given, settings_in(directory))


def test_own_commands(tmp_path: Path) -> None:
    async def test() -> None:
        agent = own(
            tmp_path,
            start=f"touch {tmp_path}/up",
            stop=f"rm -f {tmp_path}/up",
            monitor=f"test -e {tmp_path}/up || {{ echo it is down; exit 9; }}",
        )
        assert not await agent.active()
        await agent.start(START)
        await agent.monitor()
        (tmp_path / "up").unlink()
        with pytest.raises(AgentError, match="does not run as it should: its monitor returned 9: it is down"):
            await agent.monitor()
        assert await agent.active()  # something of it may be left: it was started and not stopped
        await agent.stop()
        assert not await agent.active()

    run(test)


def test_own_commands_without_a_monitor_are_known_by_what_was_done(tmp_path: Path) -> None:
    async def test() -> None:
        agent = own(tmp_path, start=f"echo x >> {tmp_path}/starts", stop="exit 0", monitor=None)
        assert not await agent.active()
        await agent.start(START)
        again = own(tmp_path, start=f"echo x >> {tmp_path}/starts", stop="exit 0", monitor=None)  # a new daemon
        assert await again.active()
        await again.start(START)
        await again.monitor()
        assert (tmp_path / "starts").read_text() == "x\n"
        await again.stop()
        assert not await agent.active()

    run(test)


def test_a_start_that_failed_half_way_is_neither_running_nor_stopped(tmp_path: Path) -> None:
    async def test() -> None:
        agent = own(tmp_path, start=f"test -e {tmp_path}/luck || {{ echo no; exit 1; }}", stop="exit 0", monitor=None)
        with pytest.raises(AgentError, match=r"^cannot be started: its start returned 1: no$"):
            await agent.start(START)
        assert await agent.active()
        with pytest.raises(AgentError):
            await agent.monitor()
        (tmp_path / "luck").touch()
        await agent.start(START)
        await agent.monitor()

    run(test)


def test_a_stop_of_own_commands_that_fails_is_an_error(tmp_path: Path) -> None:
    async def test() -> None:
        agent = own(tmp_path, start="exit 0", stop="echo cannot; exit 2", monitor=None)
        await agent.start(START)
        with pytest.raises(AgentError, match=r"^cannot be stopped: its stop returned 2: cannot$"):
            await agent.stop()
        assert await agent.active()

    run(test)


def test_the_title_says_that_nothing_is_watched() -> None:
    commands = {"exec": "own", "start": "/bin/true", "stop": ["/bin/true"]}
    title = kinds.kind("exec").title
    assert title(options_of("exec", commands)) == "exec own (not watched: it has no monitor)"
    assert title(options_of("exec", {**commands, "monitor": "/bin/true"})) == "exec own"


def test_a_call_that_is_cancelled_ends_its_program(tmp_path: Path) -> None:
    """Time limits are the group's: it cancels."""

    async def test() -> None:
        os.mkfifo(tmp_path / "fifo")
        descriptor = os.open(tmp_path / "fifo", os.O_RDWR | os.O_NONBLOCK)
        agent = own(tmp_path, start=f"echo $$ > {tmp_path}/fifo; exec sleep 1000", stop="exit 0", monitor=None)
        starting = asyncio.create_task(agent.start(START))
        there = asyncio.Event()
        asyncio.get_running_loop().add_reader(descriptor, there.set)
        await there.wait()
        asyncio.get_running_loop().remove_reader(descriptor)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        gone(int(os.read(descriptor, 100)))
        os.close(descriptor)

    run(test)
