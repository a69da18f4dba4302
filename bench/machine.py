"""What a figure depends on besides the program: machine, versions, date."""

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Final

import uvloop

_ROOT: Final = Path(__file__).resolve().parents[1]


def facts(programs: Sequence[str] = ()) -> list[str]:
    """One fact each; of `programs` the versions."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return [
        f"{os.cpu_count()} × {cpu[1] if cpu else platform.machine()}, Linux {platform.release()}",
        f"Python {platform.python_version()}, uvloop {uvloop.__version__}",
        *_versions(programs),
        f"what the machine had to do besides, before it began: a load of {os.getloadavg()[0]:.1f}",
    ]


def _versions(programs: Sequence[str]) -> Iterator[str]:
    for program in programs:
        with contextlib.suppress(OSError):
            done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
            yield (done.stdout or done.stderr).splitlines()[0].strip() if done.stdout or done.stderr else program


def revision() -> str:
    """The commit whose programs are measured, with a plus sign when they were changed; "" outside of a clone."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(_ROOT)]
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "replica", "nbdserver"], check=False)
        return commit.stdout.strip() + ("+" if changes.returncode else "")
    return ""


def how(command: str) -> str:
    """The sentence above a table."""
    of = revision()
    return f"Measured on {date.today()}{f' (revision {of})' if of else ''} with `{command}`."
