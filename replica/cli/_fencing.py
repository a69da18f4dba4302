"""What the commands of fencing share."""

import argparse
import importlib

from replica.errors import ReplicaError
from replica.heartbeat.settings import HeartbeatSettings


def heartbeat_settings(args: argparse.Namespace) -> HeartbeatSettings:
    """The settings that the command line means, without the secrets; ConfigError."""
    reader = importlib.import_module("replica.heartbeat.toml")  # late: most commands do without it
    settings: HeartbeatSettings = reader.load_heartbeat(args.config, args.node, need_secret=False)
    return settings


def known_node(settings: HeartbeatSettings, node: str) -> None:
    """Refuse a name that is no node's."""
    if node not in settings.nodes:
        raise ReplicaError(f"there is no node {node!r}: the nodes are {' and '.join(settings.nodes)}")
