"""The units of contrib/systemd, and units as resources, in a virtual machine that was booted with systemd.

One node, whose peer is not there; the tests go on from each other, and the last one switches the machine off. No
systemd is started anywhere else: it would take the machine of the tests for its own.
"""

import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.vm.machine import PATIENCE_S, Machine, need_image, user_network

pytestmark = pytest.mark.timeout(900)

_HEARTBEAT = "replica-heartbeat.service"
_REPLICAD = "replicad@r0.service"
_ADDRESS = "10.0.2.50"
_KERNEL_ARGUMENTS = (
    "guest.systemd systemd.hostname=node1 "
    "systemd.unit=guest-agent.service "  # and what that needs, no more: nobody logs in, and it takes its time
    "systemd.journald.forward_to_console=1"  # so that it is there when the machine is off
)
#: The machine is slow.
_TIMES = "start-timeout = 300, stop-timeout = 300, monitor-timeout = 100, monitor-interval = 10"
_TOML = f"""
[cluster]
name = "test"
secret-file = "cluster.key"
[node.node1]
address = "10.0.2.15"
[node.node2]
address = "10.0.2.16"
[resource.r0]
port = 7789
nbd = "127.0.0.1:10809"
backing = "/srv/r0.img"
[heartbeat]
deadtime = 8
initdead = 8
promote-without-fencing = true
[[group]]
name = "web"
preferred = "node1"
resources = [
  {{ replica = "r0", {_TIMES} }},
  {{ map = "r0", device = "/dev/nbd0", {_TIMES} }},
  {{ mount = "/data", device = "/dev/nbd0", type = "ext4", {_TIMES} }},
  {{ ip = "{_ADDRESS}/24", interface = "eth0", {_TIMES} }},
  {{ systemd = "store", {_TIMES} }},
  {{ systemd = "site.service", {_TIMES} }},
]
[[group]]
name = "no-unit"
preferred = "node1"
max-failures = 1
failure-window = 3600
resources = [ {{ systemd = "nothing", {_TIMES} }} ]
[[group]]
name = "masked"
preferred = "node1"
max-failures = 1
failure-window = 3600
resources = [ {{ systemd = "masked", {_TIMES} }} ]
"""
_INTERFACES = """
auto lo
iface lo inet loopback
auto eth0
iface eth0 inet static
    address 10.0.2.15/24
    pre-down echo "The network goes: replica-heartbeat is $(systemctl is-active replica-heartbeat)"
"""


def _unit(start: str, stop: str) -> str:
    return f"[Service]\nExecStart={start}\nExecStop=/bin/sh -c '{stop}'\n"


#: Each says in the journal what there is when it is stopped.
_UNITS = {
    "store": _unit(
        '/bin/sh -c "exec sleep infinity >> /data/file"',
        'echo "store ends on $$(findmnt -no FSTYPE /data), site is $$(systemctl is-active site)"',
    ),
    # Its stop takes its time: whoever does not wait for it is seen.
    "site": _unit("/bin/sleep infinity", "sleep 2; echo site ends"),
}


