"""`python -m nbdserver FILE` in a process of its own, used by clients that others wrote."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

MIB = 1024 * 1024
SIZE = 64 * MIB
ROOT = Path(__file__).resolve().parents[2]
DEBIAN_PACKAGES = {
    "nbdinfo": "libnbd-bin",
    "nbdcopy": "libnbd-bin",
    "qemu-io": "qemu-utils",
    "qemu-img": "qemu-utils",
    "fio": "fio",
    "nbdkit": "nbdkit",
}


def need(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed (Debian package {DEBIAN_PACKAGES[program]})")
    return path


def client(program: str, *arguments: str) -> str:
    """Run it to its end and return what it printed; fails with its words when it fails."""
    done = subprocess.run([need(program), *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{program} {' '.join(arguments)}: {done.stdout}{done.stderr}"
    return done.stdout


def import_nbd():
    try:
        import nbd
    except ImportError:
        # Debian's binding is for Debian's interpreter of the same version; it goes last on the path.
        sys.path.append("/usr/lib/python3/dist-packages")
        nbd = pytest.importorskip("nbd", reason="libnbd's binding is missing (Debian package python3-libnbd)")
    return nbd


def start(*arguments: str, **options) -> tuple[subprocess.Popen[str], str]:
    """A server process and the URI that it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, "-m", "nbdserver", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )
    assert server.stdout is not None
    line = server.stdout.readline()
    assert " at " in line, server.communicate()
    return server, line.split(" at ")[1].strip()


def stop(server: subprocess.Popen[str]) -> None:
    server.send_signal(signal.SIGTERM)
    output, errors = server.communicate(timeout=20)
    assert (server.returncode, output, errors) == (0, "", "")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, SIZE)
    return path


@pytest.fixture(params=["tcp", "unix"])
def uri(request, image: Path, tmp_path: Path) -> Iterator[str]:
    where = ("--listen", "127.0.0.1:0") if request.param == "tcp" else ("--unix", str(tmp_path / "nbd"))
    server, address = start(str(image), *where, "--export", "disk one")
    yield address
    stop(server)


def test_nbdinfo_list(uri):
    listed = json.loads(client("nbdinfo", "--list", "--json", uri))
    (export,) = listed["exports"]
    assert export["export-name"] == "disk one"
    assert export["export-size"] == SIZE
    assert (export["block_size_minimum"], export["block_size_preferred"]) == (1, 4096)
    wanted = ("can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero")
    assert all(export[name] for name in wanted)
    assert not export["is_read_only"]


def test_nbdcopy_there_and_back(uri, tmp_path):
    source, back = tmp_path / "source", tmp_path / "back"
    source.write_bytes(os.urandom(5 * MIB) + bytes(20 * MIB) + os.urandom(7 * MIB) + bytes(32 * MIB))
    client("nbdcopy", "--flush", str(source), uri)
    client("nbdcopy", uri, str(back))
    assert back.read_bytes() == source.read_bytes()


def test_nbdcopy_huge_requests(uri, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(SIZE))
    client("nbdcopy", "--request-size", str(32 * MIB), str(source), uri)
    client("nbdcopy", "--request-size", str(32 * MIB), uri, str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_libnbd(uri):
    nbd = import_nbd()
    handle = nbd.NBD()
    handle.connect_uri(uri)
    handle.pwrite(b"a" * 4096, 4096, nbd.CMD_FLAG_FUA)
    handle.pwrite(b"b" * 4096, 8192)
    handle.flush()
    handle.zero(4096, 6000, nbd.CMD_FLAG_NO_HOLE)
    handle.trim(4096, 4096, nbd.CMD_FLAG_FUA)
    assert handle.pread(12288, 0) == bytes(10096) + b"b" * 2192
    handle.shutdown()


def test_libnbd_wrong_requests(uri):
    nbd = import_nbd()
    handle = nbd.NBD()
    handle.set_strict_mode(0)
    handle.connect_uri(uri)
    for call, number in (
        (lambda: handle.pwrite(b"x" * 4096, SIZE - 1), "ENOSPC"),
        (lambda: handle.pread(4096, SIZE), "EINVAL"),
        (lambda: handle.pread(4096, 2**63 - 4096), "EINVAL"),
        (lambda: handle.trim(4096, SIZE), "EINVAL"),
        (lambda: handle.zero(4096, SIZE), "ENOSPC"),
        (lambda: handle.cache(4096, SIZE), "EINVAL"),
        (lambda: handle.block_status(4096, 0, lambda *_: 0), "EINVAL"),
        (lambda: handle.pread(4096, 0, nbd.CMD_FLAG_REQ_ONE), "EINVAL"),
        (lambda: handle.pread(33 * MIB, 0, nbd.CMD_FLAG_DF), "EOVERFLOW"),
        (lambda: handle.pwrite(b"x", 0, nbd.CMD_FLAG_NO_HOLE), "EINVAL"),
        (lambda: handle.pwrite(bytes(49 * MIB), 0), "EINVAL"),
    ):
        with pytest.raises(nbd.Error) as caught:
            call()
        assert caught.value.errno == number
    handle.pwrite(bytes(49_865_728), 0)
    assert handle.pread(4, 0) == bytes(4)
    handle.shutdown()


def test_libnbd_many_requests_in_flight(uri):
    nbd = import_nbd()
    handle = nbd.NBD()
    handle.connect_uri(uri)
    for n in range(200):
        handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([n]) * 5000), n * 5000)
    while handle.aio_in_flight():
        handle.poll(-1)
    assert handle.pread(200 * 5000, 0) == b"".join(bytes([n]) * 5000 for n in range(200))
    handle.shutdown()


