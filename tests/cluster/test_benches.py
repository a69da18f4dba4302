"""The benches run: each for a moment, with everything that they start."""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import compare, peers, resync_time, servers, switchover
from bench.load import Workload, has_fio
from bench.measure import in_turn
from tests.cluster.cluster import ROOT, Cluster

_MOMENT_S = 0.1


@pytest.fixture
def folder() -> Iterator[Path]:
    with servers.image_folder() as path:
        yield path


@pytest.fixture
def fio() -> None:
    if not has_fio():
        pytest.skip("fio with its nbd engine is not installed")


def test_two_servers_are_measured_in_turn(libnbd: Any, fio: None, folder: Path) -> None:
    with servers.replica(folder) as ours, servers.floor(folder) as floor:
        peers.warm_up([ours, floor])
        rows = in_turn([ours, floor], [Workload("write", 4096, 16), peers.READS, peers.FLUSHED], 2, _MOMENT_S)
    for row in rows:
        for name in ("Replica C", "floor"):
            assert len(row.rates(name)) == 2 and all(rate > 0 for rate in row.rates(name))
            assert row.latencies(name).count > 0
            assert all(cost > 0 for cost in row.costs(name))


def test_the_bound_writes_to_both_images(libnbd: Any, folder: Path, rng: random.Random) -> None:
    """Small writes, and large ones that arrive in pieces, some of them at once."""
    with servers.floor(folder) as floor:
        handle = libnbd.NBD()
        handle.connect_uri(floor.uri)
        written: dict[int, bytes] = {}
        for number in range(64):
            data = rng.randbytes(rng.choice((512, 4096, 128 << 10, (128 << 10) + 512, 1 << 20)))
            written[number << 20] = data
            handle.aio_pwrite(libnbd.Buffer.from_bytearray(bytearray(data)), number << 20)
        while handle.aio_in_flight():
            handle.poll(-1)
        handle.flush()
        assert all(handle.pread(len(data), offset) == data for offset, data in written.items())
        handle.shutdown()
    for image in ("floor-1.img", "floor-2.img"):
        with (folder / image).open("rb") as file:
            for offset, data in written.items():
                file.seek(offset)
                assert file.read(len(data)) == data


@pytest.mark.parametrize("name", servers.PEERS)
def test_every_other_server_serves(libnbd: Any, folder: Path, name: str) -> None:
    start, programs = servers.PEERS[name]
    if missing := servers.missing(programs):
        pytest.skip(f"not installed: {', '.join(missing)}")
    with start(folder) as target:
        handle = libnbd.NBD()
        handle.connect_uri(target.uri)
        assert handle.get_size() == servers.SIZE_BYTES
        handle.pwrite(b"x" * 4096, 8192)
        assert handle.pread(4096, 8192) == b"x" * 4096
        handle.shutdown()
        assert target.resident_bytes() > 0


def test_the_programs_are_those_of_the_revision(folder: Path) -> None:
    """Whatever is in the current directory, and in the environment's own packages."""
    other = folder / "other"
    (other / "replica").mkdir(parents=True)
    (other / "replica" / "__init__.py").write_text("print('the other one')\n")
    environment = Cluster(folder, root=other).node1.environment()
    done = subprocess.run(
        [sys.executable, "-c", "import replica"], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "the other one\n"


def test_a_revision_is_checked_out_and_removed(tmp_path: Path) -> None:
    try:
        commit = compare.commit_of("HEAD")
    except RuntimeError:
        pytest.skip("this is no clone")
    with compare.checked_out(commit, tmp_path / "build") as place:
        assert (place / "replica" / "__init__.py").exists()
    assert not place.exists()


def test_pauses_are_measured() -> None:
    pauses = switchover.measure(runs=2, kills=1)
    counts = {kind: each.count for kind, each in pauses.by_kind.items()}
    assert counts == {switchover.TAKEOVER: 2, switchover.PROMOTE: 1, switchover.PROMOTE_VERB: 1}
    assert pauses.errors == 0


def test_resyncs_are_measured(libnbd: Any, fio: None) -> None:
    times = resync_time.measure(rounds=1, size_bytes=32 << 20)
    shares = sorted(times["resync"])
    assert shares[-1] == 1.0 and 0 < shares[0] < 0.01 and len(shares) == 4
