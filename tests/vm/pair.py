"""Two nodes, each in a machine of its own whose power can be cut; their link is a cable between the machines.

Each keeps its metadata on ext4 on one disk. Its copy is on another: the block device itself ("device"), or a file on
ext4 ("file"). There may be a third machine, no node, with a cable to each of them.
"""

import random
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.cluster.cluster import MIB, first_difference, free_port
from tests.vm import machine as vm
from tests.vm.machine import PATIENCE_S, Image, Machine, cable, new_disk, user_network

_NBD_PORT = 10809
_CLIENT_ADDRESS = "192.168.77.3"
_STATE_DISK_BYTES = 24 * MIB
_SECRET = "0123456789abcdef" * 4
_MAP_LOG = "/run/replica/run/map/r0.log"
_LAST_LINES = 40
#: How the guest's kernel writes back what nobody flushes: as late as it can, or soon. By seed, since the first loses
#: all that is not flushed, and the second brings some of it to the disk, in an order of its own.
_WRITE_BACK = {
    # (With an interval of 0 the kernel would look at once whenever something becomes dirty.)
    "late": (
        "vm.dirty_writeback_centisecs=60000",
        "vm.dirty_expire_centisecs=60000",
        "vm.dirty_background_ratio=90",
        "vm.dirty_ratio=95",
    ),
    "soon": ("vm.dirty_writeback_centisecs=20", "vm.dirty_expire_centisecs=50", "vm.dirty_background_ratio=1"),
}


class Node:
    """One node: its machine, its disks, its daemon when it runs, its operator."""

    def __init__(self, pair: "Pair", number: int, kind: str) -> None:
        self.name = f"node{number}"
        self.kind = kind
        self.address = f"192.168.77.{number}"
        self.backing = "/dev/vdb" if kind == "device" else "/copy/volume"
        self.port = 0
        self._pair = pair
        self._number = number
        copy_bytes = pair.size_bytes if kind == "device" else 2 * pair.size_bytes
        disks = [new_disk(pair.folder / f"{self.name}.copy", copy_bytes)]
        disks.append(new_disk(pair.folder / f"{self.name}.state", _STATE_DISK_BYTES))
        for disk in disks[1 if kind == "device" else 0 :]:
            subprocess.run(["mke2fs", "-q", "-t", "ext4", disk], check=True, timeout=PATIENCE_S)
        self.machine = Machine(self.name, pair.image, pair.folder, disks)

    @property
    def peer(self) -> "Node":
        """The other node."""
        one, other = self._pair.nodes
        return other if self is one else one

    # ── the machine ──────────────────────────────────────────────────────────────────────────────────────────

    def power_on(self) -> None:
        """Start the machine; `boot` goes on."""
        self.port = free_port("127.0.0.1")
        ends = [self._pair.folder / f"{node.name}.cable" for node in (self, self.peer)]
        cards = [user_network([(self.port, _NBD_PORT)]), cable(*ends)]
        if self._pair.has_client:
            cards.append(cable(*self.client_cable))
        self.machine.power_on(cards, self._number)

    @property
    def client_cable(self) -> tuple[Path, Path]:
        """This node's end and the client's end of the cable between them."""
        return self._pair.folder / f"{self.name}-client.cable", self._pair.folder / f"client-{self.name}.cable"

    def boot(self, write_back: str) -> None:
        """Until the machine is up with its network and disks, its kernel writing back "late" or "soon"."""
        self.machine.wait_ready()
        commands = [
            "set -e",
            "ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up",
            f"ip addr add {self.address}/24 dev eth1; ip link set eth1 mtu 9000 up",
            f"sysctl -q -w {' '.join(_WRITE_BACK[write_back])}",
            "mkdir /state /copy; mount /dev/vdc /state",
        ]
        if self._pair.has_client:
            commands.append(f"ip link set eth2 mtu 9000 up; ip route add {_CLIENT_ADDRESS}/32 dev eth2")
        if self.kind == "file":
            commands.append("mount /dev/vdb /copy")
        self.machine.run("sh", "-c", "\n".join(commands))
        self._call("configure", config=self._pair.configuration(), secret=_SECRET)

    def cut_client_cable(self) -> None:
        """The client and this node hear nothing of each other any more, and are not told."""
        self.machine.run("ip", "link", "set", "eth2", "down")

    def mend_client_cable(self) -> None:
        """It is plugged in again."""
        self.machine.run("sh", "-c", f"ip link set eth2 up; ip route replace {_CLIENT_ADDRESS}/32 dev eth2")

    def copy_out(self) -> Path:
        """This node's copy of the volume, as the guest reads it, in a file of the host."""
        self.machine.run("dd", f"if={self.backing}", "of=/job/volume", "bs=1M")
        return self.machine.job / "volume"

    # ── the daemon and its operator ──────────────────────────────────────────────────────────────────────────

    def create(self) -> None:
        """Metadata, and the file."""
        size = [] if self.kind == "device" else ["--size", str(self._pair.size_bytes)]
        self.cli("create-md", *size)

    def cli(self, *arguments: str) -> str:
        """`replicactl`: what it printed."""
        output: str = self._call("cli", node=self.name, arguments=arguments)
        return output

    def start(self) -> None:
        """`replicad`."""
        self._call("start", node=self.name, log=f"/job/{self.name}.log", patience_s=PATIENCE_S)

    def ctl(self, verb: str, **args: Any) -> Any:
        """Ask the daemon."""
        return self._call("ctl", node=self.name, verb=verb, args=args, patience_s=PATIENCE_S)

    def wait(self, **wanted: str | Sequence[str]) -> dict[str, Any]:
        """The first status in which each key has this value, or one of these; `volume_disk` is the volume's `disk`."""
        values = {
            key.replace("volume_", "volume."): [value] if isinstance(value, str) else list(value)
            for key, value in wanted.items()
        }
        status: dict[str, Any] = self._call("wait", node=self.name, wanted=values, patience_s=PATIENCE_S)
        return status

    def wait_alone(self) -> dict[str, Any]:
        """Until this node knows that its peer is gone."""
        return self.wait(connection=("Connecting", "StandAlone"))

    def log(self) -> str:
        """Everything that the daemon has ever said."""
        path = self.machine.job / f"{self.name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def times_alone(self) -> int:
        """How many times this node went on as Primary without the other."""
        return self.log().count(": goes on without ")

    def _call(self, function: str, **args: Any) -> Any:
        try:
            return self.machine.call(f"tests.vm.operate:{function}", **args)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._pair.logs()}") from None

    def open_nbd(self) -> Any:
        """A libnbd handle connected to the node's export; raises nbd.Error."""
        import nbd

        handle = nbd.NBD()
        handle.connect_tcp("127.0.0.1", str(self.port))
        return handle


