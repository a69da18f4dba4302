"""`[[group]]`: what runs together on one node, in which order."""

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from replica import config_values
from replica.config_file import Table, suggestion
from replica.config_values import integer, seconds
from replica.heartbeat.agents import kinds
from replica.heartbeat.agents.base import REQUIRED, Kind, Option
from replica.heartbeat.settings import GroupSettings, ResourceSettings
from replica.heartbeat.values import tables

#: Besides name, preferred and resources; key → (field, how it is read). Defaults are those of `GroupSettings`.
GROUP_LIMITS: Final = {
    "max-failures": ("max_failures", integer(1, 1000)),
    "failure-window": ("failure_window_s", seconds(1, 86400)),
    "stop-attempts": ("stop_attempts", integer(1, 100)),
}
#: What all kinds of resources have. Defaults are those of `ResourceSettings`.
RESOURCE_TIMES: Final = {
    "start-timeout": ("start_timeout_s", seconds(0.1, 86400)),
    "stop-timeout": ("stop_timeout_s", seconds(0.1, 86400)),
    "monitor-timeout": ("monitor_timeout_s", seconds(0.1, 3600)),
    "monitor-interval": ("monitor_interval_s", seconds(0.1, 86400)),
}


def read_groups(
    top: Table, nodes: Sequence[str], replicas: frozenset[str], replicas_file: Path | None
) -> tuple[GroupSettings, ...]:
    """Every group, checked alone and against the others; ConfigError."""
    tables = top.tables("group")
    groups = [_read_group(table, nodes) for table in tables]
    names: dict[str, Table] = {}
    holders: dict[tuple[str, str], str] = {}  # what can be in one place only → its group
    for table, group in zip(tables, groups, strict=True):
        if group.name in names:
            other = table.file.where(names[group.name].key)
            raise table.file.error((*table.key, "name"), f"is that of another group ({other}): choose another one")
        names[group.name] = table
        entries = table.tables("resources")
        _check_order(entries, group)
        for entry, resource in zip(entries, group.resources, strict=True):
            _check_replica(entry, resource, replicas, replicas_file)
            _check_alone(entry, resource, group.name, holders)
    return tuple(groups)


def cluster_addresses(top: Table) -> frozenset[str]:
    """The IP addresses that the groups hold, in their usual form."""
    entries = (entry for group in top.tables("group") for entry in group.tables("resources"))
    return frozenset(_plain_address(str(entry.items["ip"])) for entry in entries if "ip" in entry.items)


def _read_group(table: Table, nodes: Sequence[str]) -> GroupSettings:
    table.check_keys(("name", "preferred", "resources", *GROUP_LIMITS))
    name = table.value("name", config_values.name, "name the group")
    preferred = table.value("preferred", config_values.text, "name the node that it runs on when both are there")
    if preferred not in nodes:
        hint = suggestion(preferred, nodes) or f" (there are {', '.join(nodes)})"
        raise table.file.error((*table.key, "preferred"), f"{preferred!r} is no node{hint}")
    table.value("resources", tables, "list what the group starts, in order")
    resources = [_read_resource(entry) for entry in table.tables("resources")]
    if not resources:
        raise table.file.error((*table.key, "resources"), "is empty: list what the group starts, in order")
    for number, resource in enumerate(resources):
        same_name = [
            other for other in resources[:number] if other.kind == resource.kind and other.name == resource.name
        ]
        if any(other.options == resource.options for other in same_name):
            raise table.tables("resources")[number].error(f"{resource.name} is in the group {name} twice: remove one")
    resources = _with_names_of_their_own(resources)
    return GroupSettings(name, preferred, tuple(resources), **_given(table, GROUP_LIMITS))


def _with_names_of_their_own(resources: Sequence[ResourceSettings]) -> list[ResourceSettings]:
    """Two of one name (an OCF agent with other parameters, say) are told apart by a number."""
    numbered: list[ResourceSettings] = []
    for resource in resources:
        number = 1 + sum(
            other.kind == resource.kind and other.name == resource.name for other in resources[: len(numbered)]
        )
        numbered.append(resource if number == 1 else replace(resource, name=f"{resource.name} ({number})"))
    return numbered


