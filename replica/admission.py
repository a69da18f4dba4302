"""When a write may begin: extents hot, gates open, range free; and the queue of those that cannot begin yet.

The volume's hot path asks nothing here while every extent is hot, no gate is closed and no range is locked. What
cannot begin waits in one queue, oldest first. Each write of a batch waits for itself: a batch may touch more extents
than the activity log has slots, but one piece of work never does.
"""

import asyncio
import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdserver.export import NO_ERRORS, WriteDone
from replica.activity_log import EXTENT_SHIFT
from replica.range_lock import RangeLocks
from replica.tasks import spawn

if TYPE_CHECKING:
    from replica.volume import Volume

#: The longest range that is worked on as a whole: bounds how long a write can wait for a zeroing it overlaps.
MAX_CHANGE_EXTENTS: Final = 64


class ActivityLogLost(OSError):
    """The activity log cannot be written: nothing can be written to this copy any more."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """One write (with its data and whom to tell) or one other change (with the future of its turn)."""

    start: int
    stop: int
    data: memoryview | None = None
    told: Callable[[int], None] | None = None
    turn: "asyncio.Future[None] | None" = None

    @property
    def extents(self) -> range:
        return range(self.start >> EXTENT_SHIFT, ((self.stop - 1) >> EXTENT_SHIFT) + 1)


class _Batch:
    """Answers a batch once each of its writes is done; they may be done at different times."""

    def __init__(self, count: int, done: WriteDone) -> None:
        self._left = count
        self._done = done
        self._errors: dict[int, int] = {}

    def teller(self, index: int) -> Callable[[int], None]:
        """What to call when write `index` is done, with its error number or 0."""

        def tell(error: int) -> None:
            if error:
                self._errors[index] = error
            self._left -= 1
            if not self._left:
                self._done(self._errors or NO_ERRORS)

        return tell


class Admission:
    """What keeps a volume's changes back, and the transactions of its activity log that let them go on."""

    def __init__(self, volume: "Volume") -> None:
        self._volume = volume
        self._waiting: list[_Waiting] = []
        self._gates: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self.locks = RangeLocks(self.go_on)
        #: Set for good when the activity log cannot be written: nothing may begin any more.
        self.failure: OSError | None = None

    # ── gates ────────────────────────────────────────────────────────────────────────────────────────────────

    def close_gate(self, reason: str) -> None:
        """Let nothing begin until the gate of this reason is open again; what is under way goes on."""
        self._gates.add(reason)

    def open_gate(self, reason: str) -> None:
        """Let changes begin again, those that waited first."""
        self._gates.discard(reason)
        self.go_on()

    # ── who may begin ────────────────────────────────────────────────────────────────────────────────────────

    def admits(self, writes: Sequence[tuple[int, memoryview]]) -> bool:
        """Whether these writes, all of whose extents are hot, may begin now."""
        if self._gates or self.failure is not None:
            return False
        overlaps = self.locks.overlaps
        return not self.locks.held or not any(overlaps(offset, offset + len(data)) for offset, data in writes)

    def put_off(self, writes: Sequence[tuple[int, memoryview]], done: WriteDone) -> None:
        """Queue a batch that `admits` or the activity log keeps back; what of it may begin does so now."""
        if self.failure is not None:
            done(dict.fromkeys(range(len(writes)), errno.EIO))
            return
        batch = _Batch(len(writes), done)
        for index, (offset, data) in enumerate(writes):
            self._waiting.append(_Waiting(offset, offset + len(data), data, batch.teller(index)))
        self.go_on()

    async def begin_change(self, start: int, stop: int) -> None:
        """Return when a change of [start, stop) may begin; its range is then locked (`end_change` frees it).

        At most MAX_CHANGE_EXTENTS and a quarter of the activity log long. Raises OSError when it never may begin.
        """
        if self.failure is not None:
            raise self.failure
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(start, stop, turn=turn))
        self.go_on()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.end_change(start, stop)
            raise

    def end_change(self, start: int, stop: int) -> None:
        """The change is done on both nodes."""
        self.locks.release(start, stop)

    @property
    def max_change_bytes(self) -> int:
        """The longest range for one `begin_change`."""
        return max(1, min(MAX_CHANGE_EXTENTS, self._volume.activity_log.slots // 4)) << EXTENT_SHIFT

    def go_on(self) -> None:
        """Let begin what may begin now, oldest first, and have the extents activated that others wait for."""
        if not self._waiting or self._gates:
            return
        hot, epoch = self._volume.activity_log.hot, self._volume.epoch
        writes: list[_Waiting] = []
        still: list[_Waiting] = []
        cold = False
        for work in self._waiting:
            if work.turn is not None and work.turn.cancelled():
                continue
            extents = work.extents
            if not all(extent in hot for extent in extents):
                cold = True
                still.append(work)
            elif self.locks.overlaps(work.start, work.stop):
                still.append(work)
            else:
                for extent in extents:
                    hot[extent] = epoch
                if work.turn is None:
                    writes.append(work)
                else:
                    self.locks.take(work.start, work.stop)
                    work.turn.set_result(None)
        self._waiting = still
        if writes:
            self._submit(writes)
        # Work whose extents are hot but locked may fill the log for now; then the release of its lock comes back here,
        # and to try again at once would be a loop without a pause (found by the simulator).
        if cold and self._task is None and self._wanted():
            self._task = spawn(self._activate(), "activity log")
            self._task.add_done_callback(self._activated)

    def _submit(self, writes: list[_Waiting]) -> None:
        """Hand writes that may begin to the volume as one batch."""
        tellers = [work.told for work in writes if work.told is not None]

        def done(errors: Mapping[int, int]) -> None:
            for index, tell in enumerate(tellers):
                tell(errors.get(index, 0))

        self._volume.submit([(work.start, work.data) for work in writes if work.data is not None], done)

    # ── the activity log ─────────────────────────────────────────────────────────────────────────────────────

    async def idle(self) -> None:
        """Return when no transaction of the activity log is under way."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def _wanted(self) -> list[int]:
        """The extents of the oldest work that waits for one: as many as fit into the log, hot ones included (they
        must not be evicted for the others), nothing when all are hot.
        """
        log = self._volume.activity_log
        wanted: dict[int, None] = {}
        for work in self._waiting:
            extents = [extent for extent in work.extents if extent not in wanted]
            if len(wanted) + len(extents) > log.slots:
                break
            wanted.update(dict.fromkeys(extents))
        return list(wanted) if any(extent not in log.hot for extent in wanted) else []

    async def _activate(self) -> None:
        """Transactions until nobody waits for an extent; all misses meanwhile share the next one."""
        volume = self._volume
        starved = False
        while wanted := self._wanted():
            plan = volume.activity_log.plan(wanted, volume.settled_epoch)
            if plan is None:
                # Every extent was written since the last round. A round frees them; if writes keep all of them
                # busy even so, new writes wait for one round.
                if starved:
                    self.close_gate("activity log")
                starved = True
                await volume.settle()
                continue
            try:
                # An extent may leave only when its dirty bits are durable. (Nothing is written when all are.)
                await volume.metadata.save_bitmap(volume.bitmap)
                await volume.metadata.save_activity_log(plan.extents)
            except BaseException:
                volume.activity_log.abandon(plan)
                raise
            volume.activity_log.commit(plan, volume.epoch)
            starved = False
            self.open_gate("activity log")

    def _activated(self, task: "asyncio.Task[None]") -> None:
        self._task = None
        error = None if task.cancelled() else task.exception()
        if error is None:
            self.go_on()
        else:
            self._give_up(error if isinstance(error, OSError) else OSError(errno.EIO, str(error)))

    def _give_up(self, error: OSError) -> None:
        """The activity log cannot be written: what waits, or comes later, can never begin."""
        self.failure = error
        self._volume.report_failure(ActivityLogLost(error.errno, error.strerror))
        for work in self._refuse_turns(error):
            if work.told is not None:
                work.told(errno.EIO)

    def hand_over(self) -> list[tuple[int, memoryview, Callable[[int], None]]]:
        """Let nothing begin any more. The writes that wait: (offset, data, whom to tell); other changes fail."""
        self.failure = self.failure or OSError(errno.EIO, "the disk has failed and is no longer used")
        return [
            (work.start, work.data, work.told)
            for work in self._refuse_turns(self.failure)
            if work.data is not None and work.told is not None
        ]

    def _refuse_turns(self, error: OSError) -> list[_Waiting]:
        """Empty the queue; its writes are returned, the other changes get the error."""
        waiting, self._waiting = self._waiting, []
        for work in waiting:
            if work.turn is not None and not work.turn.done():
                work.turn.set_exception(error)
        return waiting
