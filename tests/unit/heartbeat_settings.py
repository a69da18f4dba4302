"""Settings of two nodes that send each other heartbeats, for several test modules."""

from pathlib import Path
from typing import Any

from replica.heartbeat.settings import Auth, AuthMethod, HeartbeatSettings, PathKind, PathSettings

KEY = Auth(AuthMethod.SHA256, b"the secret of this cluster")
OTHER_KEY = Auth(AuthMethod.SHA256, b"the secret of another one")
ETH0 = PathSettings(PathKind.UNICAST, "eth0", "192.168.2.45")
ETH1 = PathSettings(PathKind.BROADCAST, "eth1", "")


def settings_of(node: str = "node1", peer: str = "node2", **changes: Any) -> HeartbeatSettings:
    """Of a cluster "web" with two paths and no groups, with some fields changed."""
    values: dict[str, Any] = {
        "cluster": "web",
        "node": node,
        "peer": peer,
        "auth": KEY,
        "paths": (ETH0, ETH1),
        "groups": (),
        "state_dir": Path("/nonexistent/state"),
        "run_dir": Path("/nonexistent/run"),
        **changes,
    }
    return HeartbeatSettings(**values)
