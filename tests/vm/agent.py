"""In a guest: does what the host asks for over a virtio-serial port. Started by guest-init.

Lines of JSON. The agent's first is {"ready": seconds since boot}. Then, as many at once as the host likes:

    {"id": 1, "run": ["ls", "/"], "timeout_s": 30}               → {"id": 1, "status": 0, "output": "…"}
    {"id": 2, "call": "tests.vm.operate:ctl", "args": {…}}       → {"id": 2, "result": …}

`call` runs a function of the project in this process: that spares the start of an interpreter, which takes seconds
here. What fails, also a program that does not end in time, is answered with {"id": …, "error": "Type: text"}.
"""

import importlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PORT_NAME = "replica.agent"
_RECEIVE_BYTES = 64 << 10


class Agent:
    """The agent at one port."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._sending = threading.Lock()

    def serve(self) -> None:
        """Until the host closes its end."""
        self._send({"ready": float(Path("/proc/uptime").read_text().split()[0])})
        for line in self._lines():
            threading.Thread(target=self._answer, args=(json.loads(line),), daemon=True).start()

    def _lines(self) -> Iterator[bytes]:
        rest = b""
        while received := os.read(self._port, _RECEIVE_BYTES):
            *lines, rest = (rest + received).split(b"\n")
            yield from lines

    def _answer(self, request: dict[str, Any]) -> None:
        try:
            answer = _run(request) if "run" in request else _call(request)
        except Exception as error:  # it is the host's to judge
            answer = {"error": f"{type(error).__name__}: {error}"}
        self._send({"id": request["id"], **answer})

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._sending:
            while data:
                data = data[os.write(self._port, data) :]


def _run(request: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        request["run"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=request["timeout_s"],
        check=False,
    )
    return {"status": done.returncode, "output": done.stdout.decode(errors="replace")}


def _call(request: dict[str, Any]) -> dict[str, Any]:
    module, _, function = request["call"].partition(":")
    return {"result": getattr(importlib.import_module(module), function)(**request["args"])}


def _find_port() -> Path:
    for name in Path("/sys/class/virtio-ports").glob("*/name"):
        if name.read_text().strip() == PORT_NAME:
            return Path("/dev") / name.parent.name
    raise FileNotFoundError(f"this machine has no virtio port {PORT_NAME}")


if __name__ == "__main__":
    Agent(os.open(_find_port(), os.O_RDWR)).serve()
