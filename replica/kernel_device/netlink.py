"""The kernel's NBD driver, asked and listened to over generic netlink sockets."""

import contextlib
import errno
import os
import socket
import subprocess
from pathlib import Path

from replica.errors import ReplicaError
from replica.kernel_device import messages
from replica.kernel_device.messages import Cmd, Family, Message, Settings

_NETLINK_GENERIC = 16
_SOL_NETLINK = 270
_ADD_MEMBERSHIP = 1
_RECEIVE_BYTES = 64 << 10
_ANSWER_TIMEOUT_S = 30.0
_SECTOR_BYTES = 512  # the unit of sizes in /sys/block, whatever the device's own sectors are


class DeviceError(ReplicaError):
    """The kernel's NBD driver is not there, or refuses a command; `number` is its errno."""

    def __init__(self, sentence: str, number: int = 0) -> None:
        super().__init__(sentence)
        self.number = number


class Driver:
    """The driver. Its calls block for as long as the kernel takes (well below a second). Raises `DeviceError`."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_GENERIC)
        self._socket.settimeout(_ANSWER_TIMEOUT_S)
        self._socket.bind((0, 0))
        self._sequence = 0
        try:
            self._family = self._find_family()
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """No more calls."""
        self._socket.close()

    def listen(self) -> socket.socket:
        """A non-blocking socket that gets the driver's announcements, see `dead_link`."""
        listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_GENERIC)
        listener.bind((0, 0))
        listener.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, self._family.group)
        listener.setblocking(False)
        return listener

    def connect(self, index: int | None, settings: Settings) -> int:
        """Attach a device, any free one for None; its index."""
        answers = self._ask(Cmd.CONNECT, index, settings)
        found = [number for answer in answers if (number := messages.index_of(answer)) is not None]
        if not found:
            raise DeviceError("the kernel did not say which device it attached: see dmesg")
        return found[0]

    def reconfigure(self, index: int, settings: Settings) -> None:
        """Change what is attached. A socket replaces a dead one; without a dead one the kernel ignores it."""
        self._ask(Cmd.RECONFIGURE, index, settings)

    def disconnect(self, index: int) -> None:
        """Detach a device: what is not answered fails."""
        self._ask(Cmd.DISCONNECT, index, Settings())

    def _ask(self, command: Cmd, index: int | None, settings: Settings) -> list[Message]:
        self._sequence += 1
        request = messages.device_command(self._family, command, self._sequence, index, settings)
        error, answers = self._exchange(request)
        if error:
            raise DeviceError(messages.error_text(error, "a device" if index is None else device_path(index)), error)
        return answers

    def _find_family(self) -> Family:
        for attempt in range(2):
            self._sequence += 1
            error, answers = self._exchange(messages.get_family(self._sequence))
            for answer in answers:
                family = messages.family_of(answer)
                if family is not None:
                    return family
            if error == errno.ENOENT and attempt == 0:
                _load_module()
        raise DeviceError("the kernel has no network block devices: load its module as root (`modprobe nbd`)")

    def _exchange(self, request: bytes) -> tuple[int, list[Message]]:
        """The errno (0: done) and the messages that came before it."""
        answers: list[Message] = []
        try:
            self._socket.send(request)
            while True:
                for message in messages.parse(self._socket.recv(_RECEIVE_BYTES)):
                    if message.sequence != self._sequence:
                        continue
                    if message.error is not None:
                        return message.error, answers
                    answers.append(message)
        except TimeoutError:
            raise DeviceError("the kernel does not answer over netlink: see dmesg") from None


def dead_links(listener: socket.socket) -> set[int]:
    """The devices of which connections have died, as far as that was announced since the last call."""
    devices: set[int] = set()
    with contextlib.suppress(BlockingIOError):
        while True:
            try:
                data = listener.recv(_RECEIVE_BYTES)
            except OSError as error:
                if error.errno == errno.ENOBUFS:  # some announcements were dropped; others come
                    continue
                raise
            for message in messages.parse(data):
                index = messages.index_of(message)
                if message.command == Cmd.LINK_DEAD and index is not None:
                    devices.add(index)
    return devices


def device_path(index: int) -> str:
    """/dev/nbd0"""
    return f"/dev/nbd{index}"


def device_index(path: str) -> int:
    """The number in /dev/nbd0; raises `DeviceError`."""
    digits = path.removeprefix("/dev/nbd")
    if digits == path or not digits.isascii() or not digits.isdigit():
        raise DeviceError(f"{path!r} is no network block device: name one such as /dev/nbd0")
    return int(digits)


def backend_of(index: int) -> str | None:
    """The backend that a device was attached with; None when it is not attached, or was without one."""
    try:
        return Path(f"/sys/block/nbd{index}/backend").read_text().strip()
    except OSError:
        return None


def find_backend(prefix: str) -> tuple[int, str] | None:
    """The attached device whose backend begins so."""
    for folder in Path("/sys/block").glob("nbd*"):
        backend = backend_of(int(folder.name.removeprefix("nbd")))
        if backend is not None and backend.startswith(prefix):
            return int(folder.name.removeprefix("nbd")), backend
    return None


def is_attached(index: int) -> bool:
    """Whether the device has connections, dead or alive."""
    return Path(f"/sys/block/nbd{index}/pid").exists()


def size_of(index: int) -> int:
    """The device's size in bytes, as the kernel has it."""
    return int(Path(f"/sys/block/nbd{index}/size").read_text()) * _SECTOR_BYTES


def is_mounted(device: str, folder: Path) -> bool:
    """Whether this device is mounted there, by the kernel's list: looking at the folder might wait for the device."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    wanted = [device, str(folder).replace("\\", "\\134").replace(" ", "\\040")]
    return any(line.split()[:2] == wanted for line in lines)


def users_sentence(index: int) -> str | None:
    """Why a device must not be detached: somebody has mounted it, or the like; None if nobody has."""
    path = device_path(index)
    try:
        # Exclusive: the kernel then refuses what a mount, a swap area or a device mapper has.
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return f"{path} is in use: unmount it first (`findmnt {path}` shows where it is mounted)"
    return None


def _load_module() -> None:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(["modprobe", "nbd"], stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False)
