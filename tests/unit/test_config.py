"""The configuration file: what it means, and that every mistake is named with file, line and key."""

import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from replica import config_values
from replica.config import ConfigError, Listen, load_config
from replica.heartbeat.settings import Timing
from replica.hooks import Event, HookSettings
from replica.split_brain import CASES, CHOICES, Policies, Policy
from replica.toml_lines import find_line, key_lines, path_text
from tests.unit.heartbeat_kinds import agents

__all__ = ["agents"]

GOOD = """\
[cluster]
name = "web"
secret-file = "cluster.key"
state-dir = "/var/lib/replica"
run-dir = "run"

[node.node1]
address = "192.168.2.44"
[node.node2]
address = "fd00::45"

[resource.r0]
protocol = "C"
port = 7789
nbd = "0.0.0.0:10809"
backing = "/srv/r0.img"
[resource.r0.on.node2]
backing = "/dev/vg0/r0"
nbd = "unix:r0.nbd"
timeout = 2
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        key = tmp_path / "cluster.key"
        key.write_bytes(b"k" * 16)
        key.chmod(0o600)
        file = tmp_path / "replica.toml"
        file.write_text(text)
        return file

    return write


def error_of(file: Path, node: str = "node1") -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(file, node)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_example_of_both_nodes(write: Callable[[str], Path], tmp_path: Path) -> None:
    file = write(GOOD)
    first, second = load_config(file, "node1"), load_config(str(file), "node2")

    assert (first.cluster.name, first.cluster.secret) == ("web", b"k" * 16)
    assert (first.node.name, first.node.address, first.peer.address) == ("node1", "192.168.2.44", "fd00::45")
    r0 = first.resource()
    assert r0.local.nbd == Listen(host="0.0.0.0", port=10809)
    assert r0.local.backing == Path("/srv/r0.img")
    assert (r0.local.timeout_s, r0.peer.timeout_s) == (6.0, 2.0)
    assert r0.peer.backing == Path("/dev/vg0/r0")
    assert r0.peer.nbd == Listen(unix_path=str(tmp_path / "r0.nbd"))
    assert (second.resource("r0").local, second.resource("r0").peer) == (r0.peer, r0.local)
    assert second.peer == first.node


def test_paths_of_a_node(write: Callable[[str], Path], tmp_path: Path) -> None:
    config = load_config(write(GOOD), "node2")
    assert config.metadata_path("r0") == Path("/var/lib/replica/node2/r0-0.md")
    assert config.control_socket("r0") == tmp_path / "run/node2/r0.sock"


def test_defaults(write: Callable[[str], Path]) -> None:
    side = load_config(write(GOOD.replace('protocol = "C"\n', "")), "node1").resource("r0").local
    assert (side.protocol, side.data_integrity, side.on_io_error) == ("C", False, "detach")
    assert (side.al_extents, side.settle_interval_s, side.settle_bytes) == (1237, 5.0, 64 << 20)
    assert (side.connect_interval_s, side.resync_rate_bytes_s) == (1.0, None)


def test_every_setting(write: Callable[[str], Path]) -> None:
    settings = """\
data-integrity = true
timeout-s = 1.5
ping-interval = 3
connect-interval = 0.1
al-extents = 7
settle-interval = 1
settle-bytes = "1M"
resync-rate = "100MiB"
on-io-error = "pass-on"
after-split-brain = { no-primary = "discard-zero-changes" }
max-nbd-connections = 3
nbd-inflight-bytes = 2097152
"""
    text = GOOD.replace('backing = "/srv/r0.img"\n', 'backing = "r0.img"\n' + settings)
    side = load_config(write(text), "node1").resource("r0").local
    assert (side.data_integrity, side.timeout_s, side.ping_interval_s, side.connect_interval_s) == (
        *(True, 1.5, 3.0, 0.1),
    )
    assert (side.al_extents, side.settle_interval_s, side.settle_bytes) == (7, 1.0, 1 << 20)
    assert (side.resync_rate_bytes_s, side.on_io_error) == (100 << 20, "pass-on")
    assert side.after_split_brain == Policies(no_primary="discard-zero-changes")
    assert (side.max_nbd_connections, side.nbd_inflight_bytes) == (3, 2 << 20)


def test_hooks(write: Callable[[str], Path]) -> None:
    assert load_config(write(GOOD), "node1").resource().hooks == HookSettings(10.0, {})
    text = (
        GOOD
        + """
