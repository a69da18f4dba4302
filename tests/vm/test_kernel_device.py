"""The kernel's NBD client on a stock Debian kernel: nbd-client as it is, and `replicactl map` across failovers."""

import contextlib
import random
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.vm.machine import PATIENCE_S, need_image
from tests.vm.two_in_one import TwoInOne, verifying_fio

_DEVICE = "/dev/nbd0"
_FOLDER = "/mnt/volume"
_MOUNT = ("--mount", _FOLDER)
_WAIT = ("--timeout", "80")
_QUICK = ("--request-timeout", "2")
_CHECKS = {"ext4": "e2fsck -fn", "xfs": "xfs_repair -n"}
_FAILOVERS = 5

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoInOne]:
    """One machine for all tests of this file that need no more."""
    image = need_image()
    with TwoInOne(tmp_path_factory.mktemp("vm"), image) as machine:
        yield machine


@pytest.fixture
def both(machine: TwoInOne) -> Iterator[TwoInOne]:
    """In sync, node1 is Primary, and nothing is attached; what happened is printed if a test fails."""
    status = machine.ctl("node1", "status")
    if status["role"] != "Primary":
        machine.ctl("node1", "takeover" if status["peer"]["role"] == "Primary" else "promote")
    try:
        yield machine
    finally:
        print(machine.map_log(), file=sys.stderr)
        print(machine.sh("dmesg | tail -20"), file=sys.stderr)
        with contextlib.suppress(AssertionError):
            machine.sh(f"umount {_FOLDER}")
        with contextlib.suppress(AssertionError):
            machine.cli("node1", "unmap")


def _make(both: TwoInOne, file_system: str, *options: str) -> None:
    """A new file system on the mapped device, then mounted."""
    both.cli("node1", "map", "r0", _DEVICE, *_WAIT)
    force = "-F" if file_system == "ext4" else "-f"
    both.sh(f"mkfs.{file_system} -q {force} {_DEVICE}")
    both.cli("node1", "unmap")
    both.cli("node1", "map", "r0", _DEVICE, *_WAIT, *_MOUNT, "--type", file_system, *options)


def _check(both: TwoInOne, file_system: str) -> None:
    """Unmount, and let the file system's own checker look at it."""
    both.cli("node1", "unmap")
    both.cli("node1", "map", "r0", _DEVICE, *_WAIT)
    both.sh(f"{_CHECKS[file_system]} {_DEVICE}", timeout_s=2 * PATIENCE_S)
    both.cli("node1", "unmap")


def _report(name: str, report: dict[str, Any]) -> None:
    print(f"{name}: {report}", file=sys.stderr)
    assert report["operations"] > 0


def _await_in_log(both: TwoInOne, text: str, count: int = 1) -> None:
    """Until replicad-map has said this so many times."""
    both.sh(f'until [ "$(grep -c "{text}" /run/replica/run/map/r0.log)" -ge {count} ]; do sleep 0.1; done')


def test_stock_nbd_client(both: TwoInOne) -> None:
    both.sh(
        f"""
        modprobe nbd
        nbd-client 127.0.0.1 10809 {_DEVICE} -N r0
        mkfs.ext4 -q -F {_DEVICE}
        mkdir -p {_FOLDER}
        mount {_DEVICE} {_FOLDER}
        head -c 3000000 /dev/urandom > /tmp/data
        cp /tmp/data {_FOLDER}/data
        umount {_FOLDER}
        nbd-client -d {_DEVICE}
        nbd-client 127.0.0.1 10809 {_DEVICE} -N r0
        e2fsck -fn {_DEVICE}
        mount {_DEVICE} {_FOLDER}
        cmp /tmp/data {_FOLDER}/data
        umount {_FOLDER}
        nbd-client -d {_DEVICE}
        """
    )


@pytest.mark.parametrize(("file_system", "connections"), [("ext4", 1), ("xfs", 3)])
def test_fio_verifies_what_it_wrote(both: TwoInOne, file_system: str, connections: int) -> None:
    _make(both, file_system, "--connections", str(connections))
    both.sh(
        f"fio --name=verify --directory={_FOLDER} --rw=randwrite --bsrange=4k-64k --size=24M --direct=1 "
        "--ioengine=libaio --iodepth=8 --verify=crc32c --do_verify=1 --verify_fatal=1",
        timeout_s=2 * PATIENCE_S,
    )
    assert both.ctl("node1", "status")["nbd"]["clients"] == connections
    _check(both, file_system)


def test_the_agents_of_a_group_with_data(both: TwoInOne) -> None:
    """Kernel device and file system stay when replicad is killed, and move from node to node with what was written."""
    _make(both, "ext4")
    both.cli("node1", "unmap")

    def live_and_die(node: str, peer: str, words: str) -> str:
        said: str = both.machine.call(
            "tests.vm.group:live_and_die",
            timeout_s=3 * PATIENCE_S,
            node=node,
            peer=peer,
            device=_DEVICE,
            folder=_FOLDER,
            file_system="ext4",
            words=words,
        )
        return said

    try:
        assert live_and_die("node1", "node2", "first") == ""
        both.wait_in_sync()
        assert live_and_die("node2", "node1", "second") == "first, again"
    finally:
        for node in ("node1", "node2"):  # those that run now were started by agents
            both.sh(f"pkill -KILL -f '[r]eplica.daemon r0 .*--node {node}' || true")
            both.start(node)
    both.ctl("node2", "promote")
    both.wait_in_sync()
    both.ctl("node2", "demote")


