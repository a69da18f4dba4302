"""Transactions of the activity log: extents become hot, durably, before a write to them begins anywhere."""

import asyncio
import errno
from collections.abc import Iterable
from typing import TYPE_CHECKING

from replica.tasks import spawn

if TYPE_CHECKING:
    from replica.volume import Volume


class Activation:
    """Gathers the misses of a volume's activity log; all that come while a transaction runs share the next one."""

    def __init__(self, volume: "Volume") -> None:
        self._volume = volume
        self._wanted: set[int] = set()
        self._task: asyncio.Task[None] | None = None

    def want(self, extents: Iterable[int]) -> None:
        """Have these extents made hot. The volume is woken when it is done."""
        self._wanted.update(extents)
        if self._task is None and self._wanted:
            self._task = spawn(self._run(), "activity log")
            self._task.add_done_callback(self._finished)

    async def idle(self) -> None:
        """Return when no transaction is under way."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        volume = self._volume
        starved = False
        while self._wanted:
            wanted = set(list(self._wanted)[: volume.activity_log.slots])
            plan = volume.activity_log.plan(wanted, volume.settled_epoch)
            if plan is None:
                # Every extent was written since the last round. A round frees them; if writes keep all of them
                # busy even so, new writes wait for one round.
                if starved:
                    volume.close_gate("activity log")
                starved = True
                await volume.flush()
                continue
            try:
                # An extent may leave only when its dirty bits are durable. (Nothing is written when all are.)
                await volume.metadata.save_bitmap(volume.bitmap)
                await volume.metadata.save_activity_log(plan.extents)
            except BaseException:
                volume.activity_log.abandon(plan)
                raise
            volume.activity_log.commit(plan, volume.epoch)
            self._wanted -= wanted
            starved = False
            volume.open_gate("activity log")

    def _finished(self, task: "asyncio.Task[None]") -> None:
        self._task = None
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._wanted.clear()
            self._volume.end_changes(error if isinstance(error, OSError) else OSError(errno.EIO, str(error)))
        else:
            self.want(())
