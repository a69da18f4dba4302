"""What `replicactl import-ha` prints means the same as the files that it was made of."""

import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replica.heartbeat.digest import settings_digest
from replica.heartbeat.ha_d import load_ha_d, read_ha_d
from replica.heartbeat.ha_export import as_toml, assignments
from replica.heartbeat.settings import HeartbeatSettings
from replica.heartbeat.toml import load_heartbeat
from replica.toml_lines import element, key_lines
from tests.unit.heartbeat_kinds import agents
from tests.unit.scripted_daemon import replicactl

__all__ = ["agents"]

OWN = {"node1": frozenset({"10.0.0.1", "10.1.0.1"}), "node2": frozenset({"10.0.0.2", "10.1.0.2"})}
BASE = """\
[cluster]
name = "web"
secret-file = "cluster.key"
[node.node1]
address = "10.0.0.1"
[node.node2]
address = "10.0.0.2"
[resource.r0]
port = 7789
nbd = "unix:r0"
backing = "r0.img"
"""


def compared(one: HeartbeatSettings) -> HeartbeatSettings:
    """Without where it was read."""
    groups = tuple(
        replace(group, resources=tuple(replace(resource, where="") for resource in group.resources))
        for group in one.groups
    )
    fencing = {node: tuple(replace(device, where="") for device in devices) for node, devices in one.fencing.items()}
    return replace(one, groups=groups, fencing=fencing, warnings=(), config_path=None, ha_dir=None)


def assert_same(folder: Path, config: Path | None, file: Path) -> None:
    """The text for `node1`, loaded by both nodes."""
    text = as_toml(read_ha_d(folder, "node1", config, own=OWN["node1"]))
    base = "" if config is None else config.read_text().partition("[heartbeat]")[0]
    file.write_text(base + text)
    for node, own in OWN.items():
        ha_d, toml = load_ha_d(folder, node, config, own=own), load_heartbeat(file, node)
        assert compared(toml) == compared(ha_d), text
        assert settings_digest(toml) == settings_digest(ha_d)


def write(folder: Path, ha_cf: str, haresources: str, authkeys: str) -> None:
    for name, text in (("ha.cf", ha_cf), ("haresources", haresources), ("authkeys", authkeys)):
        (folder / name).write_text(text)
    (folder / "authkeys").chmod(0o600)


optional = st.one_of
nothing = st.just("")
word = st.from_regex(r"[a-z][a-z0-9.@_-]{0,8}", fullmatch=True)
host = st.integers(3, 250)
ha_cfs = st.tuples(
    st.just("node node1 node2"),
    st.permutations(["ucast eth0 10.0.0.1", "ucast eth0 10.0.0.2", "ucast eth1 10.1.0.1", "ucast eth1 10.1.0.2"]).map(
        "\n".join
    ),
    optional(nothing, st.just("bcast eth2 eth3"), host.map("mcast eth4 239.0.0.{} 694 1 0".format)),
    optional(nothing, st.just("keepalive 500ms\ndeadtime 3"), st.integers(3, 60).map("deadtime {}".format)),
    optional(nothing, st.just("initdead 120"), st.just("deadping 61")),
    optional(nothing, host.map("ping 10.2.0.{}".format), st.just("ping_group a.b 10.2.0.1 10.2.0.2")),
    optional(nothing, *(st.just(f"auto_failback {value}") for value in ("on", "off", "legacy"))),
    optional(nothing, word.map('logfile /var/log/ä "{}"'.format), st.just("logfacility local1")),
    optional(nothing, word.map('respawn nobody /bin/{} "x" \\y'.format), st.just("watchdog /dev/watchdog")),
    optional(nothing, st.integers(1, 65535).map("udpport {}".format)),
).map("\n".join)
resources = optional(
    word,
    st.tuples(word, word).map("::".join),
    st.just("Filesystem::/dev/sda1::/srv"),
)
lines = st.lists(
    st.tuples(st.sampled_from(["node1", "node2"]), st.lists(resources, min_size=1, max_size=3, unique=True))
)


@pytest.mark.usefixtures("agents")
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ha_cf=ha_cfs,
    lines=lines,
    addresses=st.lists(host, max_size=2, unique=True),
    key=st.sampled_from(["crc", "sha1 k", "sha256 " + "k" * 64]),
)
def test_any_directory(ha_cf: str, lines: list[Any], addresses: list[int], key: str) -> None:
    text = "".join(f"node1 10.3.0.{last}/24/eth0\n" for last in addresses)
    seen: set[str] = set()
    for node, words in lines:
        if not seen & {"Filesystem::/dev/sda1::/srv"} & set(words):
            text += f"{node} {' '.join(words)}\n"
            seen |= set(words)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "ha.d")
        folder.mkdir()
        write(folder, ha_cf, text, f"auth 1\n1 {key}\n")
        assert_same(folder, None, Path(name, "replica.toml"))


