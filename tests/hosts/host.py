"""A host of a lab: processes, network, host name and file system of its own, and what can happen to it.

Its file system is the machine's own, with a private layer above it that is kept over a reboot, as a disk is; /run, /tmp
and /dev/shm are empty after a boot. The machine's devices are shared. /lab is a folder that all hosts see.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tests.hosts.namespace import LabError, Namespace, run, state_of
from tests.hosts.switch import all_of
from tests.processes import PATIENCE_S

if TYPE_CHECKING:
    from tests.hosts.lab import Lab

ROOT: Final = Path(__file__).resolve().parents[2]
_NAMESPACES: Final = ("--net", "--uts", "--ipc", "--mount", "--pid")
_RETRY_S: Final = 0.02
_STOPPED: Final = frozenset("TtZX")
_WAITS: Final = "D"


def now() -> float:
    """CLOCK_BOOTTIME in seconds: the same on all hosts, and in the program under test."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Card(NamedTuple):
    """A network card: eth0 is on network 0, and so on; without an address it does not take part in ARP either."""

    interface: str
    network: int
    address: str = ""

    @property
    def mac(self) -> str:
        """Made of network and address, so that it is the same after a reboot."""
        last = int(self.address.partition("/")[0].rpartition(".")[2] or 254)
        return f"02:00:00:00:{self.network:02x}:{last:02x}"