def test_socket_activation(image):
    nbd = import_nbd()
    handle = nbd.NBD()
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        handle.connect_systemd_socket_activation([sys.executable, "-m", "nbdserver", str(image)])
    finally:
        del os.environ["PYTHONPATH"]
    handle.pwrite(b"activated", 0)
    assert handle.get_size() == SIZE
    handle.shutdown()
    assert image.read_bytes()[:9] == b"activated"


def test_qemu_io(uri):
    commands = (
        "write -P 0x5a 0 1M",
        "write -f -P 0xa5 1M 64k",
        "write -z 512k 128k",
        "write -z -u 1088k 512k",
        "discard 2M 1M",
        "aio_write -P 0x11 4M 4M",
        "aio_flush",
        "flush",
        "read -P 0x5a 0 512k",
        "read -P 0 512k 128k",
        "read -P 0x5a 640k 384k",
        "read -P 0xa5 1M 64k",
        "read -P 0 1088k 512k",
        "read -P 0x11 4M 4M",
    )
    output = client("qemu-io", "-f", "raw", *(word for command in commands for word in ("-c", command)), uri)
    assert "failed" not in output
    assert "error" not in output.lower()


def test_qemu_img(uri, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3 * MIB) + bytes(50 * MIB) + os.urandom(11 * MIB))
    client("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), uri)
    assert "identical" in client("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), uri)
    client("qemu-img", "map", "-f", "raw", "--output=json", uri)
    client("qemu-img", "bench", "-f", "raw", "-c", "2000", "-d", "32", "-s", "4096", "-w", uri)


@pytest.mark.parametrize("mix", [("randwrite", "4k-4k", "32"), ("randrw", "512-256k", "16")])
def test_fio_verify(uri, tmp_path, mix):
    pattern, sizes, depth = mix
    client(
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={uri}",
        f"--rw={pattern}",
        f"--bsrange={sizes}",
        f"--iodepth={depth}",
        "--size=32M",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--fsync=64",
        f"--aux-path={tmp_path}",
    )


def test_through_nbdkit_with_filters(uri, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(SIZE))
    client("nbdcopy", "--flush", str(source), uri)
    need("nbdkit")
    command = f"nbdcopy '{source}' \"$uri\""  # checkwrite refuses every write that changes anything
    client("nbdkit", "-U", "-", "--filter=checkwrite", "--filter=retry", "nbd", uri, "--run", command)


def test_read_only(image):
    server, uri = start(str(image), "--listen", "127.0.0.1:0", "--read-only")
    assert json.loads(client("nbdinfo", "--json", uri))["exports"][0]["is_read_only"]
    stop(server)


def refused(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "nbdserver", *arguments],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_refusals_are_one_sentence(image, tmp_path):
    assert refused(str(tmp_path / "missing")) == (
        1,
        f"nbdserver: cannot open {tmp_path}/missing: there is no such file; create it first\n",
    )
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        code, text = refused(str(image), "--listen", f"127.0.0.1:{port}")
        assert (code, text.count("\n")) == (1, 1)
        assert "the port is in use" in text
    server, _ = start(str(image), "--unix", str(tmp_path / "socket"))
    assert refused(str(image))[1] == f"nbdserver: {image} is in use by another process; stop that one first\n"
    stop(server)
    assert not (tmp_path / "socket").exists()


@pytest.mark.parametrize("wrong", [(), ("--listen", "nonsense", "f"), ("f", "--listen", "a:1", "--unix", "b")])
def test_usage_errors_exit_2(wrong):
    code, text = refused(*wrong)
    assert code == 2
    assert "usage: nbdserver" in text
