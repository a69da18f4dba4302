"""What the commands of the cluster manager share."""

import argparse
from pathlib import Path

from replica.errors import ReplicaError
from replica.heartbeat.settings import HeartbeatSettings


def add_ha_dir(parser: argparse.ArgumentParser) -> None:
    """The option of a daemon that was started with it."""
    parser.add_argument(
        "--ha-dir",
        metavar="DIR",
        type=Path,
        help="Heartbeat's directory, as given to replica-heartbeat ($REPLICA_HA_DIR, else /etc/ha.d where there is no "
        "configuration)",
    )


def load_cluster(args: argparse.Namespace) -> HeartbeatSettings:
    """The settings, without the key. ConfigError."""
    from replica.heartbeat.source import load_settings

    return load_settings(args.config, args.ha_dir, args.node, need_secret=False)


def known_node(settings: HeartbeatSettings, node: str) -> None:
    """Refuse a name that is no node's."""
    if node not in settings.nodes:
        raise ReplicaError(f"there is no node {node!r}: the nodes are {' and '.join(settings.nodes)}")
