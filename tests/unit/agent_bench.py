"""Agents of services for tests: made as a group makes them, with programs in a directory of the test."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import uvloop

from replica.heartbeat.agents import kinds
from replica.heartbeat.agents.base import Agent, Start, Surroundings
from replica.heartbeat.settings import Auth, AuthMethod, HeartbeatSettings, ResourceSettings

#: Longer than anything here takes.
PATIENCE_S = 60.0

START = Start(peer_is_dead=False)


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test on an event loop, within bounds."""

    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await test()

    uvloop.run(bounded())


def settings_in(directory: Path, **others: Any) -> HeartbeatSettings:
    """Settings of node1, with its directories in this one."""
    values: dict[str, Any] = {
        "cluster": "test",
        "node": "node1",
        "peer": "node2",
        "auth": Auth(AuthMethod.CRC, b""),
        "paths": (),
        "groups": (),
        "state_dir": directory / "state",
        "run_dir": directory / "run",
        **others,
    }
    return HeartbeatSettings(**values)


def options_of(kind_name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The checked options, as the reader of the settings makes them."""
    kind = kinds.kind(kind_name)
    options = {
        name: option.parse(given[name]) if name in given else option.default for name, option in kind.options.items()
    }
    kind.check(options)
    return options


def make(kind_name: str, given: Mapping[str, Any], settings: HeartbeatSettings) -> Agent:
    """An agent from options as they stand in the file."""
    kind = kinds.kind(kind_name)
    options = options_of(kind_name, given)
    resource = ResourceSettings(kind_name, kind.title(options), options, "test")
    return kind.make(resource, Surroundings(settings, lambda: None))


def program(path: Path, text: str) -> Path:
    """A shell script at this path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path
