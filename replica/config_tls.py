"""TLS in the configuration: which files a node uses for the peer link and for its NBD clients, and what they are."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from nbdserver.handshake import TlsMode
from nbdserver.tls import TlsFileError, TlsFiles
from replica.config_file import Document
from replica.config_values import ClientTlsPaths, NbdTls, TlsPaths
from replica.nbd_client_tls import ClientTls
from replica.toml_lines import KeyPath


@dataclass(frozen=True, slots=True)
class Tls:
    """The files of one node; `not_after`: when the first of the certificates expires (None: they were not read)."""

    files: TlsFiles
    mode: TlsMode = TlsMode.REQUIRE
    not_after: datetime | None = None


def link_tls(file: Document, key: KeyPath, paths: TlsPaths, node: str, *, read: bool) -> Tls:
    """The peer link's, with `read`: checked. Raises ConfigError."""
    files = _files(file, paths, node)
    if not read:
        return Tls(files)
    try:
        certified = files.check()
    except TlsFileError as error:
        raise file.error((*key, error.which), str(error)) from None
    if not certified.by_ca:
        raise file.error((*key, "cert"), f"{files.cert} is not signed by {files.ca}")
    if node not in certified.names:
        problem = f"{files.cert} is not for {node} (it has no such DNS name): its peer would refuse it"
        raise file.error((*key, "cert"), problem)
    return Tls(files, not_after=certified.not_after)


def nbd_tls(file: Document, key: KeyPath, setting: NbdTls, node: str, *, read: bool) -> Tls | None:
    """That of the NBD clients, with `read`: checked; None when it is off. Raises ConfigError."""
    if setting.mode is TlsMode.OFF or setting.paths is None:
        return None
    files = _files(file, setting.paths, node)
    try:
        not_after = files.check().not_after if read else None
    except TlsFileError as error:
        raise file.error((*key, error.which), str(error)) from None
    return Tls(files, setting.mode, not_after)


def client_tls(file: Document, paths: ClientTlsPaths, machine: str) -> ClientTls:
    """That of NBD clients on this machine, unchecked: it may be no client."""
    cert, key = (None if path is None else _resolve(file, path, machine) for path in (paths.cert, paths.key))
    return ClientTls(_resolve(file, paths.ca, machine), cert, key)


def _files(file: Document, paths: TlsPaths, node: str) -> TlsFiles:
    cert, key = (_resolve(file, path, node) for path in (paths.cert, paths.key))
    return TlsFiles(cert, key, None if paths.ca is None else _resolve(file, paths.ca, node))


def _resolve(file: Document, path: str, name: str) -> Path:
    return file.resolve(path.replace("%n", name))