class Pair:
    """Both nodes. `settings` are keys of [resource.r0], as TOML values. Its machines are off at the end of `with`.

    `kinds` are those of the copies, at random for None; `has_client`: each node has a card for a cable to a client.
    """

    def __init__(
        self,
        folder: Path,
        image: Image,
        rng: random.Random,
        size_bytes: int,
        *,
        kinds: Sequence[str] | None = None,
        has_client: bool = False,
        **settings: str,
    ) -> None:
        self.folder = folder
        self.image = image
        self.size_bytes = size_bytes
        self.has_client = has_client
        self._rng = rng
        self._settings = {name.replace("_", "-"): value for name, value in settings.items()}
        kinds = kinds or rng.sample(("device", "file"), 2)
        self.nodes = Node(self, 1, kinds[0]), Node(self, 2, kinds[1])
        self._stack = ExitStack()

    def __enter__(self) -> "Pair":
        for node in self.nodes:
            self._stack.enter_context(node.machine)
        return self

    def __exit__(self, *reason: Any) -> None:
        self._stack.close()

    def configuration(self) -> str:
        """The TOML file of both nodes."""
        common = {"port": "7789", "nbd": f'"10.0.2.15:{_NBD_PORT}"', **self._settings}
        lines = ["[cluster]", 'name = "test"', 'secret-file = "cluster.key"', 'state-dir = "/state"', 'run-dir = "run"']
        lines += [f'[node.{node.name}]\naddress = "{node.address}"' for node in self.nodes]
        lines += ["[resource.r0]", *(f"{name} = {value}" for name, value in common.items())]
        lines += [f'[resource.r0.on.{node.name}]\nbacking = "{node.backing}"' for node in self.nodes]
        return "\n".join(lines) + "\n"

    def boot(self, *nodes: Node) -> None:
        """Switch these machines on, all at once, and return when they are up; no daemon runs yet."""
        for node in nodes:
            node.power_on()
        for node in nodes:
            node.boot(self._rng.choice(("late", "late", "soon")))

    def up(self) -> "Pair":
        """From nothing to a pair in sync with node1 as Primary."""
        self.boot(*self.nodes)
        for node in self.nodes:
            node.create()
            node.start()
        one = self.nodes[0]
        one.wait(connection="Connected", volume_peer_disk="Inconsistent")
        one.ctl("promote", force=True)
        return self.wait_in_sync()

    def wait_in_sync(self) -> "Pair":
        """Until both nodes say that both copies are the same."""
        for node in self.nodes:
            node.wait(replication="Established", volume_disk="UpToDate", volume_peer_disk="UpToDate")
        return self

    def check_identical(self) -> None:
        """AssertionError unless the copies are the same, byte for byte."""
        at = first_difference(*(node.copy_out() for node in self.nodes))
        assert at is None, f"the copies differ at {at}\n{self.logs()}"

    def logs(self) -> str:
        """The ends of both nodes' logs, for messages."""
        text = ""
        for node in self.nodes:
            text += f"── {node.name} ({node.kind})\n" + "\n".join(node.log().splitlines()[-_LAST_LINES:]) + "\n"
        return text


