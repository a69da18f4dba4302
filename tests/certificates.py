"""Certificates for the tests, made by the program's own authority; folders as clients want them."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from nbdserver.tls import TlsFiles
from replica.certificates import Pair, issue, make_authority

PAST = datetime.now(UTC) - timedelta(days=400)


class Authority:
    """A CA whose certificates go to `folder`; `ca` is its own."""

    def __init__(self, folder: Path, name: str = "tests") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.pair = make_authority(name, 3650, now=PAST)
        self.ca = folder / "ca.crt"
        self.ca.write_bytes(self.pair.certificate)

    def files(self, name: str, *hosts: str, server: bool = True, days: float = 90, expired: bool = False) -> TlsFiles:
        """NAME.crt and NAME.key, which name these hosts; `expired`: they are of the past."""
        now = PAST if expired else None
        pair = issue(self.pair, name, days, hosts=hosts, server=server, now=now)
        cert, key = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        return TlsFiles(*save(pair, cert, key), self.ca)

    def client_folder(self, name: str = "client") -> Path:
        """A folder for libnbd's `tls-certificates` and QEMU's `dir=`."""
        folder = self.folder / f"client-{name}"
        folder.mkdir()
        (folder / "ca-cert.pem").write_bytes(self.pair.certificate)
        save(issue(self.pair, name, 90, server=False), folder / "client-cert.pem", folder / "client-key.pem")
        return folder


def save(pair: Pair, cert: Path, key: Path) -> tuple[Path, Path]:
    """Write both, the key for its owner only."""
    cert.write_bytes(pair.certificate)
    key.write_bytes(pair.key)
    key.chmod(0o600)
    return cert, key