def test_what_is_refused_is_one_sentence(both: TwoInOne) -> None:
    both.cli("node1", "map", "r0", _DEVICE, *_WAIT)
    listed = both.cli("node1", "map", "--list")
    assert listed == f"r0 {_DEVICE}: attached to node1 (127.0.0.1:10809), 320.0 MiB\n"
    assert listed.strip() in both.cli("node1", "status", "r0")
    for arguments, words in (
        (("map", "r0"), "is mapped already"),
        (("map", "r1"), r"there is no \[resource.r1\]"),
    ):
        with pytest.raises(AssertionError, match=words):
            both.cli("node1", *arguments)
    both.sh(f"mkfs.ext4 -q -F {_DEVICE}; mkdir -p {_FOLDER}; mount {_DEVICE} {_FOLDER}")
    with pytest.raises(AssertionError, match="is in use: unmount it first"):
        both.cli("node1", "unmap")
    both.sh(f"umount {_FOLDER}")
    both.cli("node1", "unmap")
    with pytest.raises(AssertionError, match="is not mapped on this machine"):
        both.cli("node1", "unmap")
    both.sh(f"nbd-client 127.0.0.1 10809 {_DEVICE} -N r0")
    with pytest.raises(AssertionError, match="is in use already"):
        both.cli("node1", "map", "r0", _DEVICE, *_WAIT)
    both.sh(f"nbd-client -d {_DEVICE}")
    both.ctl("node1", "demote")
    with pytest.raises(AssertionError, match="is not mapped after 20 s: nobody serves r0"):
        both.cli("node1", "map", "r0", "--timeout", "20")
    both.ctl("node1", "promote")


def test_a_mere_client_and_a_device_without_a_file_system(both: TwoInOne) -> None:
    replicactl = "python3 -m replica.cli --config /run/replica/replica.toml"
    both.sh('test -z "${REPLICA_NODE:-}"; ! grep -q $(uname -n) /run/replica/replica.toml')
    assert both.sh(f"{replicactl} map r0 {_DEVICE}") == f"{_DEVICE}\n"
    both.sh(f"wipefs -aq {_DEVICE}; {replicactl} unmap r0")
    with pytest.raises(AssertionError, match="`mount -t ext4 --mkdir /dev/nbd0 /mnt/volume` failed: "):
        both.cli("node1", "map", "r0", _DEVICE, *_WAIT, *_MOUNT, "--type", "ext4")
    assert both.cli("node1", "map", "--list") == ""
    both.sh("test ! -e /sys/block/nbd0/pid")


def test_kill_of_the_primary(both: TwoInOne, rng: random.Random) -> None:
    _make(both, "ext4", *_QUICK, "--connections", "2")
    both.begin_exercise(_FOLDER, rng.randrange(1 << 30), 15)
    both.signal("node1", signal.SIGKILL)
    both.wait("node2", connection="Connecting")
    both.ctl("node2", "promote")
    _report("kill of the Primary", both.end_exercise())
    both.start("node1")
    both.wait_in_sync()
    _check(both, "ext4")


def test_a_frozen_server_thaws_again(both: TwoInOne, rng: random.Random) -> None:
    _make(both, "ext4", *_QUICK)
    both.begin_exercise(_FOLDER, rng.randrange(1 << 30), 30)
    for count in (1, 2):
        both.signal("node1", signal.SIGSTOP)
        _await_in_log(both, "the connection has ended (", count)
        both.signal("node1", signal.SIGCONT)
        _await_in_log(both, "goes on after", count)
    _report("frozen server", both.end_exercise())
    both.wait_in_sync()
    _check(both, "ext4")


def test_the_agent_is_killed_and_another_goes_on(both: TwoInOne, rng: random.Random) -> None:
    _make(both, "ext4", *_QUICK, "--connections", "2")
    both.begin_exercise(_FOLDER, rng.randrange(1 << 30), 12)
    both.sh("kill -9 $(ps -eo pid,args | awk '/[k]ernel_device.agent/ { print $1 }')")
    assert "unattended; its replicad-map has ended" in both.cli("node1", "map", "--list")
    assert both.cli("node1", "map", "r0", *_WAIT, *_MOUNT) == f"{_DEVICE}\n"
    _report("killed agent", both.end_exercise())
    _check(both, "ext4")


