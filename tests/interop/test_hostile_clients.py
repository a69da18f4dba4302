"""`python -m nbdserver` in a process of its own, under each of the known attacks: see tests/attacks.py."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest

from nbdserver.limits import Limits
from tests.attacks import ATTACKS, MIB, Target, under
from tests.interop.test_nbdserver_clients import ROOT
from tests.raw_nbd import PATIENCE_S, READ, WRITE, Connect, Peak, RawClient, descriptors, to_address

SIZE = 64 * MIB
LIMITS = Limits()
#: The most clients that an attack keeps open beyond the handshake.
GREEDY_CLIENTS = 2
#: In the log after all attacks: strangers do not fill the disk with it.
MOST_LINES = 1000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Connect]]:
    """One server for all attacks: what one leaves behind would show in the next."""
    folder = tmp_path_factory.mktemp("hostile")
    image, log = folder / "disk.img", folder / "log"
    image.touch()
    os.truncate(image, SIZE)
    command = [sys.executable, "-m", "nbdserver", str(image), "--listen", "127.0.0.1:0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    assert process.stdout is not None
    address = urlsplit(process.stdout.readline().split(" at ")[1].strip())
    assert address.hostname and address.port
    yield process.pid, to_address(address.hostname, address.port)
    process.terminate()
    assert process.wait(PATIENCE_S) == 0
    assert "Traceback" not in log.read_text()
    assert len(log.read_text().splitlines()) < MOST_LINES


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_attack(server: tuple[int, Connect], attack: Callable[[Target], None]) -> None:
    pid, connect = server
    with RawClient(connect).open() as bystander:
        assert bystander.ask(WRITE, SIZE - 4096, data=b"b" * 4096) == 0
        peak = Peak(pid)
        with under(attack, connect, SIZE):
            # It is served on, and somebody new gets in.
            for _ in range(20):
                bystander.send(b"")
                assert bystander.ask(READ, SIZE - 4096, 4096) == 0
            with RawClient(connect).open() as newcomer:
                assert newcomer.ask(READ, 0, 4096) == 0
            assert descriptors(pid) < LIMITS.max_connections + 30
            assert peak.grown_bytes() < GREEDY_CLIENTS * LIMITS.client_bytes + 32 * MIB
        assert bystander.ask(READ, SIZE - 4096, 4096) == 0
