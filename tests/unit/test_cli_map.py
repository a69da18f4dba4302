"""``replicactl map`` and ``unmap`` where there is nothing to attach. (With a kernel that has nbd: tests/vm.)"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.scripted_daemon import replicactl, running

MakeConfig = Callable[..., Path]

ATTACHED = {
    "resource": "r0",
    "device": "/dev/nbd0",
    "state": "attached",
    "server": "node1 (192.0.2.1:10809)",
    "size_bytes": 1 << 30,
    "mount": "/srv/web",
    "last_error": "",
    "ready": True,
}
SEARCHING = {**ATTACHED, "state": "searching", "size_bytes": 0, "mount": "", "last_error": "nobody serves r0"}


@pytest.fixture
def options(make_config: MakeConfig) -> list[str]:
    """Of a machine that is no node."""
    return ["--config", str(make_config())]


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (ATTACHED, "r0 /dev/nbd0: attached to node1 (192.0.2.1:10809), 1.0 GiB, mounted at /srv/web\n"),
        (SEARCHING, "r0 /dev/nbd0: searching; nobody serves r0\n"),
    ],
)
def test_the_list_says_where_each_device_is(
    options: list[str], short_dir: Path, status: dict[str, object], line: str
) -> None:
    with running(short_dir / "run/map/r0.sock") as agent:
        agent.answers["status"] = status
        done = replicactl("map", "--list", *options)
    assert (done.returncode, done.stdout, done.stderr) == (0, line, "")


def test_an_empty_list(options: list[str]) -> None:
    done = replicactl("map", "--list", *options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_is_mapped_is_not_mapped_again(options: list[str], short_dir: Path) -> None:
    with running(short_dir / "run/map/r0.sock") as agent:
        agent.answers["status"] = ATTACHED
        done = replicactl("map", "r0", *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert "r0 is mapped already (/dev/nbd0): see" in done.stderr


def test_what_is_not_mapped_is_not_unmapped(options: list[str]) -> None:
    done = replicactl("unmap", "r0", *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert "r0 is not mapped on this machine" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["r1"], "there is no [resource.r1]"),
        (["r0", "--connections", "0"], "must be a whole number from 1 to 16"),
        (["r0", "--timeout", "-1"], "must be a positive number of seconds"),
    ],
)
def test_wrong_arguments_are_one_sentence(options: list[str], arguments: list[str], words: str) -> None:
    done = replicactl("map", *arguments, *options)
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.root
def test_a_kernel_without_network_block_devices(options: list[str]) -> None:
    if os.geteuid() != 0:
        pytest.skip("takes root")
    if Path("/sys/block/nbd0").exists():
        pytest.skip("this kernel has network block devices")
    for arguments, words in (
        (["r0"], "load its module as root (`modprobe nbd`)"),
        (["r0", "/dev/sda"], "'/dev/sda' is no network block device"),
    ):
        done = replicactl("map", *arguments, *options)
        assert (done.returncode, done.stdout) == (1, "")
        assert words in done.stderr
