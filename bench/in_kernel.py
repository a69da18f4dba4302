"""Replica beside DRBD, which does the same in the kernel: in one virtual machine, on RAM disks, one after the other.

    python -m bench.in_kernel [--seconds S] [--write-docs]

The machine is that of tests/vm (`make vm-image`): Debian's kernel, emulated in software, with both nodes of either in
it. Programs in Python suffer more from the emulation than the kernel does, so the ratio is an upper bound of what lies
between the two. DRBD is the kernel's own 8.4; its tools are downloaded by apt, and installed nowhere.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from bench import document, machine
from bench.latency import PERCENTILES, duration
from bench.load import Seen, read_fio
from tests.vm.machine import Machine, find_image

SECTION: Final = "kernel"
_DEPTHS: Final = (1, 16)
_RAM_DISK_KIB: Final = 96 << 10
_PATIENCE_S: Final = 180.0
_TOOLS: Final = ("drbdsetup-84", "drbdmeta")
_REPLICA, _FLOOR, _DRBD = "Replica C, the kernel's NBD client", "floor, the kernel's NBD client", "DRBD 8.4, protocol C"
#: RAM disks 0 and 1, as a pair of files would be.
_START_REPLICA: Final = """
cd /run/replica
export PYTHONPATH=/project
for node in node1 node2; do
  python3 -m replica.cli --config replica.toml --node $node create-md > /dev/null
  python3 -m replica.daemon r0 --config replica.toml --node $node 2> $node.log &
done
ctl() { python3 -m replica.cli --config replica.toml --node node1 "$@"; }
until ctl wait-connect --timeout 60 2> /dev/null; do sleep 1; done
ctl promote --force
ctl wait-sync --timeout 120 > /dev/null
nbd-client 127.0.0.1 10809 /dev/nbd0 -N r0 > /dev/null
"""
_CONFIGURATION: Final = """[cluster]
name = "bench"
secret-file = "cluster.key"
state-dir = "state"
run-dir = "run"
[node.node1]
address = "127.0.0.1"
[node.node2]
address = "127.0.0.2"
[resource.r0]
port = 7789
[resource.r0.on.node1]
nbd = "127.0.0.1:10809"
backing = "/dev/ram0"
[resource.r0.on.node2]
nbd = "127.0.0.2:10809"
backing = "/dev/ram1"
"""
#: RAM disks 2 and 3; both nodes are one kernel's, and are known to be the same from the start.
_START_DRBD: Final = """
mkdir -p /run/lock /var/lib/drbd /var/lock
modprobe drbd
tool() { /job/"$@"; }
for minor in 0 1; do
  disk=/dev/ram$((minor + 2)) own=127.0.0.1:$((7001 + minor)) other=127.0.0.1:$((7002 - minor))
  tool drbdmeta --force $minor v08 $disk internal create-md > /dev/null
  tool drbdsetup-84 new-resource r$minor
  tool drbdsetup-84 new-minor r$minor $minor 0
  tool drbdsetup-84 attach $minor $disk $disk internal
  tool drbdsetup-84 connect r$minor ipv4:$own ipv4:$other --protocol=C
