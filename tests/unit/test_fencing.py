"""Fencing: with an agent that the test scripts, with one that kills all of a host made of namespaces, with Debian's."""

import asyncio
import logging
import os
import re
import select
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from replica import cli
from replica.cli.fence import fence
from replica.cli.fence_test import test as fence_test
from replica.control import ControlServer
from replica.errors import ReplicaError
from replica.heartbeat import fence_device
from replica.heartbeat.fence_device import FenceError, as_input, read_secret, redacted
from replica.heartbeat.fencing import DeviceAnswer, Fencer, device_from_stonith, stonith_target
from replica.heartbeat.settings import FenceDevice, HeartbeatSettings
from tests.unit.agent_bench import PATIENCE_S, program, run, settings_in

# Notes each action and its input; files say how it ends. "power" is whether the node is on.
_AGENT = """
cd {0}; input=$(cat); action=$(echo "$input" | sed -n s/^action=//p)
echo $action >> calls; echo "$input" > input.$action
test -e $action.says && cat $action.says
test -e $action.waits && read _ < fifo
test -e $action.ends && exit $(cat $action.ends)
case $action in
  off) test -e clings || echo off > power;;
  on) echo on > power; test ! -p told || echo on > told;;
  status) test "$(cat power)" = on || exit 2;;
esac
"""


