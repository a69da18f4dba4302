"""`python -m nbdserver FILE --tls …` and clients that others wrote: libnbd and QEMU (both with GnuTLS), nbdkit."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserver.tls import TlsFiles
from tests.certificates import Authority
from tests.interop.test_nbdserver_clients import MIB, ROOT, SIZE, client, image, import_nbd, need, start, stop

__all__ = ["image"]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def folder(authority: Authority) -> Path:
    """A client's certificates."""
    return authority.client_folder()


@pytest.fixture(scope="module")
def files(authority: Authority) -> TlsFiles:
    return authority.files("server", "localhost", "127.0.0.1")


def options(files: TlsFiles, mode: str = "require") -> list[str]:
    return ["--tls", mode, "--tls-cert", str(files.cert), "--tls-key", str(files.key), "--tls-ca", str(files.ca)]


@pytest.fixture
def uri(image: Path, files: TlsFiles) -> Iterator[str]:
    """A server on TCP that requires TLS."""
    server, uri = start(str(image), "--listen", "127.0.0.1:0", *options(files))
    try:
        yield uri
    finally:
        stop(server)


def with_certificates(uri: str, folder: Path) -> str:
    return f"{uri}{'&' if '?' in uri else '?'}tls-certificates={folder}"


def connected(nbd, uri: str, folder: Path):
    handle = nbd.NBD()
    handle.set_uri_allow_local_file(True)
    handle.connect_uri(with_certificates(uri, folder))
    return handle


def credentials(folder: Path) -> list[str]:
    return ["--object", f"tls-creds-x509,id=tls0,endpoint=client,dir={folder}", "--image-opts"]


def qemu_place(uri: str) -> str:
    match = re.fullmatch(r"nbds://(.+):(\d+)/", uri)
    assert match is not None
    return f"driver=nbd,host={match[1]},port={match[2]},tls-creds=tls0"


def test_nbdinfo(uri: str, folder: Path) -> None:
    assert uri.startswith("nbds://127.0.0.1:")
    said = client("nbdinfo", with_certificates(uri, folder))
    assert "protocol: newstyle-fixed with TLS" in said
    assert f"export-size: {SIZE}" in said
    assert "protocol: newstyle-fixed with TLS" in client("nbdinfo", "--list", with_certificates(uri, folder))