done
until grep -q ' 0: cs:Connected' /proc/drbd && grep -q ' 1: cs:Connected' /proc/drbd; do sleep 0.2; done
tool drbdsetup-84 new-current-uuid --clear-bitmap 0
tool drbdsetup-84 primary 0
until grep -q ' 0: cs:Connected ro:Primary/Secondary ds:UpToDate/UpToDate' /proc/drbd; do sleep 0.2; done
"""
_START_FLOOR: Final = """
cd /project
for image in 1 2; do truncate -s 64M /tmp/floor-$image; done
python3 -m bench.floor --image /tmp/floor-2 --port 7801 2> /tmp/floor.log &
primary() { python3 -m bench.floor --image /tmp/floor-1 --port 7801 --serve /tmp/floor.nbd 2>> /tmp/floor.log; }
until primary; do sleep 1; done &
until [ -S /tmp/floor.nbd ]; do sleep 0.5; done
nbd-client -unix /tmp/floor.nbd /dev/nbd1 > /dev/null
"""


def fetch_tools(folder: Path) -> None:
    """DRBD's tools, from Debian's package. RuntimeError when apt cannot get it."""
    done = subprocess.run(
        ["apt-get", "download", "-qq", "drbd-utils"], cwd=folder, capture_output=True, text=True, check=False
    )
    package = next(folder.glob("drbd-utils_*.deb"), None)
    if done.returncode or package is None:
        raise RuntimeError(f"drbd-utils cannot be downloaded: {done.stderr.strip()}")
    subprocess.run(["dpkg", "-x", package, folder / "unpacked"], check=True)
    for name in _TOOLS:
        shutil.copy(next(file for file in (folder / "unpacked").rglob(name) if file.is_file()), folder / name)


def measure(seconds: float) -> dict[str, dict[int, Seen]]:
    """By product and depth. AssertionError, RuntimeError or OSError with the reason when it does not work."""
    image = find_image()
    found: dict[str, dict[int, Seen]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="rb-") as folder,
        Machine("bench", image, Path(folder), memory_mib=1536) as guest,
    ):
        fetch_tools(guest.job)
        guest.power_on()
        guest.wait_ready()
        guest.run("modprobe", "nbd")
        guest.run("modprobe", "brd", "rd_nr=4", f"rd_size={_RAM_DISK_KIB}")
        guest.call("tests.vm.operate:configure", config=_CONFIGURATION, secret="0123456789abcdef" * 4)
        for name, script, device in (
            (_DRBD, _START_DRBD, "/dev/drbd0"),
            (_REPLICA, _START_REPLICA, "/dev/nbd0"),
            (_FLOOR, _START_FLOOR, "/dev/nbd1"),
        ):
            _in_background(guest, script)
            found[name] = {depth: _fio(guest, device, depth, seconds) for depth in _DEPTHS}
    return found


def _in_background(guest: Machine, script: str) -> None:
    """What it leaves running must not hold the pipe that its output is read from."""
    quiet = f"(set -eu; {script}) > /tmp/log 2>&1 < /dev/null || {{ cat /tmp/log; exit 1; }}"
    guest.run("bash", "-c", quiet, timeout_s=_PATIENCE_S)


def _fio(guest: Machine, device: str, depth: int, seconds: float) -> Seen:
    command = [
        *("fio", "--name=bench", f"--filename={device}", "--direct=1", "--ioengine=libaio", "--rw=randwrite"),
        *("--bs=4k", f"--iodepth={depth}", "--size=48M", "--time_based", f"--runtime={seconds:g}"),
        *("--randrepeat=1", "--norandommap", "--output-format=json+"),
    ]
    return read_fio(guest.run(*command, timeout_s=seconds + _PATIENCE_S), "write")


def as_markdown(found: dict[str, dict[int, Seen]], seconds: float, facts: list[str]) -> list[str]:
    """The table, as it goes into docs/benchmarks.md."""
    cells = [
        [
            f"{name}, depth {depth}",
            f"{seen.rate:,.0f}",
            *(duration(seen.latencies.percentile_us(percentile)) for percentile in PERCENTILES),
        ]
        for depth in _DEPTHS
        for name, by_depth in found.items()
        for seen in (by_depth[depth],)
    ]
    heads = ["4 KiB writes, all emulated", "requests/s", *(f"p{each:g}" for each in PERCENTILES)]
    how = machine.how(f"python -m bench.in_kernel --seconds {seconds:g}")
    return [how, "", *(f"- {fact}" for fact in facts), "", *document.table(heads, cells)]


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 measured, 1 not possible here."""
    parser = argparse.ArgumentParser(prog="bench.in_kernel", description="Replica beside DRBD in one virtual machine.")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each single measurement (default 10)")
    parser.add_argument("--write-docs", action="store_true", help=f"update {document.BENCHMARKS.name}")
    options = parser.parse_args(arguments)
    facts = machine.facts()
    try:
        found = measure(options.seconds)
    except (RuntimeError, OSError, AssertionError, subprocess.SubprocessError) as error:
        print(f"bench.in_kernel: {error}", file=sys.stderr)
        return 1
    lines = as_markdown(found, options.seconds, facts)
    print("\n".join(lines))
    if options.write_docs:
        document.write_section(document.BENCHMARKS, SECTION, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