class Bench:
    """A scripted agent in a directory, and what it was asked."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.agent = program(directory / "fence_scripted", _AGENT.format(directory))
        (directory / "power").write_text("on\n")

    def settings(self, *devices: FenceDevice, **others: Any) -> HeartbeatSettings:
        values = {"fencing": {"node2": devices}, "config_path": self.directory / "replica.toml", **others}
        return settings_in(self.directory, **values)

    def device(self, **different: Any) -> FenceDevice:
        values: dict[str, Any] = {"agent": str(self.agent), "options": {}, "action": "off", "timeout_s": PATIENCE_S}
        return FenceDevice(**{**values, "retries": 0, **different})

    def fencer(self, **different: Any) -> Fencer:
        return Fencer(self.settings(self.device(**different)))

    def set(self, name: str, text: object = "") -> None:
        (self.directory / name).write_text(f"{text}\n")

    @property
    def calls(self) -> list[str]:
        path = self.directory / "calls"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(fence_device, "_RETRY_S", 0.01)
    return Bench(tmp_path)


# ── one device ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_node_is_switched_off_and_that_is_verified(bench: Bench) -> None:
    async def test() -> None:
        fencer = bench.fencer(options={"ip": "192.0.2.7", "plug": "2"})
        assert fencer.configured("node2")
        assert fencer.last("node2") == ""
        fenced = await fencer.fence("node2", why="it is silent")
        assert fenced.ok
        assert fenced.sentence.startswith("node2 is fenced: fence_scripted switched it off and confirms it (")
        assert fencer.last("node2") == fenced.sentence
        assert bench.calls == ["off", "status"]
        assert (bench.directory / "input.off").read_text() == "action=off\nip=192.0.2.7\nplug=2\n"

    run(test)


def test_with_reboot_it_is_switched_on_again_once_it_is_verified_to_be_off(bench: Bench) -> None:
    async def test() -> None:
        fencer = bench.fencer(action="reboot")
        assert (await fencer.fence("node2", why="")).ok
        await fencer.settled()
        assert bench.calls == ["off", "status", "on"]

    run(test)


def test_a_node_that_does_not_come_back_is_fenced_all_the_same(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        bench.set("on.ends", 1)
        fencer = bench.fencer(action="reboot", retries=1)
        assert (await fencer.fence("node2", why="")).ok
        await fencer.settled()
        assert bench.calls == ["off", "status", "on", "on"]
        assert "node2 is fenced, but could not be switched on again: fence_scripted on returned 1." in caplog.text

    run(test)


@pytest.mark.parametrize("ends", [0, 1, 3])
def test_an_agent_that_says_off_while_its_status_does_not_has_failed(bench: Bench, ends: int) -> None:
    async def test() -> None:
        bench.set("status.ends", ends)
        fenced = await bench.fencer(timeout_s=3.0).fence("node2", why="")
        assert not fenced.ok
        said = "says that it is still on" if ends == 0 else f"does not confirm: returned {ends}"
        assert f"fence_scripted off ended well, but status {said}" in fenced.sentence
        assert "if you are sure that it is off, run `replicactl fence node2 --done`" in fenced.sentence

    run(test)


def test_a_bad_exit_status_of_off_is_no_success_even_if_it_is_that_of_a_node_that_is_off(bench: Bench) -> None:
    """2 is also what programs end with that do not understand how they were called."""

    async def test() -> None:
        bench.set("off.ends", 2)
        bench.set("status.ends", 2)
        bench.set("off.says", "no such outlet\nPlease use '-h' for usage")
        fenced = await bench.fencer(retries=2).fence("node2", why="")
        assert not fenced.ok
        assert "fence_scripted off returned 2: no such outlet." in fenced.sentence
        assert bench.calls == ["off", "off", "off"]

    run(test)


def test_it_is_tried_again(bench: Bench) -> None:
    async def test() -> None:
        once = f"test -e {bench.directory}/second || {{ touch {bench.directory}/second; exit 1; }}"
        program(bench.agent, once + _AGENT.format(bench.directory))
        assert (await bench.fencer(retries=1).fence("node2", why="")).ok

    run(test)


def test_an_agent_that_takes_too_long_is_killed_and_has_failed(bench: Bench) -> None:
    async def test() -> None:
        os.mkfifo(bench.directory / "fifo")
        bench.set("off.waits")
        fenced = await bench.fencer(timeout_s=0.5).fence("node2", why="")
        assert not fenced.ok
        assert "fence_scripted off ran longer than 0.5 s and was killed" in fenced.sentence

    run(test)


def test_an_agent_that_is_not_installed(bench: Bench) -> None:
    async def test() -> None:
        fenced = await bench.fencer(agent="fence_of_nobody").fence("node2", why="")
        assert "fence_of_nobody is not installed on this node" in fenced.sentence
        fenced = await bench.fencer(agent="/no/such/agent").fence("node2", why="")
        assert "agent off cannot be started (/no/such/agent: No such file or directory)" in fenced.sentence

    run(test)


def test_a_node_without_a_device_is_not_fenced(bench: Bench) -> None:
    async def test() -> None:
        fencer = bench.fencer()
        assert not fencer.configured("node1")
        assert await fencer.fence("node1", why="") == (
            False,
            "node1 cannot be fenced: no fencing is configured for it, add [fencing.node1].",
        )

    run(test)


# ── several devices, several callers ─────────────────────────────────────────────────────────────────────────────


def test_the_second_device_is_used_when_the_first_fails(bench: Bench) -> None:
    async def test() -> None:
        broken = program(bench.directory / "fence_broken", f"echo broken >> {bench.directory}/calls; exit 1")
        fencer = Fencer(bench.settings(bench.device(agent=str(broken)), bench.device(), bench.device()))
        fenced = await fencer.fence("node2", why="")
        assert fenced.ok
        assert bench.calls == ["broken", "off", "status"]

    run(test)


def test_all_that_failed_is_said(bench: Bench) -> None:
    async def test() -> None:
        bench.set("off.ends", 1)
        broken = program(bench.directory / "fence_broken", "echo no route; exit 1")
        fenced = await Fencer(bench.settings(bench.device(agent=str(broken)), bench.device())).fence("node2", why="")
        assert "node2 could not be fenced: fence_broken off returned 1: no route; fence_scripted off returned 1." in (
            fenced.sentence
        )

    run(test)


def test_whoever_asks_while_a_node_is_being_fenced_gets_the_same_result(bench: Bench) -> None:
    async def test() -> None:
        fencer = bench.fencer()
        first, second = await asyncio.gather(fencer.fence("node2", why="a"), fencer.fence("node2", why="b"))
        assert first is second
        assert bench.calls == ["off", "status"]
        await fencer.fence("node2", why="once more")
        assert bench.calls == ["off", "status"] * 2

    run(test)


def test_nothing_happens_when_the_callers_give_up_during_the_delay(bench: Bench) -> None:
    """The node was heard again."""

    async def test() -> None:
        fencer = bench.fencer(delay_s=1000.0)
        callers = [asyncio.create_task(fencer.fence("node2", why="")) for _ in range(2)]
        await asyncio.sleep(0)
        callers[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await callers[0]
        assert not callers[1].done()
        callers[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await callers[1]
        assert bench.calls == []
        fencer = bench.fencer()
        assert (await fencer.fence("node2", why="")).ok

    run(test)


def test_a_delay_is_waited_before_the_device_is_used(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        assert (await bench.fencer(delay_s=0.01).fence("node2", why="")).ok
        said = [record.getMessage() for record in caplog.records]
        waits = said.index("fencing node2: waits 0.01 s before fence_scripted.")
        assert waits < said.index("fencing node2: fence_scripted: runs off")

    with caplog.at_level(logging.INFO):
        run(test)


def test_what_an_operator_asks_for_is_not_delayed(bench: Bench) -> None:
    assert fence(bench.settings(bench.device(delay_s=1000.0)), "node2", done=False).startswith("node2 is fenced")


def test_what_has_begun_is_carried_through_whoever_still_waits(bench: Bench) -> None:
    async def test() -> None:
        os.mkfifo(bench.directory / "fifo")
        bench.set("off.waits")
        fencer = bench.fencer()
        caller = asyncio.create_task(fencer.fence("node2", why=""))
        # Opening it succeeds once the agent reads from it.
        fifo = await asyncio.to_thread(os.open, bench.directory / "fifo", os.O_WRONLY)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        joined = asyncio.create_task(fencer.fence("node2", why=""))
        await asyncio.sleep(0)
        os.write(fifo, b"go\n")
        os.close(fifo)
        assert (await joined).ok
        assert bench.calls == ["off", "status"]

    run(test)


# ── the test of devices ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_test_switches_nothing(bench: Bench) -> None:
    async def test() -> None:
        fencer = bench.fencer(action="reboot")
        assert await fencer.test("node2") == [
            ("fence_scripted", True, "fence_scripted answers: node2 is on"),
        ]
        bench.set("power", "off")
        assert (await fencer.test("node2"))[0].sentence == "fence_scripted answers: node2 is off"
        bench.set("status.ends", 1)
        bench.set("status.says", "no outlet 7")
        assert await fencer.test("node2") == [
            ("fence_scripted", False, "fence_scripted status returned 1: no outlet 7"),
        ]
        bench.set("monitor.ends", 1)
        assert (await fencer.test("node2"))[0].sentence == "fence_scripted monitor returned 1"
        assert await fencer.test("node1") == []
        assert set(bench.calls) == {"monitor", "status"}

    run(test)


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_secret_comes_from_its_file_and_is_seen_nowhere_else(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        secret_file = bench.directory / "bmc.key"
        secret_file.write_text("s3cret w0rd\n")
        secret_file.chmod(0o600)
        bench.set("off.says", "login with s3cret w0rd and 0pen refused")
        bench.set("off.ends", 1)
        options = {"username": "admin", "password-file": "bmc.key", "snmp_priv_passwd": "0pen"}
        fencer = bench.fencer(options=options)
        fenced = await fencer.fence("node2", why="")
        expected = "action=off\nusername=admin\npassword=s3cret w0rd\nsnmp_priv_passwd=0pen\n"
        assert (bench.directory / "input.off").read_text() == expected
        assert "login with *** and *** refused" in fenced.sentence
        for text in (caplog.text, fenced.sentence, repr(bench.device(options=options))):
            assert "s3cret" not in text
            assert "0pen" not in text

    with caplog.at_level(logging.DEBUG):
        run(test)


@pytest.mark.parametrize(
    ("prepare", "problem"),
    [
        (lambda path: path.unlink(), r"cannot be read \(No such file or directory\)"),
        (lambda path: path.chmod(0o640), r"has mode 0640, so others may use it: run `chmod 600 "),
        (lambda path: (path.unlink(), path.mkdir()), "is not a regular file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "is not a regular file"),
        (lambda path: path.write_text("\n"), "must have one line"),
        (lambda path: path.write_text("a\nb\n"), "must have one line"),
        (lambda path: path.write_bytes(b"x" * 5000), "must have one line of at most 4096 bytes"),
        (lambda path: path.write_bytes(b"\xff"), "is not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_secret(tmp_path: Path, prepare: Callable[[Path], object], problem: str) -> None:
    path = tmp_path / "key"
    path.write_text("x\n")
    path.chmod(0o600)
    prepare(path)
    with pytest.raises(FenceError, match=f"^needs {path}, which {problem}"):
        read_secret(path)


def test_a_missing_secret_is_said_and_nothing_is_run(bench: Bench) -> None:
    async def test() -> None:
        fenced = await bench.fencer(options={"password-file": "nothing"}).fence("node2", why="")
        assert f"fence_scripted needs {bench.directory}/nothing, which cannot be read" in fenced.sentence
        assert bench.calls == []

    run(test)


def test_a_value_cannot_become_another_option() -> None:
    with pytest.raises(FenceError, match="cannot be given its option ip: the value has more than one line"):
        as_input("off", {"ip": "x\naction=on"})
    assert as_input("off", {"action": "on", "a": "b=c"}) == b"action=off\na=b=c\n"
    with pytest.raises(FenceError, match="longer than"):
        as_input("off", {"a": "x" * (64 << 10)})


def test_a_secret_that_contains_another_is_redacted_whole() -> None:
    assert redacted("x abcdef abc", ("abc", "abcdef", "")) == "x *** ***"


# ── real ones ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(not Path("/usr/sbin/fence_dummy").exists(), reason="Debian's fence-agents is not installed")
def test_debians_dummy_agent(bench: Bench) -> None:
    async def test() -> None:
        status_file = bench.directory / "status"
        status_file.write_text("on")
        options = {"status_file": str(status_file)}
        fencer = bench.fencer(agent="fence_dummy", options=options, action="reboot")
        assert (await fencer.test("node2"))[0].sentence == "fence_dummy answers: node2 is on"
        assert (await fencer.fence("node2", why="")).ok
        await fencer.settled()
        assert status_file.read_text() == "on"
        fencer = bench.fencer(agent="fence_dummy", options=options)
        assert (await fencer.fence("node2", why="")).ok
        assert status_file.read_text() == "off"
        assert (await fencer.test("node2"))[0].sentence == "fence_dummy answers: node2 is off"

    run(test)


@pytest.mark.skipif(not Path("/usr/sbin/fence_dummy").exists(), reason="Debian's fence-agents is not installed")
def test_debians_agent_that_reaches_nobody(bench: Bench) -> None:
    async def test() -> None:
        options = {"ip": "127.0.0.1", "ipport": "1", "username": "a", "password": "b", "plug": "1", "snmp_version": "1"}
        fenced = await bench.fencer(agent="fence_virsh", options=options).fence("node2", why="")
        assert not fenced.ok
        assert "fence_virsh off returned 1: " in fenced.sentence

    run(test)


_KILLS_A_HOST = """
cd {0}; input=$(cat)
case $(echo "$input" | sed -n s/^action=//p) in
  off) kill -9 $(cat init.pid) 2>/dev/null; exit 0;;
  status) grep -qs . /proc/$(cat init.pid)/cmdline || exit 2;;
