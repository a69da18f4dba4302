"""[heartbeat], [[group]] and [fencing]: what they mean, and that every mistake is named with file, line and key."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from replica.config import ConfigError, load_config
from replica.heartbeat.digest import settings_digest
from replica.heartbeat.settings import (
    Auth,
    AuthMethod,
    FenceDevice,
    HeartbeatSettings,
    Logging,
    PathKind,
    PathSettings,
    PingSettings,
    Respawn,
    Timing,
)
from replica.heartbeat.toml import load_heartbeat
from tests.unit.heartbeat_kinds import agents

__all__ = ["agents"]
pytestmark = pytest.mark.usefixtures("agents")

BASE = """\
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

FULL = """\
[heartbeat]
keepalive = 0.5
warntime = 1
deadtime = 2
initdead = 4
deadping = 3
failback-delay = 7
auto-failback = false
promote-without-fencing = true
port = 1694
paths = [
  { interface = "eth0", address = "192.168.2.44", local = "192.168.2.45" },
  { kind = "ucast", interface = "eth0", address = "192.168.2.45" },
  { kind = "bcast", interface = "eth1", port = 7000 },
  { kind = "mcast", interface = "eth2", address = "239.0.0.1", ttl = 2 },
]
ping = ["192.168.2.1", "192.168.2.50"]
ping-groups = { routers = ["192.168.2.1", "192.168.2.2"] }
log-file = "/var/log/heartbeat.log"
debug-file = "/var/log/ha-debug.log"
log-facility = "local0"
respawn = [ { user = "nobody", command = "/usr/bin/tool -x" } ]
on-stop-failure = "nothing"
[heartbeat.on.node2]
paths = [ { address = "10.0.0.1" } ]
watchdog = "/dev/watchdog"

[[group]]
name = "web"
preferred = "node1"
max-failures = 5
failure-window = 30
stop-attempts = 2
resources = [
  { replica = "r0", start-timeout = 90 },
  { map = "r0", device = "/dev/nbd0" },
  { mount = "/data", device = "/dev/nbd0", type = "ext4" },
  { ip = "192.168.2.50/24", interface = "eth0", monitor-interval = 1 },
  { systemd = "apache2.service", stop-timeout = 20, monitor-timeout = 3 },
]

[[group]]
name = "mail"
preferred = "node2"
resources = [ { ip = "192.168.2.51/24", interface = "eth0" } ]

[fencing.node1]
agent = "fence_ipmilan"
ip = "10.0.0.1"
lanplus = true
password-file = "ipmi.key"
timeout = 30
retries = 1
delay = 5
action = "off"

[[fencing.node2]]
agent = "fence_ipmilan"
[[fencing.node2]]
agent = "/usr/local/sbin/fence_last"
port = 7
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


def error_of(file: Path) -> str:
    """The sentence; replicad and replicactl refuse the file with the same one."""
    with pytest.raises(ConfigError) as caught:
        load_heartbeat(file, "node1")
    message = str(caught.value)
    assert "\n" not in message
    with pytest.raises(ConfigError) as caught:
        load_config(file, "node2")
    assert str(caught.value) == message
    return message


def test_everything_that_can_be_set(write: Callable[[str], Path], tmp_path: Path) -> None:
    settings = load_heartbeat(write(BASE + FULL), "node1")

    assert (settings.cluster, settings.node, settings.peer) == ("web", "node1", "node2")
    assert settings.auth == Auth(AuthMethod.SHA256, b"k" * 16)
    assert settings.paths == (
        PathSettings(PathKind.UNICAST, "eth0", "192.168.2.45", 1694),
        PathSettings(PathKind.BROADCAST, "eth1", "", 7000),
        PathSettings(PathKind.MULTICAST, "eth2", "239.0.0.1", 1694, 2),
    )
    assert settings.timing == Timing(0.5, 1, 2, 4, 3, 7)
    assert settings.pings == (
        PingSettings("192.168.2.1", ("192.168.2.1",)),
        PingSettings("routers", ("192.168.2.1", "192.168.2.2")),
    )
    assert [warning.partition(": ")[0] for warning in settings.warnings] == [f"{tmp_path}/replica.toml:30"]
    assert "192.168.2.50 is an address that the cluster itself holds" in settings.warnings[0]
    assert settings.auto_failback is False
    assert settings.promote_without_fencing is True
    assert settings.logging == Logging(Path("/var/log/heartbeat.log"), Path("/var/log/ha-debug.log"), "local0")
    assert settings.respawn == (Respawn("nobody", ("/usr/bin/tool", "-x")),)
    assert settings.watchdog is None
    assert settings.on_stop_failure == "nothing"
    assert settings.state_dir == tmp_path / "state/node1"
    assert settings.control_socket == tmp_path / "run/node1/heartbeat.sock"
    assert settings.config_path == tmp_path / "replica.toml"


def test_groups_and_their_resources(write: Callable[[str], Path], tmp_path: Path) -> None:
    web, mail = load_heartbeat(write(BASE + FULL), "node1").groups
    assert (web.name, web.preferred, web.max_failures, web.failure_window_s, web.stop_attempts) == (
        "web",
        "node1",
        5,
        30,
        2,
    )
    assert web.replicated
    assert [resource.kind for resource in web.resources] == ["replica", "map", "mount", "ip", "systemd"]
    assert [resource.where for resource in web.resources] == [
        f"{tmp_path}/replica.toml:{line}" for line in range(48, 53)
    ]
    replica, _, mount, ip, systemd = web.resources
    assert replica.start_timeout_s == 90
    assert mount.options["device"] == "/dev/nbd0"
    assert ip.monitor_interval_s == 1
    assert (systemd.start_timeout_s, systemd.stop_timeout_s, systemd.monitor_timeout_s) == (60, 20, 3)
    assert (mail.name, mail.preferred, mail.max_failures, mail.replicated) == ("mail", "node2", 3, False)


def test_fencing(write: Callable[[str], Path], tmp_path: Path) -> None:
    file = write(BASE + FULL)
    fencing = load_heartbeat(file, "node1").fencing
    options = {"ip": "10.0.0.1", "lanplus": "1", "password-file": f"{tmp_path}/ipmi.key"}
    assert fencing == {
        "node1": (FenceDevice("fence_ipmilan", options, "off", 30, 1, 5, f"{file}:60"),),
        "node2": (
            FenceDevice("fence_ipmilan", {}, where=f"{file}:70"),
            FenceDevice("/usr/local/sbin/fence_last", {"port": "7"}, where=f"{file}:72"),
        ),
    }
    assert "10.0.0.1" not in repr(fencing)


def test_what_is_set_for_the_other_node(write: Callable[[str], Path]) -> None:
    settings = load_heartbeat(write(BASE + FULL), "node2")
    assert settings.paths == (PathSettings(PathKind.UNICAST, "", "10.0.0.1", 1694),)
    assert settings.watchdog == Path("/dev/watchdog")


def test_defaults(write: Callable[[str], Path]) -> None:
    settings = load_heartbeat(write(BASE + "[heartbeat]\n"), "node2")
    assert settings.paths == (PathSettings(PathKind.UNICAST, "", "192.168.2.44", local="192.168.2.45"),)
    assert settings.timing == Timing()
    assert (settings.groups, settings.pings, settings.fencing) == ((), (), {})
    nothing = "no group is described: node2 hears whether node1 is alive, and starts nothing"
    assert [warning.rpartition("toml: ")[2] for warning in settings.warnings] == [nothing]
    assert settings.auto_failback
    assert not settings.promote_without_fencing
    assert settings.logging == Logging()


@pytest.mark.parametrize(
    ("deadtime", "initdead"), [(2.1, 12), (5.9, 12), (6, 12), (7, 14), (10, 20), (10.1, 10.1), (30, 30)]
)
def test_times_that_follow_from_deadtime(write: Callable[[str], Path], deadtime: float, initdead: float) -> None:
    timing = load_heartbeat(write(f"{BASE}[heartbeat]\ndeadtime = {deadtime}\n"), "node1").timing
    assert timing == Timing(min(1, deadtime / 5), deadtime / 2, deadtime, initdead, deadtime, 5)


@pytest.mark.parametrize(("deadtime", "keepalive"), [(1, 0.2), (2, 0.4), (5, 1), (30, 1)])
def test_keepalive_fits_a_short_deadtime(write: Callable[[str], Path], deadtime: float, keepalive: float) -> None:
    assert load_heartbeat(write(f"{BASE}[heartbeat]\ndeadtime = {deadtime}\n"), "node1").timing.keepalive_s == keepalive


def test_a_keepalive_that_is_too_long(write: Callable[[str], Path]) -> None:
    file = write(BASE + "[heartbeat]\nkeepalive = 2.5\n")
    problem = "must be less than half of deadtime (5 s), not 2.5 s: one lost packet must not look like a death"
    assert error_of(file) == f"{file}:15: heartbeat.keepalive: {problem}"


def test_times_below_a_second(write: Callable[[str], Path]) -> None:
    timing = load_heartbeat(write(BASE + "[heartbeat]\nkeepalive = 0.05\ndeadtime = 0.3\n"), "node1").timing
    assert (timing.keepalive_s, timing.warntime_s, timing.deadtime_s) == (0.05, 0.15, 0.3)


def test_a_cluster_without_a_replicated_resource(write: Callable[[str], Path]) -> None:
    base = BASE.partition("[resource.r0]")[0]
    group = (
        '[[group]]\nname = "web"\npreferred = "node1"\nresources = [ { ip = "192.168.2.50/24", interface = "e0" } ]\n'
    )
    file = write(base + group)
    assert [group.name for group in load_heartbeat(file, "node1").groups] == ["web"]
    config = load_config(file, "node1")
    with pytest.raises(ConfigError, match="has no resources: describe one in"):
        config.resource()
    with pytest.raises(ConfigError, match="describe at least one resource"):
        load_config(write(base), "node1")


def test_a_file_without_these_sections(write: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"replica\.toml: there is no \[heartbeat\]"):
        load_heartbeat(write(BASE), "node1")


def test_the_secret_is_only_read_when_needed(write: Callable[[str], Path], tmp_path: Path) -> None:
    file = write(BASE + FULL)
    (tmp_path / "cluster.key").unlink()
    assert load_heartbeat(file, "node1", need_secret=False).auth.key == b""
    with pytest.raises(ConfigError, match=r":3: cluster.secret-file: .* does not exist"):
        load_heartbeat(file, "node1")


def test_a_file_of_heartbeat_has_the_key(write: Callable[[str], Path], tmp_path: Path) -> None:
    file = write(BASE + '[heartbeat]\nauthkeys = "authkeys"\n' + FULL[FULL.index("[[group]]") :])
    (tmp_path / "cluster.key").unlink()
    keys = tmp_path / "authkeys"
    keys.write_text("auth 2\n1 crc\n2 sha1 a-key-that-is-long-enough\n")
    keys.chmod(0o600)
    settings = load_heartbeat(file, "node1")
    assert (settings.auth, settings.warnings) == (Auth(AuthMethod.SHA1, b"a-key-that-is-long-enough"), ())
    keys.write_text("auth 1\n1 crc\n")
    settings = load_heartbeat(file, "node1")
    assert settings.auth == Auth(AuthMethod.CRC, b"")
    assert settings.warnings[0].startswith(f"{keys}:2: crc is a checksum and no key")
    keys.chmod(0o640)
    with pytest.raises(ConfigError, match=rf"^{keys}: has mode 0640 and others may use it: run `chmod 600"):
        load_heartbeat(file, "node1")


MAIL = '{ ip = "192.168.2.51/24", interface = "eth0" }'
MAP = 'map = "r0", device = "/dev/nbd0"'
MOUNT = 'mount = "/data", device = "/dev/nbd0", type = "ext4"'
MISTAKES = [
    # (text in FULL, what is there instead, line in FULL, key, what the sentence says)
    ("keepalive = 0.5", 'keepalive = "1s"', 2, "heartbeat.keepalive", "must be a number of seconds"),
    ("keepalive = 0.5", "keepalif = 1", 2, "heartbeat.keepalif", "did you mean 'keepalive'?"),
    ("deadtime = 2", "deadtime = 1", 4, "heartbeat.deadtime", "must be more than twice keepalive (0.5 s)"),
    (
        "warntime = 1\ndeadtime = 2",
        "",
        5,
        "heartbeat.deadping",
        "must be more than twice keepalive (1.6 s), not 3 s: one lost",
        ("keepalive = 0.5", "keepalive = 1.6"),
    ),
    ("warntime = 1", "warntime = 2", 3, "heartbeat.warntime", "must be between keepalive (0.5 s) and deadtime (2 s)"),
    ("warntime = 1", "warntime = 0.5", 3, "heartbeat.warntime", "must be between keepalive"),
    ("initdead = 4", "initdead = 1", 5, "heartbeat.initdead", "must be at least deadtime (2 s), not 1 s"),
    ("deadping = 3", "deadping = 1", 6, "heartbeat.deadping", "must be more than twice keepalive"),
    ("auto-failback = false", 'auto-failback = "off"', 8, "heartbeat.auto-failback", "must be true or false"),
    ("port = 1694", "port = 0", 10, "heartbeat.port", "must be a whole number"),
    ('local = "192.168.2.45" },', "to = 1 },", 12, "heartbeat.paths[1].to", "unknown key"),
    ('kind = "ucast"', 'kind = "serial"', 13, "heartbeat.paths[2].kind", "must be ucast, bcast or mcast"),
    ('interface = "eth1", port', "port", 14, "heartbeat.paths[3]", "needs interface, through which bcast goes"),
    ("port = 7000", 'address = "192.168.2.255"', 14, "heartbeat.paths[3].address", "has no meaning for bcast"),
    ('"239.0.0.1"', '"192.168.2.45"', 15, "heartbeat.paths[4].address", "must be that of the multicast group"),
    ('"eth2", address = "239.0.0.1", ', '"eth2", ', 15, "heartbeat.paths[4].address", "is missing: name an address"),
    (
        '"192.168.2.44", local = "192.168.2.45" },',
        '"192.168.2.45" },',
        11,
        "heartbeat.paths",
        "has ucast eth0 192.168.2.45 twice",
    ),
    ("ttl = 2", 'local = "10.0.0.1"', 15, "heartbeat.paths[4].local", "has no meaning for mcast"),
    ('local = "192.168.2.45"', 'local = "x"', 12, "heartbeat.paths[1].local", "must be an IP address, not 'x'"),
    ("ttl = 2", "ttl = 0", 15, "heartbeat.paths[4].ttl", "must be a whole number from 1 to 255"),
    ('interface = "eth1"', 'interface = "a/b"', 14, "heartbeat.paths[3].interface", "name of a network interface"),
    ('ping = ["192.168.2.1"', 'ping = ["gateway"', 17, "heartbeat.ping", "'gateway' is none"),
    ('ping = ["192.168.2.1"', 'ping = ["192.168.2.50"', 17, "heartbeat.ping", "names 192.168.2.50 twice"),
    ("routers = [", '"192.168.2.1" = [', 18, "heartbeat.ping-groups.192.168.2.1", "the name of another ping node"),
    ('"local0"', '"local8"', 21, "heartbeat.log-facility", "must be auth, "),
    ('"/usr/bin/tool -x"', '"tool"', 22, "heartbeat.respawn[1].command", "absolute path of a program"),
    ('user = "nobody", ', "", 22, "heartbeat.respawn[1].user", "is missing"),
    ("[heartbeat.on.node2]", "[heartbeat.on.node3]", 24, "heartbeat.on.node3", "did you mean 'node2'?"),
    ('watchdog = "/dev/watchdog"', "deadtime = 3", 26, "heartbeat.on.node2.deadtime", "must be the same on both nodes"),
    ('watchdog = "/dev/watchdog"', "watchdog = 3", 26, "heartbeat.on.node2.watchdog", "non-empty string"),
    ('name = "mail"', 'name = "web"', 43, "group[2].name", "is that of another group ("),
    ('name = "mail"', "", 42, "group[2].name", "is missing: name the group"),
    ('preferred = "node2"', 'preferred = "node3"', 44, "group[2].preferred", "'node3' is no node, did you mean"),
    ("max-failures = 5", "max-failure = 5", 31, "group[1].max-failure", "did you mean 'max-failures'?"),
    ('resources = [ { ip = "192.168.2.51/24", interface = "eth0" } ]', "", 42, "group[2].resources", "is missing"),
    ('[ { ip = "192.168.2.51/24", interface = "eth0" } ]', "[]", 45, "group[2].resources", "is empty"),
    ('"192.168.2.51/24"', '"192.168.2.50/16"', 45, "group[2].resources[1]", "ip 192.168.2.50 is in the group web"),
    (MAIL, '{ replica = "r0" }', 45, "group[2].resources[1]", "replica r0 is in"),
    (MAIL, f"{MAIL}, {MAIL}", 45, "group[2].resources[2]", "ip 192.168.2.51/24 is in the group mail twice"),
    (MAIL, '{ interface = "eth0" }', 45, "group[2].resources[1]", "is of no known kind"),
    (MAIL, '{ sistemd = "x" }', 45, "group[2].resources[1]", "did you mean 'systemd'?"),
    (MAIL, '{ ip = "1.1.1.1/8", lsb = "x" }', 45, "group[2].resources[1]", "is of 2 kinds (ip, lsb)"),
    (
        'replica = "r0", start',
        'replica = "r1", start',
        35,
        "group[1].resources[1].replica",
        "there is no [resource.r1] in",
    ),
    (
        "start-timeout = 90",
        "start-timeout = -1",
        35,
        "group[1].resources[1].start-timeout",
        "must be a number of seconds",
    ),
    ("monitor-interval = 1", "monitor-intervall = 1", 38, "group[1].resources[4].monitor-intervall", "did you mean"),
    (
        MAP + " },\n",
        MOUNT + " },\n",
        36,
        "group[1].resources[2]",
        "comes before what it needs: put the map of /dev/nbd0",
        (MOUNT + " },\n  { ip", MAP + " },\n  { ip"),
    ),
    (
        'replica = "r0", start-timeout = 90',
        MAP,
        35,
        "group[1].resources[1]",
        'put replica = "r0" in front',
        (MAP + " },\n  { mount", 'replica = "r0" },\n  { mount'),
    ),
    ("[fencing.node1]", "[fencing.node3]", 47, "fencing.node3", "is no node, did you mean"),
    ('agent = "fence_ipmilan"\nip', "ip", 47, "fencing.node1.agent", 'is missing: name a fence agent such as "fence_'),
    ("timeout = 30", "timeout = 0", 52, "fencing.node1.timeout", "must be a number of seconds"),
    ('action = "off"', 'action = "on"', 55, "fencing.node1.action", "must be reboot or off"),
    ("port = 7\n", "port = [7]\n", 61, "fencing.node2[2].port", "must be a text of one line"),
    ("[fencing.node1]", "[arbiter]\n[fencing.node1]", 47, "arbiter", "is not supported by this version yet"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: f"{mistake[3]}-{mistake[4][:30]}")
def test_mistakes(write: Callable[[str], Path], mistake: tuple[str, str, int, str, str]) -> None:
    old, new, line, key, problem, *more = mistake
    text = FULL
    for one, other in more:
        assert one in text
        text = text.replace(one, other)
    assert old in FULL
    text = text.replace(old, new, 1)
    file = write(BASE + text)
    message = error_of(file)
    assert message.startswith(f"{file}:{line + BASE.count(chr(10))}: {key}: "), message
    assert problem in message


def test_a_mount_by_nbdfuse(write: Callable[[str], Path]) -> None:
    group = '[[group]]\nname = "web"\npreferred = "node1"\nresources = [\n  { %s },\n  { %s },\n]\n'
    replica, mount = 'replica = "r0"', 'mount = "/data", device = "nbd:r0"'
    assert load_heartbeat(write(BASE + group % (replica, mount)), "node1").groups[0].replicated
    file = write(BASE + group % (mount, replica))
    assert error_of(file).startswith(
        f'{file}:18: group[1].resources[1]: comes before what it needs: put replica = "r0"'
    )
    file = write(BASE + group % (replica, mount.replace("r0", "r1")))
    assert error_of(file).startswith(f"{file}:19: group[1].resources[2].device: there is no [resource.r1] in {file}")


def test_one_agent_twice_with_other_parameters(write: Callable[[str], Path]) -> None:
    group = '[[group]]\nname = "web"\npreferred = "node1"\nresources = [ %s ]\n'
    entries = [f'{{ ocf = "heartbeat:Dummy", params = {{ state = "/run/{name}" }} }}' for name in "aba"]
    (web,) = load_heartbeat(write(BASE + group % ", ".join(entries[:2])), "node1").groups
    assert [resource.name for resource in web.resources] == ["ocf heartbeat:Dummy", "ocf heartbeat:Dummy (2)"]
    assert "group[1].resources[3]: ocf heartbeat:Dummy is in the group web twice" in error_of(
        write(BASE + group % ", ".join(entries))
    )


def test_paths_that_only_lead_back(write: Callable[[str], Path]) -> None:
    file = write(BASE + '[heartbeat]\npaths = [ { address = "192.168.2.44" } ]\n')
    with pytest.raises(ConfigError, match=r"heartbeat\.paths: leads nowhere from node1: name a path to node2"):
        load_heartbeat(file, "node1")


def test_the_digest_tells_groups_apart(write: Callable[[str], Path]) -> None:
    def digest(text: str, node: str = "node1") -> str:
        return settings_digest(load_heartbeat(write(BASE + text), node, need_secret=False))

    assert digest(FULL) == digest(FULL, "node2")
    assert digest(FULL) == digest(
        "\n\n" + FULL.replace('"/var/log/heartbeat.log"', '"x"').replace("delay = 5", "delay = 6")
    )
    for old, new in [
        ('preferred = "node2"', 'preferred = "node1"'),
        ("192.168.2.51", "192.168.2.52"),
        ('type = "ext4"', 'type = "xfs"'),
        ("deadtime = 2", "deadtime = 3"),
        ("auto-failback = false", "auto-failback = true"),
        ("stop-timeout = 20", "stop-timeout = 21"),
    ]:
        assert digest(FULL) != digest(FULL.replace(old, new)), old
    first, second = FULL.index("[[group]]"), FULL.index("[[group]]", FULL.index("[[group]]") + 1)
    end = FULL.index("[fencing")
    assert digest(FULL) == digest(FULL[:first] + FULL[second:end] + FULL[first:second] + FULL[end:])


def test_the_key_is_not_shown(write: Callable[[str], Path]) -> None:
    settings: HeartbeatSettings = load_heartbeat(write(BASE + FULL), "node1")
    assert "kkkk" not in repr(settings)
    assert replace(settings, node="node2", peer="node1").nodes == settings.nodes
