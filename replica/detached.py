"""Daemons that a program starts beside itself, and that outlive it: where no supervisor does that."""

import contextlib
import os
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path


def start_detached(
    command: Sequence[str], output: Path, *, mode: str, without: Collection[str]
) -> "subprocess.Popen[bytes]":
    """Start it in a session of its own. All that it prints goes to the file `output`, opened in that mode, whose folder
    is made; of the environment it gets all but `without`. Raises OSError.
    """
    output.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key not in without}
    with output.open(mode) as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            env=environment,
            cwd="/",
        )


def last_sentence(output: Path, program: str) -> str:
    """What `program` has said last in its own name, which is why it could not start; "" when it has said nothing."""
    with contextlib.suppress(OSError):
        for line in reversed(output.read_text(errors="replace").splitlines()):
            if line.startswith(f"{program}: "):
                return line.removeprefix(f"{program}: ")
    return ""
