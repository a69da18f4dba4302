"""Heartbeat's own files: what they mean, and that every mistake is named with file and line."""

import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replica.config import ConfigError
from replica.heartbeat.digest import settings_digest
from replica.heartbeat.ha_cf import DIRECTIVES
from replica.heartbeat.ha_d import load_ha_d
from replica.heartbeat.own_addresses import own_addresses
from replica.heartbeat.settings import (
    Auth,
    AuthMethod,
    HeartbeatSettings,
    Logging,
    PathKind,
    PathSettings,
    PingSettings,
    Respawn,
    Timing,
)
from replica.heartbeat.source import load_settings
from tests.unit.heartbeat_kinds import agents

__all__ = ["agents"]
pytestmark = pytest.mark.usefixtures("agents", "no_settings_of_this_machine")

FIXTURES = Path(__file__).with_name("ha.d")
ADDRESSES = {"node1": frozenset({"192.168.2.44", "127.0.0.1"}), "node2": frozenset({"192.168.2.45", "127.0.0.1"})}
HA_CF = "node node1 node2\nucast eth0 192.168.2.44\nucast eth0 192.168.2.45\ndeadtime 5\n"
KEYS = "auth 1\n1 sha256 0123456789abcdef0123456789abcdef\n"


@pytest.fixture
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("REPLICA_CONFIG", raising=False)
    monkeypatch.setattr("replica.heartbeat.ha_d.DEFAULT_PATH", str(tmp_path / "none.toml"))


@pytest.fixture
def ha_dir(tmp_path: Path) -> Path:
    """The files as a tutorial for beginners prints them: with no-break spaces, and comments at the ends of lines."""
    folder = tmp_path / "ha.d"
    shutil.copytree(FIXTURES, folder)
    (folder / "authkeys").chmod(0o600)
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(ha_cf: str = HA_CF, haresources: str = "node1 192.168.2.50\n", authkeys: str = KEYS) -> Path:
        folder = tmp_path / "ha.d"
        folder.mkdir(exist_ok=True)
        for name, text in (("ha.cf", ha_cf), ("haresources", haresources), ("authkeys", authkeys)):
            (folder / name).write_text(text, errors="replace")
        (folder / "authkeys").chmod(0o600)
        return folder

    return write


def load(folder: Path, node: str = "node1", config: Path | None = None) -> HeartbeatSettings:
    return load_ha_d(folder, node, config, own=ADDRESSES[node])


