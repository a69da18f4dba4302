"""In a guest that runs systemd: Replica as an administrator installs it, and what its cluster manager says."""

import shutil
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from replica import control
from replica.errors import ReplicaError

_PROJECT = Path("/project")
_PACKAGES = ("replica", "nbdserver")
_SITE = Path(f"/usr/local/lib/python{sys.version_info[0]}.{sys.version_info[1]}/dist-packages")
_PROGRAMS = Path("/usr/local/bin")
_UNITS = Path("/etc/systemd/system")
_SOCKET = Path("/run/replica/node1/heartbeat.sock")
#: As pip makes them.
_PROGRAM = "#!/usr/bin/python3\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
_LOOK_S = 0.1


class _Reached(Exception):
    """Ends a `watch` from within."""


def install(files: dict[str, str]) -> None:
    """The packages, their programs, the units of contrib/systemd, and these files."""
    for package in _PACKAGES:
        shutil.copytree(_PROJECT / package, _SITE / package)
    scripts = tomllib.loads((_PROJECT / "pyproject.toml").read_text())["project"]["scripts"]
    for name, entry in scripts.items():
        module, _, function = entry.partition(":")
        program = _PROGRAMS / name
        program.write_text(_PROGRAM.format(module=module, function=function))
        program.chmod(0o755)
    for unit in (_PROJECT / "contrib" / "systemd").iterdir():
        shutil.copy(unit, _UNITS)
    for name, text in files.items():
        file = Path(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600 if file.suffix == ".key" else 0o644)
        file.write_text(text)


def status() -> Any:
    """What the cluster manager says now; ReplicaError when it does not run."""
    return control.call(_SOCKET, "status")


def wait_started(group: str, patience_s: float) -> None:
    """Until this group runs."""
    _wait(lambda groups: bool(groups[group]["status"] == "started"), patience_s)


def wait_problem(resource: str, problem: str, patience_s: float) -> None:
    """Until this is what is said about the resource."""
    _wait(
        lambda groups: any(
            (one["name"], one["problem"]) == (resource, problem)
            for group in groups.values()
            for one in group["resources"]
        ),
        patience_s,
    )


def _wait(reached: Callable[[dict[str, Any]], bool], patience_s: float) -> None:
    """Until this is true of the groups, by name; over a start anew of the cluster manager, too."""
    deadline_s = time.monotonic() + patience_s
    seen: dict[str, Any] = {}

    def look(said: dict[str, Any]) -> None:
        seen.clear()
        seen.update((group["name"], group) for group in said["groups"])
        if reached(seen):
            raise _Reached

    while (left_s := deadline_s - time.monotonic()) > 0:
        try:
            control.call(_SOCKET, "watch", on_event=look, timeout_s=left_s)
        except _Reached:
            return
        except ReplicaError:
            time.sleep(_LOOK_S)
    raise RuntimeError(f"that does not come about: {seen}")
