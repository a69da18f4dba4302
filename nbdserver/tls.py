"""The files of TLS (certificate, key, CA), with one sentence for whatever is wrong, and what is made of them."""

import os
import ssl
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from nbdserver.handshake import TlsMode

if TYPE_CHECKING:
    from cryptography import x509


class TlsFileError(Exception):
    """One of the files is of no use. `which` is "cert", "key" or "ca"; the text begins with the file's name."""

    def __init__(self, which: str, text: str) -> None:
        super().__init__(text)
        self.which = which


@dataclass(frozen=True, slots=True)
class Certified:
    """What a certificate says: the DNS names it is for, whether the CA that was given signed it (None: there is none),
    and when the first of the certificates involved expires.
    """

    names: frozenset[str]
    by_ca: bool | None
    not_after: datetime


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: this side's certificate (and what leads from it to the CA) and key, and the CA of the other side."""

    cert: Path
    key: Path
    ca: Path | None = None

    def check(self) -> Certified:
        """Read and compare them. Raises TlsFileError."""
        from cryptography import x509

        chain = _certificates("cert", self.cert)
        _check_key(self.key)
        authorities = _certificates("ca", self.ca) if self.ca is not None else []
        self.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        try:
            names = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            dns_names = frozenset(names.get_values_for_type(x509.DNSName))
        except x509.ExtensionNotFound:
            dns_names = frozenset()
        return Certified(
            dns_names,
            any(_signed(chain[-1], authority) for authority in authorities) if authorities else None,
            min(certificate.not_valid_after_utc for certificate in (*chain, *authorities)),
        )

    def load_into(self, context: ssl.SSLContext) -> None:
        """Give them to a context. Raises TlsFileError."""
        try:
            # Without a password callback, OpenSSL would ask for one on the terminal.
            context.load_cert_chain(self.cert, self.key, password=_no_password)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise TlsFileError("key", f"{self.key} is not the key of {self.cert}") from None
            raise TlsFileError("key", f"{self.key} is not a private key without a password, in PEM") from None
        except OSError as error:
            raise TlsFileError("cert", f"{self.cert} or {self.key} cannot be read ({error.strerror})") from None
        if self.ca is not None:
            load_authority(context, self.ca)


def load_authority(context: ssl.SSLContext, ca: Path) -> None:
    """Let the context accept only certificates of this authority. Raises TlsFileError."""
    try:
        context.load_verify_locations(ca)
    except (OSError, ssl.SSLError) as error:
        raise TlsFileError("ca", f"{ca} cannot be read ({error.strerror})") from None
    context.verify_mode = ssl.CERT_REQUIRED


@dataclass(frozen=True)
class ServerTls:
    """TLS of a server: whether clients may or must use it, and with what."""

    mode: TlsMode
    context: ssl.SSLContext


def server_tls(mode: TlsMode, files: TlsFiles) -> ServerTls:
    """TLS 1.2 or newer; with a CA, clients have to show a certificate of it. Raises TlsFileError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Nothing is resumed, and keys are not negotiated anew in the middle of a connection.
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.num_tickets = 0
    files.load_into(context)
    return ServerTls(mode, context)


def _no_password() -> str:
    return ""


def _read(which: str, path: Path) -> bytes:
    try:
        # O_NONBLOCK so that a FIFO in its place cannot hang us.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise TlsFileError(which, f"{path} does not exist") from None
    except OSError as error:
        raise TlsFileError(which, f"{path} cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise TlsFileError(which, f"{path} is not a regular file")
    with os.fdopen(descriptor, "rb") as stream:
        return stream.read()


def _certificates(which: str, path: Path) -> "list[x509.Certificate]":
    """All that are in the file, each of them valid now."""
    from cryptography import x509  # not needed where there is no TLS

    try:
        certificates = x509.load_pem_x509_certificates(_read(which, path))
    except ValueError:
        raise TlsFileError(which, f"{path} is not a certificate in PEM") from None
    now = datetime.now(UTC)
    for certificate in certificates:
        if certificate.not_valid_after_utc <= now:
            raise TlsFileError(which, f"{path} has expired, on {certificate.not_valid_after_utc:%Y-%m-%d}: renew it")
        if certificate.not_valid_before_utc > now:
            begins = f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
            raise TlsFileError(which, f"{path} is not valid before {begins}: look at this machine's clock")
    return certificates


def _signed(certificate: "x509.Certificate", authority: "x509.Certificate") -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _check_key(path: Path) -> None:
    """Refuse a key that others may read: they could be this server."""
    _read("key", path)
    status = path.stat()
    if status.st_uid not in (os.geteuid(), 0):
        raise TlsFileError("key", f"{path} belongs to user {status.st_uid}: it must be root's or this user's")
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise TlsFileError("key", f"{path} has mode {mode:04o} and others may use it: run `chmod 600 {path}`")
