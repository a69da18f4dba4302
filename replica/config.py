"""The configuration: one TOML file, the same on every node, seen from one of them.

Every error is a `ConfigError` that names the file, the line when it can be found, and the key. Nothing is
guessed: an unknown key is an error, so that a typo can never silently leave a default in force.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from replica import config_values as values
from replica.config_file import ConfigError, ConfigFile, Document, Table, suggestion
from replica.config_tls import Tls, client_tls, link_tls, nbd_tls
from replica.config_values import CLUSTER_MANAGER_STEM, Listen, NbdTls, TlsPaths
from replica.heartbeat.sections import SECTIONS, Members, Sections, read_sections
from replica.hooks import MAX_TIMEOUT_S, MIN_TIMEOUT_S, Event, HookSettings
from replica.nbd_client_tls import ClientTls
from replica.private_file import read_private_file
from replica.split_brain import Policies
from replica.toml_lines import KeyPath

__all__ = ["Cluster", "Config", "ConfigError", "Listen", "Node", "Resource", "ResourceSide", "load_config"]

DEFAULT_PATH = "/etc/replica/replica.toml"
DEFAULT_STATE_DIR = "/var/lib/replica"
DEFAULT_RUN_DIR = "/run/replica"
MIN_SECRET_BYTES = 16
_MAX_SECRET_BYTES = 4096
_NODES = 2
_RESERVED_SECTIONS = ("arbiter",)


@dataclass(frozen=True, slots=True)
class Cluster:
    """``[cluster]``. ``state_dir`` and ``run_dir`` are without the node's subfolder: use `Config`'s paths."""

    name: str
    secret_file: Path
    state_dir: Path
    run_dir: Path
    secret: bytes = field(repr=False)  # without a final newline; empty when loaded with need_secret=False


@dataclass(frozen=True, slots=True)
class Node:
    """``[node.NAME]``; ``address`` is an IP address or a host name."""

    name: str
    address: str
    tls: TlsPaths | None = None


@dataclass(frozen=True, slots=True)
class ResourceSide:
    """The settings of a resource on one node: ``[resource.X]`` with ``[resource.X.on.NODE]`` applied."""

    node: Node
    protocol: str  # "A", "B" or "C"
    port: int
    nbd: Listen
    nbd_tls: NbdTls
    backing: Path
    data_integrity: bool
    timeout_s: float
    ping_interval_s: float
    connect_interval_s: float
    al_extents: int
    settle_interval_s: float
    settle_bytes: int
    resync_rate_bytes_s: int | None  # None: as clients allow
    verify_rate_bytes_s: int | None  # None: unlimited
    on_io_error: str  # "detach" or "pass-on"
    after_split_brain: Policies
    max_nbd_connections: int
    nbd_inflight_bytes: int


@dataclass(frozen=True, slots=True)
class Resource:
    """One resource: what holds on this node (``local``) and on the other (``peer``), and its hooks."""

    name: str
    local: ResourceSide
    peer: ResourceSide
    hooks: HookSettings
    tls: Tls | None = None  # of this node's NBD clients; None: off


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file as node ``node`` sees it. ``resources`` is in the order of the file, and empty only where
    there is `heartbeat`.
    """

    path: Path
    cluster: Cluster
    node: Node
    peer: Node
    resources: Mapping[str, Resource]
    #: Whether this machine is `node`. It is not where only a client runs, and `node` is then one of the two.
    is_member: bool = True
    tls: Tls | None = None  # of the peer link; None: off
    heartbeat: Sections | None = None  # of the cluster manager; None: the file has no such sections
    client_tls: ClientTls | None = None  # of the NBD clients that run on this machine

    def resource(self, name: str | None = None) -> Resource:
        """The resource ``name``, or the only one when ``name`` is None; raises `ConfigError`."""
        if name is None:
            if len(self.resources) == 1:
                return next(iter(self.resources.values()))
            if not self.resources:
                raise ConfigError(f"{self.path} has no resources: describe one in [resource.NAME]")
            raise ConfigError(f"{self.path} has several resources: name one of {', '.join(self.resources)}")
        if name not in self.resources:
            hint = suggestion(name, self.resources) or f" (it has {', '.join(self.resources)})"
            raise ConfigError(f"{self.path}: there is no [resource.{name}]{hint}")
        return self.resources[name]

    @property
    def node_state_dir(self) -> Path:
        return self.cluster.state_dir / self.node.name

    @property
    def node_run_dir(self) -> Path:
        return self.cluster.run_dir / self.node.name

    def metadata_path(self, resource: str, volume: int = 0) -> Path:
        return self.node_state_dir / f"{resource}-{volume}.md"

    def control_socket(self, resource: str) -> Path:
        return self.node_run_dir / f"{resource}.sock"

    @property
    def map_run_dir(self) -> Path:
        """Of the agents of kernel devices, which belong to this machine and to no node."""
        return self.cluster.run_dir / "map"


