"""A group on one node, with real programs as its resources: in order, mended, moved away, stuck, suspended."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from replica.heartbeat import clock
from replica.heartbeat.agents.base import Start
from replica.heartbeat.agents.execute import ExecuteAgent
from replica.heartbeat.group import GroupRunner, build_group
from replica.heartbeat.node_state import Readiness, Ready, Status
from replica.heartbeat.settings import GroupSettings, ResourceSettings
from tests.unit.heartbeat_settings import settings_of

#: Waits for DIR/NAME-ACTION.hold to go, fails where there is DIR/NAME-ACTION.fails; what runs has DIR/NAME.up.
SCRIPT = """#!/bin/sh
dir=$(dirname $0); name=$1; action=$2
[ $action = monitor ] || echo "$action $name" >> $dir/log
while [ -e $dir/$name-$action.hold ]; do read nothing < $dir/$name-$action.hold; done
[ -e $dir/$name-$action.fails ] && exit 1
case $action in
    start) touch $dir/$name.up ;;
    stop) rm -f $dir/$name.up ;;
    monitor) [ -e $dir/$name.up ] ;;
esac
"""


class Lab:
    """A group of programs in a folder."""

    def __init__(self, folder: Path, names: str, **changes: Any) -> None:
        self.folder = folder
        script = folder / "script"
        script.write_text(SCRIPT)
        script.chmod(0o755)
        self.changed = asyncio.Event()

        def resource(name: str) -> ResourceSettings:
            options = {"exec": name} | {do: (str(script), name, do) for do in ("start", "stop", "monitor")}
            return ResourceSettings("exec", f"exec {name}", options, "", monitor_interval_s=0.05)

        group = replace(GroupSettings("web", "node1", tuple(map(resource, names))), **changes)
        settings = settings_of(run_dir=folder / "run", groups=(group,))
        self.runner: GroupRunner = build_group(group, settings, clock.now, self.changed.set)

    @property
    def log(self) -> list[str]:
        path = self.folder / "log"
        return path.read_text().splitlines() if path.exists() else []

    def touch(self, name: str) -> Path:
        path = self.folder / name
        path.touch()
        return path

    async def until(self, status: Status) -> None:
        await self.when(lambda: self.runner.status is status)

    async def when(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def started(self) -> None:
        self.runner.begin(held=False)
        await self.until(Status.STOPPED)
        self.runner.start(peer_is_dead=False)
        await self.until(Status.STARTED)


def run(lab_of: Callable[[], Lab], body: Callable[[Lab], Awaitable[None]]) -> None:
    async def main() -> None:
        lab = lab_of()
        try:
            await body(lab)
        finally:
            await lab.runner.close()

    asyncio.run(main())


def test_it_starts_in_order_and_stops_in_the_other(tmp_path: Path) -> None:
    async def body(lab: Lab) -> None:
        await lab.started()
        lab.runner.stop()
        lab.runner.stop()
        assert lab.runner.status is Status.STOPPING
        await lab.until(Status.STOPPED)
        assert lab.log == ["start a", "start b", "start c", "stop c", "stop b", "stop a"]

    run(lambda: Lab(tmp_path, "abc"), body)


def test_what_runs_at_the_start_is_stopped(tmp_path: Path) -> None:
    async def body(lab: Lab) -> None:
        lab.touch("b.up")
        lab.runner.begin(held=False)
        assert lab.runner.status is Status.STOPPING, "until it is known that nothing runs"
        await lab.until(Status.STOPPED)
        assert lab.log == ["stop b", "stop a"]

    run(lambda: Lab(tmp_path, "ab"), body)


def test_what_was_held_goes_on(tmp_path: Path) -> None:
    async def body(lab: Lab) -> None:
        lab.touch("a.up")
        lab.runner.begin(held=True)
        assert lab.runner.status is Status.SUSPENDED
        lab.runner.start(peer_is_dead=False)
        await lab.until(Status.STARTED)
        assert lab.log == []

    run(lambda: Lab(tmp_path, "a"), body)


def test_a_failure_is_mended_with_what_stands_on_it(tmp_path: Path) -> None:
    async def body(lab: Lab) -> None:
        await lab.started()
        (tmp_path / "b.up").unlink()
        await lab.when(lambda: len(lab.log) > 3)
        await lab.until(Status.STARTED)
        assert lab.log[3:] == ["stop c", "stop b", "start b", "start c"]
        assert lab.runner.ready() == Ready()

    run(lambda: Lab(tmp_path, "abc"), body)


def test_too_many_failures_end_it_until_somebody_has_mended_it(tmp_path: Path) -> None:
    async def body(lab: Lab) -> None:
        lab.runner.begin(held=False)
        await lab.until(Status.STOPPED)
        fails = lab.touch("b-start.fails")
        lab.runner.start(peer_is_dead=False)
        await lab.until(Status.FAILED)
        assert lab.log == [*["start a", "start b", "stop b"], *["start b", "stop b", "stop a"]]
        ready = lab.runner.ready()
        assert ready.readiness is Readiness.NO
        assert ready.why.startswith("exec b has failed 2 times within 60 s (cannot be started: its start returned 1")
        fails.unlink()
        lab.runner.forget_failures()
        assert lab.runner.status is Status.STOPPED
        assert lab.runner.ready() == Ready()
        lab.runner.start(peer_is_dead=False)
        await lab.until(Status.STARTED)

    run(lambda: Lab(tmp_path, "ab", max_failures=2), body)


def test_failures_outside_the_window_do_not_count_but_leave_it_reluctant(tmp_path: Path) -> None:
    async def body(lab: Lab) -> None:
        lab.runner.begin(held=False)
        await lab.until(Status.STOPPED)
        lab.touch("a-start.fails")
        lab.runner.start(peer_is_dead=False)
        await lab.until(Status.FAILED)
        later = clock.now() + 61.0
        lab.runner._now = lambda: later
        assert lab.runner.ready().readiness is Readiness.RELUCTANT
        assert lab.runner.ready().why.endswith("`replicactl cluster --clear` forgets it")

    run(lambda: Lab(tmp_path, "a", max_failures=1), body)


def test_a_stop_that_fails_is_tried_again_and_then_stuck_until_it_is_mended(tmp_path: Path) -> None:
    async def body(lab: Lab) -> None:
        await lab.started()
        fails = lab.touch("b-stop.fails")
        lab.runner.stop()
        await lab.until(Status.STUCK)
        assert lab.log[2:] == ["stop b", "stop b"], "what is under it goes on"
        assert not lab.runner.status.holds_nothing
        assert lab.runner.problem == "exec b cannot be stopped: its stop returned 1"
        fails.unlink()
        lab.runner.forget_failures()
        await lab.until(Status.STOPPED)
        assert lab.log[4:] == ["stop b", "stop a"]

    run(lambda: Lab(tmp_path, "ab", stop_attempts=2), body)


def test_a_stop_comes_through_in_the_middle_of_a_start(tmp_path: Path) -> None:
    async def body(lab: Lab) -> None:
        lab.runner.begin(held=False)
        await lab.until(Status.STOPPED)
        _fifo(tmp_path / "b-start.hold")
        lab.runner.start(peer_is_dead=False)
        await lab.when(lambda: lab.runner.resource == "exec b")
        lab.runner.stop()
        await lab.until(Status.STOPPED)
        assert [line for line in lab.log if line.startswith("stop")] == ["stop b", "stop a"]
        assert not list(tmp_path.glob("*.up"))

    run(lambda: Lab(tmp_path, "ab"), body)


def test_a_start_that_takes_too_long_has_failed(tmp_path: Path) -> None:
    async def body(lab: Lab) -> None:
        lab.runner.begin(held=False)
        await lab.until(Status.STOPPED)
        _fifo(tmp_path / "a-start.hold")
        lab.runner.resources[0].settings = replace(lab.runner.resources[0].settings, start_timeout_s=0.2)
        lab.runner.start(peer_is_dead=False)
        await lab.until(Status.FAILED)
        assert lab.runner.problem == "was not started within 0.2 s"

    run(lambda: Lab(tmp_path, "a", max_failures=1), body)


def test_suspended_it_runs_on_and_is_not_watched(tmp_path: Path) -> None:
    async def body(lab: Lab) -> None:
        await lab.started()
        lab.runner.suspend()
        assert lab.runner.status is Status.SUSPENDED
        assert (tmp_path / "a.up").exists()
        (tmp_path / "a.up").unlink()
        lab.runner.start(peer_is_dead=False)
        await lab.until(Status.STARTED)
        assert lab.log == ["start a", "start a"]
        lab.runner.suspend()
        lab.runner.stop()
        await lab.until(Status.STOPPED)

    run(lambda: Lab(tmp_path, "a"), body)


class Faulty(ExecuteAgent):
    """Its calls fail with what no agent should fail with."""

    fails: frozenset[str] = frozenset()

    def _fail(self, call: str) -> None:
        if call in self.fails:
            raise KeyError(call)

    async def start(self, start: Start) -> None:
        self._fail("start")
        await super().start(start)

    async def stop(self) -> None:
        self._fail("stop")
        await super().stop()

    async def monitor(self) -> None:
        self._fail("monitor")
        await super().monitor()

    async def active(self) -> bool:
        self._fail("active")
        return await super().active()

    def ready(self) -> Ready:
        self._fail("ready")
        return super().ready()

    def hold(self, until_s: float) -> None:
        self._fail("hold")

    def let_go(self) -> None:
        self._fail("let_go")


@pytest.mark.parametrize(
    ("call", "status"), [("start", Status.FAILED), ("monitor", Status.FAILED), ("stop", Status.STUCK)]
)
def test_an_agent_with_a_fault_is_a_resource_that_fails(tmp_path: Path, call: str, status: Status) -> None:
    async def body(lab: Lab) -> None:
        lab.runner.begin(held=False)
        await lab.until(Status.STOPPED)
        lab.runner.resources[0].agent.__class__ = Faulty
        lab.runner.resources[0].agent.fails = frozenset({call})  # type: ignore[attr-defined]
        lab.runner.start(peer_is_dead=False)
        if call == "stop":
            await lab.until(Status.STARTED)
            lab.runner.stop()
        await lab.until(status)
        assert "its agent has failed (KeyError" in lab.runner.problem

    run(lambda: Lab(tmp_path, "a", max_failures=1, stop_attempts=1), body)


def test_an_agent_with_a_fault_is_not_the_end_of_the_daemon(tmp_path: Path) -> None:
    async def body(lab: Lab) -> None:
        lab.runner.resources[0].agent.__class__ = Faulty
        lab.runner.resources[0].agent.fails = frozenset({"active", "ready", "hold", "let_go"})  # type: ignore[attr-defined]
        lab.runner.begin(held=False)
        await lab.until(Status.FAILED)
        assert lab.runner.ready().readiness is Readiness.NO
        lab.runner.start(peer_is_dead=False)
        await lab.until(Status.STARTED)
        lab.runner.hold(clock.now() + 1)
        lab.runner.suspend()
        assert lab.runner.status is Status.SUSPENDED

    run(lambda: Lab(tmp_path, "a"), body)


def _fifo(path: Path) -> None:
    """Whoever reads it waits."""
    os.mkfifo(path)
