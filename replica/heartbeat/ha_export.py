"""Heartbeat's directory as sections of the TOML file: what `replicactl import-ha` prints. Pure."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from replica.heartbeat.ha_d import HaDirectory

_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")


def as_toml(directory: HaDirectory) -> str:
    """The text; with it, and without the directory, the settings are the same. ConfigError, as when it is read."""
    settings = directory.settings(need_secret=False)
    lines = [f"# From {directory.folder}, by `replicactl import-ha`."]
    if directory.base is None:
        lines.append(
            "# Save it as /etc/replica/replica.toml on both nodes, and start replica-heartbeat without --ha-dir."
        )
    else:
        lines.append(
            f"# Put it into {directory.base.path} on both nodes, and start replica-heartbeat without --ha-dir."
        )
        if "heartbeat" in directory.base_document:
            lines.append("# Its section [heartbeat] is replaced by the one below.")
    lines += [f"# {warning}" for warning in settings.warnings]
    if directory.base is None:
        lines += _cluster(directory)
    document = directory.document
    heartbeat = {key: value for key, value in document["heartbeat"].items() if key != "on"}
    lines += ["", "[heartbeat]", *assignments(heartbeat)]
    for node, table in document["heartbeat"]["on"].items():
        lines += ["", f"[heartbeat.on.{_key(node)}]", *assignments(table)]
    for group in document["group"]:
        lines += ["", "[[group]]", *assignments(group)]
    for node, devices in document["fencing"].items():
        for device in devices:
            lines += ["", f"[[fencing.{_key(node)}]]", *assignments(device)]
    return "\n".join(lines) + "\n"


def _cluster(directory: HaDirectory) -> Iterator[str]:
    yield from ("", "[cluster]", *assignments({"name": directory.cluster}))
    yield "# Of replicated resources; with authkeys below, replica-heartbeat does not read it."
    yield from assignments({"secret-file": "cluster.key"})
    for node in sorted((directory.node, directory.peer)):
        yield from ("", f"[node.{_key(node)}]")
        if node not in directory.addresses:
            yield "# Heartbeat's files do not say it: give the IP address of the node."
        yield from assignments({"address": directory.addresses.get(node, node)})


def assignments(table: Mapping[str, Any]) -> Iterator[str]:
    """A line for each key; each table of an array has its own."""
    for key, value in table.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield f"{_key(key)} = ["
            yield from (f"  {_value(item)}," for item in value)
            yield "]"
        else:
            yield f"{_key(key)} = {_value(value)}"


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, str):
        # JSON's strings are TOML's, but for this character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _value(key)