class _Setting(NamedTuple):
    """A key of ``[resource.X]``: the field of `ResourceSide` it fills, its parser, its default."""

    field: str
    parse: Callable[[object], Any]
    default: Any
    per_node: bool = True  # may stand in ``[resource.X.on.NODE]``


_REQUIRED = object()
_MIB = 1 << 20
_TIMEOUT = _Setting("timeout_s", values.seconds(0.1, 3600), 6.0)
_RESOURCE_KEYS: dict[str, _Setting] = {
    "protocol": _Setting("protocol", values.one_of("A", "B", "C"), "C"),
    "port": _Setting("port", values.integer(1, 65535), _REQUIRED),
    "nbd": _Setting("nbd", values.listen, _REQUIRED),
    "nbd-tls": _Setting("nbd_tls", values.nbd_tls, NbdTls()),
    "backing": _Setting("backing", values.text, _REQUIRED),
    "data-integrity": _Setting("data_integrity", values.boolean, False),
    "timeout-s": _TIMEOUT,
    "timeout": _TIMEOUT,
    "ping-interval": _Setting("ping_interval_s", values.seconds(0.1, 3600), 10.0),
    "connect-interval": _Setting("connect_interval_s", values.seconds(0.05, 3600), 1.0),
    "al-extents": _Setting("al_extents", values.integer(7, 65534), 1237),
    "settle-interval": _Setting("settle_interval_s", values.seconds(0.05, 3600), 5.0),
    "settle-bytes": _Setting("settle_bytes", values.size_at_least(4096, "4K"), 64 * _MIB),
    "resync-rate": _Setting("resync_rate_bytes_s", values.size_at_least(4096, "4K"), None),
    "verify-rate": _Setting("verify_rate_bytes_s", values.size_at_least(4096, "4K"), None),
    "on-io-error": _Setting("on_io_error", values.one_of("detach", "pass-on"), "detach"),
    "after-split-brain": _Setting("after_split_brain", values.after_split_brain, Policies(), per_node=False),
    "max-nbd-connections": _Setting("max_nbd_connections", values.integer(1, 65535), 64),
    "nbd-inflight-bytes": _Setting("nbd_inflight_bytes", values.size_at_least(_MIB, "1M"), 64 * _MIB),
}


def load_config(
    path: str | Path | None = None,
    node: str | None = None,
    *,
    need_secret: bool = True,
    may_be_client: bool = False,
) -> Config:
    """Read the file as ``node`` sees it; raises `ConfigError`.

    ``path`` defaults to ``$REPLICA_CONFIG`` or /etc/replica/replica.toml, ``node`` to ``$REPLICA_NODE`` or
    the name of this machine. With ``need_secret=False`` the secret file and those of TLS are not looked at (for
    commands that only talk to a daemon), and ``cluster.secret`` is empty. With
    ``may_be_client=True`` this machine need not be a node, see `Config.is_member`.
    """
    file = ConfigFile(Path(path or os.environ.get("REPLICA_CONFIG") or DEFAULT_PATH).absolute())
    top = file.table((), file.document)
    top.check_keys(("cluster", "node", "resource", "hooks", *SECTIONS), reserved=_RESERVED_SECTIONS)
    nodes = _read_nodes(file, top)
    is_member = not may_be_client or _node_name(node) in nodes or node is not None
    here = _this_node(file, node, nodes) if is_member else next(iter(nodes.values()))
    (peer,) = (other for other in nodes.values() if other is not here)
    hooks = _read_hooks(top, HookSettings())
    resources = _read_resources(top, here, peer, hooks)
    _check_clashes(file, resources)
    heartbeat = _read_heartbeat(file, top, here, peer, resources)
    cluster_table = top.subtable("cluster", "name the cluster and its secret-file")
    cluster = _read_cluster(cluster_table, need_secret)
    resources = {name: _with_tls(file, resource, need_secret) for name, resource in resources.items()}
    tls = _read_link_tls(cluster_table, here, peer, need_secret)
    clients = None
    if "client-tls" in cluster_table.items:
        clients = client_tls(file, cluster_table.value("client-tls", values.client_tls), _node_name(node))
    return Config(file.path, cluster, here, peer, resources, is_member, tls, heartbeat, clients)