class Host:
    """One host, off at first."""

    interpreter: Final = sys.executable

    def __init__(self, lab: "Lab", name: str, cards: Sequence[Card]) -> None:
        self.lab = lab
        self.name = name
        self.cards = cards
        self.disk = lab.disks / name
        self.frozen = False
        #: What is started by a boot, as by an init system: called with the host.
        self.at_boot: list[Callable[[Host], object]] = []
        self._running: Namespace | None = None

    def __repr__(self) -> str:
        return f"<{self.name}>"

    @property
    def address(self) -> str:
        """On network 0, without the prefix."""
        return self.cards[0].address.partition("/")[0]

    def ports(self, *interfaces: str) -> list[str]:
        """The ports of the switch behind these interfaces, or behind all."""
        return [
            f"{self.name}.{card.interface}" for card in self.cards if not interfaces or card.interface in interfaces
        ]

    # ── power ────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def on(self) -> bool:
        """Whether it has power (a host may also end itself, by reboot(2))."""
        return self._running is not None and self._running.alive

    @property
    def off(self) -> bool:
        """Whether nothing is left of it: a host that has ended itself is neither on nor off before `power_cut`."""
        return self._running is None

    @property
    def namespace(self) -> Namespace:
        """That of the host, which must be on; LabError."""
        if self._running is None:
            raise LabError(f"{self.name} is off")
        return self._running

    def wait_off(self) -> None:
        """Until it has ended itself; LabError after a time."""
        if not self.namespace.wait():
            raise LabError(f"{self.name} is still on")

    def boot(self) -> "Host":
        """Power on; returns when its interfaces are up and what belongs to the boot (`at_boot`) is started."""
        with self.lab.lock:
            if self.on:
                raise LabError(f"{self.name} is on")
            if self._running is not None:
                self.power_cut()  # it has ended itself: what is left goes
            self._boot()
        return self

    def _boot(self) -> None:
        spec = {
            "name": self.name,
            "disk": str(self.disk),
            "shared": self.lab.shared_folders(),
            "files": {"/etc/hostname": f"{self.name}\n", "/etc/hosts": self.lab.hosts_file()},
        }
        self._running = Namespace("host", spec, _NAMESPACES, within=self.lab.ground)
        for card, port in zip(self.cards, self.ports(), strict=True):
            self.lab.switch.connect(port, card.network, self._running.pid, card.interface, card.mac)
            link = ["ip", "link", "set", card.interface]
            if card.address:
                self.run("ip", "address", "add", card.address, "brd", "+", "dev", card.interface)
            else:
                self.run(*link, "arp", "off")
            self.run(*link, "up")
        self.lab.note(f"boot {self.name}")
        for start in self.at_boot:
            start(self)

    def power_cut(self) -> None:
        """Everything of it ends at once. What was written stays; nothing is said to anybody."""
        with self.lab.lock:
            self.lab.note(f"power cut {self.name}")
            # The ports first: the kernel would answer for the dead, with RST for their connections.
            with contextlib.suppress(LabError):
                self.lab.switch.pull(*self.ports())
            if self.frozen:
                self.lab.switch.pass_on(*all_of(self.ports()))
                self.frozen = False
            running, self._running = self.namespace, None
            loops = _loop_devices(running.pid)
            self.lab.loop_devices |= {(device, loop_backing(device)) for device in loops}
            running.kill()
            self.lab.switch.remove(*self.ports())
            for device in loops:
                _detach(device)

    # ── other faults ─────────────────────────────────────────────────────────────────────────────────────────

    def pull(self, *interfaces: str) -> None:
        """Take out the cables of these interfaces, or all."""
        self.lab.note(f"pull {' '.join(self.ports(*interfaces))}")
        self.lab.switch.pull(*self.ports(*interfaces))

    def plug(self, *interfaces: str) -> None:
        """Put them in again."""
        self.lab.switch.plug(*self.ports(*interfaces))
        self.lab.note(f"plug {' '.join(self.ports(*interfaces))}")

    def freeze(self) -> None:
        """It does nothing any more, as a virtual machine that is paused; its network keeps the carrier."""
        with self.lab.lock:
            self.lab.switch.drop(*all_of(self.ports()))  # its kernel would answer
            self.frozen = True
            told: set[int] = set()
            while running := [pid for pid in self.namespace.processes() if not _stopped(pid, told=pid in told)]:
                for pid in running:  # again, as one may have forked meanwhile
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGSTOP)
                told.update(running)
        self.lab.note(f"freeze {self.name}")

    def thaw(self) -> None:
        """It goes on where it was. Its kernel answers before its processes do: that is the hard case."""
        with self.lab.lock:
            self.lab.note(f"thaw {self.name}")
            self.lab.switch.pass_on(*all_of(self.ports()))
            self.frozen = False
            for pid in self.namespace.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    # ── what runs on it ──────────────────────────────────────────────────────────────────────────────────────

    def command(self, *command: str | Path) -> list[str]:
        """The command line that runs this on the host."""
        return [*self.namespace.enter("-n", "-u", "-i", "-m", "-p"), *map(str, command)]

    def run(self, *command: str | Path, stdin: str = "") -> str:
        """What a program printed; LabError with its words when it fails or does not end in time."""
        return run(self.command(*command), stdin)

    def try_run(
        self, *command: str | Path, environment: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """The same, for a program that may fail."""
        return subprocess.run(
            self.command(*command),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            env=_environment(environment),
            check=False,
        )

    def popen(
        self, *command: str | Path, environment: Mapping[str, str] | None = None, **options: Any
    ) -> "subprocess.Popen[bytes]":
        """Start a program and talk to it; it ends with the host at the latest. On a host that is frozen meanwhile its
        nsenter stops as well, for good: there `spawn`.
        """
        return subprocess.Popen(
            self.command(*command), env=_environment(environment), start_new_session=True, **options
        )

    def python(self, module: str, *arguments: str | Path) -> list[str | Path]:
        """The command line, inside, of a module of this project."""
        return [sys.executable, "-m", module, *arguments]

    def spawn(self, name: str, *command: str | Path, environment: Mapping[str, str] | None = None) -> None:
        """Start a program that is nobody's child out here, as an init system would: it can be frozen with its host.
        What it prints goes to /var/log/NAME.log of the host.
        """
        into_log = f'exec setsid --fork "$@" >>/var/log/{name}.log 2>&1'
        self.popen(*("sh", "-c", into_log, name, *command), environment=environment, stdin=subprocess.DEVNULL).wait(
            PATIENCE_S
        )

    def signal(self, number: signal.Signals, program: str) -> list[int]:
        """Send a signal to the processes of this host whose command line begins so; who got it."""
        reached = []
        for pid in self.namespace.processes():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if command.startswith(program):
                    os.kill(pid, number)
                    reached.append(pid)
        return reached

    # ── files ────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, path: str | Path) -> str:
        """The text of a file, "" when there is none; of a host that is off, if it has written it itself."""
        if self.on:
            return self.try_run("cat", path).stdout  # inside: an absolute symbolic link would lead out of there
        file = self._written(path)
        return file.read_text(errors="replace") if file.exists() else ""

    def write(self, path: str | Path, text: str, mode: int = 0o644) -> None:
        """Make or replace a file, and the folders above it."""
        self.run("install", "-D", "-m", f"{mode:o}", "/dev/stdin", path, stdin=text)

    def _written(self, path: str | Path) -> Path:
        """Where a file that the host has written lies out here."""
        return self.lab.ground_path(self.disk / "upper" / str(path).lstrip("/"))

    def logs(self) -> Iterator[tuple[str, str]]:
        """What there is to read after a failure: name and text of each file of /var/log that the host has written."""
        folder = self._written("/var/log")
        if folder.is_dir():
            for file in sorted(folder.rglob("*")):
                if file.is_file():
                    yield str(file.relative_to(folder)), file.read_text(errors="replace")


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    """Only what a program needs: those of a host must not see what the tests were started with."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    kept["PATH"] = f"{kept.get('PATH', '')}:/usr/sbin:/sbin"
    return {**kept, "PYTHONPATH": str(ROOT), "HOME": "/root", **(extra or {})}


def _stopped(pid: int, *, told: bool) -> bool:
    """Whether a process runs nothing any more. One that waits and cannot be interrupted (for its child of vfork, for a
    FUSE server that stopped before it) cannot stop now; once told to, it stops before it runs again.
    """
    state = state_of(pid)
    return state in _STOPPED or (told and state == _WAITS)


def _loop_devices(pid: int) -> list[str]:
    """Those that are mounted where this process lives."""
    try:
        mounts = Path(f"/proc/{pid}/mountinfo").read_text()
    except OSError:  # it has ended itself, and its mounts with it
        return []
    sources = (line.rpartition(" - ")[2].split()[1] for line in mounts.splitlines())
    return sorted({source for source in sources if source.startswith("/dev/loop")})


def _detach(device: str) -> None:
    """Loop devices are the machine's, and stay. Returns when it is free: the kernel takes down the mounts of a
    namespace some time after its last process.
    """
    backing = loop_backing(device)
    until = now() + PATIENCE_S
    while backing and loop_backing(device) == backing and now() < until:
        with contextlib.suppress(LabError):
            run(["losetup", "--detach", device])
        time.sleep(_RETRY_S)


def loop_backing(device: str) -> str:
    """The file behind a loop device, "" when there is none."""
    try:
        return Path("/sys/block", Path(device).name, "loop/backing_file").read_text().strip()
    except OSError:
        return ""
