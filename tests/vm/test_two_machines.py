"""`replicactl map` on one node of a pair, each of which is a machine with a stock Debian kernel."""

import random
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.cluster.cluster import MIB
from tests.vm.machine import PATIENCE_S, need_image
from tests.vm.pair import Node, Pair
from tests.vm.two_in_one import begin_exercise

_DEVICE = "/dev/nbd0"
_FOLDER = "/mnt/volume"

pytestmark = pytest.mark.timeout(600)


class Client:
    """`replicactl map` on one node of a pair, and what runs on the device there."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def sh(self, script: str) -> str:
        """In the node's machine."""
        return self.node.machine.run("bash", "-euc", script)

    def begin(self, seed: int, seconds: int) -> None:
        """Start the exerciser."""
        begin_exercise(self.node.machine, _FOLDER, seed, seconds)

    def end(self) -> str:
        """What it reports."""
        report: str = self.node.machine.call(
            "tests.vm.operate:end", name="exerciser", patience_s=PATIENCE_S, timeout_s=PATIENCE_S + 30
        )
        return report.strip()

    def await_log(self, count: int) -> None:
        """Until the device went on so many times."""
        self.sh(f'until [ "$(grep -c "goes on after" /run/replica/run/map/r0.log)" -ge {count} ]; do sleep 0.1; done')


def test_two_machines(short_dir: Path, rng: random.Random) -> None:
    """The client is on one of them: takeover, power cut of the Primary, frozen Primary while the other takes over."""
    image = need_image()
    settings = {"protocol": '"C"', "nbd": '"0.0.0.0:10809"', "timeout": "5", "connect_interval": "0.2"}
    with Pair(short_dir, image, rng, 64 * MIB, **settings) as pair:
        one, two = pair.up().nodes
        client = Client(two)
        two.cli("map", "r0", _DEVICE, "--timeout", "80", "--request-timeout", "2")
        client.sh(f"mkfs.ext4 -q {_DEVICE}; mkdir {_FOLDER}; mount {_DEVICE} {_FOLDER}")

        client.begin(rng.randrange(1 << 30), 20)
        two.ctl("takeover")
        client.await_log(1)
        one.ctl("takeover")
        client.await_log(2)
        print(f"takeover: {client.end()}", file=sys.stderr)

        client.begin(rng.randrange(1 << 30), 25)
        one.machine.power_cut()
        two.wait_alone()
        two.ctl("promote")
        client.await_log(3)
        print(f"power cut of the Primary: {client.end()}", file=sys.stderr)
        pair.boot(one)
        one.start()
        pair.wait_in_sync()
        one.ctl("takeover")
        client.await_log(4)

        client.begin(rng.randrange(1 << 30), 30)
        one.machine.call("tests.vm.operate:signal", node=one.name, number=int(signal.SIGSTOP))
        two.wait_alone()
        two.ctl("promote")
        client.await_log(5)
        one.machine.call("tests.vm.operate:signal", node=one.name, number=int(signal.SIGCONT))
        print(f"frozen Primary, failover, thaw: {client.end()}", file=sys.stderr)
        client.sh(f"umount {_FOLDER}; e2fsck -fn {_DEVICE}")
        assert re.search(r"attached to node2", two.cli("map", "--list"))
        two.cli("unmap")
        # What the thawed one executed of the past stays there, and is given up.
        if one.ctl("status")["role"] == "Primary":
            one.ctl("demote", force=True)
            one.ctl("connect", discard_my_data=True)
            two.ctl("connect")
        pair.wait_in_sync()
        pair.check_identical()
