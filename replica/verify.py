"""Online verification: finding out, while clients write, whether the two copies are really the same (`drbdadm verify`).

A run belongs to one link. The node that was asked drives it (`verify_walk.Walker`), the other one answers
(`verify_walk.Answers`); both may be in either role, and change it. What differs becomes dirty on both nodes, durably:
the next resync copies it, from the copy that the decision table finds to be the better one, the Primary's. Or it is
repaired at the end of the run: the Primary sends what it has once more, as if a client had written it.
"""

import asyncio
import logging
import math
from typing import TYPE_CHECKING, Any, Final

from replica import wire
from replica.activity_log import EXTENT_SHIFT
from replica.bitmap import BLOCK_SHIFT, BLOCK_SIZE, blocks_of
from replica.errors import Refused, ReplicaError
from replica.hooks import Event
from replica.link import LinkLost, PeerLink
from replica.states import Role
from replica.superblock import MAX_VOLUME_BYTES
from replica.sync_rate import pace_of
from replica.tasks import spawn
from replica.throttle import Throttle
from replica.verify_report import VerifyProgress, ended
from replica.verify_walk import CHUNK_BYTES, WINDOW_BYTES, Answers, CannotVerify, Walker

if TYPE_CHECKING:
    from replica.resource import Resource

log = logging.getLogger("replica.verify")

#: Repaired at once, then flushed on both nodes; verbs wait meanwhile.
REPAIR_BYTES: Final = 4 << 20
#: The longest piece that is sent once more.
REPAIR_PIECE_BYTES: Final = 256 << 10
#: How long the other node may take to save its bitmap, or to repair REPAIR_BYTES.
REQUEST_TIMEOUT_S: Final = 60.0

#: What the other node can be asked.
BEGIN, SAVE, REPAIR = "verify", "verify-save", "verify-repair"


