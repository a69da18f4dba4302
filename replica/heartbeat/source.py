"""Where the settings come from: the TOML file, or Heartbeat's directory."""

import os
from pathlib import Path
from typing import Final

from replica.config import DEFAULT_PATH
from replica.heartbeat.digest import settings_digest
from replica.heartbeat.ha_d import load_ha_d
from replica.heartbeat.settings import HeartbeatSettings
from replica.heartbeat.toml import load_heartbeat

__all__ = ["load_settings", "settings_digest"]

DEFAULT_HA_DIR: Final = "/etc/ha.d"


def load_settings(
    config: str | Path | None = None,
    ha_dir: str | Path | None = None,
    node: str | None = None,
    *,
    need_secret: bool = True,
) -> HeartbeatSettings:
    """The settings as ``node`` sees them; ConfigError.

    Heartbeat's directory is read where one is named (``ha_dir``, ``$REPLICA_HA_DIR``), or where /etc/ha.d is all there
    is. Daemon and commands find the same one.
    """
    directory = find_ha_dir(config, ha_dir)
    if directory is not None:
        return load_ha_d(directory, node, config, need_secret=need_secret)
    return load_heartbeat(config, node, need_secret=need_secret)


def find_ha_dir(config: str | Path | None, ha_dir: str | Path | None) -> Path | None:
    """Heartbeat's directory, if the settings are there."""
    named = ha_dir or os.environ.get("REPLICA_HA_DIR")
    if named:
        return Path(named)
    toml = config or os.environ.get("REPLICA_CONFIG")
    if toml or Path(DEFAULT_PATH).exists() or not Path(DEFAULT_HA_DIR, "ha.cf").exists():
        return None
    return Path(DEFAULT_HA_DIR)
