"""Process 1 of a host, or of the ground that all hosts of a lab stand on: makes its file system, then reaps orphans.

Started by `tests.hosts.lab` and `tests.hosts.host` in namespaces of its own; it says that it is ready on the socket
``fd``, whose other end learns its process id (as it is there) from the kernel.
"""

import contextlib
import glob
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

_OLD_ROOT = ".old-root"
#: Empty after a boot. What is shared lies below /lab, see `Host`.
_VOLATILE = {"run": "mode=755", "tmp": "mode=1777", "dev/shm": "mode=1777"}


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", "-n", *map(str, arguments)], check=True)


def _ground(spec: dict[str, Any]) -> None:
    """A place for disks that goes with the namespace, however that ends."""
    _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", spec["disks"])


def _host(spec: dict[str, Any]) -> None:
    """The machine's own file system with a private layer above it, which is the host's disk: kept over a reboot."""
    disk = Path(spec["disk"])
    layers = {layer: disk / layer for layer in ("upper", "work", "root")}
    for layer in layers.values():
        layer.mkdir(parents=True, exist_ok=True)
    root = layers["root"]
    _mount("-t", "overlay", "-o", f"lowerdir=/,upperdir={layers['upper']},workdir={layers['work']}", "lab", root)
    _mount("-t", "proc", "proc", root / "proc")
    _mount("-t", "sysfs", "sysfs", root / "sys")
    _mount("--rbind", "/dev", root / "dev")
    for folder, options in _VOLATILE.items():
        _mount("-t", "tmpfs", "-o", options, "tmpfs", root / folder)
    for source, target in spec["shared"].items():
        inside = root / target.lstrip("/")
        inside.mkdir(parents=True, exist_ok=True)
        _mount("--bind", source, inside)
    for device in ["/proc/sysrq-trigger", *glob.glob("/dev/watchdog*")]:  # a host must not reboot the machine
        if os.path.exists(device):
            _mount("--bind", "/dev/null", root / device.lstrip("/"))
    (root / _OLD_ROOT).mkdir(exist_ok=True)
    os.chdir(root)
    subprocess.run(["pivot_root", ".", _OLD_ROOT], check=True)
    os.chroot(".")
    os.chdir("/")
    subprocess.run(["umount", "-n", "-l", f"/{_OLD_ROOT}"], check=True)
    for name, text in spec["files"].items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    os.makedirs("/run/lock", mode=0o1777, exist_ok=True)
    socket.sethostname(spec["name"])


def main() -> None:
    """``init.py ground|host fd``, with a JSON document on the socket."""
    what, fd = sys.argv[1:]
    with socket.socket(fileno=int(fd)) as lab:
        spec = json.loads(lab.recv(1 << 16))
        {"ground": _ground, "host": _host}[what](spec)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        lab.send(b"ready")
    null = os.open("/dev/null", os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        signal.sigtimedwait([signal.SIGCHLD], 1)


if __name__ == "__main__":
    main()