class Verification:
    """Runs of verification on one link, one at a time."""

    def __init__(self, resource: "Resource", link: PeerLink) -> None:
        self._resource = resource
        self._link = link
        self._walker: Walker | None = None
        self._answers: Answers | None = None
        self._run: asyncio.Task[None] | None = None
        self._beginning = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = 0
        self._throttle: Throttle
        for kind in (wire.VERIFY_DIGEST, wire.VERIFY_DATA):
            link.handlers[kind] = self._on_answer
        for kind in (wire.VERIFY_HASH, wire.VERIFY_BLOCKS, wire.VERIFY_HOLE, wire.VERIFY_DONE):
            link.handlers[kind] = self._handler(kind)
        link.handlers[wire.VERIFY_CLEAN] = self._on_clean
        link.handlers[wire.VERIFY_END] = self._on_end

    # ── beginning ────────────────────────────────────────────────────────────────────────────────────────────

    async def begin(self, start: int, stop: int | None, *, repair: bool) -> None:
        """Verify [start, stop), driven by this node. Refused; returns when the run has begun."""
        resource = self._resource
        await self.finished()
        self._check()
        size_bytes = resource.volume.size_bytes
        stop = size_bytes if stop is None else stop
        _check_range(resource.name, start, stop, size_bytes)
        if repair and Role.PRIMARY not in (resource.state.role, resource.state.peer_role):
            raise Refused(
                f"{resource.name} is Secondary on both nodes, and neither copy goes before the other: promote the node "
                "whose data are right, then repair."
            )
        seed = resource.random_seed()
        message = {"op": BEGIN, "from": start, "to": stop, "seed": seed, "repair": repair}
        self._beginning = True
        try:
            await self._ask(message)
            if self._link.closed or not resource.both_in_sync:
                raise Refused(f"{resource.name} is not in sync with {resource.peer_name} any more: try again later.")
        except (Refused, asyncio.CancelledError):
            # Not the peer's refusal: it has begun, or may be about to.
            self._link.send_map(wire.VERIFY_END, {"reason": "the run has not begun", "repaired": 0})
            raise
        finally:
            self._beginning = False
        progress = self._start(resource.node_name, start, stop, repair)
        self._walker = Walker(self._link, resource.volume, self._throttle, progress, seed, self._numbers)
        self._run = spawn(self._drive(self._walker, progress), "verification")

    async def _begin_answering(self, message: dict[str, Any]) -> None:
        """The peer drives a run."""
        resource = self._resource
        await self.finished()
        self._check()
        start, stop = _offset(message, "from"), _offset(message, "to")
        _check_range(resource.name, start, stop, resource.volume.size_bytes)
        seed, repair = wire.field(message, "seed", int), wire.field(message, "repair", bool)
        if not 0 < seed < 1 << 64:
            raise wire.ProtocolError("the seed of a verification is no 64-bit number.")
        progress = self._start(resource.peer_name, start, stop, repair)
        self._answers = Answers(self._link, resource.volume, self._throttle, progress, seed, resource.disk_failed)

    def _start(self, driver: str, start: int, stop: int, repair: bool) -> VerifyProgress:
        resource = self._resource
        resource.verifications += 1
        now_s = asyncio.get_running_loop().time()
        progress = VerifyProgress(resource.verifications, driver, start, stop, repair, now_s)
        resource.verify_progress = progress
        pace = pace_of(resource.settings.verify_rate_bytes_s, CHUNK_BYTES, WINDOW_BYTES, queue_s=math.inf)
        self._throttle = Throttle(pace, resource.clock_s)
        self._watch_clients()
        words = " and repair what differs" if repair else ""
        log.info("%s: %s begins to verify %d to %d%s", resource.name, driver, start, stop, words)
        resource.changed()
        return progress

    def _watch_clients(self) -> None:
        """Have the throttle know what a run costs this node's clients. (Promotion, and a new link, begin it anew.)"""
        volume = self._resource.volume
        if volume.mirroring and not volume.watches_clients:
            volume.watch_clients(self._throttle, self._resource.clock_s)

    @property
    def running(self) -> bool:
        """Whether a run is under way on this link, driven by either node."""
        return self._walker is not None or self._answers is not None

    def _check(self) -> None:
        self._resource.need_both_in_sync("verified")
        name = self._resource.name
        if self.running or self._beginning:
            raise Refused(
                f"{name} is being verified already: see `replicactl status {name}`, or end that with "
                f"`replicactl verify --stop {name}`."
            )

    # ── the run, as its driver ───────────────────────────────────────────────────────────────────────────────

    async def _drive(self, walker: Walker, progress: VerifyProgress) -> None:
        reason = ""
        try:
            await walker.walk()
            await walker.marks.save()
            await self._ask({"op": SAVE})
            if progress.repair:
                await self._repair(progress)
        except OSError as error:
            self._resource.disk_failed(error)
            reason = f"the disk of {self._resource.node_name} failed ({error.strerror or error})"
        except LinkLost:
            return  # `end` is called, with the reason
        except ReplicaError as error:
            reason = str(error).removesuffix(".")
        self._finish(reason, tell=True)

    async def _repair(self, progress: VerifyProgress) -> None:
        """Have the Primary send what it has of all that is dirty in the range."""
        position = progress.start
        while position < progress.stop:
            if self._resource.state.role is Role.PRIMARY:
                position, repaired_bytes = await self._repair_from(position, progress.stop)
            else:
                reply = await self._ask({"op": REPAIR, "from": position, "to": progress.stop})
                position, repaired_bytes = _offset(reply, "next"), _offset(reply, "repaired")
            progress.repaired_bytes += repaired_bytes

    async def _repair_from(self, start: int, stop: int) -> tuple[int, int]:
        """As Primary: send the dirty blocks of [start, stop) once more, REPAIR_BYTES at most; how far that is, and how
        many bytes they were. What was sent is durable on both nodes then, and clean.

        Under the lock of the verbs: this node stays Primary meanwhile, with its disk.
        """
        resource = self._resource
        async with resource.admin:
            if resource.state.role is not Role.PRIMARY or not resource.both_in_sync or self._link.closed:
                raise CannotVerify(f"{resource.node_name}, which was to repair, is not Primary and in sync any more")
            volume, position, sent = resource.volume, start, 0
            pieces: list[tuple[int, int]] = []
            while sent < REPAIR_BYTES:
                run = volume.bitmap.next_run(position >> BLOCK_SHIFT, REPAIR_PIECE_BYTES >> BLOCK_SHIFT)
                offset = run[0] << BLOCK_SHIFT if run is not None else stop
                if run is None or offset >= stop:
                    position = stop
                    break
                extent_stop = ((offset >> EXTENT_SHIFT) + 1) << EXTENT_SHIFT
                position = min(offset + (run[1] << BLOCK_SHIFT), extent_stop, stop)
                if not await volume.send_again(offset, position - offset):
                    raise CannotVerify(f"the blocks at {offset} could not be repaired")
                pieces.append((offset, position - offset))
                sent += position - offset
            if pieces:
                await volume.settle()
            for offset, length in pieces:
                self._link.send(wire.VERIFY_CLEAN, wire.pack_length(length), offset=offset)
        return position, sent

    async def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            return await self._link.request(message, REQUEST_TIMEOUT_S)
        except TimeoutError:
            peer, name = self._resource.peer_name, self._resource.name
            raise Refused(
                f"{peer} did not answer the request to {message['op']} in {REQUEST_TIMEOUT_S:g} s: see "
                f"`replicactl status {name}` there."
            ) from None

    # ── what the other node asks ─────────────────────────────────────────────────────────────────────────────

    async def asked(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """Carry out the peer's request, and what to add to the answer; None: it is not about verification."""
        match message.get("op"):
            case "verify":
                await self._begin_answering(message)
            case "verify-save":
                await self._need_answers().marks.save()
            case "verify-repair":
                self._need_answers()
                start, stop = _offset(message, "from"), _offset(message, "to")
                _check_range(self._resource.name, start, stop, self._resource.volume.size_bytes)
                position, repaired_bytes = await self._repair_from(start, stop)
                return {"next": position, "repaired": repaired_bytes}
            case _:
                return None
        return {}

    def _need_answers(self) -> Answers:
        if self._answers is None:
            raise Refused(f"{self._resource.node_name} is in no verification.")
        return self._answers

    def _handler(self, kind: int) -> Any:
        def handle(flags: int, sequence: int, offset: int, payload: memoryview) -> None:
            answers = self._answers
            if answers is None:
                return  # sent before the driver knew that the run is over
            handlers = {
                wire.VERIFY_HASH: answers.on_hash,
                wire.VERIFY_BLOCKS: answers.on_blocks,
                wire.VERIFY_HOLE: answers.on_hole,
                wire.VERIFY_DONE: answers.on_done,
            }
            handlers[kind](flags, sequence, offset, payload)

        return handle

    def _on_answer(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        if self._walker is not None:
            self._walker.answered(flags, sequence, offset, payload)

    def _on_clean(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        """The Primary has sent these blocks once more, and both nodes have flushed them."""
        length, progress = wire.unpack_length(payload), self._resource.verify_progress
        if progress is None or not self.running:
            return
        if not length or offset < progress.start or offset + length > progress.stop or offset % BLOCK_SIZE:
            raise wire.ProtocolError(f"blocks at {offset} are called repaired that were not to be.")
        self._resource.disk.bitmap.clear_range(*blocks_of(offset, length))

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────

    def stop(self) -> None:
        """An operator of this node ends the run. Refused when there is none."""
        if not self.running:
            raise Refused(f"{self._resource.name} is not being verified.")
        self._finish(f"it was stopped on {self._resource.node_name}", tell=True)

    def look(self) -> None:
        """A state has changed: a run goes on only while both copies are in sync."""
        if self.running and not self._resource.both_in_sync:
            self._finish("the two copies are not in sync any more", tell=True)
        elif self.running:
            self._watch_clients()

    def end(self, reason: str) -> None:
        """The link is gone."""
        self._finish(f"the connection was lost: {reason.removesuffix('.')}", tell=False)

    async def finished(self) -> None:
        """Return when nothing of a run that is over is under way any more."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def _on_end(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        message = wire.unpack_map(payload)
        reason, repaired_bytes = wire.field(message, "reason", str), _offset(message, "repaired")
        progress = self._resource.verify_progress
        if progress is None or not self.running:
            return
        if self._answers is not None:
            progress.repaired_bytes = repaired_bytes
        elif not reason:
            raise wire.ProtocolError("a verification is called complete by the node that does not drive it.")
        self._finish("".join(letter for letter in reason if letter.isprintable()), tell=False)

    def _finish(self, reason: str, *, tell: bool) -> None:
        """The run is over; `reason`: why before its end, or ""."""
        resource, progress = self._resource, self._resource.verify_progress
        walker, answers, run = self._walker, self._answers, self._run
        if progress is None or (walker is None and answers is None):
            return
        self._walker = self._answers = self._run = None
        resource.verify_progress = None
        if resource.attached:
            resource.volume.watch_no_clients()
        if walker is not None:
            self._numbers = walker.number
        result = resource.verify_result = ended(progress, asyncio.get_running_loop().time(), reason)
        if tell:
            self._link.send_map(wire.VERIFY_END, {"reason": reason, "repaired": result.repaired_bytes})
        log.log(logging.WARNING if result.found_bytes else logging.INFO, "%s: %s", resource.name, result.sentence())
        if result.found_bytes:
            resource.hooks.fire(Event.OUT_OF_SYNC, result.sentence())
        task = spawn(self._wind_up(walker, answers, run), "end of a verification")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        resource.changed()

    async def _wind_up(self, walker: Walker | None, answers: Answers | None, run: "asyncio.Task[None] | None") -> None:
        """Let go of every range, and make durable what was marked."""
        if run is not None and not run.done():
            run.cancel()
            await asyncio.wait([run])
        if answers is not None:
            await answers.end()
        marks = walker.marks if walker is not None else answers.marks if answers is not None else None
        try:
            if marks is not None and self._resource.attached:
                await marks.save()
        except OSError as error:
            self._resource.disk_failed(error)


def _offset(message: dict[str, Any], name: str) -> int:
    value: int = wire.field(message, name, int)
    if not 0 <= value <= MAX_VOLUME_BYTES:
        raise wire.ProtocolError(f"a control message has {value} as {name!r}.")
    return value


def _check_range(name: str, start: int, stop: int, size_bytes: int) -> None:
    """Whole blocks, and inside the volume (whose last block may be shorter). Refused."""
    if not 0 <= start < stop <= size_bytes:
        raise Refused(f"{name} has {size_bytes} bytes: {start} to {stop} is no part of it that could be verified.")
    if start % BLOCK_SIZE or (stop % BLOCK_SIZE and stop != size_bytes):
        raise Refused(f"{name} is verified in blocks of {BLOCK_SIZE} bytes: {start} to {stop} are not whole ones.")
