"""Virtual machines whose power can be cut: QEMU in software emulation, with disks that are files of the host.

A guest's page cache is memory of the QEMU process. When that is killed, everything that the guest had not yet written
to its disk is gone, and what it had is in the disk's file. The root is thrown away at each end; /job in the guest is
the folder `job` of the machine on the host, /project is this checkout. Needs no root, only the image (`build-image`).
"""

import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.vm.agent import PORT_NAME

#: A guest is ten to twenty times slower than the host, so this is longer than anything takes there.
PATIENCE_S = float(os.environ.get("REPLICA_VM_PATIENCE", "90"))
_ROOT = Path(__file__).resolve().parents[2]
_QEMU = "qemu-system-x86_64"
_KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check audit=0"
_RECEIVE_BYTES = 1 << 20
_LAST_LINES = 25


@dataclass(frozen=True)
class Image:
    """What machines boot: made by `tests/vm/build-image FOLDER`."""

    folder: Path

    @property
    def files(self) -> tuple[Path, Path, Path]:
        """Kernel, initial RAM disk, root."""
        return self.folder / "kernel", self.folder / "initrd.gz", self.folder / "root.ext4"


def find_image() -> Image:
    """The image in $REPLICA_VM_DIR, else build/vm. FileNotFoundError without it, or without QEMU."""
    image = Image(Path(os.environ.get("REPLICA_VM_DIR") or _ROOT / "build" / "vm").resolve())
    if shutil.which(_QEMU) is None:
        raise FileNotFoundError(f"{_QEMU} is not installed (Debian package qemu-system-x86)")
    if not all(file.exists() for file in image.files):
        raise FileNotFoundError("there is no image for virtual machines (make vm-image)")
    return image


def need_image() -> Image:
    """The image; the test is skipped when nothing can be done with it."""
    try:
        return find_image()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def user_network(forwards: Iterable[tuple[int, int]] = ()) -> str:
    """A network card whose guest reaches nobody; (host port, guest port): a port of the host's loopback leads to one
    of the guest, at address 10.0.2.15.
    """
    rules = "".join(f",hostfwd=tcp:127.0.0.1:{host}-10.0.2.15:{guest}" for host, guest in forwards)
    return f"user,restrict=on,net=10.0.2.0/24{rules}"


def cable(mine: Path, others: Path) -> str:
    """A network card at one end of a cable between two machines: each end is a socket file. Either may be off."""
    return f"dgram,local.type=unix,local.path={mine},remote.type=unix,remote.path={others}"


