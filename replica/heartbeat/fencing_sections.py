"""`[fencing.NODE]`: how a node is switched off."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from replica import config_values
from replica.config_file import Table, suggestion
from replica.config_values import integer, one_of, seconds
from replica.heartbeat.settings import FenceDevice

#: Ours; any other key is an option of the agent. Key → (field, how it is read). Defaults are those of `FenceDevice`.
FENCING_KEYS: Final[Mapping[str, tuple[str, Callable[[object], Any]]]] = {
    "agent": ("agent", config_values.text),
    "action": ("action", one_of("reboot", "off")),
    "timeout": ("timeout_s", seconds(1, 3600)),
    "retries": ("retries", integer(0, 100)),
    "delay": ("delay_s", seconds(0, 3600)),
}
#: The end of keys that name a file with the option's value: "password-file" for the agent's "password".
SECRET_FILE: Final = "-file"


def read_fencing(top: Table, nodes: Sequence[str]) -> dict[str, tuple[FenceDevice, ...]]:
    """Node → the devices in the order in which they are tried; ConfigError."""
    if "fencing" not in top.items:
        return {}
    table = top.subtable("fencing")
    devices: dict[str, tuple[FenceDevice, ...]] = {}
    for node, value in table.items.items():
        if node not in nodes:
            hint = suggestion(node, nodes) or f" (there are {', '.join(nodes)})"
            raise table.file.error(
                (*table.key, node), f"is no node{hint}: say how each node is fenced in [fencing.NODE]"
            )
        tables = table.tables(node) if isinstance(value, list) else [table.subtable(node)]
        devices[node] = tuple(map(_read_device, tables))
    return devices


def _read_device(table: Table) -> FenceDevice:
    given = {field: table.value(key, parse) for key, (field, parse) in FENCING_KEYS.items() if key in table.items}
    if "agent" not in given:
        raise table.file.error((*table.key, "agent"), 'is missing: name a fence agent such as "fence_ipmilan"')
    options = {key: _option(table, key) for key in table.items if key not in FENCING_KEYS}
    return FenceDevice(options=options, where=table.file.where(table.key), **given)


def _option(table: Table, key: str) -> str:
    """As a fence agent reads it on its input, or the path of the file that has it."""
    value = table.value(key, _line)
    return str(table.file.resolve(value)) if key.endswith(SECRET_FILE) else value


def _line(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if not isinstance(value, str | int | float) or "\n" in str(value):
        raise ValueError(f"must be a text of one line, a number, true or false, not {value!r}")
    return str(value)
