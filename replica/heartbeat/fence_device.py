"""One fence device: a standard fence agent, which switches a node off and tells whether it is.

The interface is that of the ClusterLabs fence agents (their FenceAgentAPI.md): ``key=value`` lines on standard input,
``action`` among them; exit status 0 is success; ``status`` ends with 0 for on and 2 for off.
"""

import asyncio
import logging
import os
import re
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from replica import programs
from replica.errors import ReplicaError
from replica.heartbeat.settings import FenceDevice
from replica.hooks import one_line

log = logging.getLogger("replica.heartbeat.fencing")

#: The end of the name of an option whose value is in a file: "password-file" for the agent's "password".
SECRET_FILE: Final = "-file"
MAX_SECRET_BYTES: Final = 4096
#: Where agents lie that are not in the PATH.
AGENT_DIRS: Final = "/usr/sbin:/sbin:/usr/local/sbin"

_STATUS_ON: Final = 0
_STATUS_OFF: Final = 2
_RETRY_S: Final = 1.0
_MAX_SAID: Final = 300
#: Options whose values must not be seen even when they stand in the configuration itself.
_SECRET_NAME: Final = re.compile(r"pass|secret|token|community|credential|_key$|^key$|hexadecimal_kg", re.IGNORECASE)


class FenceError(ReplicaError):
    """A device has failed; the text is the end of a sentence about it."""


class _Answer(NamedTuple):
    status: int | None
    said: str  # "returned 1: Unable to connect"


class _Input(NamedTuple):
    options: Mapping[str, str]
    secrets: tuple[str, ...]


class Device:
    """A device that fences one node."""

    def __init__(self, settings: FenceDevice, node: str, relative_to: Path) -> None:
        self.settings = settings
        self.name = Path(settings.agent).name
        self._node = node
        self._relative_to = relative_to

    async def switch_off(self) -> None:
        """Return when the node is off and the device has confirmed it. FenceError after the last attempt."""
        for attempt in range(self.settings.retries + 1):
            if attempt:
                await asyncio.sleep(_RETRY_S)
            try:
                return await self._switch_off_once()
            except FenceError as error:
                failure = error
                log.warning("fencing %s: %s %s (attempt %d).", self._node, self.name, error, attempt + 1)
        raise failure

    async def switch_on(self) -> None:
        """Return when the agent says that the node is on. FenceError after the last attempt."""
        for attempt in range(self.settings.retries + 1):
            if attempt:
                await asyncio.sleep(_RETRY_S)
            answer = await self._call("on")
            if answer.status == 0:
                return
        raise FenceError(f"on {answer.said}")

    async def test(self) -> str:
        """What the device says about the node ("on", "off"); nothing is switched. FenceError if it does not answer."""
        answer = await self._call("monitor")
        if answer.status != 0:
            raise FenceError(f"monitor {answer.said}")
        answer = await self._call("status")
        if answer.status not in (_STATUS_ON, _STATUS_OFF):
            raise FenceError(f"status {answer.said}")
        return "on" if answer.status == _STATUS_ON else "off"

    async def _switch_off_once(self) -> None:
        answer = await self._call("off")
        if answer.status != 0:
            raise FenceError(f"off {answer.said}")
        loop = asyncio.get_running_loop()
        limit_s = loop.time() + self.settings.timeout_s
        while True:
            answer = await self._call("status")
            if answer.status == _STATUS_OFF:
                return
            if loop.time() > limit_s:
                said = "says that it is still on" if answer.status == _STATUS_ON else f"does not confirm: {answer.said}"
                raise FenceError(f"off ended well, but status {said}")
            await asyncio.sleep(_RETRY_S)

    async def _call(self, action: str) -> _Answer:
        """Run the agent; FenceError when there is nothing to run it with."""
        given, agent = await asyncio.to_thread(lambda: (self._read_options(), self._find_agent()))
        stdin = as_input(action, given.options)
        lines: list[str] = []

        def on_line(line: str) -> None:
            line = redacted(one_line(line), given.secrets)
            lines.append(line)
            log.info("fencing %s: %s %s: %s", self._node, self.name, action, line)

        log.info("fencing %s: %s: runs %s", self._node, self.name, action)
        ended = await programs.run([agent], {}, self.settings.timeout_s, on_line, stdin=stdin)
        said = [
            line.strip() for line in lines if line.strip() and line != programs.NOT_LOGGED and "-h' for" not in line
        ]
        return _Answer(ended.status, ": ".join([ended.problem, *(line[:_MAX_SAID] for line in said[-1:])]))

    def _find_agent(self) -> str:
        agent = self.settings.agent
        path = os.pathsep.join((os.environ.get("PATH", ""), AGENT_DIRS))
        found = agent if agent.startswith("/") else shutil.which(agent, path=path)
        if found is None:
            raise FenceError("is not installed on this node (Debian's are in the package fence-agents)")
        return found

    def _read_options(self) -> _Input:
        """The options with what is in their files."""
        options, secrets = {}, []
        for name, value in self.settings.options.items():
            if name.endswith(SECRET_FILE):
                name, value = name.removesuffix(SECRET_FILE), read_secret(self._relative_to / value)
                secrets.append(value)
            elif _SECRET_NAME.search(name):
                secrets.append(value)
            options[name] = value
        return _Input(options, tuple(secrets))


def as_input(action: str, options: Mapping[str, str]) -> bytes:
    """What an agent reads. Pure; FenceError for a value that would become another option."""
    lines = [("action", action), *((name, value) for name, value in options.items() if name != "action")]
    for name, value in lines:
        if "\n" in value or "\r" in value:
            raise FenceError(f"cannot be given its option {name}: the value has more than one line")
    stdin = "".join(f"{name}={value}\n" for name, value in lines).encode()
    if len(stdin) > programs.MAX_STDIN_BYTES:
        raise FenceError(f"cannot be given its options: they are longer than {programs.MAX_STDIN_BYTES} bytes")
    return stdin


def redacted(line: str, secrets: tuple[str, ...]) -> str:
    """The line without the secrets. Pure."""
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        line = line.replace(secret, "***")
    return line


def read_secret(path: Path) -> str:
    """The first line of a file that only its owner may read. FenceError. Blocks."""
    try:
        # O_NONBLOCK so that a FIFO in its place cannot hang us
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise FenceError(f"needs {path}, which cannot be read ({error.strerror})") from None
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FenceError(f"needs {path}, which is not a regular file")
        if status.st_uid not in (os.geteuid(), 0):
            raise FenceError(f"needs {path}, which belongs to user {status.st_uid}: it must belong to root")
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise FenceError(f"needs {path}, which has mode {mode:04o}, so others may use it: run `chmod 600 {path}`")
        data = stream.read(MAX_SECRET_BYTES + 1).rstrip(b"\r\n")
    try:
        secret = data.decode()
    except UnicodeDecodeError:
        raise FenceError(f"needs {path}, which is not UTF-8 text") from None
    if not secret or len(data) > MAX_SECRET_BYTES or "\n" in secret:
        raise FenceError(f"needs {path}, which must have one line of at most {MAX_SECRET_BYTES} bytes")
    return secret