def test_what_nbd_client_attached_is_adopted_under_load(both: TwoInOne, rng: random.Random) -> None:
    both.sh(
        f"""
        modprobe nbd
        nbd-client 127.0.0.1 10809 {_DEVICE} -N r0
        mkfs.ext4 -q -F {_DEVICE}
        mkdir -p {_FOLDER}
        mount {_DEVICE} {_FOLDER}
        """
    )
    both.begin("fio", *verifying_fio(_FOLDER, rng.randrange(1 << 30), 30))
    both.sh(f"until [ -s {_FOLDER}/verify.0.0 ]; do sleep 0.1; done")
    both.begin_exercise(_FOLDER, rng.randrange(1 << 30), 25)
    both.cli("node1", "map", "r0", _DEVICE, "--adopt", *_WAIT, *_MOUNT, *_QUICK)
    both.signal("node1", signal.SIGKILL)
    both.wait("node2", connection="Connecting")
    both.ctl("node2", "promote")
    _await_in_log(both, "goes on after")
    _report("adopted under load", both.end_exercise())
    assert "err= 0" in both.end("fio")
    both.start("node1")
    both.wait_in_sync()
    _check(both, "ext4")


def test_five_failovers(both: TwoInOne, rng: random.Random) -> None:
    _make(both, "xfs", *_QUICK)
    primary, other = "node1", "node2"
    both.begin_exercise(_FOLDER, rng.randrange(1 << 30), 60)
    for number in range(_FAILOVERS):
        if number % 2:
            both.ctl(other, "takeover")
        else:
            both.signal(primary, signal.SIGKILL)
            both.wait(other, connection="Connecting")
            both.ctl(other, "promote")
            both.start(primary)
        primary, other = other, primary
        _await_in_log(both, "goes on after", number + 1)
        both.wait_in_sync()
    _report("five failovers", both.end_exercise())
    _check(both, "xfs")


_TLS = 'nbd-tls = { mode = "require", cert = "certs/%n.crt", key = "certs/%n.key", ca = "certs/ca.crt" }'
_CLIENT_FILES = (("ca", "ca-cert.pem"), ("cert", "client-cert.pem"), ("key", "client-key.pem"))
_CLIENT_TLS = ", ".join(f'{key} = "certs/client-%n/{file}"' for key, file in _CLIENT_FILES)
# PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE (linux/sched.h): what PR_SET_IO_FLUSHER sets.
_IO_FLUSHER = 0x80000 | 0x100000


def test_tls_across_a_killed_agent_a_frozen_server_and_a_killed_primary(both: TwoInOne, rng: random.Random) -> None:
    def restart() -> None:
        for node in ("node1", "node2"):
            both.signal(node, signal.SIGKILL)
        for node in ("node1", "node2"):
            both.start(node)
        both.wait("node1", connection="Connected")
        both.ctl("node1", "promote")
        both.wait_in_sync()

    both.sh("cp /run/replica/replica.toml /run/replica/without-tls")
    both.cli("node1", "certs")
    both.cli("node1", "certs", "--client", "laptop")
    both.sh(
        f"""
        cd /run/replica
        sed -i 's|^\\[cluster\\]$|&\\nclient-tls = {{ {_CLIENT_TLS} }}|; s|^\\[resource.r0\\]$|&\\n{_TLS}|' replica.toml
        """
    )
    try:
        restart()
        both.sh(f"modprobe nbd; ! nbd-client 127.0.0.1 10809 {_DEVICE} -N r0 2>/tmp/refusal; cat /tmp/refusal >&2")
        _make(both, "ext4", *_QUICK, "--connections", "2")
        agent = "ps -eo pid,args | awk '/[k]ernel_device.agent/ { print $1 }'"
        threads = both.sh(f"for t in /proc/$({agent})/task/*/stat; do sed 's/.*) //' $t | cut -d' ' -f7; done").split()
        assert len(threads) > 2
        assert all(int(flags) & _IO_FLUSHER == _IO_FLUSHER for flags in threads)

        both.begin_exercise(_FOLDER, rng.randrange(1 << 30), 50)
        both.sh(f"kill -9 $({agent})")
        assert both.cli("node1", "map", "r0", *_WAIT, *_MOUNT, *_QUICK) == f"{_DEVICE}\n"
        both.signal("node1", signal.SIGSTOP)
        _await_in_log(both, "the connection has ended (")
        both.signal("node1", signal.SIGCONT)
        _await_in_log(both, "goes on after", 2)
        both.signal("node1", signal.SIGKILL)
        both.wait("node2", connection="Connecting")
        both.ctl("node2", "promote")
        _report("TLS: killed agent, frozen server, killed Primary", both.end_exercise())
        both.start("node1")
        both.wait_in_sync()
        _check(both, "ext4")

        client = "REPLICA_NODE=laptop python3 -m replica.cli --config /run/replica/replica.toml"
        files = " ".join(f"--tls-{key} /run/replica/certs/client-laptop/{file}" for key, file in _CLIENT_FILES)
        for options in ("", files):
            assert both.sh(f"{client} map r0 {_DEVICE} {options}; {client} unmap r0") == f"{_DEVICE}\n"
            both.sh("sed -i /^client-tls/d /run/replica/replica.toml")
    finally:
        both.sh("mv /run/replica/without-tls /run/replica/replica.toml")
        restart()