def _read_resources(top: Table, here: Node, peer: Node, hooks: HookSettings) -> dict[str, Resource]:
    """At least one, unless the file is there for the cluster manager alone."""
    alone = any(section in top.items for section in SECTIONS)
    wanted = "describe at least one resource in [resource.NAME]"
    if alone and "resource" not in top.items:
        return {}
    table = top.subtable("resource", wanted)
    resources = {name: _read_resource(table.subtable(name), here, peer, hooks) for name in table.items}
    if not resources and not alone:
        raise table.error(f"is empty: {wanted}")
    return resources


def _read_heartbeat(
    file: ConfigFile, top: Table, here: Node, peer: Node, resources: Mapping[str, Resource]
) -> Sections | None:
    """What is wrong there is refused by all programs: it must not show only when a node fails."""
    if not any(section in top.items for section in SECTIONS):
        return None

    def is_own(address: str) -> bool:
        return address == here.address

    members = Members(here.name, peer.name, here.address, peer.address, is_own, frozenset(resources), file.path)
    return read_sections(top, members)


def _read_nodes(file: ConfigFile, top: Table) -> dict[str, Node]:
    table = top.subtable("node", "describe both nodes in [node.NAME]")
    nodes: dict[str, Node] = {}
    for name in table.items:
        _check_name(file, ("node", name), name)
        settings = table.subtable(name)
        settings.check_keys(("address", "tls"))
        address = settings.value("address", values.address, "give the node's IP address or host name")
        tls = settings.value("tls", values.link_tls) if "tls" in settings.items else None
        nodes[name] = Node(name, address, tls)
    if len(nodes) != _NODES:
        raise file.error(("node",), f"exactly two nodes are supported, not {len(nodes)} ({', '.join(nodes) or 'none'})")
    return nodes


def _this_node(file: ConfigFile, name: str | None, nodes: dict[str, Node]) -> Node:
    wanted = _node_name(name)
    if wanted not in nodes:
        raise ConfigError(
            f"{file.path}: there is no [node.{wanted}] (it has {', '.join(nodes)}): "
            "say which node this is with --node or $REPLICA_NODE"
        )
    return nodes[wanted]


def _node_name(name: str | None) -> str:
    return name or os.environ.get("REPLICA_NODE") or os.uname().nodename


def _read_cluster(table: Table, need_secret: bool) -> Cluster:
    table.check_keys(("name", "secret-file", "state-dir", "run-dir", "tls", "client-tls"))
    file = table.file
    name = table.value("name", values.name, "name the cluster")
    secret_file = file.resolve(table.value("secret-file", values.text, "name the file of the shared secret"))
    state_dir, run_dir = (
        file.resolve(table.value(key, values.text) if key in table.items else default)
        for key, default in (("state-dir", DEFAULT_STATE_DIR), ("run-dir", DEFAULT_RUN_DIR))
    )
    secret = _read_secret(file, secret_file) if need_secret else b""
    return Cluster(name, secret_file, state_dir, run_dir, secret)


def _read_secret(file: Document, path: Path) -> bytes:
    make_one = f"make one with `(umask 077; replicactl secret > {path})`, the same on both nodes"
    try:
        secret = read_private_file(path, _MAX_SECRET_BYTES, make_one).rstrip(b"\r\n")
        if not MIN_SECRET_BYTES <= len(secret) <= _MAX_SECRET_BYTES:
            raise ValueError(f"must hold from {MIN_SECRET_BYTES} to {_MAX_SECRET_BYTES} bytes: {make_one}")
    except ValueError as error:
        raise file.error(("cluster", "secret-file"), f"{path} {error}") from None
    return secret


def _read_link_tls(table: Table, here: Node, peer: Node, read: bool) -> Tls | None:
    """The peer link's TLS as this node uses it: of its own section, else of ``[cluster]``."""
    common = table.value("tls", values.link_tls) if "tls" in table.items else None
    paths = here.tls or common
    if paths is None:
        if peer.tls is not None:
            problem = f"TLS of the peer link is for both nodes: set it for {here.name} as well, or in [cluster]"
            raise table.file.error(("node", peer.name, "tls"), problem)
        return None
    if peer.tls is None and common is None:
        problem = f"TLS of the peer link is for both nodes: set it for {peer.name} as well, or in [cluster]"
        raise table.file.error(("node", here.name, "tls"), problem)
    key = ("node", here.name, "tls") if here.tls is not None else (*table.key, "tls")
    return link_tls(table.file, key, paths, here.name, read=read)


def _with_tls(file: ConfigFile, resource: Resource, read: bool) -> Resource:
    node = resource.local.node.name
    key = _place(file, resource.name, node, "nbd-tls")
    return replace(resource, tls=nbd_tls(file, key, resource.local.nbd_tls, node, read=read))


