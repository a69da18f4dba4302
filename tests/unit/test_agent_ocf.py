"""The agent of OCF resource agents: Debian's resource-agents, and one that the test can make fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from replica.heartbeat.agents import ocf
from replica.heartbeat.agents.base import Agent, AgentError
from replica.heartbeat.agents.ocf import environment, judge
from replica.heartbeat.agents.service import Result, State
from replica.heartbeat.node_state import Readiness
from replica.heartbeat.settings import ResourceSettings
from tests.unit.agent_bench import START, make, options_of, program, run, settings_in

AGENTS = Path("/usr/lib/ocf/resource.d/heartbeat")
debians = pytest.mark.skipif(not (AGENTS / "Dummy").exists(), reason="Debian's resource-agents is not installed")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: Debian's agents do")


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Agent:
    """An agent that notes its variables, and ends as files tell it to."""
    monkeypatch.setattr(ocf, "OCF_ROOT", str(tmp_path))
    program(
        tmp_path / "resource.d/test/thing",
        f"cd {tmp_path}; echo $1 >> calls; env | grep ^OCF_ | sort > env.$1\n"
        "test -e $1.says && cat $1.says\ntest -e $1.ends && exit $(cat $1.ends)\n"
        "case $1 in start) touch up;; stop) rm -f up;; monitor) test -e up || exit 7;; esac",
    )
    params = {"configfile": "/a b", "port": 80, "on": True, "OCF_CHECK_LEVEL": 10}
    return make("ocf", {"ocf": "test:thing", "params": params}, settings_in(tmp_path))


def test_it_is_started_watched_and_stopped_and_all_of_it_may_be_repeated(scripted: Agent, tmp_path: Path) -> None:
    async def test() -> None:
        assert not await scripted.active()
        await scripted.start(START)
        await scripted.start(START)
        await scripted.monitor()
        assert await scripted.active()
        await scripted.stop()
        await scripted.stop()
        with pytest.raises(AgentError, match="is not running"):
            await scripted.monitor()
        calls = (tmp_path / "calls").read_text().split()
        assert [call for call in calls if call != "monitor"] == ["validate-all", "start", "stop", "stop"]

    run(test)


def test_the_variables_that_it_gets(scripted: Agent, tmp_path: Path) -> None:
    async def test() -> None:
        await scripted.start(START)
        await scripted.monitor()
        common = [
            "OCF_CHECK_LEVEL=10",
            "OCF_RA_VERSION_MAJOR=1",
            "OCF_RA_VERSION_MINOR=1",
            "OCF_RESKEY_configfile=/a b",
            "OCF_RESKEY_on=true",
            "OCF_RESKEY_port=80",
            "OCF_RESOURCE_INSTANCE=test_thing",
            "OCF_RESOURCE_PROVIDER=test",
            "OCF_RESOURCE_TYPE=thing",
            f"OCF_ROOT={tmp_path}",
        ]
        of_start = ["OCF_RESKEY_CRM_meta_interval=0", "OCF_RESKEY_CRM_meta_timeout=60000"]
        of_monitor = ["OCF_RESKEY_CRM_meta_interval=5000", "OCF_RESKEY_CRM_meta_timeout=20000"]
        assert set((tmp_path / "env.start").read_text().splitlines()) == {*common, *of_start}
        assert set((tmp_path / "env.monitor").read_text().splitlines()) == {*common, *of_monitor}

    run(test)


@pytest.mark.parametrize("status", [2, 4, 5, 6])
def test_a_start_that_cannot_succeed_is_not_tried(scripted: Agent, tmp_path: Path, status: int) -> None:
    async def test() -> None:
        (tmp_path / "validate-all.ends").write_text(str(status))
        (tmp_path / "validate-all.says").write_text("ocf-exit-reason:no such file\nmore talk\n")
        with pytest.raises(
            AgentError, match=rf"^cannot be started: validate-all returned {status} \(.*\): no such file$"
        ):
            await scripted.start(START)
        assert "start" not in (tmp_path / "calls").read_text().split()

    run(test)


def test_an_agent_without_validate_all_is_started(scripted: Agent, tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "validate-all.ends").write_text("3")
        await scripted.start(START)

    run(test)


def test_a_start_that_fails_says_why(scripted: Agent, tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "start.ends").write_text("1")
        (tmp_path / "start.says").write_text("no luck\n")
        with pytest.raises(AgentError, match=r"^cannot be started: its start returned 1: no luck$"):
            await scripted.start(START)

    run(test)


def test_a_stop_that_fails_is_an_error_whatever_the_monitor_says(scripted: Agent, tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "stop.ends").write_text("1")
        with pytest.raises(AgentError, match=r"^cannot be stopped: its stop returned 1$"):
            await scripted.stop()

    run(test)


def test_a_stop_that_is_refused_where_it_never_ran_is_no_failure(scripted: Agent, tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "stop.ends").write_text("5")
        await scripted.stop()
        await scripted.start(START)
        with pytest.raises(AgentError, match=r"^cannot be stopped: its stop returned 5 "):
            await scripted.stop()

    run(test)


def test_what_is_not_installed_does_not_run_and_need_not_be_stopped(tmp_path: Path) -> None:
    async def test() -> None:
        agent = make("ocf", {"ocf": "heartbeat:no-such-agent"}, settings_in(tmp_path))
        assert not await agent.active()
        with pytest.raises(AgentError, match=r"^cannot be started: there is no agent "):
            await agent.start(START)
        await agent.stop()

    run(test)


@pytest.mark.parametrize(
    ("status", "state"),
    [
        (0, State.RUNNING),
        (1, State.BROKEN),
        (2, State.UNKNOWN),
        (3, State.UNKNOWN),
        (4, State.UNKNOWN),
        (5, State.STOPPED),
        (6, State.UNKNOWN),
        (7, State.STOPPED),
        (8, State.RUNNING),
        (9, State.BROKEN),
        (127, State.UNKNOWN),
        (None, State.UNKNOWN),
    ],
)
def test_the_statuses_of_a_monitor(status: int | None, state: State) -> None:
    assert judge(Result(status, f"returned {status}", [])).state is state


def test_a_node_without_the_agent_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocf, "OCF_ROOT", str(tmp_path))
    readiness, why = make("ocf", {"ocf": "ocf:heartbeat:nothing"}, settings_in(tmp_path)).ready()
    assert readiness is Readiness.NO
    assert why.startswith(f"there is no agent {tmp_path}/resource.d/heartbeat/nothing")


@pytest.mark.parametrize("given", ["apache", "a:b:c", "heartbeat:../x", "..:x", "heartbeat:", 7])
def test_what_is_no_agent(given: object) -> None:
    with pytest.raises(ValueError, match="must be the provider and the type of an agent"):
        options_of("ocf", {"ocf": given})


@pytest.mark.parametrize("params", ["x", {"a b": "x"}, {"a": ["x"]}, {"a": "x\0"}])
def test_what_are_no_parameters(params: object) -> None:
    with pytest.raises(ValueError, match=r"^(must be a table|has a name|a must be)"):
        options_of("ocf", {"ocf": "heartbeat:apache", "params": params})


def test_the_instance_is_a_name_that_may_become_part_of_a_file_name() -> None:
    options = options_of("ocf", {"ocf": "heartbeat:Dummy"})
    settings = ResourceSettings("ocf", "ocf a/b c", options, "test")
    assert environment(settings, timeout_s=1, interval_s=0)["OCF_RESOURCE_INSTANCE"] == "a_b_c"


# ── Debian's ─────────────────────────────────────────────────────────────────────────────────────────────────────


@debians
@as_root
@pytest.mark.root
def test_debians_dummy(tmp_path: Path) -> None:
    async def test() -> None:
        params = {"state": str(tmp_path / "state"), "fake": "x"}
        agent = make("ocf", {"ocf": "heartbeat:Dummy", "params": params}, settings_in(tmp_path))
        assert agent.ready().readiness is Readiness.YES
        assert not await agent.active()
        await agent.start(START)
        await agent.monitor()
        (tmp_path / "state").unlink()
        with pytest.raises(AgentError, match="is not running"):
            await agent.monitor()
        await agent.start(START)
        await agent.stop()
        assert not await agent.active()

    run(test)


@debians
@as_root
@pytest.mark.root
def test_debians_agent_of_any_program_whose_daemon_is_killed(tmp_path: Path) -> None:
    async def test() -> None:
        params = {"binfile": "/bin/sleep", "cmdline_options": "1000", "pidfile": str(tmp_path / "pid")}
        agent = make("ocf", {"ocf": "heartbeat:anything", "params": params}, settings_in(tmp_path))
        await agent.start(START)
        await agent.monitor()
        await agent.stop()
        assert not await agent.active()

    run(test)


@debians
@as_root
@pytest.mark.root
def test_debians_agents_refuse_what_is_wrong_before_the_start(tmp_path: Path) -> None:
    async def test() -> None:
        agent = make(
            "ocf", {"ocf": "heartbeat:anything", "params": {"binfile": "/no/such/file"}}, settings_in(tmp_path)
        )
        with pytest.raises(AgentError, match=r"^cannot be started: validate-all returned 5 \(.*not installed here\)"):
            await agent.start(START)

    run(test)


@debians
@as_root
@pytest.mark.root
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare(1)")
@pytest.mark.parametrize("agent", ["address", "apache"])
def test_debians_in_a_network_of_its_own(tmp_path: Path, agent: str) -> None:
    if agent == "apache" and not Path("/usr/sbin/apache2").exists():
        pytest.skip("Debian's apache2 is not installed")
    script = (
        "set -e; ip link set lo up; ip link add d0 type veth peer d1; ip link set d0 up; ip link set d1 up;"
        " ip addr add 192.0.2.1/24 dev d0;"
        " mount -t tmpfs none /run; mkdir -p /run/lock /run/resource-agents; mount -t tmpfs none /var/log;"
        f" mkdir -p /var/log/apache2; {sys.executable} -m tests.unit.ocf_in_a_namespace {agent} {tmp_path}; exit $?"
    )
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script]
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["stopped", "running", "failed", "running", "stopped"], done.stdout + done.stderr
