"""Other people's programs (hooks, resource scripts, fence agents) as processes of this machine: started, listened to,
and ended together with what they have started.

Starting a program can take as long as the disk likes on which it lies; one on a dead file server must not stop the
event loop. Hence a thread for each start.
"""

import asyncio
import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from replica.tasks import to_its_end

#: Between SIGTERM and SIGKILL, and how long the end is waited for after that.
GRACE_S: Final = 1.0
#: Starts that hang and were given up; beyond that no more are attempted.
MAX_HANGING: Final = 4
#: What a pipe takes at once (pipe(7)).
MAX_STDIN_BYTES: Final = 64 << 10
#: What a program prints is listened to up to here.
MAX_LINES: Final = 64
MAX_OUTPUT_BYTES: Final = 8 << 10
#: Stands in place of what is beyond that.
NOT_LOGGED: Final = "(the rest of its output is not logged)"
_READ_BYTES: Final = 64 << 10
#: Output that is no longer logged is thrown away so seldom that a flood of it costs next to nothing.
_FLOOD_PAUSE_S: Final = 0.02
_DEFAULTS: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/",
}

if sys.version_info < (3, 11, 4):
    # There, vfork keeps the interpreter's lock until exec is through, and with it all threads.
    subprocess._USE_VFORK = False  # type: ignore[misc]

#: Threads whose starts nobody waits for any more.
_given_up: list[threading.Thread] = []


class Ended(NamedTuple):
    """How a program ended."""

    #: Its exit status, negative for a signal; None when it was never started, or ran too long and was killed.
    status: int | None
    #: What was wrong, as the end of a sentence ("returned 1"); "" for status 0.
    problem: str


class _Started(NamedTuple):
    process: "subprocess.Popen[bytes]"
    pidfd: int

    def discard(self) -> None:
        """Nobody waits for it any more."""
        _signal_group(self.process, signal.SIGKILL)
        self.close()
        self.process.wait()

    def close(self) -> None:
        os.close(self.pidfd)
        if self.process.stdout is not None:
            self.process.stdout.close()


async def run(
    command: Sequence[str],
    variables: Mapping[str, str],
    timeout_s: float | None,
    on_line: Callable[[str], None],
    *,
    stdin: bytes = b"",
) -> Ended:
    """Run a command to its end. `variables` are its environment besides PATH, LANG and HOME; it reads `stdin` (at most
    `MAX_STDIN_BYTES`); each line that it prints, on either of its outputs, is given to `on_line` up to `MAX_LINES`.

    After `timeout_s` (None: no limit), and when the caller is cancelled, its whole process group gets SIGTERM and
    `GRACE_S` later SIGKILL. What it leaves behind in the background when it ends in time is left alone. Raises
    ValueError for more input than that, and nothing else.
    """
    if len(stdin) > MAX_STDIN_BYTES:
        raise ValueError(f"{len(stdin)} bytes of input are more than {MAX_STDIN_BYTES}")
    _given_up[:] = [thread for thread in _given_up if thread.is_alive()]
    if len(_given_up) >= MAX_HANGING:
        hang = f"{MAX_HANGING} programs hang in their start (does the disk answer that they lie on?)"
        return Ended(None, f"cannot be started: {hang}")
    limit_s = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
    thread, starting = _start(command, variables, stdin)
    try:
        async with asyncio.timeout_at(limit_s):
            started = await asyncio.wrap_future(starting)
    except TimeoutError:
        _give_up(thread, starting)
        return Ended(None, f"could not be started within {timeout_s:g} s")
    except asyncio.CancelledError:
        _give_up(thread, starting)
        raise
    except (OSError, ValueError) as error:
        return Ended(None, f"cannot be started ({command[0]}: {getattr(error, 'strerror', None) or error})")
    program = _Running(started, on_line)
    timed_out = False
    try:
        async with asyncio.timeout_at(limit_s):
            await program.exited.wait()
    except TimeoutError:
        timed_out = True
    finally:
        status = await to_its_end(program.end(), "end of a program")
    if timed_out or status is None:
        return Ended(None, f"ran longer than {timeout_s:g} s and was killed")
    return Ended(status, _problem(status))


def _problem(status: int) -> str:
    return "" if status == 0 else f"was ended by signal {-status}" if status < 0 else f"returned {status}"