_keys = st.one_of(st.sampled_from(["a", "b c", "x.y", "[1]"]), st.text(min_size=1, max_size=4))
_leaves = st.one_of(st.text(max_size=8), st.integers(-5, 5), st.booleans(), st.floats(-9, 9).map(lambda x: round(x, 3)))
_values = st.recursive(
    _leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_keys, inner, max_size=3)),
    max_leaves=12,
)


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(_keys, _values, max_size=5))
def test_any_table_is_printed_as_toml_whose_lines_are_known(table: dict[str, Any]) -> None:
    text = "\n".join(assignments(table))
    assert tomllib.loads(text) == table
    lines = key_lines(text)
    number = 1
    for key, value in table.items():
        assert all((key, *path) in lines for path in _paths(value))
        rows = isinstance(value, list) and value and isinstance(value[0], dict)
        if rows:
            assert [lines[key, element(row)] for row in range(len(value))] == [
                number + 1 + row for row in range(len(value))
            ]
        assert lines[key,] == number
        number += len(value) + 2 if rows else 1


def _paths(value: Any) -> Iterator[tuple[str, ...]]:
    """Of everything in it."""
    if isinstance(value, dict):
        items = list(value.items())
    else:
        items = [(element(number), item) for number, item in enumerate(value)] if isinstance(value, list) else []
    for key, item in items:
        yield (key,)
        yield from ((key, *path) for path in _paths(item))


@pytest.mark.usefixtures("agents")
def test_with_replicated_resources(tmp_path: Path) -> None:
    folder = tmp_path / "ha.d"
    folder.mkdir()
    line = "node1 replica::r0 Filesystem::/dev/nbd0::/data::ext4 10.3.0.50/24/eth0 apache2\n"
    write(folder, "node node1 node2\nbcast eth0\ndeadtime 5\n", line, "auth 1\n1 crc\n")
    config = tmp_path / "replica.toml"
    config.write_text(BASE + "[heartbeat]\nfailback-delay = 2.5\npromote-without-fencing = true\n")
    (tmp_path / "new").mkdir()
    assert_same(folder, config, tmp_path / "new.toml")
    assert load_heartbeat(tmp_path / "new.toml", "node1").timing.failback_delay_s == 2.5


@pytest.mark.usefixtures("agents")
def test_with_fencing(tmp_path: Path) -> None:
    pytest.importorskip("replica.heartbeat.stonith", reason="the plug-ins of stonith_host are not known yet")
    folder = tmp_path / "ha.d"
    folder.mkdir()
    lines = [
        f'stonith_host * external/ipmi {node} 10.0.0.9 admin pass"word lanplus' for node in ("node1", "node2", "node2")
    ]
    write(folder, "node node1 node2\nbcast eth0\n" + "\n".join(lines), "", "auth 1\n1 crc\n")
    assert_same(folder, None, tmp_path / "replica.toml")
    assert len(load_heartbeat(tmp_path / "replica.toml", "node1").fencing["node2"]) == 2


@pytest.mark.usefixtures("agents")
def test_what_it_looks_like(tmp_path: Path) -> None:
    folder = tmp_path / "ha.d"
    folder.mkdir()
    ha_cf = "node node1 node2\nucast eth0 10.0.0.1\nucast eth0 10.0.0.2\nping 10.3.0.50\ndeadtime 5\napiauth x uid=1\n"
    write(folder, ha_cf, "node1 10.3.0.50\n", "auth 1\n1 crc\n")
    ping = "is an address that the cluster itself holds, and is not counted: name a router instead"
    assert (
        as_toml(read_ha_d(folder, "node1", own=OWN["node1"]))
        == f"""\
# From {folder}, by `replicactl import-ha`.
# Save it as /etc/replica/replica.toml on both nodes, and start replica-heartbeat without --ha-dir.
# {folder}/ha.cf:6: apiauth has no effect: the control socket is for root only
# {folder}/ha.cf:4: ping 10.3.0.50 {ping}

[cluster]
name = "node1-node2"
# Of replicated resources; with authkeys below, replica-heartbeat does not read it.
secret-file = "cluster.key"

[node.node1]
address = "10.0.0.1"

[node.node2]
address = "10.0.0.2"

[heartbeat]
deadtime = 5.0
ping = ["10.3.0.50"]
authkeys = "{folder}/authkeys"

[heartbeat.on.node1]
paths = [
  {{ kind = "ucast", interface = "eth0", address = "10.0.0.2" }},
]

[heartbeat.on.node2]
paths = [
  {{ kind = "ucast", interface = "eth0", address = "10.0.0.1" }},
]

[[group]]
name = "10.3.0.50"
preferred = "node1"
resources = [
  {{ ip = "10.3.0.50" }},
]
"""
    )


def test_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "ha.d"
    folder.mkdir()
    write(folder, "node node1 node2\nbcast eth0\n", "", "auth 1\n1 crc\n")
    done = replicactl("--node", "node1", "import-ha", folder)
    assert (done.returncode, done.stderr) == (0, "")
    file = tmp_path / "replica.toml"
    file.write_text(done.stdout)
    assert [path.name for path in load_heartbeat(file, "node2").paths] == ["bcast eth0"]
    failed = replicactl("--node", "node3", "import-ha", folder)
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"replicactl: {folder}/ha.cf:1: node: node3 is not there (node1, node2)")