def _read_resource(table: Table, here: Node, peer: Node, hooks: HookSettings) -> Resource:
    name = table.key[-1]
    _check_name(table.file, table.key, name)
    if name == CLUSTER_MANAGER_STEM:
        raise table.file.error(table.key, "this name is kept for the cluster manager: choose another one")
    common = _read_settings(table, of_node=False)
    overrides: dict[str, dict[str, Any]] = {}
    if "on" in table.items:
        on = table.subtable("on")
        on.check_keys((here.name, peer.name))
        overrides = {node: _read_settings(on.subtable(node), of_node=True) for node in on.items}
    return Resource(
        name=name,
        local=_side(table, here, common | overrides.get(here.name, {})),
        peer=_side(table, peer, common | overrides.get(peer.name, {})),
        hooks=_read_hooks(table, hooks),
    )


def _read_hooks(table: Table, base: HookSettings) -> HookSettings:
    """``base`` with what the section ``hooks`` of this table says otherwise."""
    if "hooks" not in table.items:
        return base
    hooks = table.subtable("hooks")
    hooks.check_keys(("timeout", *map(str, Event)))
    timeout_s = base.timeout_s
    if "timeout" in hooks.items:
        timeout_s = hooks.value("timeout", values.seconds(MIN_TIMEOUT_S, MAX_TIMEOUT_S))
    commands = {event: hooks.value(event, values.command) for event in Event if event in hooks.items}
    return HookSettings(timeout_s, {**base.commands, **commands})


def _read_settings(table: Table, *, of_node: bool) -> dict[str, Any]:
    """The keys that stand in ``table``, as fields of `ResourceSide`; no defaults."""
    file = table.file
    table.check_keys((*_RESOURCE_KEYS,) if of_node else (*_RESOURCE_KEYS, "on", "hooks"))
    settings: dict[str, Any] = {}
    for name, key in _RESOURCE_KEYS.items():
        if name not in table.items:
            continue
        if key.field in settings:
            raise file.error((*table.key, name), "is another spelling of timeout-s: keep one of them")
        if of_node and not key.per_node:
            common = f"[{'.'.join(table.key[:2])}]"
            raise file.error((*table.key, name), f"must be the same on both nodes: set it in {common}")
        value = table.value(name, key.parse)
        if name == "backing":
            value = file.resolve(value)
        elif isinstance(value, Listen) and value.unix_path is not None:
            value = _unix_listen(table, file.resolve(value.unix_path))
        settings[key.field] = value
    return settings


def _unix_listen(table: Table, path: Path) -> Listen:
    limit = values.MAX_UNIX_PATH_BYTES
    if len(os.fsencode(path)) > limit:
        problem = f"must be a path of at most {limit} bytes, not {path}"
        raise table.file.error((*table.key, "nbd"), problem)
    return Listen(unix_path=str(path))


def _side(table: Table, node: Node, given: dict[str, Any]) -> ResourceSide:
    settings = {key.field: key.default for key in _RESOURCE_KEYS.values()} | given
    for name, key in _RESOURCE_KEYS.items():
        if settings[key.field] is _REQUIRED:
            on = f"[{'.'.join(table.key)}.on.{node.name}]"
            raise table.file.error((*table.key, name), f"is missing for {node.name}: set it here or in {on}")
    return ResourceSide(node=node, **settings)


def _check_name(file: Document, key: KeyPath, name: str) -> None:
    try:
        values.name(name)
    except ValueError as error:
        raise file.error(key, str(error)) from None


def _check_clashes(file: ConfigFile, resources: Mapping[str, Resource]) -> None:
    """Refuse what two resources of a node, or two nodes of one machine, cannot both use."""
    users: dict[tuple[str, str, object], str] = {}
    for resource in resources.values():
        for side in (resource.local, resource.peer):
            used: list[tuple[str, str, object]] = [
                ("port", side.node.address, side.port),
                ("nbd", side.node.name, side.nbd),
                ("backing", side.node.name, side.backing),
            ]
            for use in used:
                key, _, thing = use
                user = f"{resource.name} on {side.node.name}"
                other = users.setdefault(use, user)
                if other != user:
                    problem = f"{thing} is used by {other} already: {user} needs its own"
                    raise file.error(_place(file, resource.name, side.node.name, key), problem)


def _place(file: ConfigFile, resource: str, node: str, key: str) -> KeyPath:
    """Where ``key`` is set for ``node``: its own table if that has the key, else the common one."""
    own = ("resource", resource, "on", node, key)
    return own if own in file.lines else ("resource", resource, key)
