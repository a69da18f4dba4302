"""A file system of the group: checked, mounted, watched, and unmounted from under whoever uses it."""

import asyncio
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from replica.heartbeat.agents.base import AgentError, Start, Surroundings
from replica.heartbeat.agents.mount import KINDS, MountAgent
from replica.heartbeat.agents.mounts import mounted_at, parse_mounts
from replica.heartbeat.settings import Auth, AuthMethod, HeartbeatSettings, ResourceSettings
from tests.cluster.mounted import need_mounts, run
from tests.processes import PATIENCE_S

START = Start(peer_is_dead=False)


def options(**given: object) -> dict[str, Any]:
    """The checked options."""
    (kind,) = KINDS
    return {
        name: option.parse(given[name]) if name in given else option.default for name, option in kind.options.items()
    }


def make_agent(folder: Path, device: str, **more: str) -> MountAgent:
    """The agent of a file system at `folder`."""
    checked = options(mount=str(folder), device=device, **more)
    settings = HeartbeatSettings(
        "test", "node1", "node2", Auth(AuthMethod.CRC, b""), (), (), folder.parent / "state", folder.parent / "run"
    )
    resource = ResourceSettings("mount", KINDS[0].title(checked), checked, "test:1", stop_timeout_s=20)
    return MountAgent(resource, Surroundings(settings, lambda: None))


def test_mountinfo_is_read() -> None:
    text = (
        "22 28 0:21 / /sys rw,nosuid shared:7 - sysfs sysfs rw\n"
        "99 28 7:0 / /srv/a\\040b rw,relatime shared:1 master:2 - ext4 /dev/loop0 ro,emergency_ro\n"
    )
    first, second = parse_mounts(text)
    assert (first.folder, first.kind, first.source) == ("/sys", "sysfs", "sysfs")
    assert (second.folder, second.source) == ("/srv/a b", "/dev/loop0")
    assert second.options == {"ro", "emergency_ro"}
    assert mounted_at("/proc") is not None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mount": "data"}, "absolute path of a folder"),
        ({"mount": "/"}, "absolute path of a folder"),
        ({"mount": 3}, "non-empty string"),
        ({"device": "nbd0"}, "must be a block device"),
        ({"device": "nbd:"}, "must be a name"),
        ({"type": "ext4 xfs"}, "without blanks"),
        ({"options": "--bind"}, "what mount"),
    ],
)
def test_bad_options_are_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        options(**{"mount": "/data", "device": "/dev/nbd0", **given})


def test_a_folder_has_one_name() -> None:
    assert options(mount="/srv//web/../data/", device="nbd:r0")["mount"] == "/srv/data"


@pytest.fixture
def device(short_dir: Path) -> Iterator[str]:
    """A loop device with an ext4 on it."""
    need_mounts()
    image = short_dir / "image"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    run("mke2fs", "-q", "-t", "ext4", image)
    name = run("losetup", "--find", "--show", image).strip()
    try:
        yield name
    finally:
        if mounted_at(str(short_dir / "mnt")):
            run("umount", "--lazy", short_dir / "mnt")
        run("losetup", "--detach", name)


def drive(work: Coroutine[Any, Any, None]) -> None:
    """In an event loop of its own."""
    asyncio.run(asyncio.wait_for(work, PATIENCE_S))


@pytest.mark.root
def test_it_is_mounted_watched_and_unmounted(short_dir: Path, device: str) -> None:
    folder = short_dir / "mnt"

    async def work() -> None:
        agent = make_agent(folder, device, type="ext4", options="noatime")
        assert not await agent.active()
        await agent.stop()
        with pytest.raises(AgentError, match="is not mounted"):
            await agent.monitor()
        await agent.start(START)
        (folder / "file").write_text("here")
        await agent.start(START)
        await agent.monitor()
        assert await agent.active()
        run("mount", "-o", "remount,ro", folder)
        with pytest.raises(AgentError, match="read-only"):
            await agent.monitor()
        await agent.stop()
        assert not folder.joinpath("file").exists()
        found = make_agent(folder, device)  # finds out the type
        await found.start(START)
        assert (folder / "file").read_text() == "here"
        await found.stop()
        await agent.close()

    drive(work())


@pytest.mark.root
def test_another_file_system_in_its_place_is_left_alone(short_dir: Path, device: str) -> None:
    folder = short_dir / "mnt"

    async def work() -> None:
        other = make_agent(folder, "/dev/null", type="ext4")
        with pytest.raises(AgentError, match=f"is in use: {device} is mounted there"):
            await other.start(START)
        assert not await other.active()
        await other.stop()
        assert mounted_at(str(folder)) is not None

    folder.mkdir()
    run("mount", device, folder)
    drive(work())


@pytest.mark.root
def test_a_damaged_file_system_is_not_mounted(short_dir: Path, device: str) -> None:
    with open(device, "r+b") as disk:
        disk.write(bytes(128 << 10))

    async def work() -> None:
        agent = make_agent(short_dir / "mnt", device, type="ext4")
        with pytest.raises(AgentError, match=r"`fsck.ext4 -p .*returned \d"):
            await agent.start(START)
        assert not await agent.active()

    drive(work())


_USER = """
import os, signal, sys
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.chdir(sys.argv[1])
print("in", flush=True)
signal.pause()
"""


def use(folder: Path, manner: str) -> "subprocess.Popen[bytes]":
    """A process that works in the folder."""
    user = subprocess.Popen([sys.executable, "-c", _USER, folder, manner], stdout=subprocess.PIPE)
    assert user.stdout is not None
    assert user.stdout.readline() == b"in\n"
    return user


@pytest.mark.root
def test_who_uses_it_is_asked_to_end_and_then_killed(
    short_dir: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replica.heartbeat.agents.mount.GRACE_S", 0.5)
    folder = short_dir / "mnt"
    users: list[subprocess.Popen[bytes]] = []

    async def work() -> None:
        agent = make_agent(folder, device, type="ext4")
        await agent.start(START)
        run("mount", "--mkdir", "-t", "tmpfs", "none", folder / "below")
        for manner, place in (("deaf", folder), ("polite", folder / "below")):
            users.append(use(place, manner))
        await agent.stop()
        assert mounted_at(str(folder)) is None

    try:
        drive(work())
        assert [user.wait(PATIENCE_S) for user in users] == [-9, -15]
    finally:
        for user in users:
            user.kill()
            user.communicate()
