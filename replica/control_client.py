"""The client's end of a control socket for an event loop; see `replica.control` for what is said there."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from replica.control import MAX_ANSWER_BYTES, answer, connect_error, gone_away, messages, new_unpacker, pack

_READ_BYTES = 64 << 10


async def call(path: Path, verb: str, args: dict[str, Any] | None = None) -> Any:
    """Ask the daemon behind the control socket; its result. Waits for as long as that takes. Raises as
    `replica.control.call` does. When the caller is cancelled, the daemon may still do what it was asked.
    """
    async with aclosing(_exchange(path, verb, args)) as received:
        async for message in received:
            if "event" not in message:
                return answer(message, path)
    raise gone_away(path, verb)


async def events(path: Path, verb: str) -> AsyncGenerator[dict[str, Any], None]:
    """What a watching verb tells, until the daemon goes away; raises as `replica.control.call` does."""
    async with aclosing(_exchange(path, verb, None)) as received:
        async for message in received:
            match message:
                case {"event": dict(event)}:
                    yield event
                case _:
                    answer(message, path)
                    return


async def _exchange(path: Path, verb: str, args: dict[str, Any] | None) -> AsyncGenerator[dict[str, Any], None]:
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError as error:
        raise connect_error(path, error) from None
    unpacker = new_unpacker(MAX_ANSWER_BYTES)
    try:
        writer.write(pack({"verb": verb, "args": args or {}}))
        while data := await reader.read(_READ_BYTES):
            for message in messages(unpacker, data, "answer"):
                yield message if isinstance(message, dict) else {}
    except ConnectionError:
        return
    finally:
        writer.close()
