"""What the commands of fencing share."""

import argparse
import importlib
from pathlib import Path

from replica.errors import ReplicaError
from replica.heartbeat.settings import HeartbeatSettings


def add_ha_dir(parser: argparse.ArgumentParser) -> None:
    """The option of a daemon that was started with it."""
    parser.add_argument("--ha-dir", metavar="DIR", type=Path, help="Heartbeat's directory, as for `replicactl cluster`")


def heartbeat_settings(args: argparse.Namespace) -> HeartbeatSettings:
    """The settings that the command line means, without the key; ConfigError."""
    cluster = importlib.import_module("replica.cli._cluster")  # late: most commands do without it
    settings: HeartbeatSettings = cluster.load_cluster(args)
    return settings


def known_node(settings: HeartbeatSettings, node: str) -> None:
    """Refuse a name that is no node's."""
    if node not in settings.nodes:
        raise ReplicaError(f"there is no node {node!r}: the nodes are {' and '.join(settings.nodes)}")