[hooks]
timeout = 1
split-brain = "/usr/local/sbin/notify 'split brain' root"
before-resync-target = ["/usr/local/sbin/snapshot", "--name", "a b", ""]
[resource.r1]
port = 7790
nbd = "unix:r1.nbd"
backing = "r1.img"
[resource.r1.hooks]
timeout = 45
split-brain = "/bin/true"
"""
    )
    config = load_config(write(text), "node1")
    snapshot = ("/usr/local/sbin/snapshot", "--name", "a b", "")
    assert config.resource("r0").hooks == HookSettings(
        1.0,
        {
            Event.SPLIT_BRAIN: ("/usr/local/sbin/notify", "split brain", "root"),
            Event.BEFORE_RESYNC_TARGET: snapshot,
        },
    )
    assert config.resource("r1").hooks == HookSettings(
        45.0, {Event.SPLIT_BRAIN: ("/bin/true",), Event.BEFORE_RESYNC_TARGET: snapshot}
    )


def test_file_and_node_come_from_the_environment(write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLICA_CONFIG", str(write(GOOD)))
    monkeypatch.setenv("REPLICA_NODE", "node2")
    assert load_config().node.name == "node2"
    assert load_config(node="node1").node.name == "node1"


def test_the_node_is_this_machine_by_default(write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REPLICA_NODE", raising=False)
    host = os.uname().nodename
    config = load_config(write(GOOD.replace("node1", host)))
    assert config.node.name == host


# (what to replace, by what, the line of the error, the key of the error, a part of the sentence)
MISTAKES = [
    ('protocol = "C"', 'protocol = "D"', 13, "resource.r0.protocol", "must be A, B or C, not 'D'"),
    ('protocol = "C"', 'protocoll = "C"', 13, "resource.r0.protocoll", "did you mean 'protocol'?"),
    ('protocol = "C"', "xyzzy = 1", 13, "resource.r0.xyzzy", "unknown key (known are protocol, port"),
    ('protocol = "C"', 'after-split-brain = "x"', 13, "resource.r0.after-split-brain", "must be a table such as {"),
    ("timeout = 2", "after-split-brain = {}", 20, "resource.r0.on.node2.after-split-brain", "set it in [resource.r0]"),
    ('protocol = "C"', 'data-integrity = "yes"', 13, "resource.r0.data-integrity", "must be true or false"),
    ('protocol = "C"', 'settle-bytes = "64Q"', 13, "resource.r0.settle-bytes", "must be a size"),
    ('protocol = "C"', "settle-bytes = -1", 13, "resource.r0.settle-bytes", "must be a size"),
    ('protocol = "C"', "resync-rate = 5", 13, "resource.r0.resync-rate", "must be at least 4K, not 5"),
    ('protocol = "C"', "timeout = 0", 13, "resource.r0.timeout", "must be a number of seconds from 0.1"),
    ('protocol = "C"', "timeout = nan", 13, "resource.r0.timeout", "must be a number of seconds from 0.1"),
    ('protocol = "C"', "timeout = true", 13, "resource.r0.timeout", "must be a number of seconds"),
    (
        'protocol = "C"',
        "timeout = 1\ntimeout-s = 1",
        13,
        "resource.r0.timeout",
        "another spelling of timeout-s",
    ),
    ('protocol = "C"', 'on-io-error = "panic"', 13, "resource.r0.on-io-error", "detach or pass-on"),
    ("port = 7789", "port = 0", 14, "resource.r0.port", "must be a whole number from 1 to 65535, not 0"),
    ("port = 7789", "port = 70000", 14, "resource.r0.port", "from 1 to 65535"),
    ("port = 7789", 'port = "7789"', 14, "resource.r0.port", "must be a whole number"),
    ("port = 7789", "", 12, "resource.r0.port", "is missing for node1"),
    ('nbd = "0.0.0.0:10809"', 'nbd = "10809"', 15, "resource.r0.nbd", "[v6-address]:port"),
    ('nbd = "0.0.0.0:10809"', 'nbd = ":::10809"', 15, "resource.r0.nbd", "[v6-address]:port"),
    ('nbd = "0.0.0.0:10809"', 'nbd = "h:0"', 15, "resource.r0.nbd", "port from 1 to 65535"),
    ('nbd = "0.0.0.0:10809"', 'nbd = "unix:"', 15, "resource.r0.nbd", "unix:/path"),
    ('nbd = "0.0.0.0:10809"', f'nbd = "unix:/{"x" * 200}"', 15, "resource.r0.nbd", "at most 107 bytes"),
    ('backing = "/srv/r0.img"', 'backing = ""', 16, "resource.r0.backing", "non-empty string"),
    ("on.node2]", "on.node3]", 17, "resource.r0.on.node3", "did you mean 'node2'?"),
    ('backing = "/dev/vg0/r0"', 'baking = "/d"', 18, "resource.r0.on.node2.baking", "mean 'backing'?"),
    ("timeout = 2", 'protocol = "X"', 20, "resource.r0.on.node2.protocol", "must be A, B or C"),
    ('name = "web"', 'name = "../web"', 2, "cluster.name", "must be a name of 1 to 64 letters"),
    ('name = "web"', "", 1, "cluster.name", "is missing"),
    ('secret-file = "cluster.key"', "", 1, "cluster.secret-file", "is missing"),
    ('state-dir = "/var/lib/replica"', "state-dir = 7", 4, "cluster.state-dir", "non-empty string"),
    ('state-dir = "/var/lib/replica"', 'statedir = "/x"', 4, "cluster.statedir", "mean 'state-dir'?"),
    ('address = "192.168.2.44"', 'address = "1.2.3.4:7"', 8, "node.node1.address", "without a port"),
    ('address = "192.168.2.44"', 'address = "a b"', 8, "node.node1.address", "an IP address or a host name"),
    ('address = "192.168.2.44"', "", 7, "node.node1.address", "is missing"),
    (
        "[resource.r0.on.node2]",
        "[resource.heartbeat]",
        17,
        "resource.heartbeat",
        "this name is kept for the cluster manager",
    ),
    ("[resource.r0]", "[[group]]\n[resource.r0]", 12, "group[1].name", "is missing"),
    ("[resource.r0]", "[arbiter]\n[resource.r0]", 12, "arbiter", "is not supported by this version yet"),
    ("[resource.r0]", "[hooks]\ntimeout = 46\n[resource.r0]", 13, "hooks.timeout", "from 0.1 to 45, not 46"),
    ("[resource.r0]", "[hooks]\npeer-los = '/x'\n[resource.r0]", 13, "hooks.peer-los", "did you mean 'peer-lost'?"),
    (
        "[resource.r0]",
        "[hooks]\ndemoted = 'x'\n[resource.r0]",
        13,
        "hooks.demoted",
        "absolute path of a program, not 'x'",
    ),
    ("[resource.r0]", "[hooks]\ndemoted = ['./x', 'y']\n[resource.r0]", 13, "hooks.demoted", "absolute path"),
    ("[resource.r0]", "[hooks]\ndemoted = ''\n[resource.r0]", 13, "hooks.demoted", "must be a command, as a string or"),
    ("[resource.r0]", "[hooks]\ndemoted = []\n[resource.r0]", 13, "hooks.demoted", "must be a command"),
    ("[resource.r0]", "[hooks]\ndemoted = ['/x', 1]\n[resource.r0]", 13, "hooks.demoted", "must be a command"),
    ("[resource.r0]", "[hooks]\ndemoted = true\n[resource.r0]", 13, "hooks.demoted", "must be a command"),
    ("[resource.r0]", '[hooks]\ndemoted = "/x \\u0000"\n[resource.r0]', 13, "hooks.demoted", "must be a command"),
    ("[resource.r0]", """[hooks]\ndemoted = "/x 'y"\n[resource.r0]""", 13, "hooks.demoted", "No closing quotation"),
    ("[resource.r0]", "hooks = 1\n[resource.r0]", 12, "node.node2.hooks", "unknown key"),
    (
        "[resource.r0.on.node2]",
        "[resource.r0.hooks]\nx = '/x'\n[resource.r0.on.node2]",
        18,
        "resource.r0.hooks.x",
        "unknown",
    ),
    ("timeout = 2", "timeout = 2\n[resource.r0.on.node2.hooks]", 21, "resource.r0.on.node2.hooks", "unknown key"),
    ("[resource.r0]", "[nodes]\n[resource.r0]", 12, "nodes", "did you mean 'node'?"),
    (
        "[node.node2]",
        "[node.a]\naddress='h'\n[node.node2]",
        7,
        "node",
        "exactly two nodes are supported, not 3",
    ),
    ('[node.node2]\naddress = "fd00::45"\n', "", 7, "node", "exactly two nodes are supported, not 1"),
    ("[resource.r0]", '[resource."r/0"]\n[resource.r0]', 12, "resource.r/0", "must be a name"),
]


@pytest.mark.parametrize(("old", "new", "line", "key", "part"), MISTAKES, ids=lambda value: str(value)[:30])
def test_a_mistake_is_named_with_file_line_and_key(
    write: Callable[[str], Path], old: str, new: str, line: int, key: str, part: str
) -> None:
    assert old in GOOD
    file = write(GOOD.replace(old, new, 1))
    message = error_of(file)
    assert message.startswith(f"{file}:{line}: {key}: "), message
    assert part in message


#: (the table, a part of the sentence)
POLICY_MISTAKES = [
    ('no-primry = "disconnect"', "has no key 'no-primry': its keys are no-primary, one-primary, two-primaries"),
    (
        'no-primary = "discard"',
        "no-primary must be disconnect, discard-zero-changes, discard-least-changes, discard-yo",
    ),
    ('no-primary = "discard-secondary"', "no-primary must be disconnect, discard-zero-changes"),
    ("no-primary = 5", "discard-older-primary, not 5"),
    ('one-primary = "discard-least-changes"', "one-primary must be disconnect, discard-secondary or consensus, not"),
    ('one-primary = "violently-as0p"', "'violently-as0p' is refused: it would overwrite a Primary under its clients"),
    ('one-primary = "call-pri-lost-after-sb"', "is refused: it gives up a Primary's data by a handler"),
    ('no-primary = "discard-node-node1"', "is refused: it names the loser beforehand"),
    ('two-primaries = "violently-as0p"', "two-primaries = 'violently-as0p' is refused: it would overwrite a Primary"),
    ('two-primaries = "call-pri-lost-after-sb"', "is refused: it gives up a Primary's data"),
    (
        'two-primaries = "consensus"',
        "two-primaries must be disconnect, not 'consensus': with two Primaries an operator",
    ),
]


@pytest.mark.parametrize(("table", "part"), POLICY_MISTAKES)
def test_a_mistake_in_the_policies(write: Callable[[str], Path], table: str, part: str) -> None:
    for text in (
        GOOD.replace('protocol = "C"', f"after-split-brain = {{ {table} }}"),
        GOOD.replace("[resource.r0]", f"[resource.r0.after-split-brain]\n{table}\n[resource.r0]"),
    ):
        file = write(text)
        message = error_of(file)
        line = next(number for number, words in enumerate(text.splitlines(), 1) if "after-split-brain" in words)
        assert message.startswith(f"{file}:{line}: resource.r0.after-split-brain: "), message
        assert part in message


def test_policies(write: Callable[[str], Path]) -> None:
    table = 'after-split-brain = { no-primary = "discard-least-changes", one-primary = "consensus" }\n'
    for node in ("node1", "node2"):
        resource = load_config(write(GOOD.replace("port =", table + "port =")), node).resource()
        assert resource.local.after_split_brain == Policies(Policy.LEAST_CHANGES, Policy.CONSENSUS, Policy.DISCONNECT)
        assert resource.peer.after_split_brain == resource.local.after_split_brain
        assert load_config(write(GOOD), node).resource().local.after_split_brain == Policies()


@pytest.mark.parametrize(("case", "policy"), [(case, policy) for case in CASES for policy in CHOICES[case]])
def test_every_policy(write: Callable[[str], Path], case: str, policy: Policy) -> None:
    text = GOOD.replace("port =", f'after-split-brain = {{ {case} = "{policy}" }}\nport =')
    policies = load_config(write(text), "node1").resource().local.after_split_brain
    assert policies == Policies(**{case.replace("-", "_"): policy})


@pytest.mark.parametrize(
    ("text", "line"),
    [("[cluster\n", 1), ('[cluster]\nname = "a\n', 2), ("a = 1\na = 2\n", 2), ("x = [1,\n", 1)],
)
def test_a_syntax_error_has_its_line(write: Callable[[str], Path], text: str, line: int) -> None:
    file = write(text)
    assert error_of(file).startswith(f"{file}:{line}: is not valid TOML: ")


def test_a_missing_section(write: Callable[[str], Path]) -> None:
    file = write(GOOD[: GOOD.index("[resource.r0]")])
    assert error_of(file).startswith(f"{file}: resource: is missing: describe")
    file = write(GOOD[GOOD.index("[node.node1]") :])
    assert error_of(file).startswith(f"{file}: cluster: is missing: ")
    assert "[node.node9] (it has node1, node2)" in error_of(write(GOOD), "node9")


def test_an_unreadable_file(tmp_path: Path) -> None:
    assert "No such file" in error_of(tmp_path / "none.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in error_of(binary)


CLASHES = [
    ('port = 7789\nnbd = "h:1"\nbacking = "b"', 22, "port", "7789 is used by r0 on node1 already"),
    ('port = 1\nnbd = "0.0.0.0:10809"\nbacking = "b"', 23, "nbd", "0.0.0.0:10809 is used by r0 on node1"),
    ('port = 1\nnbd = "h:1"\nbacking = "/srv/r0.img"', 24, "backing", "/srv/r0.img is used by r0"),
    (
        'port = 1\nnbd = "h:1"\nbacking = "b"\n[resource.r1.on.node2]\nbacking = "/dev/vg0/r0"',
        *(26, "on.node2.backing", "used by r0 on node2"),
    ),
]


@pytest.mark.parametrize(("r1", "line", "key", "part"), CLASHES)
def test_two_resources_cannot_share(write: Callable[[str], Path], r1: str, line: int, key: str, part: str) -> None:
    file = write(f"{GOOD}[resource.r1]\n{r1}\n")
    message = error_of(file)
    assert message.startswith(f"{file}:{line}: resource.r1.{key}: "), message
    assert part in message


def test_two_nodes_of_one_machine_need_two_ports(write: Callable[[str], Path]) -> None:
    text = GOOD.replace("fd00::45", "192.168.2.44")
    file = write(text)
    assert error_of(file).startswith(f"{file}:14: resource.r0.port: 7789 is used by r0 on node1 already")
    assert load_config(write(text + "port = 7790\n"), "node1").resource("r0").peer.port == 7790


def test_naming_a_resource(write: Callable[[str], Path]) -> None:
    config = load_config(write(GOOD + '[resource.web1]\nport = 1\nnbd = "h:1"\nbacking = "b"\n'), "node1")
    with pytest.raises(ConfigError, match="several resources: name one of r0, web1"):
        config.resource()
    with pytest.raises(ConfigError, match=r"no \[resource.web\], did you mean 'web1'\?"):
        config.resource("web")
    with pytest.raises(ConfigError, match=r"no \[resource.data\] \(it has r0, web1\)"):
        config.resource("data")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o666])
def test_a_secret_others_may_touch_is_refused(write: Callable[[str], Path], tmp_path: Path, mode: int) -> None:
    file = write(GOOD)
    (tmp_path / "cluster.key").chmod(mode)
    message = error_of(file)
    assert message.startswith(f"{file}:3: cluster.secret-file: {tmp_path}/cluster.key has mode {mode:04o} ")
    assert "chmod 600" in message


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_secret_of_the_owner_only(write: Callable[[str], Path], tmp_path: Path, mode: int) -> None:
    file = write(GOOD)
    (tmp_path / "cluster.key").write_bytes(b"s" * 32 + b"\n")
    (tmp_path / "cluster.key").chmod(mode)
    assert load_config(file, "node1").cluster.secret == b"s" * 32


def test_a_secret_of_somebody_else_is_refused(write: Callable[[str], Path], tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: gives the secret file to another user")
    file = write(GOOD)
    os.chown(tmp_path / "cluster.key", 12345, -1)
    assert "belongs to user 12345: it must belong to root" in error_of(file)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "does not exist: make one with"),
        (b"", "must hold"),
        (b"x" * 15 + b"\n", "must hold from 16 to"),
    ],
)
def test_a_missing_or_weak_secret(
    write: Callable[[str], Path], tmp_path: Path, content: bytes | None, part: str
) -> None:
    file = write(GOOD)
    key = tmp_path / "cluster.key"
    if content is None:
        key.unlink()
    else:
        key.write_bytes(content)
    message = error_of(file)
    assert message.startswith(f"{file}:3: cluster.secret-file: ")
    assert part in message
    assert load_config(file, "node1", need_secret=False).cluster.secret == b""


def test_a_secret_that_is_no_file(write: Callable[[str], Path], tmp_path: Path) -> None:
    file = write(GOOD)
    (tmp_path / "cluster.key").unlink()
    os.mkfifo(tmp_path / "cluster.key", 0o600)
    assert "is not a regular file" in error_of(file)
    (tmp_path / "cluster.key").unlink()
    (tmp_path / "cluster.key").mkdir(0o700)
    assert "is not a regular file" in error_of(file)


def test_the_secret_is_not_shown(write: Callable[[str], Path]) -> None:
    assert "kkkk" not in repr(load_config(write(GOOD), "node1"))


@pytest.mark.usefixtures("agents")
def test_the_sample_file_is_valid(tmp_path: Path) -> None:
    sample = Path(__file__).parents[2] / "contrib/replica.toml"
    plain = load_config(sample, "node1", need_secret=False)
    # The keys it shows as comments are the defaults: to uncomment them must change nothing but rates, TLS and hooks.
    text = sample.read_text().splitlines()
    lines = [line[1:] if re.match(r"#[\[\]]|#.* = ", line) else line for line in text]
    full = tmp_path / "full.toml"
    full.write_text("\n".join(lines).replace("cluster.key", str(sample.parent / "cluster.key")))
    shown = load_config(full, "node1", need_secret=False)
    assert shown.cluster == plain.cluster
    side, default = shown.resource().local, plain.resource().local
    assert {name for name in side.__slots__ if getattr(side, name) != getattr(default, name)} == {
        "resync_rate_bytes_s",
        "verify_rate_bytes_s",
        "nbd_tls",
    }
    assert shown.resource().hooks.timeout_s == plain.resource().hooks.timeout_s
    assert shown.resource().hooks.commands
    assert plain.heartbeat is None
    assert shown.heartbeat is not None
    assert shown.heartbeat.timing == Timing()
    assert [resource.kind for resource in shown.heartbeat.groups[0].resources] == [
        "replica",
        "map",
        "mount",
        "ip",
        "systemd",
    ]
    assert list(shown.heartbeat.fencing) == ["node1", "node2"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (4096, 4096),
        ("512", 512),
        ("64K", 65536),
        ("1 M", 1 << 20),
        ("1GiB", 1 << 30),
        ("2T", 2 << 40),
    ],
)
def test_sizes(value: object, expected: int) -> None:
    assert config_values.size(value) == expected


@pytest.mark.parametrize("value", [-1, True, 1.5, "1.5G", "1GB", "G", "", "1g", "٣", None, [1]])
def test_not_sizes(value: object) -> None:
    with pytest.raises(ValueError, match="must be a size"):
        config_values.size(value)


@pytest.mark.parametrize("value", ["127.0.0.1:10809", "[::1]:7", "host.example:65535", "unix:/run/x.nbd"])
def test_listen_values_read_as_they_are_written(value: str) -> None:
    assert str(config_values.listen(value)) == value


@pytest.mark.parametrize("value", ["", ":1", "[h]:1", "::1:7", "h:65536", "h:x", "h", "[::1]", "h:٣", 5])
def test_not_listen_values(value: object) -> None:
    with pytest.raises(ValueError, match="must"):
        config_values.listen(value)


def test_lines_of_unusual_toml() -> None:
    text = '''\
# a = 1
text = """
fake = 1
"""
"quoted key" . b = 2
[ a . "b.c" ]   # comment
'x' = [
  "y = 1",
]
inline = { deep = 1 }
[[list]]
z = 1
w = [ { k = 1 },   # {
  { k = "}]", 'm' = [
    2, [3] ] } ]
[[list]]
z.y = 1979-05-27 07:32:00
[list.sub]
q = ''\'a''\'
[[list.inner]]
e = """""x""\\""""""
f = {}
'''
    lines = key_lines(text)
    assert lines == {
        ("text",): 2,
        ("quoted key",): 5,
        ("quoted key", "b"): 5,
        ("a",): 6,
        ("a", "b.c"): 6,
        ("a", "b.c", "x"): 7,
        ("a", "b.c", "x", "[1]"): 8,
        ("a", "b.c", "inline"): 10,
        ("a", "b.c", "inline", "deep"): 10,
        ("list",): 11,
        ("list", "[1]"): 11,
        ("list", "[1]", "z"): 12,
        ("list", "[1]", "w"): 13,
        ("list", "[1]", "w", "[1]"): 13,
        ("list", "[1]", "w", "[1]", "k"): 13,
        ("list", "[1]", "w", "[2]"): 14,
        ("list", "[1]", "w", "[2]", "k"): 14,
        ("list", "[1]", "w", "[2]", "m"): 14,
        ("list", "[1]", "w", "[2]", "m", "[1]"): 15,
        ("list", "[1]", "w", "[2]", "m", "[2]"): 15,
        ("list", "[1]", "w", "[2]", "m", "[2]", "[1]"): 15,
        ("list", "[2]"): 16,
        ("list", "[2]", "z"): 17,
        ("list", "[2]", "z", "y"): 17,
        ("list", "[2]", "sub"): 18,
        ("list", "[2]", "sub", "q"): 19,
        ("list", "[2]", "inner"): 20,
        ("list", "[2]", "inner", "[1]"): 20,
        ("list", "[2]", "inner", "[1]", "e"): 21,
        ("list", "[2]", "inner", "[1]", "f"): 22,
    }
    tomllib.loads(text)
    assert find_line(lines, ("a", "b.c", "inline", "deep", "er")) == 10
    assert path_text(("list", "[2]", "sub")) == "list[2].sub"
    assert find_line(lines, ("nothing", "here")) is None
