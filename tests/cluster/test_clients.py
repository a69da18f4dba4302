"""Clients that others wrote, unchanged, while the Primary changes: some notice a pause, the others an error.

docs/clients.md is the table of what is shown here. `make test` runs a part of it, `make clients` all.
"""

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.address import FollowingAddress
from tests.cluster.cluster import PATIENCE_S, Cluster
from tests.cluster.load import Load, Model

MIB = 1 << 20
PACKAGES = {"qemu-img": "qemu-utils", "qemu-io": "qemu-utils", "nbdcopy": "libnbd-bin", "nbdinfo": "libnbd-bin"}

#: How nbdkit is told to keep trying: once a second for a minute.
RETRY = ("retries=60", "retry-delay=1", "retry-exponential=no")


def takeover(pair: Cluster, address: FollowingAddress) -> None:
    """A planned switchover: node1 drains its clients, which the address then leads to node2."""
    address.release()
    pair.node2.ctl("takeover")
    address.move(pair.node2)


def kill(pair: Cluster, address: FollowingAddress) -> None:
    """node1 dies, its requests unanswered; an operator promotes node2."""
    pair.node1.kill9()
    address.release()
    pair.node2.wait_alone()
    pair.node2.ctl("promote")
    address.move(pair.node2)


Failover = Callable[[Cluster, FollowingAddress], None]
heavy = pytest.mark.skipif(not os.environ.get("REPLICA_ALL_CLIENTS"), reason="one of many: make clients runs them all")
both_failovers = pytest.mark.parametrize("failover", [takeover, kill])
mostly_kill = pytest.mark.parametrize("failover", [pytest.param(takeover, marks=heavy), kill])


@pytest.fixture
def address(pair: Cluster) -> Iterator[FollowingAddress]:
    with FollowingAddress(pair.node1) as found:
        yield found


@pytest.fixture
def source(short_dir: Path, pair: Cluster) -> Path:
    """A file of the volume's size, no block of which is like another or a hole."""
    path = short_dir / "source"
    path.write_bytes(random.Random(1).randbytes(pair.size_bytes))
    return path


