"""``replicactl create-md``: make the metadata (and if need be the backing file) of a resource. Offline."""

import argparse
import contextlib
import os
from pathlib import Path

from nbdserver.blockfile import BlockFile, BlockFileError
from replica import config_values
from replica.cli._common import Command, add_resource, load_resource
from replica.cli._status_text import bytes_text
from replica.config import Config, Resource
from replica.errors import ReplicaError

_BLOCK_SIZE = 4096


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_resource(parser)
    parser.add_argument("--size", type=_size, help="make a sparse backing file of this size if there is none, as in 1G")
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace existing metadata: the next connection then copies everything",
    )


def _size(text: str) -> int:
    try:
        size_bytes = config_values.size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if size_bytes == 0 or size_bytes % _BLOCK_SIZE:
        raise argparse.ArgumentTypeError(f"must be a positive multiple of {_BLOCK_SIZE} bytes, not {text!r}")
    return size_bytes


def _run(args: argparse.Namespace) -> int:
    config, resource = load_resource(args)
    name, backing = resource.name, resource.local.backing
    path = config.metadata_path(name)
    if path.exists() and not args.force:
        raise ReplicaError(
            f"{name} has metadata already ({path}): --force replaces it, and then nothing is known of how "
            "this copy relates to the peer's, so that the next connection copies everything"
        )
    created = _make_backing(name, backing, args.size)
    try:
        size_bytes = _write_metadata(config, resource, path, args)
    except BaseException:
        if created:
            backing.unlink(missing_ok=True)
        raise
    print(f"{name}: metadata for {backing} ({bytes_text(size_bytes)}) written to {path}")
    return 0


def _make_backing(name: str, backing: Path, size_bytes: int | None) -> bool:
    """Make the backing file, sparse, if there is none; True when it was made."""
    if backing.exists():
        return False
    if not backing.parent.is_dir():
        raise ReplicaError(f"{name}: the directory of the backing {backing} does not exist: make it first")
    if backing.is_relative_to("/dev") and not backing.is_relative_to("/dev/shm"):
        raise ReplicaError(f"{name}: there is no device {backing}: make it first or correct `backing`")
    if size_bytes is None:
        raise ReplicaError(f"{name}: the backing {backing} does not exist: make it, or give its --size")
    # O_EXCL: a file that appeared since then belongs to somebody else. Owner only, like any disk.
    descriptor = os.open(backing, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size_bytes)
    except OSError as error:
        backing.unlink(missing_ok=True)
        problem = f"{backing} cannot be {bytes_text(size_bytes)} large ({error.strerror})"
        raise ReplicaError(f"{name}: {problem}: give another --size") from None
    finally:
        os.close(descriptor)
    return True


def _write_metadata(config: Config, resource: Resource, path: Path, args: argparse.Namespace) -> int:
    """Write the metadata of the backing as it is; returns its size in bytes."""
    from replica.metadata import create_metadata
    from replica.store import backing_fingerprint

    name = resource.name
    try:
        # Exclusive: refused while a daemon, a mount or another program has it.
        file = BlockFile.open(resource.local.backing)
    except BlockFileError as error:
        raise ReplicaError(f"{name}: {error}") from None
    with contextlib.closing(file):
        _check_size(name, file, args.size)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        create_metadata(
            path,
            cluster=config.cluster.name,
            resource=name,
            volume=0,
            node=config.node.name,
            peer=config.peer.name,
            size_bytes=file.size_bytes,
            al_slots=resource.local.al_extents,
            backing_fingerprint=backing_fingerprint(file),
            force=args.force,
        )
        return file.size_bytes


def _check_size(name: str, file: BlockFile, wanted_bytes: int | None) -> None:
    if wanted_bytes is not None and file.size_bytes != wanted_bytes:
        raise ReplicaError(
            f"{name}: {file.path} is {file.size_bytes} bytes large, not {wanted_bytes}: leave --size out "
            "to use it as it is, or change its size yourself first"
        )
    if file.size_bytes < _BLOCK_SIZE:
        raise ReplicaError(f"{name}: {file.path} is {file.size_bytes} bytes large: at least {_BLOCK_SIZE} are needed")


COMMAND = Command("write the metadata of a resource, before its first start", _run, _add_arguments)
