"""The Secondary's side when the Primary has no good disk: the Primary's clients are served from this node's volume.

The frames are those of replication, but they go through the volume, as requests of a local client would: with the
activity log, the bitmap, the record that the other copy lacks them, and, while the Primary's new disk is being
resynced, the mirroring of each write to it. The Primary has answered nothing that this node has not.
"""

import asyncio
import collections
import errno
from collections.abc import Mapping, Sequence

from replica import wire
from replica.link import PeerLink
from replica.mirror import Answers
from replica.volume import Volume


class PeerService(Answers):
    """Serves the peer of one link until `end`, or until the link is lost."""

    def __init__(self, link: PeerLink, volume: Volume) -> None:
        super().__init__(link, volume, _volume_knows)
        self._volume = volume
        #: [number of the batch's last write, whether it is done], in the order of arrival: APPLIED is cumulative.
        self._batches: collections.deque[list[int]] = collections.deque()
        self._no_batches = asyncio.Event()
        self._no_batches.set()
        link.handlers[wire.READ] = self._on_read
        volume.start_serving_peer()

    async def finished(self) -> None:
        """Return when nothing that the peer asked for is under way any more."""
        await self._no_batches.wait()
        await super().finished()

    async def end(self) -> None:
        """Finish what the peer asked for, flush both copies, and let the volume rest. OSError."""
        await self.finished()
        await self._volume.end_serving_peer()

    def _on_writes(self, writes: Sequence[tuple[int, memoryview]], last: int) -> None:
        kept: list[tuple[int, memoryview]] = []
        for offset, data in writes:
            self._check(offset, len(data))
            # The volume may keep them until an extent is hot, and the link's buffer is used again.
            kept.append((offset, memoryview(bytes(data))))
        batch = [last, False]
        self._batches.append(batch)
        self._no_batches.clear()

        def done(errors: Mapping[int, int]) -> None:
            batch[1] = True
            if errors:
                self._link.refuse("this node's disk failed as well.")
            self._acknowledge()

        self._volume.write_batch(kept, done)

    def _acknowledge(self) -> None:
        last = 0
        while self._batches and self._batches[0][1]:
            last = self._batches.popleft()[0]
        if last:
            self._link.send(wire.APPLIED, sequence=last)
        if not self._batches:
            self._no_batches.set()

    def _on_read(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        length = wire.unpack_length(payload)
        self._check(offset, length)
        if length > wire.MAX_PAYLOAD_BYTES:
            raise wire.ProtocolError(f"a READ of {length} bytes is over the bound of {wire.MAX_PAYLOAD_BYTES}.")
        self._run(self._read(sequence, offset, length))

    async def _read(self, sequence: int, offset: int, length: int) -> None:
        try:
            data = self._volume.read_now(offset, length)
            if data is None:
                data = await self._volume.read(offset, length)
        except OSError as error:
            self._link.send(wire.READ_DATA, flags=wire.FLAG_ERROR, sequence=sequence, offset=error.errno or errno.EIO)
        else:
            self._link.send(wire.READ_DATA, data, sequence=sequence)


def _volume_knows(error: OSError) -> None:
    """A volume reports the failures of its own disk."""
