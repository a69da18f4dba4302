"""The agent of systemd's units, with a `systemctl` that a script plays: no systemd runs where the tests run.

What the script answers is what systemd 252 answers: the properties of org.freedesktop.systemd1, and its words.
"""

import logging
import os
from pathlib import Path

import pytest

from replica.heartbeat.agents import service, systemd
from replica.heartbeat.agents.base import Agent, AgentError
from replica.heartbeat.agents.service import State
from replica.heartbeat.agents.systemd import judge
from tests.unit.agent_bench import START, make, options_of, program, run, settings_in

_SYSTEMCTL = """
cd {0}; echo "$*" >> calls
get() {{ cat $1 2>/dev/null || echo $2; }}
case $1 in
  show) echo "LoadState=$(get load loaded)"; echo "ActiveState=$(get active inactive)"; echo "SubState=$(get sub dead)"
        echo "Result=$(get result success)"; echo "UnitFileState=$(get file disabled)"
        echo "DropInPaths=$(get known)" ;;
  daemon-reload) echo {0}/web.service.d/*.conf | grep -v '[*]' > known ;;
  start) test -e fails && {{ echo "Job for web.service failed because the control process exited with error code."
                             echo failed > active; echo exit-code > result; exit 1; }}
         echo active > active; echo running > sub; true ;;
  stop) test -e clings || {{ echo inactive > active; echo dead > sub; }} ;;
esac
"""


@pytest.fixture
def unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Agent:
    program(tmp_path / "systemctl", _SYSTEMCTL.format(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(service, "SETTLE_S", 0.3)
    monkeypatch.setattr(systemd, "BOOTED", tmp_path)
    return make("systemd", {"systemd": "web"}, settings_in(tmp_path))


def calls(tmp_path: Path) -> list[str]:
    return [line for line in (tmp_path / "calls").read_text().splitlines() if not line.startswith("show ")]


def test_a_unit_is_started_watched_and_stopped_and_all_of_it_may_be_repeated(unit: Agent, tmp_path: Path) -> None:
    async def test() -> None:
        assert not await unit.active()
        await unit.start(START)
        await unit.start(START)
        await unit.monitor()
        assert await unit.active()
        await unit.stop()
        await unit.stop()
        with pytest.raises(AgentError, match=r"^is inactive \(dead\)$"):
            await unit.monitor()
        assert [call for call in calls(tmp_path) if call != "daemon-reload"] == [
            "start web.service",
            "stop web.service",
            "stop web.service",
        ]

    run(test)


def test_while_a_unit_is_the_groups_a_shutdown_leaves_it_to_the_group(unit: Agent, tmp_path: Path) -> None:
    """And once the group stops it, systemd is not to wait for the end of the cluster manager, which waits for it."""
    order = tmp_path / "web.service.d" / "50-replica-heartbeat.conf"

    async def test() -> None:
        await unit.start(START)
        assert order.read_text() == "[Unit]\nBefore=replica-heartbeat.service\n"
        assert calls(tmp_path) == ["start web.service", "daemon-reload"]
        order.unlink()
        await unit.stop()
        assert not order.parent.exists()  # also when a stop before this one came no further
        assert calls(tmp_path)[2:] == ["daemon-reload", "stop web.service"]

    run(test)


def test_an_order_that_cannot_be_given_is_said_and_holds_up_nothing(
    unit: Agent, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        (tmp_path / "web.service.d").touch()
        await unit.start(START)
        await unit.monitor()
        await unit.stop()
        assert "its order in a shutdown cannot be changed" in caplog.text

    run(test)


def test_a_unit_that_fails_to_start_or_later(unit: Agent, tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "fails").touch()
        with pytest.raises(AgentError, match=r"^cannot be started: systemctl returned 1: Job for web.service failed"):
            await unit.start(START)
        with pytest.raises(AgentError, match=r"^is failed \(dead\), because of: exit-code$"):
            await unit.monitor()
        (tmp_path / "fails").unlink()
        await unit.start(START)

    run(test)


def test_a_unit_that_does_not_stop(unit: Agent, tmp_path: Path) -> None:
    async def test() -> None:
        await unit.start(START)
        (tmp_path / "clings").touch()
        with pytest.raises(AgentError, match="still runs, although its stop ended well"):
            await unit.stop()

    run(test)


@pytest.mark.parametrize(
    ("load", "sentence"),
    [
        ("not-found", r"this node has no unit web\.service"),
        ("masked", r"the unit web\.service is masked \(see `systemctl unmask`\)"),
        ("bad-setting", r"systemd cannot load the unit web\.service"),
    ],
)
def test_a_unit_that_cannot_be_started(unit: Agent, tmp_path: Path, load: str, sentence: str) -> None:
    async def test() -> None:
        (tmp_path / "load").write_text(load)
        with pytest.raises(AgentError, match=f"^cannot be started: {sentence}"):
            await unit.start(START)
        assert not await unit.active()
        await unit.stop()

    run(test)


def test_a_unit_that_systemd_starts_at_boot_draws_one_warning(
    unit: Agent, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        (tmp_path / "file").write_text("enabled")
        await unit.active()
        await unit.active()
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert warnings == [
            "systemd web.service: systemd starts it at boot, too, on whichever node that is: "
            "run `systemctl disable web.service` on both."
        ]

    run(test)


def test_where_systemd_does_not_run_no_unit_does(unit: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "BOOTED", tmp_path / "nothing")

    async def test() -> None:
        assert not await unit.active()
        await unit.stop()
        with pytest.raises(AgentError, match="cannot be started: this node was not booted with systemd"):
            await unit.start(START)
        assert make("systemd", {"systemd": "web"}, settings_in(tmp_path)).ready().why == (
            "this node was not booted with systemd"
        )
        assert not (tmp_path / "calls").exists()

    run(test)


def test_when_systemd_does_not_answer_the_state_is_unknown(unit: Agent, tmp_path: Path) -> None:
    async def test() -> None:
        program(tmp_path / "systemctl", 'echo "Failed to get properties: Connection timed out"; exit 1')
        with pytest.raises(AgentError, match="has an unknown status: systemctl returned 1: Failed to get properties"):
            await unit.active()
        with pytest.raises(AgentError):
            await unit.stop()

    run(test)


@pytest.mark.parametrize(
    ("active", "state"),
    [
        ("active", State.RUNNING),
        ("reloading", State.RUNNING),
        ("inactive", State.STOPPED),
        ("failed", State.STOPPED),
        ("activating", State.BROKEN),
        ("deactivating", State.BROKEN),
        ("maintenance", State.BROKEN),
    ],
)
def test_the_states_of_a_unit(active: str, state: State) -> None:
    assert judge({"ActiveState": active, "SubState": "", "Result": ""}).state is state


@pytest.mark.parametrize(
    ("given", "unit_name"),
    [("apache2", "apache2.service"), ("a.b", "a.b.service"), ("x.socket", "x.socket"), ("r@1.service", "r@1.service")],
)
def test_the_name_of_a_unit(given: str, unit_name: str) -> None:
    assert options_of("systemd", {"systemd": given}) == {"systemd": unit_name}


@pytest.mark.parametrize("given", ["", "-x", "a b", "a/b", 7])
def test_what_is_no_name_of_a_unit(given: object) -> None:
    with pytest.raises(ValueError, match="must be the name of a unit"):
        options_of("systemd", {"systemd": given})
