"""The system's own programs (mount, losetup, …), run for an agent."""

from typing import Final

from replica import programs
from replica.heartbeat.agents.base import AgentError

#: Longer than any of them takes; a resource has its own time limit, after which they are ended as well.
TIMEOUT_S: Final = 3600.0


async def run(*command: str, timeout_s: float = TIMEOUT_S, good: tuple[int, ...] = (0,)) -> str:
    """What it printed. AgentError with its words when it returns something that is not `good`."""
    lines: list[str] = []
    ended = await programs.run(command, {}, timeout_s, lines.append)
    if ended.status not in good:
        words = " ".join(line.strip() for line in lines[-3:])
        raise AgentError(f"failed: `{' '.join(command)}` {ended.problem}{words and f' ({words})'}")
    return "\n".join(lines)