def test_nbdcopy_there_and_back(uri: str, folder: Path, image: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    there.write_bytes(os.urandom(SIZE))
    place = with_certificates(uri, folder)
    client("nbdcopy", "--flush", str(there), place)
    assert image.read_bytes() == there.read_bytes()
    client("nbdcopy", place, str(back))
    assert back.read_bytes() == there.read_bytes()


def test_nbdsh(uri: str, folder: Path) -> None:
    nbd = import_nbd()
    handle = connected(nbd, uri, folder)
    data = os.urandom(3 * MIB)
    handle.pwrite(data, 4096, nbd.CMD_FLAG_FUA)
    assert bytes(handle.pread(len(data), 4096)) == data
    assert handle.get_tls_negotiated()
    handle.shutdown()


def test_several_connections(uri: str, folder: Path) -> None:
    nbd = import_nbd()
    handles = [connected(nbd, uri, folder) for _ in range(4)]
    for n, handle in enumerate(handles):
        handle.pwrite(bytes([n]) * MIB, n * MIB)
    handles[0].flush()
    for n in range(4):
        assert bytes(handles[3 - n].pread(MIB, n * MIB)) == bytes([n]) * MIB


def test_qemu(uri: str, folder: Path, image: Path) -> None:
    place = qemu_place(uri)
    commands = ["write -P 0x5a 1M 2M", "flush", "read -P 0x5a 1M 2M", "discard 1M 1M", "write -z 2M 1M"]
    client("qemu-io", *credentials(folder), place, *(word for command in commands for word in ("-c", command)))
    assert image.read_bytes()[2 * MIB : 3 * MIB] == bytes(MIB)
    assert "64 MiB" in client("qemu-img", "info", *credentials(folder), place)


def test_qemu_without_certificates_is_told_why(uri: str) -> None:
    place = qemu_place(uri).replace(",tls-creds=tls0", "")
    done = subprocess.run(
        [need("qemu-img"), "info", "--image-opts", place], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "this server serves only clients that use TLS" in done.stderr


def test_a_client_of_another_ca(image: Path, files: TlsFiles, authority: Authority, tmp_path: Path) -> None:
    """It trusts the server, which does not know it; the server says so, and goes on."""
    nbd = import_nbd()
    stranger = Authority(tmp_path / "other").client_folder()
    (stranger / "ca-cert.pem").write_bytes(authority.ca.read_bytes())
    server, uri = start(str(image), "--listen", "127.0.0.1:0", *options(files))
    with pytest.raises(nbd.Error):
        connected(nbd, uri, stranger)
    connected(nbd, uri, authority.client_folder("afterwards")).shutdown()
    server.terminate()
    _, said = server.communicate(timeout=20)
    assert server.returncode == 0
    assert said.count("\n") == 1
    assert said.endswith(": its certificate is refused (unable to get local issuer certificate)\n")


def test_a_client_that_expects_another_server(image: Path, authority: Authority, folder: Path) -> None:
    nbd = import_nbd()
    server, uri = start(str(image), "--listen", "127.0.0.1:0", *options(authority.files("elsewhere", "elsewhere")))
    with pytest.raises(nbd.Error, match=r"certificate|verif"):
        connected(nbd, uri, folder)
    server.terminate()
    _, said = server.communicate(timeout=20)
    assert said.count("closing the connection of") == 1


@pytest.mark.parametrize("mode", ["allow", "require"])
def test_unix_sockets(image: Path, files: TlsFiles, folder: Path, short_dir: Path, mode: str) -> None:
    path = short_dir / "nbd"
    server, uri = start(str(image), "--unix", str(path), *options(files, mode))
    try:
        secured = f"nbds+unix:///?socket={path}"
        assert uri == (secured if mode == "require" else secured.replace("nbds", "nbd"))
        assert "with TLS" in client("nbdinfo", with_certificates(secured, folder))
        place = f"driver=nbd,path={path},tls-creds=tls0,tls-hostname=localhost"
        client("qemu-img", "info", *credentials(folder), place)
        if mode == "allow":
            assert "without TLS" in client("nbdinfo", uri)
    finally:
        stop(server)


def test_nbdkit_as_client(uri: str, folder: Path) -> None:
    """Its nbd plugin serves ours again, plain: TLS on one side."""
    need("nbdkit")
    plugin = f"{need('nbdkit')} -U - nbd uri='{uri}' tls-certificates={folder} --run 'nbdinfo \"$uri\"'"
    done = subprocess.run(plugin, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"export-size: {SIZE}" in done.stdout


def test_stop_answers_what_is_under_way(image: Path, files: TlsFiles, folder: Path) -> None:
    """SIGTERM while a client has many requests out: all of what was received is answered, then an orderly end."""
    nbd = import_nbd()
    server, uri = start(str(image), "--listen", "127.0.0.1:0", *options(files))
    handle = connected(nbd, uri, folder)
    handle.pwrite(b"x" * MIB, 0)
    cookies = [handle.aio_pread(nbd.Buffer(MIB), 0) for _ in range(16)]
    server.terminate()
    while handle.aio_in_flight():
        handle.poll(-1)
    ended = sum(1 for cookie in cookies if _completed(handle, cookie))
    assert server.wait(20) == 0
    assert ended > 0


def _completed(handle, cookie) -> bool:
    try:
        return bool(handle.aio_command_completed(cookie))
    except Exception:  # it was not received before the end
        return False


# ── the command line ─────────────────────────────────────────────────────────────────────────────────────────────


def refused(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "nbdserver", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()[-1]


def test_wrong_options(image: Path, files: TlsFiles) -> None:
    assert refused(str(image), "--tls", "require") == (
        2,
        "nbdserver: error: --tls require needs --tls-cert and --tls-key",
    )
    assert refused(str(image), "--tls-cert", str(files.cert)) == (
        2,
        "nbdserver: error: --tls-cert needs --tls require or --tls allow",
    )
    assert refused(str(image), "--tls", "maybe")[0] == 2


def test_wrong_files(image: Path, files: TlsFiles, authority: Authority, tmp_path: Path) -> None:
    place = ["--listen", "127.0.0.1:0"]
    gone = tmp_path / "gone"
    assert refused(str(image), *place, *options(TlsFiles(gone, files.key, files.ca))) == (
        1,
        f"nbdserver: --tls-cert: {gone} does not exist",
    )
    other = authority.files("other")
    assert refused(str(image), *place, *options(TlsFiles(files.cert, other.key, files.ca))) == (
        1,
        f"nbdserver: --tls-key: {other.key} is not the key of {files.cert}",
    )
