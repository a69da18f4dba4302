"""A machine with both nodes in it, on two addresses of its loopback, and the kernel's NBD devices."""

import json
import signal
from pathlib import Path
from typing import Any

from tests.cluster.cluster import MIB
from tests.vm.machine import PATIENCE_S, Image, Machine, new_disk

NODES = ("node1", "node2")
_SECRET = "0123456789abcdef" * 4
_SIZE_BYTES = 320 * MIB  # xfs takes no less than 300 MiB


def begin_exercise(machine: Machine, folder: str, seed: int, seconds: int) -> None:
    """Start the exerciser in a machine, and return when it writes."""
    command = ["python3", "-m", "tests.vm.writer", folder, str(seed), str(seconds)]
    machine.run("rm", "-f", f"{folder}/exercised", f"{folder}/renamed")
    machine.call("tests.vm.operate:begin", name="exerciser", command=command)
    machine.run("bash", "-c", f"until [ -s {folder}/exercised -o -s {folder}/renamed ]; do sleep 0.1; done")


def verifying_fio(folder: str, seed: int, seconds: int) -> list[str]:
    """A fio that writes a file anew again and again, 20 requests a second, and reads back what it wrote."""
    return [
        *("fio", "--name=verify", f"--directory={folder}", "--size=8M", "--rw=randwrite", "--bsrange=4k-64k"),
        *("--direct=1", "--ioengine=libaio", "--iodepth=4", "--rate_iops=20", "--time_based", f"--runtime={seconds}"),
        *("--verify=crc32c", "--verify_fatal=1", f"--randseed={seed}"),
    ]


class TwoInOne:
    """The machine, its two daemons, and what an operator does there. A context manager."""

    def __init__(self, folder: Path, image: Image) -> None:
        disks = [new_disk(folder / f"{node}.disk", _SIZE_BYTES) for node in NODES]
        self.machine = Machine("both", image, folder, disks, memory_mib=1024)

    def __enter__(self) -> "TwoInOne":
        self.machine.power_on()
        try:
            self.machine.wait_ready()
            # Loopback writes through the page cache to the same kernel: dirty pages are kept few.
            self.machine.run("sysctl", "-q", "-w", "vm.dirty_background_ratio=2", "vm.dirty_ratio=5")
            self._call("configure", config=self.configuration(), secret=_SECRET)
            for node in NODES:
                self.cli(node, "create-md")
                self.start(node)
            self.wait("node1", connection="Connected", volume_peer_disk="Inconsistent")
            self.ctl("node1", "promote", force=True)
            self.wait_in_sync()
        except BaseException:
            self.machine.power_cut()
            raise
        return self

    def __exit__(self, *reason: Any) -> None:
        self.machine.power_cut()

    @staticmethod
    def configuration() -> str:
        """The TOML file."""
        lines = ["[cluster]", 'name = "test"', 'secret-file = "cluster.key"', 'state-dir = "state"', 'run-dir = "run"']
        lines += [f'[node.node{n}]\naddress = "127.0.0.{n}"' for n in (1, 2)]
        lines += ['[resource.r0]\nport = 7789\nprotocol = "C"\ntimeout = 5\nconnect-interval = 0.2']
        lines += [
            f'[resource.r0.on.node{n}]\nnbd = "127.0.0.{n}:10809"\nbacking = "/dev/vd{disk}"'
            for n, disk in ((1, "b"), (2, "c"))
        ]
        return "\n".join(lines) + "\n"

    def cli(self, node: str, *arguments: str) -> str:
        """`replicactl`: what it printed; AssertionError with its sentence when it fails."""
        output: str = self._call("cli", node=node, arguments=arguments)
        return output

    def start(self, node: str) -> None:
        """`replicad`."""
        self._call("start", node=node, log=f"/job/{node}.log", patience_s=PATIENCE_S)

    def signal(self, node: str, number: signal.Signals) -> None:
        """To its `replicad`."""
        self._call("signal", node=node, number=int(number))

    def ctl(self, node: str, verb: str, **args: Any) -> Any:
        """Ask the daemon."""
        return self._call("ctl", node=node, verb=verb, args=args, patience_s=PATIENCE_S)

    def wait(self, node: str, **wanted: str) -> None:
        """Until the status has these values."""
        values = {key.replace("volume_", "volume."): [value] for key, value in wanted.items()}
        self._call("wait", node=node, wanted=values, patience_s=PATIENCE_S)

    def wait_in_sync(self) -> None:
        """Both copies are the same."""
        for node in NODES:
            self.wait(node, replication="Established", volume_disk="UpToDate", volume_peer_disk="UpToDate")

    def sh(self, script: str, timeout_s: float = PATIENCE_S) -> str:
        """What a script of bash printed; AssertionError unless it succeeds."""
        return self.machine.run("bash", "-euc", script, timeout_s=timeout_s)

    def begin_exercise(self, folder: str, seed: int, seconds: int) -> None:
        """Start the exerciser, and return when it writes."""
        begin_exercise(self.machine, folder, seed, seconds)

    def end_exercise(self) -> dict[str, Any]:
        """What it reports; AssertionError when it has seen an error or wrong data."""
        report: dict[str, Any] = json.loads(self.end("exerciser").splitlines()[-1])
        return report

    def begin(self, name: str, *command: str) -> None:
        """Start a program."""
        self._call("begin", name=name, command=command)

    def end(self, name: str) -> str:
        """What it printed; AssertionError with that unless it ends with status 0."""
        output: str = self._call("end", name=name, patience_s=PATIENCE_S, timeout_s=PATIENCE_S + 30)
        return output

    def map_log(self) -> str:
        """What `replicad-map` says."""
        return self.machine.run("sh", "-c", "cat /run/replica/run/map/r0.log || true")

    def _call(self, function: str, timeout_s: float = PATIENCE_S, **args: Any) -> Any:
        return self.machine.call(f"tests.vm.operate:{function}", timeout_s=timeout_s, **args)
