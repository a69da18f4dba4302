"""``replicactl certs``: what it writes, what it leaves alone, and that the certificates are good for their purpose."""

import ipaddress
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from nbdserver.tls import TlsFiles
from replica import cli
from tests.certificates import PAST, Authority

Main = Callable[..., tuple[int, str, str]]
NODE_FILES = ["ca.key", "ca.crt", "node1.key", "node1.crt", "node2.key", "node2.crt"]


@pytest.fixture
def main(make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """Run `replicactl certs` in this process as node1; returns exit code, standard output and standard error."""
    monkeypatch.setenv("REPLICA_CONFIG", str(make_config()))
    monkeypatch.setenv("REPLICA_NODE", "node1")

    def run(*args: str) -> tuple[int, str, str]:
        code = cli.main(("certs", *args))
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def folder(short_dir: Path) -> Path:
    return short_dir / "certs"


def done(result: tuple[int, str, str]) -> list[str]:
    code, out, err = result
    assert (code, err) == (0, "")
    return out.splitlines()


def refusal(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    return err


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def hosts(path: Path) -> set[str]:
    names = certificate(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in names}


def test_an_authority_and_both_nodes(main: Main, folder: Path) -> None:
    assert done(main()) == [str(folder / name) for name in NODE_FILES]
    assert {path.name for path in folder.iterdir()} == set(NODE_FILES)
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == (0o600 if path.suffix == ".key" else 0o644)
    for number in (1, 2):
        files = TlsFiles(folder / f"node{number}.crt", folder / f"node{number}.key", folder / "ca.crt")
        certified = files.check()
        assert certified.by_ca
        assert certified.names == {f"node{number}"}
        assert hosts(files.cert) == {f"node{number}", f"127.0.0.{number}"}
        usage = certificate(files.cert).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert set(usage) == {x509.ExtendedKeyUsageOID.SERVER_AUTH, x509.ExtendedKeyUsageOID.CLIENT_AUTH}
        assert not certificate(files.cert).extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_the_keys_are_private_whatever_the_umask(main: Main, folder: Path) -> None:
    import os

    before = os.umask(0)
    try:
        done(main())
    finally:
        os.umask(before)
    for path in folder.glob("*.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nothing_is_overwritten(main: Main, folder: Path) -> None:
    done(main())
    before = contents(folder)
    assert refusal(main()) == (
        f"replicactl: {folder}/node1.key exists: with --force, everything but the authority is replaced\n"
    )
    assert contents(folder) == before


def test_with_force_the_authority_stays(main: Main, folder: Path) -> None:
    done(main())
    before = contents(folder)
    assert done(main("--force", "--days", "10")) == [str(folder / name) for name in NODE_FILES[2:]]
    after = contents(folder)
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed == set(NODE_FILES[2:])
    left = certificate(folder / "node1.crt").not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=9) < left <= timedelta(days=10)
    assert TlsFiles(folder / "node1.crt", folder / "node1.key", folder / "ca.crt").check().by_ca


def test_more_hosts_and_another_folder(main: Main, short_dir: Path) -> None:
    out = short_dir / "deep" / "er"
    done(main("--out", str(out), "--host", "10.0.0.9", "--host", "volume.example.org", "--host", "fd00::9"))
    assert hosts(out / "node2.crt") == {"node2", "127.0.0.2", "10.0.0.9", "volume.example.org", "fd00::9"}
    names = certificate(out / "node2.crt").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert ipaddress.ip_address("10.0.0.9") in names.get_values_for_type(x509.IPAddress)


def test_where_the_nodes_listen_for_clients(main: Main, folder: Path, short_dir: Path) -> None:
    file = short_dir / "replica.toml"
    file.write_text(
        file.read_text()
        .replace('nbd = "unix:r0.nbd"', 'nbd = "10.1.1.1:10809"')
        .replace('nbd = "unix:r0-2.nbd"', 'nbd = "[::]:10809"')
    )
    done(main())
    assert hosts(folder / "node1.crt") == {"node1", "127.0.0.1", "10.1.1.1"}
    assert hosts(folder / "node2.crt") == {"node2", "127.0.0.2"}


def test_a_client(main: Main, folder: Path) -> None:
    done(main())
    own = folder / "client-laptop"
    assert done(main("--client", "laptop", "--days", "5")) == [
        str(own / name) for name in ("ca-cert.pem", "client-key.pem", "client-cert.pem")
    ]
    files = TlsFiles(own / "client-cert.pem", own / "client-key.pem", own / "ca-cert.pem")
    certified = files.check()
    assert certified.by_ca
    assert certified.names == frozenset()  # it cannot be taken for a node
    usage = certificate(files.cert).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {x509.ExtendedKeyUsageOID.CLIENT_AUTH}
    assert stat.S_IMODE(files.key.stat().st_mode) == 0o600
    assert "exists" in refusal(main("--client", "laptop"))
    done(main("--client", "laptop", "--force"))


def test_a_client_needs_an_authority(main: Main, folder: Path) -> None:
    assert refusal(main("--client", "laptop")) == (
        f"replicactl: there is no authority in {folder}: run `replicactl certs` first, or name its DIR with --out\n"
    )
    assert not folder.exists()


def test_a_client_is_not_a_node(main: Main) -> None:
    assert "node2 is a node" in refusal(main("--client", "node2"))


def test_without_the_key_of_the_authority(main: Main, folder: Path) -> None:
    done(main())
    (folder / "ca.key").unlink()
    before = contents(folder)
    assert refusal(main("--force")) == (
        f"replicactl: {folder}/ca.key is missing: make certificates where the authority is kept, "
        "or name its DIR with --out\n"
    )
    assert contents(folder) == before


def test_an_orphaned_key_is_not_overwritten(main: Main, folder: Path) -> None:
    done(main())
    (folder / "ca.crt").unlink()
    before = contents(folder)
    assert "ca.key exists, but not its certificate ca.crt" in refusal(main("--force"))
    assert contents(folder) == before


def test_an_authority_that_is_none(main: Main, folder: Path) -> None:
    done(main())
    (folder / "ca.key").write_bytes(b"garbage")
    assert "not a certificate and a private key without a password" in refusal(main("--force"))
    (folder / "ca.key").write_bytes((folder / "node1.key").read_bytes())
    assert "does not belong to its certificate" in refusal(main("--force"))


def test_certificates_do_not_outlive_the_authority(main: Main, folder: Path) -> None:
    folder.mkdir()
    authority = Authority(folder)  # of 400 days ago, for 3650
    (folder / "ca.key").write_bytes(authority.pair.key)
    done(main("--days", "5000"))
    assert certificate(folder / "node1.crt").not_valid_after_utc == authority.pair.not_after


def test_an_expired_authority(main: Main, folder: Path) -> None:
    from replica.certificates import make_authority
    from tests.certificates import save

    folder.mkdir()
    save(make_authority("old", 100, now=PAST), folder / "ca.crt", folder / "ca.key")
    expired = PAST + timedelta(days=100)
    assert refusal(main()) == f"replicactl: the authority expired on {expired:%Y-%m-%d}\n"


@pytest.mark.parametrize(
    "arguments", [("--days", "0"), ("--days", "x"), ("--client", "../x"), ("--client", ""), ("--host", "a b")]
)
def test_usage(main: Main, folder: Path, arguments: tuple[str, str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(*arguments)
    assert caught.value.code == 2
    assert not folder.exists()
