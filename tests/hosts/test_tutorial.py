"""``make tutorial`` as a user runs it; and docs/tutorial.md, whose commands it runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.mounted import need_mounts
from tests.hosts import apache
from tests.hosts.lab import need_hosts
from tests.hosts.tutorial import DOCUMENT, ROOT

pytestmark = pytest.mark.root

#: What takes a machine of its own; each begin of a command line stands in the document as "not run".
_NOT_RUN = re.compile(
    r"apt-get |git clone |python3 -m venv |ln -s |cp /usr/src/|uname -n|scp |systemctl "
    r"|replicactl (un)?map |mkfs\.ext4 -q /dev/nbd0|mkdir -p /data && mount /dev/nbd0"
)
_COMMAND = re.compile(r"^    (?:root@node[12])?# (.*?)(?:  +#.*)?$", re.MULTILINE)


@pytest.mark.timeout(240)
def test_every_check_passes_and_the_commands_are_those_of_the_document() -> None:
    need_hosts()
    need_mounts()
    if missing := apache.missing():
        pytest.skip(missing)
    told = subprocess.run(
        [sys.executable, "-m", "tests.hosts.tutorial"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=230,
        check=False,
    )
    print(told.stdout)
    assert told.returncode == 0, told.stderr
    assert re.search(r"^All \d+ checks passed in \d+ s\.$", told.stdout, re.MULTILINE)
    ran = set(re.findall(r"^   \$ root@node[12]# (.*)$", told.stdout, re.MULTILINE))
    documented = _COMMAND.findall(Path(DOCUMENT).read_text())
    assert [line for line in documented if line not in ran and not _NOT_RUN.match(line)] == []
