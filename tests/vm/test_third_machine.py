"""`replicactl map` on a machine of its own, with a cable to each of the two nodes; all three are virtual."""

import contextlib
import json
import random
import signal
import sys
from collections.abc import Iterator

import pytest

from tests.cluster.cluster import MIB
from tests.vm.machine import need_image
from tests.vm.pair import ClientMachine, Node, Pair
from tests.vm.two_in_one import begin_exercise, verifying_fio

_DEVICE = "/dev/nbd0"
_FOLDER = "/mnt/volume"
_MAP = ("map", "r0", _DEVICE, "--timeout", "80", "--request-timeout", "2")
_SIZE_BYTES = 64 * MIB
_SETTINGS = {"protocol": '"C"', "nbd": '"0.0.0.0:10809"', "timeout": "5", "connect_interval": "0.2"}

pytestmark = pytest.mark.timeout(600)


class Three:
    """The pair and the client, and what an operator does with them."""

    def __init__(self, pair: Pair, client: ClientMachine) -> None:
        self.pair = pair
        self.client = client
        self.one, self.two = pair.nodes

    def map_new(self) -> None:
        """A new ext4 on the device, mounted."""
        self.client.cli(*_MAP)
        self.client.sh(f"mkfs.ext4 -q -F {_DEVICE}; mkdir -p {_FOLDER}; mount {_DEVICE} {_FOLDER}")

    def check_and_unmap(self) -> None:
        """The file system has no errors, and both copies are the same."""
        self.client.sh(f"umount {_FOLDER}; e2fsck -fn {_DEVICE}")
        self.client.cli("unmap")
        self.pair.wait_in_sync()
        self.pair.check_identical()

    def signal(self, node: Node, number: signal.Signals) -> None:
        """To its `replicad`."""
        node.machine.call("tests.vm.operate:signal", node=node.name, number=int(number))

    def await_moved(self, count: int, to: Node) -> None:
        """Until probes had no answer for the `count`th time, and the device went on with this node."""
        self.client.await_log("the server does not answer", count)
        self.client.await_log("goes on after", count)
        assert f"attached to {to.name}" in self.client.cli("map", "--list")

    def settle_past_of(self, node: Node, newer: Node) -> None:
        """What a thawed Primary knows of the past is given up."""
        if node.ctl("status")["role"] == "Primary":
            node.ctl("demote", force=True)
        if node.wait(connection=("Connected", "StandAlone"))["connection"] == "StandAlone":  # it had changes of its own
            node.ctl("connect", discard_my_data=True)
            newer.ctl("connect")
        self.pair.wait_in_sync()

    def replace_volume(self, change: str) -> None:
        """Both nodes stop, their copies are changed by a script, and node1 serves what is there as a new volume."""
        self.one.ctl("demote", force=True)
        for node in self.pair.nodes:  # both first: the new copy of one must not meet the old one of the other
            self.signal(node, signal.SIGKILL)
        for node in self.pair.nodes:
            node.machine.run("sh", "-ec", change)
            node.cli("create-md", "--force")
            node.start()
        self.one.wait(connection="Connected", volume_peer_disk="Inconsistent")
        self.one.ctl("promote", force=True)
        self.pair.wait_in_sync()

    def exercise(self, rng: random.Random, seconds: int) -> None:
        """Start the exerciser on the client, and return when it writes."""
        begin_exercise(self.client.machine, _FOLDER, rng.randrange(1 << 30), seconds)

    def end_exercise(self, what: str) -> None:
        """AssertionError when it has seen an error or wrong data."""
        report = json.loads(self.client.end("exerciser").splitlines()[-1])
        print(f"{what}: {report}", file=sys.stderr)
        assert report["operations"] > 0


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Three]:
    """Three machines for all tests of this file."""
    image = need_image()
    folder = tmp_path_factory.mktemp("three")
    kinds = ("file", "file")  # their size can be changed
    with Pair(folder, image, random.Random(1), _SIZE_BYTES, kinds=kinds, has_client=True, **_SETTINGS) as pair:
        client = ClientMachine(pair)
        with client.machine:
            client.power_on()
            pair.up()
            client.boot()
            yield Three(pair, client)