class Machine:
    """One machine, off at first. `disks` are raw files: /dev/vdb, /dev/vdc, …; use it as a context manager."""

    def __init__(
        self,
        name: str,
        image: Image,
        folder: Path,
        disks: Sequence[Path] = (),
        memory_mib: int = 512,
        kernel_arguments: str = "",
    ) -> None:
        self.name = name
        self.job = folder / f"{name}.job"
        self._image = image
        self._disks = disks
        self._memory_mib = memory_mib
        self._kernel_arguments = f"{_KERNEL_ARGUMENTS} {kernel_arguments}"
        self._console = folder / f"{name}.console"
        self._process: subprocess.Popen[bytes] | None = None
        self._port: socket.socket | None = None
        self._received = b""
        self._serial = 0
        self.job.mkdir()

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *ignored: object) -> None:
        if self._process is not None:
            self.power_cut()

    # ── power ────────────────────────────────────────────────────────────────────────────────────────────────

    def power_on(self, networks: Sequence[str] = (), mac_suffix: int = 1) -> None:
        """Start it; `wait_ready` returns when it is up. `networks`: its cards eth0, eth1, …"""
        assert self._process is None, f"{self.name} is on"
        self._port, guest_end = socket.socketpair()
        self._received = b""
        command = self._command(guest_end.fileno(), networks, mac_suffix)
        with guest_end, self._console.with_suffix(".qemu").open("ab") as errors:
            # It must not outlive the tests, however those end.
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=[guest_end.fileno()],
            )

    def _command(self, agent_fd: int, networks: Sequence[str], mac_suffix: int) -> list[str]:
        kernel, initrd, root = self._image.files
        command = [_QEMU, "-machine", "q35", "-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max", "-smp", "1"]
        command += ["-m", str(self._memory_mib), "-nodefaults", "-display", "none", "-monitor", "none", "-no-reboot"]
        command += ["-kernel", str(kernel), "-initrd", str(initrd), "-append", self._kernel_arguments]
        command += ["-serial", f"file:{self._console}", "-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]
        command += ["-chardev", f"socket,id=agent,fd={agent_fd}"]
        command += ["-device", f"virtserialport,chardev=agent,name={PORT_NAME}"]
        command += _disk("root", root, ",readonly=on,file.locking=off")
        for number, disk in enumerate(self._disks):
            command += _disk(f"disk{number}", disk, ",cache=writeback")
        for number, network in enumerate(networks):
            mac = f"52:54:00:00:{number:02x}:{mac_suffix:02x}"
            command += ["-netdev", f"{network},id=net{number}"]
            command += ["-device", f"virtio-net-pci,netdev=net{number},mac={mac},romfile="]
        command += _share("job", self.job, "")
        return command + _share("project", _ROOT, ",readonly=on")

    def wait_ready(self) -> float:
        """Until the guest's agent answers; the seconds that the guest says it took."""
        message = self._receive(time.monotonic() + PATIENCE_S)
        return float(message["ready"])

    def power_cut(self) -> None:
        """Kill the machine as a power cut would, and wait for its end."""
        power_cut(self)

    def shut_down(self) -> None:
        """Let the guest write everything to its disks, and end."""
        self.run("sync")
        with contextlib.suppress(AssertionError):  # it may be off before it can answer
            self.run("sh", "-c", "echo o > /proc/sysrq-trigger; sleep 60")
        self._reap()

    def wait_off(self, timeout_s: float = PATIENCE_S) -> None:
        """Until it has switched itself off, as it was told."""
        assert self._process is not None, f"{self.name} is off"
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} does not switch itself off\n{self.last_words()}") from None
        self._reap()

    def _reap(self) -> None:
        assert self._process is not None and self._port is not None
        self._process.wait(PATIENCE_S)
        self._port.close()
        self._process = self._port = None

    # ── in the guest ─────────────────────────────────────────────────────────────────────────────────────────

    def run(self, *command: str, timeout_s: float = PATIENCE_S) -> str:
        """What a program printed (both outputs); AssertionError with it unless its status is 0."""
        answer = self._ask({"run": command, "timeout_s": timeout_s}, timeout_s)
        assert answer["status"] == 0, (
            f"{self.name}: {' '.join(command)} ended with {answer['status']}: {answer['output']}"
        )
        output: str = answer["output"]
        return output

    def call(self, function: str, timeout_s: float = PATIENCE_S, **args: Any) -> Any:
        """The result of "module:function" of this project, called in the guest's agent; values are those of JSON."""
        return self._ask({"call": function, "args": args}, timeout_s)["result"]

    def _ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert self._port is not None, f"{self.name} is off"
        self._serial += 1
        # The guest's own limit comes first: its answer says more.
        deadline = time.monotonic() + timeout_s + 10.0
        try:
            self._port.settimeout(timeout_s)
            self._port.sendall(json.dumps({"id": self._serial, **request}).encode() + b"\n")
        except OSError as error:
            raise AssertionError(f"{self.name} cannot be asked: {error}\n{self.last_words()}") from None
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._serial:
                assert "error" not in answer, f"{self.name}: {answer['error']}\n{self.last_words()}"
                return answer

    def _receive(self, deadline: float) -> dict[str, Any]:
        """The agent's next message; AssertionError with the console's end when there is none until `deadline`."""
        assert self._port is not None
        while b"\n" not in self._received:
            ready, _, _ = select.select([self._port], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{self.name} does not answer\n{self.last_words()}"
            data = self._port.recv(_RECEIVE_BYTES)
            assert data, f"{self.name} has ended\n{self.last_words()}"
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def console(self) -> list[str]:
        """The lines that the guest has written to its console, since it was made."""
        return self._console.read_text(errors="replace").splitlines()

    def last_words(self) -> str:
        """The ends of the guest's console, and of what QEMU said, for messages."""
        lines = [f"── {self.name}"]
        for path in (self._console.with_suffix(".qemu"), self._console):
            with contextlib.suppress(OSError):
                lines += path.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        return "\n".join(lines)

    def kill(self) -> None:
        """Only the first half of `power_cut`: the machine is dead, or will be in an instant."""
        assert self._process is not None, f"{self.name} is off"
        self._process.kill()


def power_cut(*machines: Machine) -> None:
    """Cut the power of all of them at once."""
    for machine in machines:
        machine.kill()
    for machine in machines:
        machine._reap()


def new_disk(path: Path, size_bytes: int) -> Path:
    """An empty, sparse disk."""
    path.touch()
    os.truncate(path, size_bytes)
    return path


def _disk(name: str, file: Path, options: str) -> list[str]:
    drive = f"file={file},if=none,id={name},format=raw{options}"
    return ["-drive", drive, "-device", f"virtio-blk-pci,drive={name}"]


def _share(tag: str, folder: Path, options: str) -> list[str]:
    return ["-virtfs", f"local,path={folder},mount_tag={tag},security_model=none,multidevs=remap{options}"]