class ClientMachine:
    """The third machine, which has the configuration and no secret: `replicactl map`, and what runs on the device."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self.machine = Machine("client", pair.image, pair.folder)

    def power_on(self) -> None:
        """Start the machine; `boot` goes on."""
        cables = [cable(*reversed(node.client_cable)) for node in self._pair.nodes]
        self.machine.power_on(cables, len(self._pair.nodes) + 1)

    def boot(self) -> None:
        """Until it is up and reaches both nodes' addresses, over one cable each."""
        self.machine.wait_ready()
        commands = ["set -e"]
        for number, node in enumerate(self._pair.nodes):
            commands += [
                f"ip addr add {_CLIENT_ADDRESS}/32 dev eth{number}; ip link set eth{number} mtu 9000 up",
                f"ip route add {node.address}/32 dev eth{number} src {_CLIENT_ADDRESS}",
            ]
        self.machine.run("sh", "-c", "\n".join(commands))
        self.machine.call("tests.vm.operate:configure", config=self._pair.configuration(), secret=None)

    def cli(self, *arguments: str) -> str:
        """`replicactl` without a node's name: what it printed; AssertionError with its sentence when it fails."""
        output: str = self.machine.call("tests.vm.operate:cli", node=None, arguments=arguments)
        return output

    def sh(self, script: str, timeout_s: float = PATIENCE_S) -> str:
        """What a script of bash printed; AssertionError unless it succeeds."""
        return self.machine.run("bash", "-euc", script, timeout_s=timeout_s)

    def begin(self, name: str, *command: str) -> None:
        """Start a program."""
        self.machine.call("tests.vm.operate:begin", name=name, command=command)

    def end(self, name: str) -> str:
        """What it printed; AssertionError with that unless it ends with status 0."""
        output: str = self.machine.call(
            "tests.vm.operate:end", name=name, patience_s=PATIENCE_S, timeout_s=PATIENCE_S + 30
        )
        return output.strip()

    def await_log(self, text: str, count: int = 1) -> None:
        """Until replicad-map, since it was started, has said this so many times."""
        self.sh(f'until [ "$(grep -c "{text}" {_MAP_LOG})" -ge {count} ]; do sleep 0.1; done')

    def map_log(self) -> str:
        """What `replicad-map` says."""
        return self.machine.run("sh", "-c", f"cat {_MAP_LOG} || true")


def power_cut(*nodes: Node) -> None:
    """Cut the power of these nodes at once."""
    vm.power_cut(*(node.machine for node in nodes))
