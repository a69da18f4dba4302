"""Heartbeat's file `haresources`: one group in each line. What it says becomes tables of `[[group]]`."""

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from replica import config_values
from replica.config_file import ConfigError, suggestion
from replica.heartbeat.ha_lines import Line, read_lines

RESOURCE_DIRS: Final = (Path("/etc/ha.d/resource.d"), Path("/etc/heartbeat/resource.d"))
_ADDRESS_SCRIPTS: Final = ("IPaddr", "IPaddr2", "IPv6addr")
_DRBD_SCRIPTS: Final = ("drbddisk", "drbdupper")
_NBD_DEVICE: Final = re.compile(r"/dev/nbd[0-9]+")
_DRBD_DEVICE: Final = re.compile(r"/dev/drbd.*")


@dataclass
class HaGroup:
    """A line: a table of `[[group]]`, and for each of its resources what stands for it in the file."""

    where: str
    table: dict[str, Any]
    entries: list[str] = field(default_factory=list)


def read_haresources(path: Path, ha_dir: Path, nodes: Sequence[str]) -> list[HaGroup]:
    """ConfigError with file and line."""
    groups = [_Group(line, ha_dir, nodes).read() for line in read_lines(path)]
    numbers = dict.fromkeys(nodes, 0)
    for group in groups:
        node = group.table["preferred"]
        numbers[node] += 1
        address = next((resource["ip"] for resource in group.table["resources"] if "ip" in resource), "")
        name = address.partition("/")[0]
        try:
            group.table["name"] = config_values.name(name)
        except ValueError:  # none, or one of IPv6
            group.table["name"] = f"{node}-{numbers[node]}"
    return groups


class _Group:
    """One line."""

    def __init__(self, line: Line, ha_dir: Path, nodes: Sequence[str]) -> None:
        self._line = line
        self._ha_dir = ha_dir
        self._nodes = nodes
        self._replicas: list[str] = []  # without a device yet

    def read(self) -> HaGroup:
        node, *entries = self._line.words
        if node not in self._nodes:
            hint = suggestion(node, self._nodes) or f" (there are {', '.join(self._nodes)})"
            raise self._error(node, f"is no node{hint}: a line begins with the node that has the group")
        if not entries:
            raise self._error(node, "has no resources in this line: name them, or remove it")
        group = HaGroup(self._line.where, {"name": "", "preferred": node, "resources": []})
        for entry in entries:
            for table in self._resources(entry):
                group.table["resources"].append(table)
                group.entries.append(entry)
        return group

    def _error(self, entry: str, problem: str) -> ConfigError:
        return ConfigError(f"{self._line.where}: {entry}: {problem}")

    def _resources(self, entry: str) -> list[dict[str, Any]]:
        """What an entry means, in order: mostly one resource."""
        if _is_address(entry):
            return [self._ip(entry, entry)]
        script, *arguments = entry.split("::")
        if script in _ADDRESS_SCRIPTS:
            return [self._ip(entry, entry.removeprefix(script).removeprefix("::"))]
        if script in _DRBD_SCRIPTS:
            raise self._error(
                entry, f"is for DRBD: write replica::{'::'.join(arguments) or 'r0'}, and see replica.toml"
            )
        if script == "replica":
            (name,) = self._take(entry, arguments, 1, 1, "replica::r0")
            self._replicas.append(name)
            return [{"replica": name}]
        if script == "map":
            name, *device = self._take(entry, arguments, 1, 2, "map::r0::/dev/nbd0")
            self._replicas = [replica for replica in self._replicas if replica != name]
            return [{"map": name, **({"device": device[0]} if device else {})}]
        if script == "Filesystem":
            return self._file_system(entry, arguments)
        return [self._script(script, arguments)]

    def _take(self, entry: str, arguments: list[str], least: int, most: int, form: str) -> list[str]:
        if not least <= len(arguments) <= most or not all(arguments[:least]):
            raise self._error(entry, f"has {len(arguments)} arguments: write {form}")
        return arguments

    def _ip(self, entry: str, text: str) -> dict[str, Any]:
        """``address[/mask[/interface][/broadcast]]``."""
        address, *parts = text.split("/")
        form = "192.168.2.50/24/eth0/192.168.2.255"
        mask = parts.pop(0) if parts else ""
        table: dict[str, Any] = {"ip": f"{address}/{self._prefix(entry, mask)}" if mask else address}
        for part in parts:
            key = "broadcast" if _is_address(part) else "interface"
            if not part or key in table or "broadcast" in table:
                raise self._error(entry, f"must be an address such as {form}")
            table[key] = part
        return table

    def _prefix(self, entry: str, mask: str) -> int:
        """Of "24" or "255.255.255.0"."""
        try:
            return (
                int(mask) if mask.isascii() and mask.isdigit() else ipaddress.IPv4Network(f"0.0.0.0/{mask}").prefixlen
            )
        except ValueError:
            raise self._error(entry, f"has no netmask such as 24 or 255.255.255.0, but {mask!r}") from None

    def _file_system(self, entry: str, arguments: list[str]) -> list[dict[str, Any]]:
        form = "Filesystem::/dev/nbd0::/data::ext4"
        device, folder, *more = self._take(entry, arguments, 2, 4, form)
        mount: dict[str, Any] = {"mount": folder, "device": device}
        mount |= {key: value for key, value in zip(("type", "options"), more, strict=False) if value}
        if not self._replicas:
            return [mount]
        if _DRBD_DEVICE.fullmatch(device):
            raise self._error(entry, f"is on a device of DRBD, and {self._replicas[-1]} is none: write {form}")
        if not _NBD_DEVICE.fullmatch(device):
            return [mount]
        # Heartbeat's files know of no device that has to be made first.
        return [{"map": self._replicas.pop(), "device": device}, mount]

    def _script(self, script: str, arguments: list[str]) -> dict[str, Any]:
        """Heartbeat's own scripts come before those of the system."""
        own = self._ha_dir / "resource.d" / script
        found = next((path for path in (own, *(one / script for one in RESOURCE_DIRS)) if _runs(path)), None)
        if found is None and not arguments:
            return {"lsb": script}
        name = str(own) if found == own and own.parent not in RESOURCE_DIRS else script
        return {"resource.d": name, **({"args": arguments} if arguments else {})}


def _runs(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.partition("/")[0])
    except ValueError:
        return False
    return True
