"""The volume as a file system of this machine: NBD → nbdfuse → loop device → ext4, as where the kernel has no nbd.

Whatever happens to the server, nothing here hangs: a dead nbdfuse makes the kernel fail everything above it, so
ending nbdfuse (by its process id) is what every bounded wait falls back to.
"""

import contextlib
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import PATIENCE_S, Node

_PROGRAMS = {
    "nbdfuse": "libnbd-bin",
    "mke2fs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "losetup": "mount",
    "mount": "mount",
    "umount": "mount",
    "prlimit": "util-linux",
    "setpriv": "util-linux",
}
_CAP_SYS_ADMIN = 1 << 21


def need_mounts() -> None:
    """Skip the test, and say why, where file systems cannot be mounted through nbdfuse and a loop device."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    if not int(status["CapEff"], 16) & _CAP_SYS_ADMIN:
        pytest.skip("mounting takes root")
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not os.path.exists(device):
            pytest.skip(f"{device} is missing")
    for program, package in _PROGRAMS.items():
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian package {package})")


def run(*command: str | Path, user: str | None = None, stdin: str = "") -> str:
    """What a program printed; AssertionError with its words when it fails or does not end in time.

    Unlike `subprocess.run` it does not wait for a killed process: one that is stuck in the kernel does not die.
    """
    name = " ".join(map(str, command))[:120]
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        user=user,
        cwd="/",
    )
    try:
        output, _ = child.communicate(stdin, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        raise AssertionError(f"{name} does not end") from None
    assert child.returncode == 0, f"{name} ended with {child.returncode}: {output[-2000:]}"
    return output


class Mounted:
    """An ext4 on the volume that `node` serves, or on that of another node after `move`."""

    def __init__(self, folder: Path, node: Node) -> None:
        self.node = node
        self.folder = folder / "mnt"
        self._bridge_folder = folder / "nbdfuse"
        #: The volume as a file.
        self.volume = self._bridge_folder / "volume"
        self._bridge: subprocess.Popen[bytes] | None = None
        self._loop: str | None = None
        for path in (self.folder, self._bridge_folder):
            path.mkdir()

    # ── in order ─────────────────────────────────────────────────────────────────────────────────────────────

    def attach(self) -> None:
        """Show the volume as a file, by nbdfuse."""
        assert self._bridge is None
        uri = f"nbd+unix:///{self.node.cluster.resource}?socket={self.node.nbd_path}"
        # nbdfuse 1.14 meets the end of its server with abort(), for which nobody needs a core dump. It ends with the
        # tests, however those end: then nothing that they leave behind can hang.
        command = ["prlimit", "--core=0", "setpriv", "--pdeathsig", "KILL", "nbdfuse", str(self.volume), uri]
        self._bridge = subprocess.Popen(command, cwd="/", stderr=subprocess.DEVNULL)
        _wait_mounted(self._bridge_folder, self._bridge)

    def make(self) -> None:
        """A new, empty file system on the volume."""
        run("mke2fs", "-q", "-t", "ext4", self.volume)

    def mount(self) -> None:
        """Mount it; the kernel replays its journal."""
        self._loop = run("losetup", "--find", "--show", self.volume).strip()
        run("mount", "-t", "ext4", self._loop, self.folder)

    def unmount(self) -> None:
        """Unmount it in order: everything is written and flushed."""
        run("umount", self.folder)
        assert self._loop is not None
        run("losetup", "--detach", self._loop)
        self._loop = None

    def check(self) -> None:
        """AssertionError unless e2fsck finds nothing to mend on the unmounted file system."""
        run("e2fsck", "-f", "-n", self.volume)

    def detach(self) -> None:
        """Let go of the volume."""
        assert self._bridge is not None
        run("umount", self._bridge_folder)
        self._bridge.wait(PATIENCE_S)
        self._bridge = None

    def move(self, node: Node) -> None:
        """The next `attach` is to this node."""
        assert self._bridge is None
        self.node = node

    # ── after the end of the server, or of the test ──────────────────────────────────────────────────────────

    def abandon(self) -> None:
        """Take everything down, in whatever state it is; returns in any case, and leaves no mount or loop device."""
        if self._bridge is not None:
            self._bridge.kill()
            self._bridge.wait(PATIENCE_S)
            self._bridge = None
        for undo in (
            ("umount", "--lazy", str(self.folder)),
            *((("losetup", "--detach", self._loop),) if self._loop else ()),
            ("umount", "--lazy", str(self._bridge_folder)),
        ):
            try:
                run(*undo)
            except AssertionError as error:
                if undo[-1] in _mount_points() or undo[-1] == self._loop:
                    print(error, file=sys.stderr)
        self._loop = None


@contextlib.contextmanager
def mounted(folder: Path, node: Node) -> Iterator[Mounted]:
    """A `Mounted` that is taken down at the end, and AssertionError if it left something behind."""
    stack = Mounted(folder, node)
    try:
        yield stack
    finally:
        stack.abandon()
        left = [point for point in _mount_points() if Path(point).is_relative_to(folder)]
        left += [device for device, backing in _loop_devices().items() if Path(backing).is_relative_to(folder)]
        assert not left, f"left behind: {left}"


def _mount_points() -> list[str]:
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def _loop_devices() -> dict[str, str]:
    found: dict[str, str] = {}
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # detached meanwhile
            found[f"/dev/{backing.parts[3]}"] = backing.read_text().strip()
    return found


def _wait_mounted(folder: Path, server: "subprocess.Popen[bytes]") -> None:
    """Until something is mounted there; AssertionError when `server`, which is to mount it, ends before."""
    with open("/proc/self/mountinfo") as mounts:
        changes = select.poll()
        changes.register(mounts, select.POLLPRI | select.POLLERR)  # the kernel's way to say that the list has changed
        exit_fd = os.pidfd_open(server.pid)
        changes.register(exit_fd, select.POLLIN)
        try:
            while str(folder) not in _mount_points():
                ready = changes.poll(PATIENCE_S * 1000)
                assert ready, f"nothing was mounted at {folder}"
                assert exit_fd not in dict(ready), f"nbdfuse ended with {server.wait()}"
        finally:
            os.close(exit_fd)
