"""`python -m nbdserver` in a process of its own, under each of the known attacks: see tests/attacks.py."""

import contextlib
import os
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from nbdserver.limits import Limits
from tests.attacks import ATTACKS, GREEDY, MIB, Target, under
from tests.certificates import Authority
from tests.interop.test_nbdserver_clients import ROOT
from tests.raw_nbd import PATIENCE_S, READ, WRITE, Connect, Peak, RawClient, descriptors, to_address

SIZE = 64 * MIB
LIMITS = Limits()
#: The most clients that an attack keeps open beyond the handshake.
GREEDY_CLIENTS = 2
#: In the log after all attacks: strangers do not fill the disk with it.
MOST_LINES = 1000


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[int, Connect]]:
    """One server for all attacks: what one leaves behind would show in the next."""
    image, log = folder / "disk.img", folder / "log"
    image.touch()
    os.truncate(image, SIZE)
    command = [sys.executable, "-m", "nbdserver", str(image), "--listen", "127.0.0.1:0", *options]
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Connect]]:
    with serving(tmp_path_factory.mktemp("hostile")) as running:
        yield running


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[tuple[int, Connect]]:
    files = authority.files("server", "localhost")
    options = ("--tls", "require", "--tls-cert", str(files.cert), "--tls-key", str(files.key))
    with serving(tmp_path_factory.mktemp("hostile-tls"), *options) as running:
        yield running


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_attack(server: tuple[int, Connect], attack: Callable[[Target], None]) -> None:
    withstands(server, attack)


@pytest.mark.parametrize("attack", GREEDY, ids=lambda attack: attack.__name__)
def test_attack_inside_tls(
    tls_server: tuple[int, Connect], authority: Authority, attack: Callable[[Target], None]
) -> None:
    context = ssl.create_default_context(cafile=str(authority.ca))
    context.check_hostname = False
    withstands(tls_server, attack, context)


def withstands(
    server: tuple[int, Connect], attack: Callable[[Target], None], tls: ssl.SSLContext | None = None
) -> None:
    pid, connect = server
    with RawClient(connect, tls).open() as bystander:
        assert bystander.ask(WRITE, SIZE - 4096, data=b"b" * 4096) == 0
        peak = Peak(pid)
        with under(attack, connect, SIZE, tls):
            # It is served on, and somebody new gets in.
            for _ in range(20):
                bystander.send(b"")
                assert bystander.ask(READ, SIZE - 4096, 4096) == 0
            with RawClient(connect, tls).open() as newcomer:
                assert newcomer.ask(READ, 0, 4096) == 0
            assert descriptors(pid) < LIMITS.max_connections + 30
            assert peak.grown_bytes() < GREEDY_CLIENTS * LIMITS.client_bytes + 32 * MIB
        assert bystander.ask(READ, SIZE - 4096, 4096) == 0
