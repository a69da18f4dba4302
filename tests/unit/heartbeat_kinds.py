"""Kinds of resources for tests of the settings alone: one whose agent is not there has only options."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from replica import config_values
from replica.heartbeat.agents import kinds
from replica.heartbeat.agents.base import Kind, Option


def _kind(name: str, *optional: str, needed: tuple[str, ...] = ()) -> Kind:
    options = {name: Option(config_values.text), **{key: Option(config_values.text) for key in needed}}
    options |= {key: Option(lambda value: value, None) for key in optional}

    def make(*_: Any) -> Any:
        raise AssertionError("these settings are not run")

    return Kind(name, options, lambda given: f"{name} {given[name]}", make)


_MODULES = {
    "replicated": [_kind("replica")],
    "mapped": [_kind("map", "device")],
    "mount": [_kind("mount", "type", "options", needed=("device",))],
    "ip": [_kind("ip", "interface", "broadcast")],
    "systemd": [_kind("systemd")],
    "scripts": [_kind("lsb"), _kind("resource.d", "args")],
    "ocf": [_kind("ocf", "params")],
    "execute": [_kind("exec", "start", "stop", "monitor")],
}


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every kind of resource can be read."""
    for name in dict.fromkeys(kinds.MODULES.values()):
        full_name = f"replica.heartbeat.agents.{name}"
        try:
            importlib.import_module(full_name)
        except ModuleNotFoundError:
            module = ModuleType(full_name)
            module.KINDS = _MODULES[name]  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, full_name, module)
    yield
