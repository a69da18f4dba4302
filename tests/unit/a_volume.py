"""The data path alone: a real store, real metadata, no node around it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from nbdserver.blockfile import BlockFile
from replica.activity_log import ActivityLog
from replica.bitmap import BLOCK_SHIFT, Bitmap
from replica.metadata import Metadata, create_metadata
from replica.store import FileOfMetadata, FileStore
from replica.volume import Volume, VolumeSettings

SIZE_BYTES = 4 << 20
StoreT = TypeVar("StoreT", bound=FileStore)


@contextmanager
def disk(folder: Path, kind: Callable[[BlockFile, int], StoreT] = FileStore) -> Iterator[StoreT]:  # type: ignore[assignment]
    """A store of zeroes."""
    path = folder / "image"
    path.write_bytes(bytes(SIZE_BYTES))
    store = kind(BlockFile.open(path), SIZE_BYTES)
    yield store
    store.close()


def new_metadata(path: Path, size_bytes: int, al_slots: int) -> FileOfMetadata:
    """Of a new copy."""
    create_metadata(
        path,
        cluster="c",
        resource="r0",
        volume=0,
        node="a",
        peer="b",
        size_bytes=size_bytes,
        al_slots=al_slots,
        backing_fingerprint="",
        force=True,
    )
    return FileOfMetadata.open(path)


async def volume_on(store: FileStore, folder: Path) -> Volume:
    """On this store, of a node whose copy is in sync; its first extent is hot."""
    metadata = await Metadata.load(new_metadata(folder / "md", SIZE_BYTES, 64))
    activity_log = ActivityLog(64)
    activity_log.hot[0] = 1

    async def record_alone() -> None: ...

    def disk_failed(error: OSError) -> None:
        raise error

    bitmap = Bitmap(SIZE_BYTES >> BLOCK_SHIFT)
    settings = VolumeSettings(protocol="C", settle_interval_s=60, settle_bytes=1 << 40)
    return Volume(settings, store, metadata, bitmap, activity_log, record_alone, disk_failed)