def _read_resource(table: Table) -> ResourceSettings:
    kind = _kind(table)
    table.check_keys((*kind.options, *RESOURCE_TIMES))
    options = {name: _option(table, kind, name, option) for name, option in kind.options.items()}
    try:
        kind.check(options)
        title = kind.title(options)
    except ValueError as error:
        raise table.error(str(error)) from None
    return ResourceSettings(kind.name, title, options, table.file.where(table.key), **_given(table, RESOURCE_TIMES))


def _kind(table: Table) -> Kind:
    named = [name for name in kinds.MODULES if name in table.items]
    if len(named) == 1:
        return kinds.kind(named[0])
    if named:
        raise table.error(f"is of {len(named)} kinds ({', '.join(named)}): make a table for each of them")
    first = next(iter(table.items), "")
    hint = suggestion(first, kinds.MODULES) or f": one of its keys must be {', '.join(kinds.MODULES)}"
    raise table.error(f"is of no known kind{hint}")


def _option(table: Table, kind: Kind, name: str, option: Option) -> Any:
    if name not in table.items and option.default is not REQUIRED:
        return option.default
    return table.value(name, option.parse, f"{kind.name} needs it")


def _given(table: Table, known: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    return {field: table.value(key, parse) for key, (field, parse) in known.items() if key in table.items}


# ── what only shows when resources are seen together ──────────────────────────────────────────────────────────────


def _check_order(entries: Sequence[Table], group: GroupSettings) -> None:
    """Refuse a device that is used before it is there."""
    made = [_makes(entry, resource.kind) for entry, resource in zip(entries, group.resources, strict=True)]
    for number, (entry, resource) in enumerate(zip(entries, group.resources, strict=True)):
        needed = _needs(entry, resource.kind)
        if needed is not None and needed in made[number + 1 :]:
            kind, what = needed
            first = f'replica = "{what}"' if kind == "replica" else f"the map of {what}"
            raise entry.error(f"comes before what it needs: put {first} in front of it")


def _makes(entry: Table, kind: str) -> tuple[str, object] | None:
    """What others may need: a Primary, or a device."""
    if kind == "replica":
        return "replica", entry.items["replica"]
    return ("device", entry.items["device"]) if kind == "map" and "device" in entry.items else None


def _needs(entry: Table, kind: str) -> tuple[str, object] | None:
    if kind == "map":
        return "replica", entry.items["map"]
    if kind != "mount":
        return None
    bridged = _bridged(entry)
    return ("replica", bridged) if bridged is not None else ("device", entry.items.get("device"))


def _bridged(entry: Table) -> str | None:
    """The resource of a mount that does without a device of the kernel: ``device = "nbd:r0"``."""
    device = str(entry.items.get("device", ""))
    return device.removeprefix("nbd:") if device.startswith("nbd:") else None


def _check_replica(entry: Table, resource: ResourceSettings, replicas: frozenset[str], file: Path | None) -> None:
    """Refuse a replicated resource that is not configured."""
    key = resource.kind
    name = entry.items[key] if key in ("replica", "map") else None
    if key == "mount":
        key, name = "device", _bridged(entry)
    if name is not None and name not in replicas:
        hint = suggestion(str(name), replicas) or (f" (it has {', '.join(sorted(replicas))})" if replicas else "")
        where = f" in {file}{hint}" if file is not None else ", for there is no configuration of replicad"
        raise entry.file.error((*entry.key, key), f"there is no [resource.{name}]{where}")


def _check_alone(entry: Table, resource: ResourceSettings, group: str, holders: dict[tuple[str, str], str]) -> None:
    for kind, what in _held(entry, resource):
        if (kind, what) in holders:
            raise entry.error(f"{kind} {what} is in the group {holders[kind, what]} already: remove one")
        holders[kind, what] = group


def _held(entry: Table, resource: ResourceSettings) -> Iterator[tuple[str, str]]:
    value = str(entry.items[resource.kind])
    if resource.kind == "ip":
        yield "ip", _plain_address(value)
    elif resource.kind in ("replica", "mount"):
        yield resource.kind, value


def _plain_address(value: str) -> str:
    address = value.partition("/")[0]
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        return address
