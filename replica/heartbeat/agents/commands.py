"""The system's own programs (mount, losetup, …), run for an agent."""

from collections.abc import Mapping
from typing import Final

from replica import programs
from replica.heartbeat.agents.base import AgentError

#: Longer than any of them takes; a resource has its own time limit, after which they are ended as well.
TIMEOUT_S: Final = 3600.0


async def run(*command: str, good: tuple[int, ...] = (0,), variables: Mapping[str, str] | None = None) -> str:
    """What it printed. `variables` are its environment besides the usual. AgentError with its words when it returns
    something that is not `good`.
    """
    lines: list[str] = []
    ended = await programs.run(command, variables or {}, TIMEOUT_S, lines.append)
    if ended.status not in good:
        words = " ".join(line.strip() for line in lines[-3:])
        raise AgentError(f"failed: `{' '.join(command)}` {ended.problem}{words and f' ({words})'}")
    return "\n".join(lines)
