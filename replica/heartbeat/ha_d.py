"""The cluster manager's settings from Heartbeat's directory: `ha.cf`, `haresources` and `authkeys`.

They are turned into the tables of `[heartbeat]`, `[[group]]` and `[fencing]`, and read as those: what is said there is
checked in one place, and `replicactl import-ha` prints it.
"""

import importlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from replica.config import DEFAULT_PATH, DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, Config, ConfigError, load_config
from replica.config_file import ConfigFile, Document, Table
from replica.heartbeat.authkeys import read_authkeys
from replica.heartbeat.fencing_sections import FENCING_KEYS
from replica.heartbeat.ha_cf import DEFAULT_DEADTIME_S, HaCf, Stonith, read_ha_cf
from replica.heartbeat.haresources import HaGroup, read_haresources
from replica.heartbeat.own_addresses import own_addresses
from replica.heartbeat.sections import Members, read_sections
from replica.heartbeat.settings import Auth, AuthMethod, FenceDevice, HeartbeatSettings
from replica.toml_lines import KeyPath, element, path_text

#: Keys of `[heartbeat]` for which ha.cf has no directive: they may stand in the TOML file beside it.
TOML_KEYS: Final = ("failback-delay", "promote-without-fencing", "on-stop-failure")
_MAX_NAME: Final = 64


def load_ha_d(
    directory: str | Path,
    node: str | None = None,
    config: str | Path | None = None,
    *,
    need_secret: bool = True,
    own: frozenset[str] | None = None,
) -> HeartbeatSettings:
    """The settings as ``node`` (`uname -n`) sees them; ConfigError.

    The TOML file ``config`` is read if it is there (one that is named must be): for replicated resources, fencing, and
    keys that ha.cf has not. ``own`` are this machine's IP addresses. With ``need_secret=False`` the file `authkeys` is
    not looked at, and ``auth.key`` is empty.
    """
    return read_ha_d(directory, node, config, own=own).settings(need_secret=need_secret)


def read_ha_d(
    directory: str | Path,
    node: str | None = None,
    config: str | Path | None = None,
    *,
    own: frozenset[str] | None = None,
) -> "HaDirectory":
    """The files but for `authkeys`; ConfigError."""
    folder = Path(directory).absolute()
    ha_cf = read_ha_cf(folder / "ha.cf")
    name = node or os.environ.get("REPLICA_NODE") or os.uname().nodename
    if name not in ha_cf.nodes:
        raise ConfigError(
            f"{ha_cf.places['nodes'][0]}: node: {name} is not there ({', '.join(ha_cf.nodes)}): "
            "say which node this is with --node or $REPLICA_NODE"
        )
    groups = read_haresources(folder / "haresources", folder, ha_cf.nodes)
    base = _read_base(config, name, ha_cf)
    return HaDirectory(folder, name, ha_cf, groups, base, own_addresses() if own is None else own)


def _read_base(path: str | Path | None, node: str, ha_cf: HaCf) -> Config | None:
    """The TOML file, which must not say the same as Heartbeat's files."""
    path = path or os.environ.get("REPLICA_CONFIG")
    if path is None and not Path(DEFAULT_PATH).exists():
        return None
    config = load_config(path, node, need_secret=False)
    if {config.node.name, config.peer.name} != set(ha_cf.nodes):
        names = f"{config.node.name} and {config.peer.name}"
        raise ConfigError(f"{ha_cf.places['nodes'][0]}: node: must be {names}, as in {config.path}")
    file = ConfigFile(config.path)
    where = "is what ha.cf and haresources say: remove it here, or start without --ha-dir"
    if "group" in file.document:
        raise file.error(("group",), where)
    for key in file.document.get("heartbeat", {}):
        if key not in TOML_KEYS:
            raise file.error(("heartbeat", key), where)
    return config


@dataclass(frozen=True, slots=True)
class _Place:
    where: str
    label: str


