"""Programs that are kept running beside the cluster manager (`respawn`), on the event loop that the daemon has."""

import asyncio
import contextlib
import logging
import os
import pwd
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from replica.heartbeat import client_programs
from replica.heartbeat.client_programs import ClientPrograms, next_pause_s
from replica.heartbeat.settings import Respawn
from tests.processes import gone
from tests.unit.agent_bench import program, run

_ME = pwd.getpwuid(os.geteuid()).pw_name
#: Each life of a program is a line: which program, its process, its user.
_LIVE = 'echo "$1" $$ "$(id -un)" > {}'


@pytest.fixture
def respawn(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> "Respawner":
    if os.geteuid() != 0:
        pytest.skip("needs root: programs are started as another user")
    monkeypatch.setattr(client_programs, "_PAUSE_S", 0.005)
    monkeypatch.setattr(client_programs, "_GRACE_S", 0.05)
    return Respawner(short_dir)


class Respawner:
    """Makes programs that tell of themselves."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lives = folder / "lives"
        os.mkfifo(self._lives, 0o666)
        self._lives.chmod(0o666)
        folder.chmod(0o755)  # also for nobody

    def program(self, name: str, then: str, user: str = _ME) -> Respawn:
        """One that tells that it lives, and then does this."""
        script = program(self._folder / name, f"{_LIVE.format(self._lives)}; {then}")
        return Respawn(user, (str(script), name))

    @contextlib.asynccontextmanager
    async def running(self, *programs: Respawn) -> AsyncIterator[asyncio.StreamReader]:
        """They are kept running; the lines of their lives."""
        reader, clients = asyncio.StreamReader(), ClientPrograms(programs)
        with os.fdopen(os.open(self._lives, os.O_RDWR | os.O_NONBLOCK), "rb", buffering=0) as lives:
            transport, _ = await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), lives
            )
            clients.start()
            try:
                yield reader
            finally:
                await clients.stop()
                transport.close()


async def _life(lives: asyncio.StreamReader) -> tuple[str, int, str]:
    name, pid, user = (await lives.readline()).decode().split()
    return name, int(pid), user


@pytest.mark.parametrize("user", [_ME, "nobody"])
def test_what_ends_is_started_again_as_its_user(respawn: Respawner, user: str) -> None:
    async def test() -> None:
        async with respawn.running(respawn.program("tool", "exit 3", user)) as lives:
            seen = [await _life(lives) for _ in range(3)]
        assert {(name, who) for name, _, who in seen} == {("tool", user)}
        assert len({pid for _, pid, _ in seen}) == 3

    run(test)


def test_what_has_had_enough_is_not_started_again(respawn: Respawner) -> None:
    async def test() -> None:
        enough, again = respawn.program("enough", "exit 100"), respawn.program("again", "exit 0")
        async with respawn.running(enough, again) as lives:
            seen: list[str] = []
            while seen.count("again") < 6 or "enough" not in seen:
                seen.append((await _life(lives))[0])
        assert seen.count("enough") == 1

    run(test)


@pytest.mark.parametrize("trap", ["true", "trap '' TERM"])
def test_what_runs_ends_with_the_daemon_whether_it_listens_or_not(respawn: Respawner, trap: str) -> None:
    async def test() -> None:
        async with respawn.running(respawn.program("tool", f"{trap}; exec sleep 1000")) as lives:
            _, pid, _ = await _life(lives)
        gone(pid)

    run(test)


def test_what_cannot_be_started_is_said_and_holds_up_nothing(
    respawn: Respawner, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        unknown = Respawn("nobody-of-that-name", ("/bin/true",))
        missing = Respawn(_ME, ("/no/such/program",))
        async with respawn.running(unknown, missing, respawn.program("tool", "exit 0")) as lives:
            for _ in range(4):
                await _life(lives)
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        for words in ("/bin/true cannot be started as nobody-of-that-name", "/no/such/program cannot be started"):
            assert any(words in line for line in said)

    run(test)


@pytest.mark.parametrize(
    ("pause_s", "ran_s", "expected_s"), [(1, 0, 2), (2, 59, 4), (32, 0, 60), (60, 1, 60), (60, 60, 1), (8, 3600, 1)]
)
def test_the_pause_grows_until_it_has_run_for_a_minute(pause_s: float, ran_s: float, expected_s: float) -> None:
    assert next_pause_s(pause_s, ran_s) == expected_s
