"""The lab's end of its fence device: cuts the power of hosts when an agent on another one asks for it."""

import socketserver
import sys
import threading
from typing import Final

from tests.hosts.host import ROOT, Host
from tests.hosts.lab import Lab
from tests.hosts.namespace import LabError

AGENT: Final = "/usr/sbin/fence_lab"


class FenceDevice:
    """A context manager; the hosts given have the agent, with its options ``plug = HOST``."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        #: What it was asked: "off node2".
        self.asked: list[str] = []
        #: It fails at everything, and does nothing.
        self.broken = False
        device = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                request = self.rfile.readline().decode().strip()
                try:
                    answer = device.do(request)
                except LabError as error:
                    answer = str(error)
                self.wfile.write(answer.encode() + b"\n")

        self._server = socketserver.ThreadingUnixStreamServer(str(lab.shared / "fence.sock"), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="fence", daemon=True)
        self._thread.start()
        text = (ROOT / "tests/hosts/fence_agent.py").read_text()
        for host in lab.hosts.values():
            host.write(AGENT, f"#!{sys.executable} -IS\n{text}", mode=0o755)

    def __enter__(self) -> "FenceDevice":
        return self

    def __exit__(self, *ignored: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def do(self, request: str) -> str:
        """Answer one request; the text for the agent. LabError."""
        action, _, name = request.partition(" ")
        if action != "status":
            self.asked.append(request)
        if self.broken:
            return "the device does not answer"
        if action == "monitor":
            return "done"
        host = self._lab.hosts.get(name)
        if host is None:
            return f"there is no host {name!r}"
        with self._lab.lock:
            return self._switch(host, action)

    @staticmethod
    def _switch(host: Host, action: str) -> str:
        if action == "status":
            return "on" if host.on else "off"
        if action not in ("on", "off", "reboot"):
            return f"unknown action {action!r}"
        if action != "on" and host.on:
            host.power_cut()
        if action != "off" and not host.on:
            host.boot()
        return "done"