@pytest.fixture
def three(machines: Three) -> Iterator[Three]:
    """In sync, node1 is Primary, and nothing is mapped; what happened is printed if a test fails."""
    if machines.one.ctl("status")["role"] != "Primary":
        machines.one.ctl("takeover")
    try:
        yield machines
    finally:
        print(machines.client.map_log(), file=sys.stderr)
        print(machines.client.sh("dmesg | tail -20"), file=sys.stderr)
        print(machines.pair.logs(), file=sys.stderr)
        with contextlib.suppress(AssertionError):
            machines.client.sh(f"umount {_FOLDER}")
        with contextlib.suppress(AssertionError):
            machines.client.cli("unmap")


def test_the_primarys_machine_loses_power(three: Three, rng: random.Random) -> None:
    one, two, client = three.one, three.two, three.client
    client.sh("! grep -q $(uname -n) /run/replica/replica.toml; ! test -e /run/replica/cluster.key")
    three.map_new()
    three.exercise(rng, 30)
    client.begin("fio", *verifying_fio(_FOLDER, rng.randrange(1 << 30), 25))
    client.sh(f"until [ -s {_FOLDER}/verify.0.0 ]; do sleep 0.1; done")
    one.machine.power_cut()
    two.wait_alone()
    two.ctl("promote")
    client.await_log("goes on after")
    assert "attached to node2 (192.168.77.2:10809)" in client.cli("map", "--list")
    three.end_exercise("power cut of the Primary, client on a third machine")
    fio = client.end("fio")
    assert "err= 0" in fio, fio
    three.pair.boot(one)
    one.start()
    three.check_and_unmap()


def test_an_idle_device_leaves_a_server_that_is_silent(three: Three) -> None:
    """Without I/O the kernel misses no answer: only the probes can notice. (No file system: it writes by itself.)"""
    one, two, client = three.one, three.two, three.client
    client.cli(*_MAP)
    client.sh(f"printf %4096s before | dd of={_DEVICE} bs=4k oflag=direct")

    # The server is frozen; its machine, and the connection with it, are there.
    three.signal(one, signal.SIGSTOP)
    two.wait_alone()
    two.ctl("promote")
    three.await_moved(count=1, to=two)
    client.sh(f"printf %4096s between | dd of={_DEVICE} bs=4k seek=1 oflag=direct")
    three.signal(one, signal.SIGCONT)
    three.settle_past_of(one, newer=two)
    client.await_log("may be used again")

    # Only the client is cut off: nobody tells it that its server hands over to the other.
    two.cut_client_cable()
    one.ctl("takeover")
    three.await_moved(count=2, to=one)
    client.sh(f"printf %4096s after | dd of={_DEVICE} bs=4k seek=2 oflag=direct")
    assert client.sh(f"dd if={_DEVICE} bs=4k count=3 iflag=direct status=none").split() == [
        "before",
        "between",
        "after",
    ]
    two.mend_client_cable()
    client.cli("unmap")
    three.pair.wait_in_sync()
    three.pair.check_identical()


def test_the_volume_is_larger_or_smaller_when_it_is_back(three: Three, rng: random.Random) -> None:
    client = three.client
    three.map_new()
    three.exercise(rng, 40)

    three.replace_volume(f"truncate -s {2 * _SIZE_BYTES} /copy/volume")
    client.await_log(f"had {_SIZE_BYTES} bytes and now has {2 * _SIZE_BYTES}")
    assert int(client.sh(f"blockdev --getsize64 {_DEVICE}")) == 2 * _SIZE_BYTES
    client.sh(
        f"resize2fs {_DEVICE}; test $(stat -f -c %b {_FOLDER}) -gt $(({_SIZE_BYTES} / $(stat -f -c %S {_FOLDER})))"
    )

    three.replace_volume(f"mv /copy/volume /copy/kept; truncate -s {_SIZE_BYTES} /copy/volume")
    client.await_log(f"serves {_SIZE_BYTES} bytes, but {_DEVICE} has {2 * _SIZE_BYTES}: a device does not shrink")
    assert f"serves {_SIZE_BYTES} bytes" in client.cli("map", "--list")
    assert int(client.sh(f"blockdev --getsize64 {_DEVICE}")) == 2 * _SIZE_BYTES

    three.replace_volume("mv /copy/kept /copy/volume")
    client.await_log("goes on after", 2)
    three.end_exercise("larger, smaller and the old volume again")
    three.check_and_unmap()
