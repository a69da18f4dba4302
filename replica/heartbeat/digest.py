"""A short text by which two nodes see that their settings are not the same. Pure."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from replica.heartbeat.settings import GroupSettings, HeartbeatSettings, ResourceSettings

_HEX_DIGITS: Final = 16


def settings_digest(settings: HeartbeatSettings) -> str:
    """Of what must be the same on both nodes: the cluster, its groups, and the times that the one relies on when the
    other is silent. Not of what is each node's own: paths, pings, fencing, logs.
    """
    timing = settings.timing
    shared = [
        settings.cluster,
        settings.nodes,
        settings.auto_failback,
        [timing.keepalive_s, timing.deadtime_s],
        sorted((_group(group) for group in settings.groups), key=repr),
    ]
    return hashlib.sha256(json.dumps(_plain(shared)).encode()).hexdigest()[:_HEX_DIGITS]


def _group(group: GroupSettings) -> list[Any]:
    limits = [group.max_failures, group.failure_window_s, group.stop_attempts]
    return [group.name, group.preferred, limits, [_resource(resource) for resource in group.resources]]


def _resource(resource: ResourceSettings) -> list[Any]:
    times = [
        resource.start_timeout_s,
        resource.stop_timeout_s,
        resource.monitor_timeout_s,
        resource.monitor_interval_s,
    ]
    return [resource.kind, resource.name, resource.options, times]


def _plain(value: object) -> Any:
    """As JSON has it, whatever an agent made of its options."""
    if isinstance(value, Mapping):
        return [[str(key), _plain(value[key])] for key in sorted(value, key=str)]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value)
