"""A node's local copy: its metadata, its backing, and what has to be repaired after an unclean stop."""

from dataclasses import dataclass

from replica import config as cfg
from replica.activity_log import EXTENT_SHIFT, ActivityLog
from replica.bitmap import Bitmap
from replica.errors import ReplicaError
from replica.metadata import Metadata
from replica.runtime import ClosableMetadataFile, Runtime
from replica.store import Store, same_backing


@dataclass
class LocalDisk:
    """An attached copy; both files are locked by this process until `close`."""

    metadata: Metadata
    metadata_file: ClosableMetadataFile
    store: Store
    bitmap: Bitmap
    activity_log: ActivityLog

    @property
    def size_bytes(self) -> int:
        """The volume's size."""
        return self.metadata.superblock.size_bytes

    def close(self) -> None:
        """Let go of both files."""
        self.store.close()
        self.metadata_file.close()


async def open_disk(config: cfg.Config, resource: cfg.Resource, runtime: Runtime) -> LocalDisk:
    """Attach the local copy. Raises ReplicaError with a sentence and leaves everything as it was."""
    metadata_path = config.metadata_path(resource.name)
    metadata_file = runtime.open_metadata(metadata_path)
    try:
        # Records that an earlier process failed to flush must not be taken for durable ones.
        await metadata_file.forget_cache()
        metadata = await Metadata.load(metadata_file, where=str(metadata_path))
        _check_names(config, resource, metadata)
        store = _open_store(resource, runtime, metadata)
    except OSError as error:
        metadata_file.close()
        raise ReplicaError(f"{metadata_path} cannot be read ({error.strerror or error}): check its disk.") from error
    except BaseException:
        metadata_file.close()
        raise
    superblock = metadata.superblock
    bitmap = Bitmap(superblock.blocks)
    disk = LocalDisk(metadata, metadata_file, store, bitmap, ActivityLog(superblock.al_slots))
    try:
        await metadata.load_bitmap(bitmap)
        # What the page cache holds must be durable before it can count as settled, and be there at all.
        await store.forget_cache()
        await _recover(disk)
    except OSError as error:
        disk.close()
        raise ReplicaError(
            f"the disk of {resource.name} reports an error ({error.strerror or error}): check "
            f"{resource.local.backing} and {metadata_path}."
        ) from error
    except BaseException:
        disk.close()
        raise
    return disk


async def _recover(disk: LocalDisk) -> None:
    """After a crash as Primary: everything that was hot may differ from the peer."""
    superblock = disk.metadata.superblock
    extents = await disk.metadata.load_activity_log()
    if not extents and not superblock.primary:
        return
    for extent in extents:
        start = extent << EXTENT_SHIFT
        if start < superblock.size_bytes:
            disk.bitmap.set_bytes(start, min(1 << EXTENT_SHIFT, superblock.size_bytes - start))
    await disk.metadata.save_bitmap(disk.bitmap)
    superblock.ahead = superblock.ahead or superblock.primary
    superblock.primary = False
    await disk.metadata.save_superblock()
    # Last: until here the log is what says which blocks may differ.
    await disk.metadata.save_activity_log(())


def _check_names(config: cfg.Config, resource: cfg.Resource, metadata: Metadata) -> None:
    superblock = metadata.superblock
    path = config.metadata_path(resource.name)
    expected = (
        ("cluster", superblock.cluster, config.cluster.name),
        ("resource", superblock.resource, resource.name),
        ("node", superblock.node, config.node.name),
        ("peer", superblock.peers[0].name, config.peer.name),
    )
    for what, found, wanted in expected:
        if found != wanted:
            raise ReplicaError(
                f"{path}: these metadata belong to {what} {found!r}, not {wanted!r}: correct the configuration, or "
                f"make new ones with `replicactl create-md {resource.name} --force` (costs a full resync)."
            )


def _open_store(resource: cfg.Resource, runtime: Runtime, metadata: Metadata) -> Store:
    superblock = metadata.superblock
    path = resource.local.backing
    backing = runtime.open_backing(path)
    try:
        if backing.size_bytes < superblock.size_bytes:
            raise ReplicaError(
                f"{path} is too small: it has {backing.size_bytes} bytes, its metadata speak of "
                f"{superblock.size_bytes}; restore the backing to its full size."
            )
        if superblock.backing_fingerprint and not same_backing(superblock.backing_fingerprint, backing.fingerprint):
            raise ReplicaError(
                f"{path} is not the backing its metadata were made for ({backing.fingerprint} instead of "
                f"{superblock.backing_fingerprint}): put the right one back, or run `replicactl create-md "
                f"{resource.name} --force` to start over with a full resync."
            )
    except BaseException:
        backing.close()
        raise
    return backing.store(superblock.size_bytes)
