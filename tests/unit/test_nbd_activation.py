"""Sockets passed as sd_listen_fds(3) describes it, to a real `python -m nbdserver`."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import passing
from tests.unit.nbd_bench import MIB

GREETING = b"NBDMAGICIHAVEOPT\x00\x03"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.touch()
    os.truncate(path, MIB)
    return path


def start(image: Path, passed: list[socket.socket], count: str | None = None) -> subprocess.Popen[str]:
    command, options = passing(passed, [sys.executable, "-m", "nbdserver", str(image)], count)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_every_socket_that_was_passed_is_served_and_kept(image, tmp_path):
    path = tmp_path / "nbd"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))
        unix.listen()
        port = tcp.getsockname()[1]
        server = start(image, [tcp, unix])
        assert server.stdout is not None
        assert server.stdout.readline() == (
            f"serving {image} at nbd://127.0.0.1:{port}/ and nbd+unix:///?socket={path}\n"
        )
        for family, address in ((socket.AF_INET, ("127.0.0.1", port)), (socket.AF_UNIX, str(path))):
            with socket.socket(family) as client:
                client.settimeout(20)
                client.connect(address)
                assert client.recv(100) == GREETING
        server.send_signal(signal.SIGTERM)
        assert server.communicate(timeout=20)[1] == ""
        assert server.returncode == 0
        assert path.exists()  # it belongs to who passed it


@pytest.mark.parametrize("count", ["0", "-1", "x", "99999999999"])
def test_a_nonsensical_number_of_sockets_is_one_sentence(image, count):
    with socket.create_server(("127.0.0.1", 0)) as passed:
        server = start(image, [passed], count)
        output, errors = server.communicate(timeout=20)
    assert (server.returncode, output) == (1, "")
    assert errors == f"nbdserver: LISTEN_FDS is {count!r}, not a number of sockets from 1 to 64; correct it\n"


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_what_is_not_listening_is_refused_in_one_sentence(image, kind):
    with socket.socket(socket.AF_INET, kind) as passed:
        server = start(image, [passed])
        _, errors = server.communicate(timeout=20)
    assert server.returncode == 1
    assert re.fullmatch(r"nbdserver: file descriptor 3 is not a listening stream socket; .*\n", errors)


def test_what_was_passed_to_another_process_is_left_alone(image):
    environment = {**os.environ, "LISTEN_PID": "1", "LISTEN_FDS": "1"}
    command = [sys.executable, "-m", "nbdserver", str(image), "--listen", "127.0.0.1:0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert server.stdout is not None
    assert " at nbd://127.0.0.1:" in server.stdout.readline()
    server.send_signal(signal.SIGTERM)
    assert server.communicate(timeout=20)[1] == ""