class Guest:
    """The machine, and its administrator."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def sh(self, script: str, timeout_s: float = PATIENCE_S) -> str:
        """What a script of bash printed; AssertionError unless it succeeds."""
        return self.machine.run("bash", "-euc", script, timeout_s=timeout_s)

    def systemctl(self, *arguments: str, timeout_s: float = 2 * PATIENCE_S) -> str:
        """What it printed; AssertionError unless it succeeds."""
        return self.machine.run("systemctl", *arguments, timeout_s=timeout_s)

    def properties(self, unit: str, *names: str) -> dict[str, str]:
        """Of a unit, as systemd has them."""
        said = self.systemctl("show", *(f"--property={name}" for name in names), unit)
        return dict(line.split("=", 1) for line in said.splitlines())

    def property(self, unit: str, name: str) -> str:
        """One of them."""
        return self.properties(unit, name)[name]

    def until(self, condition: str) -> None:
        """Until this is true in bash."""
        self.sh(f"until {condition}; do sleep 0.2; done")

    def status(self) -> Any:
        """What the cluster manager says now."""
        return self.machine.call("tests.vm.installed:status")

    def wait_started(self) -> None:
        """Until the group of which nothing fails runs."""
        self._wait("started", group="web")

    def wait_problem(self, resource: str, problem: str) -> None:
        """Until this is what is said about the resource."""
        self._wait("problem", resource=resource, problem=problem)

    def _wait(self, what: str, **args: Any) -> None:
        patience_s = 2 * PATIENCE_S
        self.machine.call(f"tests.vm.installed:wait_{what}", timeout_s=patience_s + 30, patience_s=patience_s, **args)

    def lives(self) -> dict[str, str]:
        """What each of them is at the moment: another life, another value."""
        said = self.systemctl("show", "--value", "--property=InvocationID", *_UNITS, _REPLICAD).split()
        mapped = self.sh("pgrep -f '[k]ernel_device.agent'; findmnt -no ID /data")
        return dict(zip((*_UNITS, _REPLICAD, "mapped"), (*said, mapped), strict=True))


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """Replica is installed, r0 has a file system; nothing of it runs."""
    image = need_image()
    folder = tmp_path_factory.mktemp("vm")
    with Machine("systemd", image, folder, memory_mib=1024, kernel_arguments=_KERNEL_ARGUMENTS) as machine:
        machine.power_on([user_network()])
        machine.wait_ready()
        guest = Guest(machine)
        units = {f"/etc/systemd/system/{name}.service": text for name, text in _UNITS.items()}
        files = {
            **units,
            "/etc/network/interfaces": _INTERFACES,
            "/etc/replica/replica.toml": _TOML,
            "/etc/replica/cluster.key": "0123456789abcdef" * 4 + "\n",
        }
        machine.call("tests.vm.installed:install", files=files)
        guest.systemctl("mask", "--no-reload", "masked.service")
        guest.systemctl("daemon-reload")
        guest.systemctl("start", "networking.service", "network-online.target")
        guest.sh("replicactl create-md r0 --size 64M")
        guest.systemctl("start", _REPLICAD)
        guest.sh(
            """
            replicactl promote --force r0
            modprobe nbd
            nbd-client 127.0.0.1 10809 /dev/nbd0 -N r0
            mkfs.ext4 -q /dev/nbd0
            nbd-client -d /dev/nbd0
            replicactl demote --force r0
            """,
            timeout_s=2 * PATIENCE_S,
        )
        guest.systemctl("stop", _REPLICAD)
        try:
            yield guest
        finally:
            print(*machine.console()[-200:], sep="\n", file=sys.stderr)


def test_it_is_active_when_it_is_ready_and_starts_what_it_needs(guest: Guest) -> None:
    guest.systemctl("start", _HEARTBEAT)
    assert guest.status()["node"] == "node1"  # it answers from then on
    assert guest.properties(_HEARTBEAT, "ActiveState", "Type") == {"ActiveState": "active", "Type": "notify"}
    guest.wait_started()
    guest.systemctl("is-active", *_UNITS, _REPLICAD)
    guest.sh(f"ip -4 addr show eth0 | grep -q {_ADDRESS}; findmnt /data")


def test_a_unit_that_does_not_exist_and_a_masked_one(guest: Guest) -> None:
    for unit, words in (
        ("nothing", "this node has no unit nothing.service"),
        ("masked", "the unit masked.service is masked (see `systemctl unmask`)"),
    ):
        guest.wait_problem(f"systemd {unit}.service", f"cannot be started: {words}")


def test_a_unit_that_is_killed_is_started_again(guest: Guest) -> None:
    before = guest.lives()
    guest.systemctl("kill", "--signal=KILL", "site")
    guest.until(f"[[ $(systemctl show --value -p InvocationID site) != {before['site']} ]]")
    guest.wait_started()
    assert {**guest.lives(), "site": ""} == {**before, "site": ""}


def test_a_reload_moves_nothing(guest: Guest) -> None:
    before, process = guest.lives(), guest.property(_HEARTBEAT, "MainPID")
    began = len(guest.sh(f"journalctl -u {_HEARTBEAT} | grep 'is up in cluster' || true").splitlines())
    guest.systemctl("reload", _HEARTBEAT)
    guest.until(f"(( $(journalctl -u {_HEARTBEAT} | grep -c 'is up in cluster') > {began} ))")
    guest.wait_started()
    assert guest.lives() == before
    assert guest.properties(_HEARTBEAT, "MainPID", "NRestarts", "ActiveState") == {
        "MainPID": process,
        "NRestarts": "0",
        "ActiveState": "active",
    }


def test_a_cluster_manager_that_is_killed_is_started_again_and_goes_on(guest: Guest) -> None:
    before = guest.lives()
    guest.systemctl("kill", "--signal=KILL", "--kill-who=main", _HEARTBEAT)
    guest.until(f"[[ $(systemctl show --value -p NRestarts,ActiveState {_HEARTBEAT} | sort | xargs) == '1 active' ]]")
    guest.wait_started()
    assert guest.lives() == before


def test_a_replicad_that_is_killed_is_promoted_again_under_what_stands_on_it(guest: Guest) -> None:
    before = guest.lives()
    guest.systemctl("kill", "--signal=KILL", _REPLICAD)
    guest.until(f"[[ $(systemctl show --value -p InvocationID {_REPLICAD}) != {before[_REPLICAD]} ]]")
    guest.until("[[ $(replicactl role r0) == Primary* ]]")
    guest.wait_started()
    guest.sh("echo words > /data/words; sync /data/words")
    assert {**guest.lives(), _REPLICAD: ""} == {**before, _REPLICAD: ""}


def test_a_stop_leaves_nothing_but_the_replica(guest: Guest) -> None:
    guest.systemctl("stop", _HEARTBEAT)
    states = guest.systemctl("show", "--value", "--property=ActiveState", _HEARTBEAT, *_UNITS)
    assert states.split() == ["inactive"] * 3
    guest.sh(f"! ip -4 addr show eth0 | grep {_ADDRESS}; ! findmnt /data; test ! -e /sys/block/nbd0/pid")
    assert guest.property(_REPLICAD, "ActiveState") == "active"
    assert guest.sh("replicactl role r0").startswith("Secondary")


def test_systemd_starts_a_replicad_that_is_killed(guest: Guest) -> None:
    before = guest.properties(_REPLICAD, "NRestarts", "MainPID")
    guest.systemctl("kill", "--signal=KILL", _REPLICAD)
    guest.until(f"[[ $(systemctl show --value -p NRestarts {_REPLICAD}) == {int(before['NRestarts']) + 1} ]]")
    guest.until(f"systemctl is-active --quiet {_REPLICAD}")
    assert guest.property(_REPLICAD, "MainPID") not in ("0", before["MainPID"])
    assert guest.sh("replicactl role r0").startswith("Secondary")


def test_the_machine_is_switched_off_in_order(guest: Guest) -> None:
    guest.systemctl("restart", _HEARTBEAT)
    guest.wait_started()
    assert guest.sh("cat /data/words") == "words\n"
    before = len(guest.machine.console())
    guest.systemctl("poweroff", "--no-block")
    guest.machine.wait_off(2 * PATIENCE_S)
    said = guest.machine.console()[before:]

    def at(words: str) -> int:
        numbers = [number for number, line in enumerate(said) if re.search(words, line)]
        assert len(numbers) == 1, f"{words}: {numbers}"
        return numbers[0]

    ended = at(rf"{_HEARTBEAT}: Deactivated successfully")
    assert at("Leaving the cluster") < at("site ends") < at("store ends on ext4, site is inactive") < ended
    assert ended < at(f"{_REPLICAD}: Deactivated successfully")
    assert ended < at("The network goes: replica-heartbeat is inactive")