def need(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed (Debian package {PACKAGES.get(program, program)})")
    return path


def start(program: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [need(program), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/tmp")


def finish(client: "subprocess.Popen[str]") -> tuple[int, str]:
    """Its status and words; it must end by itself."""
    try:
        said, _ = client.communicate(timeout=PATIENCE_S * 2)
    except subprocess.TimeoutExpired:
        client.kill()
        said, _ = client.communicate()
        raise AssertionError(f"{client.args!r} hangs: {said}") from None
    return client.returncode, said


def survives(client: "subprocess.Popen[str]") -> None:
    status, said = finish(client)
    assert status == 0, said


def fails_cleanly(client: "subprocess.Popen[str]") -> None:
    """It ends by itself, with an error and a word about it; no signal."""
    status, said = finish(client)
    assert status > 0, (status, said)
    assert said


def interrupt(pair: Cluster, address: FollowingAddress, failover: Failover) -> None:
    """The failover, once the clients have sent as much as they were to be held after."""
    address.wait_held()
    failover(pair, address)


def check(pair: Cluster, wanted: bytes) -> None:
    """The volume holds exactly this, and both copies do once they are both there."""
    assert pair.node2.read(0, len(wanted)) == wanted
    both_the_same(pair)


def both_the_same(pair: Cluster) -> None:
    """Both copies are the same, once a node that was killed is back."""
    if pair.node1.process is None:
        pair.node1.start()
    pair.wait_in_sync().quiesce().check_identical()


def qemu(address: FollowingAddress) -> str:
    """QEMU's options for a drive that waits for the server to come back."""
    where = f"file.driver=nbd,file.server.type=inet,file.server.host=127.0.0.1,file.server.port={address.port}"
    return f"driver=raw,{where},file.export={address.export},file.reconnect-delay=30"


def through_nbdkit(address: FollowingAddress, command: str, *filters: str) -> "subprocess.Popen[str]":
    """The command, with "$uri" the address of an nbdkit that reconnects for its client."""
    plugin = ("nbd", f"uri={address.uri}")
    return start("nbdkit", "-U", "-", *filters, "--filter=retry", *plugin, *RETRY, "--run", command)


# ── clients that reconnect ───────────────────────────────────────────────────────────────────────────────────────


@mostly_kill
def test_qemu_img_convert(pair: Cluster, address: FollowingAddress, source: Path, failover: Failover) -> None:
    address.hold_after(4 * MIB)
    client = start(
        *("qemu-img", "convert", "-n", "-f", "raw", "--target-image-opts", source, qemu(address)),
    )
    interrupt(pair, address, failover)
    survives(client)
    check(pair, source.read_bytes())


@heavy
@both_failovers
def test_qemu_img_bench(pair: Cluster, address: FollowingAddress, failover: Failover) -> None:
    """Depth 32; each request that was cut off is sent again."""
    address.hold_after(4 * MIB)
    options = ("-c", 3000, "-d", 32, "-s", 4096, "-S", 4096, "--pattern=90", "-w")
    client = start("qemu-img", "bench", *options, "--image-opts", qemu(address))
    interrupt(pair, address, failover)
    survives(client)
    check(pair, b"\x5a" * 3000 * 4096)


@both_failovers
def test_qemu_io(pair: Cluster, address: FollowingAddress, failover: Failover) -> None:
    address.hold_after(2 * MIB)
    commands = [f"aio_write -P {number + 1} {number}M 1M" for number in range(8)]
    commands += ["aio_flush", "flush", *(f"read -P {number + 1} {number}M 1M" for number in range(8))]
    words = [word for command in commands for word in ("-c", command)]
    client = start("qemu-io", "--image-opts", *words, qemu(address))
    interrupt(pair, address, failover)
    status, said = finish(client)
    assert status == 0 and "failed" not in said.lower() and "error" not in said.lower(), said
    check(pair, b"".join(bytes([number + 1]) * MIB for number in range(8)))


@heavy
@both_failovers
def test_nbdcopy_through_nbdkit(pair: Cluster, address: FollowingAddress, source: Path, failover: Failover) -> None:
    """There, and what is written is compared on the way by checkwrite, and back."""
    need("nbdcopy")
    address.hold_after(4 * MIB)
    client = through_nbdkit(address, f'nbdcopy --flush "{source}" "$uri"')
    interrupt(pair, address, failover)
    survives(client)
    survives(through_nbdkit(address, f'nbdcopy "{source}" "$uri"', "--filter=checkwrite"))
    back = source.with_name("back")
    survives(through_nbdkit(address, f'nbdcopy "$uri" "{back}"'))
    assert back.read_bytes() == source.read_bytes()
    check(pair, source.read_bytes())


@heavy
@both_failovers
def test_nbdkit_checkwrite(pair: Cluster, address: FollowingAddress, source: Path, failover: Failover) -> None:
    """Everything is read and compared while the Primary changes: one wrong byte would be an error."""
    need("nbdcopy")
    pair.node1.write(0, source.read_bytes())
    address.hold_after(600)  # requests to read are small
    client = through_nbdkit(address, f'nbdcopy "{source}" "$uri"', "--filter=checkwrite")
    interrupt(pair, address, failover)
    survives(client)
    check(pair, source.read_bytes())


def fio(uri: str, folder: Path, jobs: int) -> tuple[object, ...]:
    """Random writes at depth 32, each block with a checksum in it, a connection for each job; then all is verified."""
    return (
        *("--name=verify", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k", "--iodepth=32"),
        *("--size=2M", "--offset_increment=4M", f"--numjobs={jobs}", "--verify=crc32c", "--verify_fatal=1"),
        *("--thread", "--group_reporting", f"--aux-path={folder}"),
    )


@mostly_kill
def test_fio_verify_through_nbdkit(
    pair: Cluster, address: FollowingAddress, short_dir: Path, failover: Failover
) -> None:
    need("fio")
    address.hold_after(3 * MIB)
    words = " ".join(f"'{word}'" for word in fio("UNIX", short_dir, 4)).replace("'--uri=UNIX'", '"--uri=$uri"')
    client = through_nbdkit(address, f"fio {words}")
    interrupt(pair, address, failover)
    survives(client)
    both_the_same(pair)


@mostly_kill
def test_libnbd_with_a_loop(
    pair: Cluster, address: FollowingAddress, libnbd: Any, rng: random.Random, failover: Failover
) -> None:
    """A program that connects again and repeats what has no answer: three connections, each write numbered."""

    def connect() -> Any:
        while True:
            handle = libnbd.NBD()
            try:
                handle.connect_uri(address.uri)
                return handle
            except libnbd.Error:
                continue

    model = Model(pair.size_bytes)
    load = Load(model, connect, rng, reconnect=True)
    load.wait_done(200)
    address.hold_after(1 * MIB)
    interrupt(pair, address, failover)
    load.wait_done(200)
    load.finish()
    assert load.errors == []
    model.check(pair.node2.read)
    both_the_same(pair)


# ── clients that do not ──────────────────────────────────────────────────────────────────────────────────────────


def old_or_new(pair: Cluster, source: Path, block_bytes: int) -> int:
    """Every block holds what was there before (zeroes) or what the client wrote; how many it had written."""
    wanted, found = source.read_bytes(), pair.node2.read(0, pair.size_bytes)
    written = 0
    for at in range(0, len(wanted), block_bytes):
        block = found[at : at + block_bytes]
        assert block in (bytes(block_bytes), wanted[at : at + block_bytes]), f"the block at {at} is nobody's"
        written += block != bytes(block_bytes)
    return written


@mostly_kill
def test_nbdcopy_alone_fails_cleanly(
    pair: Cluster, address: FollowingAddress, source: Path, failover: Failover
) -> None:
    address.hold_after(4 * MIB)
    client = start("nbdcopy", source, address.uri)
    address.wait_held()
    while not any(pair.node1.read(0, pair.size_bytes)):
        pass  # what was let through has not reached the disk yet
    interrupt(pair, address, failover)
    fails_cleanly(client)
    assert old_or_new(pair, source, 512) > 0
    # And once more, from the start, on whoever is Primary now.
    survives(start("nbdcopy", "--flush", source, address.uri))
    check(pair, source.read_bytes())


@heavy
@both_failovers
def test_nbdcopy_download_fails_cleanly(
    pair: Cluster, address: FollowingAddress, source: Path, failover: Failover
) -> None:
    pair.node1.write(0, source.read_bytes())
    address.hold_after(600)
    back = source.with_name("back")
    client = start("nbdcopy", "--connections=1", "--requests=4", address.uri, back)
    interrupt(pair, address, failover)
    fails_cleanly(client)
    survives(start("nbdcopy", address.uri, back))
    assert back.read_bytes() == source.read_bytes()


@mostly_kill
def test_fio_alone_fails_cleanly(pair: Cluster, address: FollowingAddress, short_dir: Path, failover: Failover) -> None:
    address.hold_after(3 * MIB)
    client = start("fio", *fio(address.uri, short_dir, 4))
    interrupt(pair, address, failover)
    fails_cleanly(client)
    survives(start("fio", *fio(address.uri, short_dir, 4)))


@both_failovers
def test_libnbd_alone(pair: Cluster, address: FollowingAddress, libnbd: Any, failover: Failover) -> None:
    """What nbdsh does: a call fails with an error, the handle is dead, what was answered is there."""
    handle = libnbd.NBD()
    handle.connect_uri(address.uri)
    for number in range(16):
        handle.pwrite(bytes([number + 1]) * 65536, number * 65536)
    failover(pair, address)
    with pytest.raises(libnbd.Error):
        while True:  # what was under way before the end of a takeover is still answered
            handle.pread(4096, 0)
    check(pair, b"".join(bytes([number + 1]) * 65536 for number in range(16)))


@mostly_kill
def test_nbdinfo(pair: Cluster, address: FollowingAddress, failover: Failover) -> None:
    """It asks once: the Primary answers, a Secondary refuses."""
    survives(start("nbdinfo", address.uri))
    address.move(pair.node2)
    status, said = finish(start("nbdinfo", address.uri))
    assert status > 0 and "server replied with error" in said, said
    failover(pair, address)
    status, said = finish(start("nbdinfo", "--json", address.uri))
    assert status == 0 and f'"export-size": {pair.size_bytes}' in said, said
