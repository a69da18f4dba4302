"""The customer as tests have it: it stores documents while they do things, and knows which of them were accepted."""

import json
import subprocess
import threading
from pathlib import Path
from typing import Final

from tests.hosts.host import Host, now
from tests.hosts.lab import CLUSTER_IP, Lab
from tests.hosts.namespace import LabError
from tests.processes import PATIENCE_S

_EVERY_S: Final = 0.05
_SETTLED_S: Final = 4.0
_DEPOSITOR: Final = Path(__file__).with_name("depositor.py")
#: What the web server runs for each document: it answers when document and name are on the disk of the volume.
STORE: Final = """#!/bin/sh
set -e
cd {documents}
cat >"$QUERY_STRING.new"
sync "$QUERY_STRING.new"
mv "$QUERY_STRING.new" "$QUERY_STRING"
sync .
printf 'Content-Type: text/plain\\n\\n'
uname -n
"""


class Deposits:
    """A context manager; the web server has `STORE` as /cgi-bin/store."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        #: Those that were accepted, in order: when (`now`), the number, by which node.
        self.accepted: list[tuple[float, int, str]] = []
        self._changed = threading.Condition()
        self._process = lab.client.popen(
            *self._command("store"), str(_EVERY_S), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._reader = threading.Thread(target=self._read, name="deposits", daemon=True)
        self._reader.start()

    def __enter__(self) -> "Deposits":
        return self

    def __exit__(self, *ignored: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE_S)
        self._reader.join()

    @staticmethod
    def _command(what: str) -> list[str | Path]:
        return [Host.interpreter, "-I", "-S", _DEPOSITOR, what, CLUSTER_IP]

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                received, number, host = json.loads(line)
                with self._changed:
                    self.accepted.append((received, number, host))
                    self._changed.notify_all()

    def wait(self, node: Host, since: float | None = None, count: int = 5, timeout_s: float = PATIENCE_S) -> float:
        """Until so many in a row were accepted by this node (after `since`, by default from now on), the last of all;
        when the first of them was.
        """
        start = now() if since is None else since

        def reached() -> bool:
            last = self.accepted[-count:]
            return len(last) == count and all(one[0] > start and one[2] == node.name for one in last)

        with self._changed:
            if not self._changed.wait_for(reached, timeout_s):
                raise LabError(f"{node.name} accepts documents: not within {timeout_s:g} s")
            return self.accepted[-count][0]

    def wait_settled(self) -> Host:
        """Until the same node has accepted documents for some seconds; which one."""
        since = now()
        with self._changed:
            self._changed.wait_for(lambda: self._settled(since), PATIENCE_S)
            return self._lab.hosts[self.accepted[-1][2]]

    def _settled(self, since: float) -> bool:
        recent = [one for one in self.accepted if one[0] > max(since, now() - _SETTLED_S)]
        return now() - since > _SETTLED_S and len({one[2] for one in recent}) == 1

    def missing(self) -> list[str]:
        """The numbers of accepted documents that are not there any more, or differ."""
        last = str(self.accepted[-1][1])
        return self._lab.client.run(*self._command("check"), "0", last).split()