class HaDirectory(Document):
    """The directory as one document with the sections of the TOML file."""

    def __init__(
        self,
        folder: Path,
        node: str,
        ha_cf: HaCf,
        groups: list[HaGroup],
        base: Config | None,
        own: frozenset[str],
    ) -> None:
        self.node = node
        (self.peer,) = (name for name in ha_cf.nodes if name != node)
        self.base = base
        self.warnings = list(ha_cf.warnings)
        self._places: dict[KeyPath, _Place] = {}
        #: Of ``ucast`` lines: the first that leads to a node.
        self.addresses: dict[str, str] = {}
        self._own = own | {node}
        heartbeat = {"deadtime": DEFAULT_DEADTIME_S, **ha_cf.heartbeat, "authkeys": str(folder / "authkeys")}
        self._places["group",] = _Place(str(folder / "haresources"), "")
        self._places["heartbeat", "deadtime"] = _Place(str(folder / "ha.cf"), "deadtime")
        for key in ha_cf.heartbeat:
            self._places["heartbeat", key] = _Place(*ha_cf.places[key])
        heartbeat["on"] = self._read_paths(ha_cf)
        #: The TOML file beside it, as it stands there.
        self.base_document = ConfigFile(base.path).document if base is not None else {}
        heartbeat |= self.base_document.get("heartbeat", {})
        document: dict[str, Any] = {"heartbeat": heartbeat, "group": [group.table for group in groups]}
        for number, group in enumerate(groups):
            self._place_group(("group", element(number)), group)
        document["fencing"] = self._read_fencing(ha_cf.stonith)
        super().__init__(folder, document)

    def where(self, key: KeyPath) -> str:
        """ "file:line" of the directive or entry."""
        return self._place(key).where

    def error(self, key: KeyPath, problem: str) -> ConfigError:
        """With the words that stand in the file."""
        place = self._place(key)
        return ConfigError(f"{place.where}: {place.label or path_text(key)}: {problem}")

    def _place(self, key: KeyPath) -> _Place:
        while key:
            if key in self._places:
                return self._places[key]
            key = key[:-1]
        return _Place(str(self.folder / "ha.cf"), "")

    def _read_paths(self, ha_cf: HaCf) -> dict[str, Any]:
        """Node → its table. The lines for one node's own addresses are the other one's paths."""
        paths: dict[str, list[dict[str, Any]]] = {self.node: [], self.peer: []}
        for number, path in enumerate(ha_cf.paths):
            to_peer = path["kind"] != "ucast" or path["address"] not in self._own
            to_us = path["kind"] != "ucast" or path["address"] in self._own
            for node, wanted in ((self.node, to_peer), (self.peer, to_us)):
                if wanted:
                    place = _Place(*ha_cf.places[number])
                    self._places["heartbeat", "on", node, "paths", element(len(paths[node]))] = place
                    self._places.setdefault(("heartbeat", "on", node, "paths"), place)
                    paths[node].append(path)
            if path["kind"] == "ucast":
                self.addresses.setdefault(self.peer if to_peer else self.node, path["address"])
        if not paths[self.node]:
            where = ha_cf.places[0][0]
            raise ConfigError(f"{where}: ucast: leads nowhere from {self.node}: name an address of {self.peer}")
        return {node: {"paths": own} for node, own in paths.items() if own}

    def _place_group(self, key: KeyPath, group: HaGroup) -> None:
        self._places[key] = _Place(group.where, group.table["preferred"])
        for number, entry in enumerate(group.entries):
            self._places[*key, "resources", element(number)] = _Place(group.where, entry)

    def _read_fencing(self, lines: list[Stonith]) -> dict[str, Any]:
        """Node → the devices that fence it."""
        fencing: dict[str, Any] = {}
        for line in lines:
            if line.host_from not in ("*", self.node, self.peer):
                raise ConfigError(f"{line.where}: stonith_host: {line.host_from!r} is no node: name one of them, or *")
            node, device = self._device(line)
            if node == line.host_from:
                raise ConfigError(
                    f"{line.where}: stonith_host: {node} is to be switched off by itself: name the other one"
                )
            devices = fencing.setdefault(node, [])
            self._places["fencing", node, element(len(devices))] = _Place(line.where, "stonith_host")
            devices.append(device)
        if self.base is not None and self.base.heartbeat is not None:
            for node in fencing.keys() & self.base.heartbeat.fencing.keys():
                file = ConfigFile(self.base.path)
                raise file.error(("fencing", node), f"is there, and so is stonith_host for {node}: keep one of them")
        return fencing

    def _device(self, line: Stonith) -> tuple[str, Mapping[str, Any]]:
        """The node that it switches off, and a table of `[fencing]`."""
        stonith = importlib.import_module("replica.heartbeat.stonith")  # when it is needed, as agents are
        try:
            node: str = stonith.stonith_target(line.kind, line.parameters)
            if node not in (self.node, self.peer):
                raise ValueError(f"switches off {node!r}, which is no node (there are {self.node}, {self.peer})")
            device: FenceDevice = stonith.device_from_stonith(line.kind, line.parameters, node)
        except ValueError as error:
            raise ConfigError(f"{line.where}: stonith_host: {error}") from None
        values, default = asdict(device), asdict(FenceDevice("", {}))
        ours = {key: values[name] for key, (name, _) in FENCING_KEYS.items() if values[name] != default[name]}
        return node, {**ours, **device.options}

    def settings(self, *, need_secret: bool = True) -> HeartbeatSettings:
        """Checked, with the key. ConfigError."""
        base = self.base
        members = Members(
            self.node,
            self.peer,
            self.addresses.get(self.node, ""),
            None,
            self._own.__contains__,
            frozenset(base.resources) if base is not None else frozenset(),
            base.path if base is not None else None,
        )
        sections = read_sections(Table(self, (), self.document), members)
        warnings = [*self.warnings, *sections.warnings]
        auth = Auth(AuthMethod.SHA256, b"")
        if need_secret:
            auth, more = read_authkeys(self.folder / "authkeys")
            warnings += more
        fields = sections.as_settings()
        if base is not None and base.heartbeat is not None:
            fields["fencing"] = {**base.heartbeat.fencing, **sections.fencing}
        return HeartbeatSettings(
            cluster=base.cluster.name if base is not None else self.cluster,
            node=self.node,
            peer=self.peer,
            auth=auth,
            state_dir=base.node_state_dir if base is not None else Path(DEFAULT_STATE_DIR, self.node),
            run_dir=base.node_run_dir if base is not None else Path(DEFAULT_RUN_DIR, self.node),
            config_path=base.path if base is not None else None,
            ha_dir=self.folder,
            warnings=tuple(warnings),
            **fields,
        )

    @property
    def cluster(self) -> str:
        """A name that both nodes agree on, and two clusters in one network don't."""
        return "-".join(sorted((self.node, self.peer)))[:_MAX_NAME]