def error_of(folder: Path, config: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, config=config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_files_are_those_that_people_paste() -> None:
    assert (FIXTURES / "authkeys").read_bytes().startswith(b"auth\xc2\xa01\n1\xc2\xa0crc\xc2\xa0#")
    assert b"# Der Eintrag f\xc3\xbcr die IP von Node1 wird" in (FIXTURES / "ha.cf").read_bytes()


@pytest.mark.parametrize(
    ("node", "peer", "address"), [("node1", "node2", "192.168.2.45"), ("node2", "node1", "192.168.2.44")]
)
def test_the_files_of_the_tutorial(ha_dir: Path, node: str, peer: str, address: str) -> None:
    settings = load(ha_dir, node)
    assert (settings.cluster, settings.node, settings.peer) == ("node1-node2", node, peer)
    assert settings.auth == Auth(AuthMethod.CRC, b"")
    assert settings.paths == (PathSettings(PathKind.UNICAST, "eth0", address),)
    assert settings.timing == Timing(1, 2.5, 5, 12, 5, 5)
    assert settings.auto_failback
    assert settings.pings == ()
    assert settings.logging == Logging(Path("/var/log/heartbeat.log"), Path("/var/log/ha-debug.log"))
    assert settings.state_dir == Path("/var/lib/replica", node)
    assert settings.control_socket == Path("/run/replica", node, "heartbeat.sock")
    (group,) = settings.groups
    assert (group.name, group.preferred) == ("192.168.2.50", "node1")
    (resource,) = group.resources
    assert (resource.kind, resource.name, resource.where) == ("ip", "ip 192.168.2.50", f"{ha_dir}/haresources:1")
    ping, key = settings.warnings
    assert ping.startswith(f"{ha_dir}/ha.cf:4: ping 192.168.2.50 is an address that the cluster itself holds")
    assert key.startswith(f"{ha_dir}/authkeys:2: crc is a checksum and no key: heartbeats are not protected")
    assert settings_digest(load(ha_dir, node)) == settings_digest(load(ha_dir, peer))


def test_a_long_line(write: Callable[..., Path], tmp_path: Path) -> None:
    line = "node1 replica::r0 Filesystem::/dev/nbd0::/data::ext4 192.168.2.50/24/eth0 apache2\n"
    config = tmp_path / "replica.toml"
    config.write_text(REPLICA_TOML)
    (group,) = load(write(haresources=line), config=config).groups
    assert [resource.kind for resource in group.resources] == ["replica", "map", "mount", "ip", "lsb"]
    replica, mapped, mount, ip, apache = (resource.options for resource in group.resources)
    assert replica["replica"] == mapped["map"] == "r0"
    assert mapped["device"] == mount["device"] == "/dev/nbd0"
    assert (mount["mount"], mount["type"]) == ("/data", "ext4")
    assert (ip["ip"], ip["interface"]) == ("192.168.2.50/24", "eth0")
    assert apache["lsb"] == "apache2"
    assert group.replicated


REPLICA_TOML = """\
[cluster]
name = "web"
secret-file = "cluster.key"
state-dir = "state"
run-dir = "run"
[node.node1]
address = "192.168.2.44"
[node.node2]
address = "192.168.2.45"
[resource.r0]
port = 7789
nbd = "0.0.0.0:10809"
backing = "/srv/r0.img"
"""


def test_the_toml_file_beside_it(write: Callable[..., Path], tmp_path: Path) -> None:
    config = tmp_path / "replica.toml"
    extra = '[heartbeat]\npromote-without-fencing = true\nfailback-delay = 1\n[fencing.node2]\nagent = "fence_x"\n'
    config.write_text(REPLICA_TOML + extra)
    settings = load(write(), config=config)
    assert settings.cluster == "web"
    assert settings.state_dir == tmp_path / "state/node1"
    assert settings.config_path == config
    assert settings.promote_without_fencing
    assert settings.timing.failback_delay_s == 1
    assert [device.agent for device in settings.fencing["node2"]] == ["fence_x"]
    for more, line, key in (
        ("[heartbeat]\nkeepalive = 1\n", 15, "heartbeat.keepalive"),
        ('[[group]]\nname = "x"\npreferred = "node1"\nresources = [ { lsb = "x" } ]\n', 14, "group"),
    ):
        config.write_text(REPLICA_TOML + more)
        assert error_of(write(), config).startswith(f"{config}:{line}: {key}: is what ha.cf and haresources say: ")
    config.write_text(REPLICA_TOML.replace("node1", "alpha"))
    with pytest.raises(ConfigError, match=r"there is no \[node.node1\]"):
        load(write(), config=config)


EVERYTHING = """\
node\tnode1
node node2   \t# the other one
udpport 1694
keepalive 250ms
warntime 0.6
deadtime 1s
initdead 20
deadping 900msec
ucast eth0 192.168.2.44
ucast eth0 192.168.2.45#45
bcast eth1 eth2
mcast eth3 239.0.0.1 695 2 0
ucast6 eth4 fd00::45
ping 192.168.2.1 192.168.2.2
ping 192.168.2.3
ping_group routers \\
  192.168.2.1 192.168.2.4
auto_failback off
logfacility local3
respawn nobody /usr/bin/tool -x y
respawn hacluster /usr/lib/heartbeat/ipfail
watchdog /dev/watchdog
apiauth ipfail gid=haclient uid=hacluster
use_logd yes
crm no
"""


def test_every_directive(write: Callable[..., Path]) -> None:
    folder = write(EVERYTHING.replace("#45", ""))
    settings = load(folder)
    assert settings.timing == Timing(0.25, 0.6, 1, 20, 0.9, 5)
    assert settings.paths == (
        PathSettings(PathKind.UNICAST, "eth0", "192.168.2.45", 1694),
        PathSettings(PathKind.BROADCAST, "eth1", "", 1694),
        PathSettings(PathKind.BROADCAST, "eth2", "", 1694),
        PathSettings(PathKind.MULTICAST, "eth3", "239.0.0.1", 695, 2),
        PathSettings(PathKind.UNICAST, "eth4", "fd00::45", 1694),
    )
    assert settings.pings == (
        *(PingSettings(f"192.168.2.{last}", (f"192.168.2.{last}",)) for last in (1, 2, 3)),
        PingSettings("routers", ("192.168.2.1", "192.168.2.4")),
    )
    assert not settings.auto_failback
    assert settings.logging == Logging(facility="local3")
    assert settings.respawn == (Respawn("nobody", ("/usr/bin/tool", "-x", "y")),)
    assert settings.watchdog == Path("/dev/watchdog")
    assert [
        warning.removeprefix(f"{folder}/ha.cf:").partition(" has no effect")[0] for warning in settings.warnings
    ] == [
        "21: respawn /usr/lib/heartbeat/ipfail",
        "23: apiauth",
        "24: use_logd",
    ]


@pytest.mark.parametrize(
    ("directive", "on"),
    [
        ("", True),
        ("auto_failback legacy", True),
        ("auto_failback YES", True),
        ("auto_failback 0", False),
        ("nice_failback on", False),
    ],
)
def test_auto_failback(write: Callable[..., Path], directive: str, on: bool) -> None:
    assert load(write(f"{HA_CF}{directive}\n")).auto_failback is on


def test_heartbeats_own_deadtime(write: Callable[..., Path]) -> None:
    assert load(write(HA_CF.replace("deadtime 5\n", ""))).timing == Timing(1, 15, 30, 30, 30, 5)


def test_only_the_other_nodes_address(write: Callable[..., Path]) -> None:
    ha_cf = "node node1 node2\nucast eth0 192.168.2.45\nucast eth1 node1\n"
    assert [path.name for path in load(write(ha_cf)).paths] == ["ucast eth0 192.168.2.45"]


def test_files_of_a_windows_editor_in_another_encoding(write: Callable[..., Path]) -> None:
    folder = write()
    (folder / "ha.cf").write_bytes(b"\xef\xbb\xbf" + HA_CF.replace("\n", "  # f\xfcr\r\n").encode("latin-1"))
    (folder / "haresources").write_bytes(b"\xef\xbb\xbfnode1\xc2\xa0192.168.2.50\r\n")
    (folder / "authkeys").write_bytes(b"\xef\xbb\xbfauth 1\r\n1 sha1 s3cr\xe9t-that-is-long\r\n")
    settings = load(folder)
    assert settings.groups[0].name == "192.168.2.50"
    assert settings.auth == Auth(AuthMethod.SHA1, b"s3cr\xe9t-that-is-long")


# ── haresources ───────────────────────────────────────────────────────────────────────────────────────────────────

ADDRESSES_IN_LINES = [
    ("192.168.2.50", {"ip": "192.168.2.50"}),
    ("192.168.2.50/24", {"ip": "192.168.2.50/24"}),
    ("192.168.2.50/255.255.255.0/eth0", {"ip": "192.168.2.50/24", "interface": "eth0"}),
    (
        "IPaddr::192.168.2.50/24/eth0/192.168.2.255",
        {"ip": "192.168.2.50/24", "interface": "eth0", "broadcast": "192.168.2.255"},
    ),
    ("IPaddr2::192.168.2.50/24/192.168.2.255", {"ip": "192.168.2.50/24", "broadcast": "192.168.2.255"}),
    ("fd00::50/64/eth0", {"ip": "fd00::50/64", "interface": "eth0"}),
    ("IPv6addr::fd00::50/64", {"ip": "fd00::50/64"}),
]


@pytest.mark.parametrize(("entry", "options"), ADDRESSES_IN_LINES)
def test_addresses(write: Callable[..., Path], entry: str, options: dict[str, str]) -> None:
    (resource,) = load(write(haresources=f"node2 {entry}\n")).groups[0].resources
    assert resource.kind == "ip"
    assert {key: value for key, value in resource.options.items() if value} == options


def test_no_group_at_all(write: Callable[..., Path]) -> None:
    folder = write(haresources="# none yet\n")
    nothing = "no group is described: node1 hears whether node2 is alive, and starts nothing"
    assert load(folder).warnings == (f"{folder}/haresources: {nothing}",)


def test_a_group_for_each_line(write: Callable[..., Path]) -> None:
    text = "# none\n\nnode1 192.168.2.50\n"
    text += "node2 fd00::1/64/eth0 \\  # more\n  apache2 \\\n\n node1 apache3\nnode2 apache4 \\"
    groups = load(write(haresources=text)).groups
    assert [(group.name, group.preferred) for group in groups] == [
        ("192.168.2.50", "node1"),
        ("node2-1", "node2"),
        ("node1-2", "node1"),
        ("node2-2", "node2"),
    ]
    assert [resource.kind for resource in groups[1].resources] == ["ip", "lsb"]
    assert groups[1].resources[1].where.endswith("haresources:4")


def test_scripts_of_heartbeat_come_before_those_of_the_system(write: Callable[..., Path]) -> None:
    folder = write(haresources="node1 tool::a::b other plain::x\n")
    scripts = folder / "resource.d"
    scripts.mkdir()
    for name in ("tool", "other"):
        (scripts / name).write_text("#!/bin/sh\n")
    (scripts / "tool").chmod(0o755)
    tool, other, plain = load(folder).groups[0].resources
    assert (tool.kind, tool.options["resource.d"]) == ("resource.d", f"{scripts}/tool")
    assert list(tool.options["args"]) == ["a", "b"]
    assert (other.kind, other.options["lsb"]) == ("lsb", "other")  # not executable
    assert (plain.kind, plain.options["resource.d"], list(plain.options["args"])) == ("resource.d", "plain", ["x"])


def test_devices_are_made_for_the_file_systems_on_them(write: Callable[..., Path], tmp_path: Path) -> None:
    config = tmp_path / "replica.toml"
    more = '[resource.r1]\nport = 7790\nnbd = "unix:r1"\nbacking = "/srv/r1.img"\n'
    config.write_text(REPLICA_TOML + more)
    line = (
        "node1 replica::r0 map::r0::/dev/nbd3 Filesystem::/dev/nbd3::/a replica::r1 Filesystem::/dev/nbd4::/b::xfs::ro"
    )
    resources = load(write(haresources=line + " Filesystem::/dev/sda1::/c"), config=config).groups[0].resources
    assert [resource.kind for resource in resources] == ["replica", "map", "mount", "replica", "map", "mount", "mount"]
    assert (resources[4].options["map"], resources[4].options["device"]) == ("r1", "/dev/nbd4")
    assert (resources[5].options["type"], resources[5].options["options"]) != (None, None)


def test_devices_that_switch_nodes_off(write: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("replica.heartbeat.stonith", reason="the plug-ins of stonith_host are not known yet")
    line = "stonith_host * external/ipmi node2 10.0.0.9 admin secret lanplus\n"
    settings = load(write(HA_CF + line))
    (device,) = settings.fencing["node2"]
    assert (device.agent, device.options["ip"], device.where.rpartition("/")[2]) == (
        "fence_ipmilan",
        "10.0.0.9",
        "ha.cf:5",
    )
    assert "node1" not in settings.fencing
    for bad, problem in (
        (line.replace("* ", "node2 "), "node2 is to be switched off by itself"),
        (line.replace("* ", "node3 "), "'node3' is no node"),
        (line.replace("ipmi node2", "ipmi node3"), "switches off 'node3', which is no node"),
        ("stonith_host * null node2\n", "null does nothing"),
    ):
        folder = write(HA_CF + bad)
        assert error_of(folder).startswith(f"{folder}/ha.cf:5: stonith_host: {problem}")
    config = tmp_path / "replica.toml"
    config.write_text(REPLICA_TOML + '[fencing.node2]\nagent = "fence_x"\n')
    problem = "fencing.node2: is there, and so is stonith_host for node2: keep one of them"
    assert error_of(write(HA_CF + line), config) == f"{config}:14: {problem}"


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────

MISTAKES_IN_HA_CF = [
    ("deadtime 5", "deadtim 5", "4: deadtim: unknown directive, did you mean 'deadtime'?"),
    ("deadtime 5", "deadtime five", "4: deadtime: must be seconds such as"),
    ("deadtime 5", "deadtime 5h", "4: deadtime: must be seconds such as"),
    ("deadtime 5", "deadtime", '4: deadtime: says too little: write "deadtime 5"'),
    ("deadtime 5", "keepalive 1\ndeadtime 2", "5: deadtime: must be more than twice keepalive (1 s), not 2 s"),
    ("deadtime 5", "keepalive 15", "deadtime: must be more than twice keepalive (15 s), not 30 s"),
    ("deadtime 5", "deadtime 5\ndeadtime 6", "5: deadtime: is there already ("),
    ("deadtime 5", "serial /dev/ttyS0", "4: serial: serial lines are not supported: name a second network path"),
    ("deadtime 5", "crm respawn", "4: crm: Pacemaker has a cluster manager of its own"),
    ("deadtime 5", "stonith x /y", "4: stonith: configuration files of devices are not read"),
    ("deadtime 5", "auto_failback maybe", "4: auto_failback: must be on or off, not 'maybe'"),
    ("deadtime 5", "udpport x", "4: udpport: must be a number"),
    ("deadtime 5", "udpport 70000", "4: udpport: must be a whole number from 1 to 65535"),
    ("deadtime 5", "ping gateway", "4: ping: must be a list of IP addresses: 'gateway' is none"),
    ("deadtime 5", "ping_group a 1.1.1.1\nping_group a 1.1.1.2", "5: ping_group: a is there already"),
    ("deadtime 5", "logfacility loud", "4: logfacility: must be auth"),
    ("deadtime 5", "respawn root tool", "4: respawn: must begin with the absolute path"),
    ("deadtime 5", "mcast eth0 10.0.0.1 694 1 0", "4: mcast eth0 10.0.0.1 694 1 0: must be that of the multicast"),
    ("ucast eth0 192.168.2.45", "ucast 192.168.2.45", '3: ucast: says too little: write "ucast INTERFACE ADDRESS"'),
    ("ucast eth0 192.168.2.45", "", "2: ucast: leads nowhere from node1: name an address of node2"),
    ("node node1 node2", "node node1", "1: node: exactly two nodes are supported, not 1 (node1)"),
    ("node node1 node2", "node node1 node1", "1: node: node1 is there twice"),
    ("node node1 node2", "node alpha beta", "1: node: node1 is not there (alpha, beta): say which node this is with"),
    ("node node1 node2", "", "node: exactly two nodes are supported, not 0 (none)"),
]


@pytest.mark.parametrize(("old", "new", "problem"), MISTAKES_IN_HA_CF, ids=lambda text: text[:40])
def test_mistakes_in_ha_cf(write: Callable[..., Path], old: str, new: str, problem: str) -> None:
    folder = write(HA_CF.replace(old, new))
    assert error_of(folder).removeprefix(f"{folder}/ha.cf:").strip().startswith(problem)


MISTAKES_IN_HARESOURCES = [
    ("node3 192.168.2.50", "node3: is no node, did you mean"),
    ("node1", "node1: has no resources in this line"),
    ("192.168.2.50", "192.168.2.50: is no node"),
    ("node1 192.168.2.50/99x", "192.168.2.50/99x: has no netmask such as 24"),
    ("node1 192.168.2.50/24/eth0/eth1", "192.168.2.50/24/eth0/eth1: must be an address such as"),
    ("node1 drbddisk::r0", "drbddisk::r0: is for DRBD: write replica::r0"),
    ("node1 replica", "replica: has 0 arguments: write replica::r0"),
    ("node1 replica::r0", "replica::r0: there is no [resource.r0], for there is no configuration of replicad"),
    ("node1 Filesystem::/dev/sda1", "Filesystem::/dev/sda1: has 1 arguments: write Filesystem::/dev/nbd0::/data::ext4"),
    (
        "node1 replica::r0 Filesystem::/dev/drbd0::/data",
        "Filesystem::/dev/drbd0::/data: is on a device of DRBD, and r0",
    ),
    ("node1 192.168.2.50 192.168.2.50/24", "192.168.2.50/24: ip 192.168.2.50 is in the group 192.168.2.50 already"),
    ("node1 apache2 apache2", "apache2: lsb apache2 is in the group node1-1 twice"),
]


@pytest.mark.parametrize(("line", "problem"), MISTAKES_IN_HARESOURCES, ids=lambda text: text[:40])
def test_mistakes_in_haresources(write: Callable[..., Path], line: str, problem: str) -> None:
    folder = write(haresources=f"# groups\n{line}\n")
    assert error_of(folder).startswith(f"{folder}/haresources:2: {problem}")


MISTAKES_IN_AUTHKEYS = [
    ("1 sha1 k", "authkeys: no line says which key is used"),
    ("auth 2\n1 sha1 k", 'authkeys:1: auth: there is no key 2: write "2 sha256 KEY"'),
    ("auth\n1 sha1 k", 'authkeys:1: must be "auth N" or "N METHOD KEY"'),
    ("auth 1\nauth 1\n1 sha1 k", "authkeys:2: auth: is there twice"),
    ("auth 1\n1 sha1 k\n1 sha1 k", "authkeys:3: key 1 is there twice"),
    ("auth 1\n16 sha1 k", 'authkeys:2: must be "auth N"'),
    ("auth 1\n1 sha2 k", "authkeys:2: key 1 has no known method, did you mean"),
    ("auth 1\nsecret-key-of-ours", "authkeys:2: must be"),
]


@pytest.mark.parametrize(("text", "problem"), MISTAKES_IN_AUTHKEYS, ids=lambda text: text[:40])
def test_mistakes_in_authkeys(write: Callable[..., Path], text: str, problem: str) -> None:
    folder = write(authkeys=text)
    message = error_of(folder)
    assert message.startswith(f"{folder}/{problem}")
    assert "secret-key-of-ours" not in message


@pytest.mark.parametrize(
    ("line", "auth", "warning"),
    [
        ("1 sha256 0123456789abcdef", Auth(AuthMethod.SHA256, b"0123456789abcdef"), None),
        ("1 md5 0123456789abcdef # c", Auth(AuthMethod.MD5, b"0123456789abcdef"), None),
        ("1 sha1 a#b#c#0123456789", Auth(AuthMethod.SHA1, b"a#b#c#0123456789"), None),
        ("1 sha1 HI!", Auth(AuthMethod.SHA1, b"HI!"), "the key is short (3 bytes) and can be guessed"),
        ("1 sha1", Auth(AuthMethod.CRC, b""), "sha1 has no key: heartbeats are not protected"),
        ("1 sha1 0123456789abcdef more", Auth(AuthMethod.SHA1, b"0123456789abcdef"), "what follows the key is ignored"),
    ],
)
def test_keys(write: Callable[..., Path], line: str, auth: Auth, warning: str | None) -> None:
    folder = write(authkeys=f"auth 1\n{line}\n2 crc\n")
    settings = load(folder)
    assert settings.auth == auth
    assert [text.removeprefix(f"{folder}/authkeys:2: ").startswith(warning or "") for text in settings.warnings] == (
        [True] if warning else []
    )
    assert "0123456789" not in repr(settings.auth)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_keys_that_others_may_read(ha_dir: Path, mode: int) -> None:
    (ha_dir / "authkeys").chmod(mode)
    assert error_of(ha_dir).startswith(
        f"{ha_dir}/authkeys: has mode {mode:04o} and others may use it: run `chmod 600 {ha_dir}/authkeys`"
    )
    assert load_ha_d(ha_dir, "node1", need_secret=False, own=ADDRESSES["node1"]).auth.key == b""


@pytest.mark.parametrize("name", ["ha.cf", "haresources", "authkeys"])
def test_a_missing_file(ha_dir: Path, name: str) -> None:
    (ha_dir / name).unlink()
    assert error_of(ha_dir).startswith(f"{ha_dir}/{name}: ")


_words = st.one_of(
    st.sampled_from(
        [*DIRECTIVES, "node1", "node2", "eth0", "192.168.2.45", "5", "500ms", "on", "\\", "#", "auth", "sha1", "::"]
    ),
    st.sampled_from(["replica::r0", "Filesystem::/dev/nbd0::/x", "IPaddr::1.2.3.4/24/eth0", "drbddisk", "map::"]),
    st.text(max_size=6),
)
_texts = st.lists(st.lists(_words, max_size=6).map(" ".join), max_size=8).map("\n".join)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ha_cf=_texts, haresources=_texts, authkeys=_texts, whole=st.booleans())
def test_any_text_is_read_or_refused_with_one_sentence(
    write: Callable[..., Path], ha_cf: str, haresources: str, authkeys: str, whole: bool
) -> None:
    folder = write(HA_CF + ha_cf if whole else ha_cf, haresources, KEYS if whole else authkeys)
    try:
        load(folder)
    except ConfigError as error:
        assert str(error).startswith(str(folder))
        assert "\n" not in str(error)


# ── where they are looked for ─────────────────────────────────────────────────────────────────────────────────────


def test_the_directory_that_is_named_wins(ha_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (ha_dir / "ha.cf").write_text("node node1 node2\nbcast eth0\ndeadtime 5\n")
    config = tmp_path / "replica.toml"
    config.write_text(REPLICA_TOML + "[heartbeat]\npromote-without-fencing = true\n")
    (tmp_path / "cluster.key").write_bytes(b"k" * 16)
    (tmp_path / "cluster.key").chmod(0o600)
    assert load_settings(config, None, "node1").groups == ()
    assert load_settings(config, ha_dir, "node1").groups != ()
    monkeypatch.setenv("REPLICA_HA_DIR", str(ha_dir))
    assert load_settings(config, None, "node1").promote_without_fencing
    assert load_settings(None, None, "node1").groups != ()


def test_the_sample_directory_is_valid(tmp_path: Path) -> None:
    folder = tmp_path / "ha.d"
    shutil.copytree(Path(__file__).parents[2] / "contrib/ha.d", folder)
    keys = folder / "authkeys"
    keys.write_text(keys.read_text().replace("KEY", "0123456789abcdef" * 4))
    keys.chmod(0o600)
    config = tmp_path / "replica.toml"
    config.write_text(REPLICA_TOML)
    settings = load(folder, config=config)
    assert settings.warnings == ()
    assert [resource.kind for resource in settings.groups[0].resources] == ["replica", "map", "mount", "ip", "lsb"]


def test_own_addresses() -> None:
    addresses = own_addresses()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for address in addresses:
            if ":" not in address:
                probe.connect((address, 9))
                assert probe.getpeername()[0] == address
    assert "127.0.0.1" in addresses
