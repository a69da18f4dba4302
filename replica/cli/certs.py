"""``replicactl certs``: a small certificate authority for the nodes and their NBD clients."""

import argparse
import os
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from replica import config_values
from replica.cli._common import Command, load
from replica.config import Config, Node
from replica.errors import ReplicaError

if TYPE_CHECKING:
    from replica.certificates import Pair

DEFAULT_DAYS = 825
AUTHORITY_DAYS = 3650
_MAX_DAYS = 36500

Files = dict[Path, tuple[bytes, int]]
"""What is to be written: path to content and mode."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="where they are kept (default: `certs` beside the configuration)"
    )
    parser.add_argument(
        "--days", metavar="N", type=_days, default=DEFAULT_DAYS, help=f"how long they are valid ({DEFAULT_DAYS})"
    )
    parser.add_argument(
        "--host",
        metavar="NAME",
        action="append",
        type=_host,
        default=[],
        help="another name or IP address by which NBD clients know the nodes, such as the cluster's IP; repeatable",
    )
    parser.add_argument(
        "--client", metavar="NAME", type=_name, help="make one for this NBD client, instead of those of the nodes"
    )
    parser.add_argument("--force", action="store_true", help="replace what is there; never the authority")


def _days(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= _MAX_DAYS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days from 1 to {_MAX_DAYS}")
    return int(text)


def _host(text: str) -> str:
    try:
        return config_values.address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _name(text: str) -> str:
    try:
        return config_values.name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run(args: argparse.Namespace) -> int:
    config = load(args)
    folder: Path = args.out.absolute() if args.out is not None else config.path.parent / "certs"
    if args.client is not None:
        files = _client_files(config, folder, args.client, args.days)
    else:
        files = _node_files(config, folder, args.host, args.days)
    present = [path for path in files if path.exists()]
    if present and not args.force:
        raise ReplicaError(f"{present[0]} exists: with --force, everything but the authority is replaced")
    for path, (content, mode) in files.items():
        _write(path, content, mode)
        print(path)
    return 0


def _node_files(config: Config, folder: Path, more_hosts: list[str], days: int) -> Files:
    from replica.certificates import issue, make_authority

    files: Files = {}
    if (folder / "ca.crt").exists():
        authority = _authority(folder)
    else:
        authority = make_authority(f"Replica cluster {config.cluster.name}", max(AUTHORITY_DAYS, days))
        files = _pair_files(folder / "ca.crt", folder / "ca.key", authority)
        if (folder / "ca.key").exists():
            raise ReplicaError(
                f"{folder / 'ca.key'} exists, but not its certificate ca.crt: put that back, or remove it"
            )
    for node in (config.node, config.peer):
        hosts = [*_hosts(config, node), *more_hosts]
        pair = issue(authority, node.name, days, hosts=hosts, server=True)
        files |= _pair_files(folder / f"{node.name}.crt", folder / f"{node.name}.key", pair)
    return files


def _hosts(config: Config, node: Node) -> list[str]:
    """The names and addresses in a node's certificate: its own first, by which its peer knows it."""
    hosts = [node.name, node.address]
    for resource in config.resources.values():
        for side in (resource.local, resource.peer):
            if side.node is node and side.nbd.unix_path is None and not _is_any(side.nbd.host):
                hosts.append(side.nbd.host)
    return hosts


def _is_any(host: str) -> bool:
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return False


def _client_files(config: Config, folder: Path, name: str, days: int) -> Files:
    """The names are those that libnbd (nbd_set_tls_certificates) and QEMU (tls-creds-x509) look for."""
    from replica.certificates import issue

    if name in (config.node.name, config.peer.name):
        raise ReplicaError(f"{name} is a node, whose certificate will do for a client, too: choose another name")
    if not (folder / "ca.crt").exists():
        raise ReplicaError(
            f"there is no authority in {folder}: run `replicactl certs` first, or name its DIR with --out"
        )
    authority = _authority(folder)
    pair = issue(authority, name, days, server=False)
    own = folder / f"client-{name}"
    return {
        own / "ca-cert.pem": (authority.certificate, 0o644),
        **_pair_files(own / "client-cert.pem", own / "client-key.pem", pair),
    }


def _authority(folder: Path) -> "Pair":
    from replica.certificates import Pair

    key = folder / "ca.key"
    if not key.exists():
        raise ReplicaError(
            f"{key} is missing: make certificates where the authority is kept, or name its DIR with --out"
        )
    return Pair((folder / "ca.crt").read_bytes(), key.read_bytes())


def _pair_files(certificate: Path, key: Path, pair: "Pair") -> Files:
    return {key: (pair.key, 0o600), certificate: (pair.certificate, 0o644)}


def _write(path: Path, content: bytes, mode: int) -> None:
    """All of it or nothing, and never for a moment readable by others than `mode` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
        stream.write(content)
    draft.replace(path)


COMMAND = Command("make the certificates of the nodes, or of an NBD client, for TLS", _run, _add_arguments)
