"""The cluster manager's settings from the TOML file of the cluster."""

from pathlib import Path

from replica.config import Config, ConfigError, load_config
from replica.heartbeat.authkeys import read_authkeys
from replica.heartbeat.sections import Sections
from replica.heartbeat.settings import Auth, AuthMethod, HeartbeatSettings


def load_heartbeat(
    path: str | Path | None = None, node: str | None = None, *, need_secret: bool = True
) -> HeartbeatSettings:
    """The settings as ``node`` sees them; ConfigError. ``path`` and ``node`` default as for `load_config`.

    With ``need_secret=False`` no file of secrets is looked at, and ``auth.key`` is empty.
    """
    config = load_config(path, node, need_secret=False)
    sections = config.heartbeat
    if sections is None:
        raise ConfigError(
            f"{config.path}: there is no [heartbeat]: describe [heartbeat] and at least one [[group]], or name "
            "Heartbeat's directory with --ha-dir"
        )
    warnings = list(sections.warnings)
    if not need_secret:
        auth = Auth(AuthMethod.SHA256, b"")
    elif sections.authkeys is not None:
        auth, more = read_authkeys(sections.authkeys)
        warnings += more
    else:
        auth = Auth(AuthMethod.SHA256, load_config(path, node).cluster.secret)
    return settings_of(config, sections, auth, warnings)


def settings_of(config: Config, sections: Sections, auth: Auth, warnings: list[str]) -> HeartbeatSettings:
    """What was read, put together."""
    return HeartbeatSettings(
        cluster=config.cluster.name,
        node=config.node.name,
        peer=config.peer.name,
        auth=auth,
        state_dir=config.node_state_dir,
        run_dir=config.node_run_dir,
        config_path=config.path,
        warnings=tuple(warnings),
        **sections.as_settings(),
    )