def _start(
    command: Sequence[str], variables: Mapping[str, str], stdin: bytes
) -> "tuple[threading.Thread, concurrent.futures.Future[_Started]]":
    future: concurrent.futures.Future[_Started] = concurrent.futures.Future()
    # From now on it can't be cancelled: what has been started must be taken over by somebody.
    future.set_running_or_notify_cancel()
    basics = {name: os.environ.get(name, value) for name, value in _DEFAULTS.items()}

    def start() -> None:
        try:
            future.set_result(_popen(command, {**basics, **variables}, stdin))
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=start, name="start of a program", daemon=True)
    thread.start()
    return thread, future


def _give_up(thread: threading.Thread, starting: "concurrent.futures.Future[_Started]") -> None:
    """Nobody waits for this start any more: should it succeed after all, the program is ended at once."""
    _given_up.append(thread)
    starting.add_done_callback(_discard)


def _popen(command: Sequence[str], variables: Mapping[str, str], stdin: bytes) -> _Started:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        cwd="/",
        env=variables,
        start_new_session=True,
    )
    if process.stdin is not None:
        # All of it fits into the pipe: nothing waits for the program to read.
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(stdin)
    try:
        return _Started(process, os.pidfd_open(process.pid))
    except OSError:
        _signal_group(process, signal.SIGKILL)
        process.wait()
        raise


def _discard(future: "concurrent.futures.Future[_Started]") -> None:
    if future.exception() is None:
        future.result().discard()


def _signal_group(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """To the program and all that it has started; what runs as another user by now is out of reach."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


class _Running:
    """A program's process. It is not reaped before `end`, so that until then its group's number is nobody else's."""

    def __init__(self, started: _Started, on_line: Callable[[str], None]) -> None:
        self.exited = asyncio.Event()
        self._started = started
        self._loop = asyncio.get_running_loop()
        self._log = _LogLines(on_line)
        self._pause: asyncio.TimerHandle | None = None
        stdout = started.process.stdout
        assert stdout is not None
        self._output = stdout.fileno()
        os.set_blocking(self._output, False)
        self._loop.add_reader(started.pidfd, self._on_exit)
        self._listen()

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._started.pidfd)
        self.exited.set()

    def _listen(self) -> None:
        self._loop.add_reader(self._output, self._on_output)

    def _on_output(self) -> None:
        data = self._read()
        if data == b"":
            self._loop.remove_reader(self._output)
        elif data is not None:
            self._log.feed(data)
            if self._log.full:
                self._loop.remove_reader(self._output)
                self._pause = self._loop.call_later(_FLOOD_PAUSE_S, self._listen)

    def _read(self) -> bytes | None:
        """What is there; b"" at the end; None when nothing is there."""
        try:
            return os.read(self._output, _READ_BYTES)
        except BlockingIOError:
            return None

    async def end(self) -> int | None:
        """End what still runs of it, read what it has printed last, reap it: its exit status, negative for a signal."""
        process = self._started.process
        in_time = self.exited.is_set()
        for number in () if in_time else (signal.SIGTERM, signal.SIGKILL):
            _signal_group(process, number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GRACE_S):
                    await self.exited.wait()
        for descriptor in (self._started.pidfd, self._output):
            self._loop.remove_reader(descriptor)
        if self._pause is not None:
            self._pause.cancel()
        self._log.feed(self._read() or b"")
        self._log.end()
        status = process.poll()
        self._started.close()
        return status


class _LogLines:
    """Makes lines of what a program prints, up to the limits, and says once that there was more."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._begun = b""
        self._lines = 0
        self._bytes = 0
        self.full = False

    def feed(self, data: bytes) -> None:
        """More output."""
        room = MAX_OUTPUT_BYTES - self._bytes
        self._bytes = min(self._bytes + len(data), MAX_OUTPUT_BYTES)
        *lines, self._begun = (self._begun + data[:room]).split(b"\n")
        for line in lines:
            self._say(line)
        if len(data) > room:
            self.end()
            self._cut()

    def end(self) -> None:
        """There is no more: a last line without its end counts, too."""
        self._say(self._begun)
        self._begun = b""

    def _say(self, line: bytes) -> None:
        if self.full or not line.strip():
            return
        if self._lines == MAX_LINES:
            self._cut()
            return
        self._lines += 1
        self._on_line(line.rstrip(b"\r").decode(errors="replace"))

    def _cut(self) -> None:
        if not self.full:
            self.full = True
            self._on_line(NOT_LOGGED)
