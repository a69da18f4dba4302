"""The kinds of resources, each in a module of its own that is imported when it is needed."""

import importlib
from typing import Final

from replica.heartbeat.agents.base import Kind

#: The name of a kind, as in ``kind = "…"`` → its module.
MODULES: Final = {
    "replica": "replicated",
    "map": "mapped",
    "mount": "mount",
    "ip": "ip_options",
    "systemd": "systemd",
    "lsb": "scripts",
    "resource.d": "scripts",
    "ocf": "ocf",
    "exec": "execute",
}


def kind(name: str) -> Kind:
    """The kind of this name; KeyError."""
    module = importlib.import_module(f"replica.heartbeat.agents.{MODULES[name]}")
    kinds: dict[str, Kind] = {kind.name: kind for kind in module.KINDS}
    return kinds[name]
