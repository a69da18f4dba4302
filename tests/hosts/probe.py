"""The client's probe as tests have it: it runs while they do things, and is asked or awaited."""

import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.hosts.host import Host, now
from tests.hosts.lab import CLUSTER_IP, Lab
from tests.hosts.namespace import LabError
from tests.hosts.timeline import Timeline
from tests.processes import PATIENCE_S

EVERY_S: Final = 0.02
_PROBER: Final = Path(__file__).with_name("prober.py")
_RESPONDER: Final = Path(__file__).with_name("responder.py")


def serve(host: Host) -> None:
    """Answer the probe on this host, now and whenever it has booted."""
    host.at_boot.append(_serve)
    if host.on:
        _serve(host)


def _serve(host: Host) -> None:
    host.spawn("responder", *_isolated(_RESPONDER))


def _isolated(script: Path) -> list[str | Path]:
    return [Host.interpreter, "-I", "-S", script]


class Probe:
    """Asks for the address of the cluster from the client; a context manager. The nodes answer, see `serve`."""

    def __init__(self, lab: Lab, http: bool = False, address: str = CLUSTER_IP) -> None:
        macs = {card.mac: node.name for node in lab.nodes for card in node.cards}
        self._timeline = Timeline(EVERY_S, macs)
        self._changed = threading.Condition()
        self._process = lab.client.popen(
            *_isolated(_PROBER),
            address,
            str(EVERY_S),
            *(["http"] if http else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._reader = threading.Thread(target=self._read, name="probe", daemon=True)
        self._reader.start()

    def __enter__(self) -> "Probe":
        return self

    def __exit__(self, *ignored: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE_S)
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with self._changed:
                    self._timeline.add(json.loads(line))
                    self._changed.notify_all()

    @property
    def timeline(self) -> Timeline:
        """What was seen up to now: a copy, since the probe goes on."""
        with self._changed:
            return self._timeline.copy()

    def wait(self, reached: Callable[[Timeline], bool], what: str, timeout_s: float = 60.0) -> float:
        """Until `reached`, asked after each line of the probe; when that was. LabError after a time."""
        with self._changed:
            if not self._changed.wait_for(lambda: reached(self._timeline), timeout_s):
                raise LabError(f"{what}: not within {timeout_s:g} s")
        return now()

    def wait_answer(self, host: Host, since: float | None = None, timeout_s: float = 60.0) -> float:
        """Until this host answers for the cluster (after `since`, by default from now on); when that was."""
        start = now() if since is None else since
        return self.wait(
            lambda seen: seen.last() == host.name and seen.answers[-1].received > start,
            f"{host.name} answers for the cluster",
            timeout_s,
        )

    def wait_page(self, text: str, since: float | None = None, timeout_s: float = 60.0) -> float:
        """Until the web server of the cluster serves a page that begins with this line."""
        start = now() if since is None else since
        return self.wait(
            lambda seen: bool(seen.pages) and seen.pages[-1].who == text and seen.pages[-1].received > start,
            f"the web server says {text!r}",
            timeout_s,
        )

    def watch(self, seconds: float) -> float:
        """Let the probe go on for so long: for what must *not* happen; when that was over."""
        until = now() + seconds
        return self.wait(lambda seen: bool(seen.ticks) and seen.ticks[-1] >= until, "the probe goes on", seconds + 30)
