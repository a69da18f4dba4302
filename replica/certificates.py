"""A small certificate authority: makes the certificates of the nodes and of their clients (RFC 5280), in memory.

P-256 keys, which every TLS library of the clients knows. Whoever has `Pair.key` of the authority can be any node.
"""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from replica.errors import ReplicaError

#: Clocks differ: a certificate is valid from a little before it was made.
_BACKDATED = timedelta(hours=1)


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes

    @property
    def not_after(self) -> datetime:
        return x509.load_pem_x509_certificate(self.certificate).not_valid_after_utc


def make_authority(name: str, days: float, *, now: datetime | None = None) -> Pair:
    """A new authority, which signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _common_name(name)
    now = now or datetime.now(UTC)
    builder = (
        _builder(subject, subject, key.public_key(), now, now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return _pair(builder.sign(key, hashes.SHA256()), key)


def issue(
    authority: Pair,
    name: str,
    days: float,
    *,
    hosts: Iterable[str] = (),
    server: bool,
    now: datetime | None = None,
) -> Pair:
    """A certificate for `name`, for `days` or as long as the authority's own.

    `hosts`: names and IP addresses by which others know it (SAN). With `server` it is good for both ends of a TLS
    connection, otherwise for the client's end only. ReplicaError when the authority is none or has expired.
    """
    try:
        issuer = x509.load_pem_x509_certificate(authority.certificate)
        signing_key = serialization.load_pem_private_key(authority.key, None)
    except (ValueError, TypeError):
        raise ReplicaError("the authority is not a certificate and a private key without a password, in PEM") from None
    if not isinstance(signing_key, ec.EllipticCurvePrivateKey) or signing_key.public_key() != issuer.public_key():
        raise ReplicaError("the authority's private key does not belong to its certificate")
    now = now or datetime.now(UTC)
    if issuer.not_valid_after_utc <= now:
        raise ReplicaError(f"the authority expired on {issuer.not_valid_after_utc:%Y-%m-%d}")
    key = ec.generate_private_key(ec.SECP256R1())
    not_after = min(now + timedelta(days=days), issuer.not_valid_after_utc)
    usages = [ExtendedKeyUsageOID.SERVER_AUTH] if server else []
    builder = (
        _builder(_common_name(name), issuer.subject, key.public_key(), now, not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([*usages, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()), critical=False)
    )
    names = [_general_name(host) for host in dict.fromkeys(hosts)]
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return _pair(builder.sign(signing_key, hashes.SHA256()), key)


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, not_after: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(not_after)
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    return Pair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