esac
"""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[int]:
    """The descriptor of a pipe that is held by three processes of a host made of a PID namespace."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare(1)")
    read, write = os.pipe()
    script = "trap '' TERM INT HUP; sleep 1000 & setsid sleep 1000 & echo up; wait"
    command = ["unshare", "--pid", "--fork", "--kill-child", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[write]) as starter:
        os.close(write)
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"up\n"
        children = Path(f"/proc/{starter.pid}/task/{starter.pid}/children").read_text().split()
        (tmp_path / "init.pid").write_text(children[0])
        yield read
        starter.kill()
    os.close(read)


@pytest.mark.root
def test_a_fenced_host_runs_nothing_any_more(bench: Bench, host: int) -> None:
    async def test() -> None:
        agent = program(bench.directory / "fence_host", _KILLS_A_HOST.format(bench.directory))
        fencer = bench.fencer(agent=str(agent))
        assert (await fencer.test("node2"))[0].sentence == "fence_host answers: node2 is on"
        assert not select.select([host], [], [], 0)[0]  # they run: the pipe is open
        assert (await fencer.fence("node2", why="")).ok
        assert await asyncio.to_thread(os.read, host, 1) == b""  # its end: nobody holds it any more

    run(test)


# ── stonith_host ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "parameters", "agent", "options"),
    [
        (
            "external/ipmi",
            ["node1", "192.0.2.7", "admin", "pw", "lanplus"],
            "fence_ipmilan",
            {"ip": "192.0.2.7", "username": "admin", "password": "pw", "lanplus": "1"},
        ),
        (
            "external/ipmi",
            ["node1", "192.0.2.7", "admin", "pw"],
            "fence_ipmilan",
            {"ip": "192.0.2.7", "username": "admin", "password": "pw"},
        ),
        (
            "ipmilan",
            ["node1", "192.0.2.7", "623", "straight", "admin", "root", "pw"],
            "fence_ipmilan",
            {
                "ip": "192.0.2.7",
                "ipport": "623",
                "auth": "password",
                "privlvl": "administrator",
                "username": "root",
                "password": "pw",
            },
        ),
        (
            "external/riloe",
            ["node1", "ilo1", "admin", "pw"],
            "fence_ilo",
            {"ip": "ilo1", "username": "admin", "password": "pw", "ssl_insecure": "1"},
        ),
    ],
)
def test_stonith_plugins_with_a_fence_agent(
    kind: str, parameters: list[str], agent: str, options: dict[str, str]
) -> None:
    assert stonith_target(kind, parameters) == "node1"
    device = device_from_stonith(kind, parameters, "node1")
    assert (device.agent, device.options) == (agent, options)
    for other in ("node2", None):
        with pytest.raises(ValueError, match="switches off node1 and no other node"):
            device_from_stonith(kind, parameters, other)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("meatware", "asks a person: leave it out, and run `replicactl fence NODE --done`"),
        ("ssh", "it is no fencing"),
        ("null", "it is no fencing"),
        ("drac3", "does not name the node that it switches off"),
        ("apcmaster", 'finds a node\'s outlet by its name.* agent = "fence_apc"'),
        ("abacus", "abacus is no type that has a fence agent here .*: add \\[fencing.NODE\\]"),
    ],
)
def test_stonith_plugins_without_one(kind: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        device_from_stonith(kind, ["node1"], "node1")


@pytest.mark.parametrize("count", [0, 3, 6])
def test_stonith_plugins_with_too_few_or_too_many_parameters(count: int) -> None:
    expected = rf"external/ipmi takes hostname ipaddr userid passwd \[interface\], and {count} are given"
    with pytest.raises(ValueError, match=expected):
        device_from_stonith("external/ipmi", ["x"] * count, "x")


# ── the commands ─────────────────────────────────────────────────────────────────────────────────────────────────


_CLUSTER = '[heartbeat]\n[[group]]\nname = "web"\npreferred = "node1"\nresources = [{ lsb = "web" }]\n'


def test_fence_without_the_daemon(bench: Bench) -> None:
    settings = bench.settings(bench.device(action="reboot"))
    assert fence(settings, "node2", done=False).startswith("node2 is fenced: ")
    assert bench.calls == ["off", "status", "on"]
    bench.set("off.ends", 1)
    with pytest.raises(ReplicaError, match="node2 could not be fenced: fence_scripted off returned 1"):
        fence(settings, "node2", done=False)
    with pytest.raises(ReplicaError, match="there is no node 'node3': the nodes are node1 and node2"):
        fence(settings, "node3", done=False)
    with pytest.raises(ReplicaError, match="replica-heartbeat does not run on node1"):
        fence(settings, "node2", done=True)


def test_a_daemon_that_ends_while_it_fences_is_not_repeated(bench: Bench, short_dir: Path) -> None:
    settings = bench.settings(bench.device(), run_dir=short_dir)

    async def end(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def test() -> None:
        settings.control_socket.parent.mkdir(parents=True, exist_ok=True)
        async with await asyncio.start_unix_server(end, settings.control_socket):
            with pytest.raises(ReplicaError, match=r"went away.*`replicactl fence-test node2` tells"):
                await asyncio.to_thread(fence, settings, "node2", done=False)

    asyncio.run(test())
    assert bench.calls == []


def test_fence_test_without_the_daemon(bench: Bench) -> None:
    results = fence_test(bench.settings(bench.device()), ["node1", "node2"])
    assert results == {
        "node1": [],
        "node2": [DeviceAnswer("fence_scripted", True, "fence_scripted answers: node2 is on")],
    }


def test_the_commands_ask_the_daemon_when_it_runs(bench: Bench, short_dir: Path) -> None:
    settings = bench.settings(bench.device(), run_dir=short_dir)
    asked: list[tuple[str, dict[str, Any]]] = []

    async def answer(verb: str, args: dict[str, Any], _send: object) -> Any:
        asked.append((verb, args))
        if verb == "fence":
            return "node2 is taken for dead."
        # As `replica.heartbeat.daemon` tells it.
        return {args["node"]: [one._asdict() for one in await Fencer(settings).test(args["node"])]}

    async def test() -> None:
        server = ControlServer(settings.control_socket, answer)
        await server.start()
        assert await asyncio.to_thread(fence, settings, "node2", done=True) == "node2 is taken for dead."
        results = await asyncio.to_thread(fence_test, settings, ["node2"])
        assert results["node2"][0].sentence == "fence_scripted answers: node2 is on"
        await server.stop()
        assert asked == [("fence", {"node": "node2", "done": True}), ("fence-test", {"node": "node2"})]

    run(test)


def test_the_examples_in_the_documents(make_config: Callable[..., Path]) -> None:
    reader = pytest.importorskip("replica.heartbeat.toml", reason="the reader of [heartbeat] is not here yet")
    text = (Path(__file__).resolve().parents[2] / "docs/fencing.md").read_text()
    examples = re.findall(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        settings = reader.load_heartbeat(make_config(extra=_CLUSTER + example), "node2")
        assert {device.agent for devices in settings.fencing.values() for device in devices} == {"fence_ipmilan"}


def test_the_commands_from_the_command_line(
    bench: Bench, make_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("replica.cli._cluster", reason="the reader of [heartbeat] is not here yet")
    extra = f'{_CLUSTER}[fencing.node2]\nagent = "{bench.agent}"\naction = "off"\nretries = 0\n'
    config = ["--config", str(make_config(extra=extra)), "--node", "node1"]
    assert cli.main([*config, "fence-test", "node2"]) == 0
    assert capsys.readouterr().out == "node2: fence_scripted answers: node2 is on\n"
    assert cli.main([*config, "fence-test"]) == 1
    assert "node1: FAILED: no fencing is configured, add [fencing.node1]\n" in capsys.readouterr().out
    assert cli.main([*config, "fence", "node2"]) == 0
    assert capsys.readouterr().out.startswith("node2 is fenced: fence_scripted switched it off")
    assert cli.main([*config, "fence", "node3"]) == 1
    assert "there is no node 'node3'" in capsys.readouterr().err
