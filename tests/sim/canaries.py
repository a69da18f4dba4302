"""Planted bugs. A simulator is believed only as far as it finds these.

Each is a change of one line (or a few that belong together) in the source of one function of the node, made in memory.
When the node's source has changed so that the old text is not there exactly once, planting it fails loudly: write the
canary anew. `bias` makes the conditions that a bug needs likelier than in an ordinary draw.
"""

import contextlib
import functools
import importlib
import inspect
import random
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from replica.split_brain import Policies
from tests.sim.run import Outcome, quiet, run_seed
from tests.sim.scenario import Scenario
from tests.sim.workers import in_order, is_over

#: Each planted bug has to be found within so many seeds.
MOST_SEEDS = 2000

Bias = Callable[[Scenario, random.Random], None]


@dataclass(frozen=True)
class Canary:
    """`old` becomes `new` in the source of `function` ("module:Class.method"); `more`: the same elsewhere, where the
    node is guarded more than once.
    """

    name: str
    what: str
    function: str
    old: str
    new: str
    bias: Bias | None = None
    more: tuple[tuple[str, str, str], ...] = ()


# ── biases ───────────────────────────────────────────────────────────────────────────────────────────────────


def _crashes(scenario: Scenario, rng: random.Random) -> None:
    """Protocol C, many kills and power cuts, quick restarts."""
    _plain(scenario, rng)
    for name in ("kill", "power", "power_other_soon", "fuse_kill"):
        scenario.fault_rates[name] = rng.choice((0.3, 0.8))
    scenario.restart_s = rng.choice((0.02, 0.1, 0.3))


def _plain(scenario: Scenario, rng: random.Random) -> None:
    scenario.protocol = scenario.side["protocol"] = "C"
    scenario.split_brain = scenario.fresh = False
    scenario.request_every_s = rng.choice((0.002, 0.005))


def _resyncs(scenario: Scenario, rng: random.Random) -> None:
    """Links that come and go under load, slow resyncs."""
    _plain(scenario, rng)
    for name in ("reset", "cut", "half_cut"):
        scenario.fault_rates[name] = rng.choice((0.5, 1.5))
    scenario.fault_rates["power"] = rng.choice((0.0, 0.5))
    scenario.heal_s = 0.1
    scenario.verb_rates["invalidate"] = rng.choice((0.0, 0.5))
    for data, _ in scenario.disk.values():
        data.uncached_read = 0.5
        data.read_s = 0.005


def _questions(scenario: Scenario, rng: random.Random) -> None:
    """Resyncs that ask first, by blocks, on links that break, with power cuts."""
    _resyncs(scenario, rng)
    scenario.constants |= {("sync_hash", "LEAST_BLOCKS"): 1, ("sync_hash", "WORTH_SHARE"): 0.0}
    scenario.fault_rates["power"] = rng.choice((0.5, 1.5))


def _slow_questions(scenario: Scenario, rng: random.Random) -> None:
    """The same, slowly, and nothing else has the target flush: what was equal stays in its page cache for long."""
    _questions(scenario, rng)
    scenario.side |= {"settle_interval_s": 5.0, "settle_bytes": 1 << 20, "resync_rate_bytes_s": 64 << 10}
    scenario.mix = [("write", 0.8), ("read", 0.2)]
    scenario.constants |= {("resync", "CHECKPOINT_BYTES"): 4 << 20, ("resync", "CHECKPOINT_INTERVAL_S"): 5.0}
    scenario.al_slots = scenario.most_extents = scenario.side["al_extents"] = 4
    scenario.fault_rates = {**dict.fromkeys(scenario.fault_rates, 0.0), "reset": 2.0, "power": 1.5}
    scenario.verb_rates = dict.fromkeys(scenario.verb_rates, 0.0)
    scenario.size_bytes, scenario.locality = 512 << 10, 0.0
    for data, _ in scenario.disk.values():
        data.write_back = 0.0


def _failover(scenario: Scenario, rng: random.Random) -> None:
    """The peer takes over at once, while the old Primary's slow writes are still under way."""
    _plain(scenario, rng)
    scenario.size_bytes = 64 << 10
    scenario.extent_shift, scenario.al_slots = 14, 4
    scenario.most_extents = scenario.side["al_extents"] = 4
    scenario.fault_rates = {**dict.fromkeys(scenario.fault_rates, 0.0), "kill": 2.0}
    scenario.restart_s = 0.5
    scenario.mix = [("fua", 0.4), ("zero", 0.2), ("write", 0.3), ("read", 0.1)]
    for data, metadata in scenario.disk.values():
        data.write_s, data.flush_s, metadata.flush_s, metadata.write_s = 0.2, 0.0005, 0.0005, 0.00005


def _hooked(scenario: Scenario, rng: random.Random) -> None:
    _resyncs(scenario, rng)
    scenario.hook_timeout_s = 0.05


def _late(scenario: Scenario, rng: random.Random) -> None:
    """Long stalls, then late delivery, with a new connection made before."""
    _plain(scenario, rng)
    scenario.fault_rates = {**dict.fromkeys(scenario.fault_rates, 0.0), "kill_cut": 3.0}
    scenario.heal_s, scenario.restart_s = 0.15, 0.02
    scenario.side |= {"timeout_s": 1.0, "ping_interval_s": 0.3, "connect_interval_s": 0.05}
    scenario.network.socket_bytes = 1 << 20
    scenario.locality, scenario.depth = 0.8, 64
    scenario.size_bytes = 64 << 10


def _verified(scenario: Scenario, rng: random.Random) -> None:
    """Both copies are compared again and again under load, by either node; disks take their time and do not fail."""
    _plain(scenario, rng)
    scenario.verb_rates |= {"verify": 10.0, "takeover": rng.choice((0.0, 0.8))}
    scenario.side["verify_rate_bytes_s"] = None
    scenario.locality = 0.8
    for data, metadata in scenario.disk.values():
        data.write_error = data.flush_error = metadata.write_error = metadata.flush_error = 0.0
        data.read_error = 0.0
        data.read_s = rng.choice((0.0005, 0.005))


def _resized(scenario: Scenario, rng: random.Random) -> None:
    """Disks with room behind the volume, on one of them not empty; nodes die in the middle of a step."""
    _plain(scenario, rng)
    scenario.extra_bytes, scenario.room_bytes = {}, 64 << 10
    scenario.leftovers = rng.choice(("node1", "node2"))
    scenario.verb_rates = {**dict.fromkeys(scenario.verb_rates, 0.0), "resize": 3.0}
    scenario.fault_rates = {**dict.fromkeys(scenario.fault_rates, 0.0), "fuse_power": rng.choice((0.0, 3.0))}
    scenario.restart_s = 0.02


def _without_disk(scenario: Scenario, rng: random.Random) -> None:
    """The Primary's disk is detached or fails again and again, links break, nodes die."""
    _plain(scenario, rng)
    scenario.side["on_io_error"] = "detach"
    scenario.verb_rates |= {"detach": rng.choice((1.0, 3.0)), "takeover": 0.3, "invalidate": 0.3}
    scenario.fault_rates |= {"reset": rng.choice((0.0, 1.0)), "kill": rng.choice((0.0, 0.5))}
    for data, _ in scenario.disk.values():
        data.flush_error = rng.choice((0.0, 0.01))


def _without_disk_power(scenario: Scenario, rng: random.Random) -> None:
    """A Primary without a disk, whose peer loses what was never flushed, and is back at once."""
    _plain(scenario, rng)
    scenario.side |= {"on_io_error": "detach", "timeout_s": 1.0, "connect_interval_s": 0.05, "settle_interval_s": 5.0}
    scenario.side["settle_bytes"] = 1 << 20
    scenario.mix = [("write", 0.6), ("read", 0.4)]
    scenario.fault_rates = {**dict.fromkeys(scenario.fault_rates, 0.0), "power": 2.0}
    scenario.verb_rates = {**dict.fromkeys(scenario.verb_rates, 0.0), "detach": 4.0}
    scenario.restart_s, scenario.locality, scenario.al_slots = 0.02, 0.8, 12
    scenario.side["al_extents"] = 12


def _write_errors(scenario: Scenario, rng: random.Random) -> None:
    _without_disk(scenario, rng)
    for data, _ in scenario.disk.values():
        data.write_error = 0.02


def _bad_disks(scenario: Scenario, rng: random.Random) -> None:
    _plain(scenario, rng)
    for data, _ in scenario.disk.values():
        data.flush_error = 0.03


def _rotten(scenario: Scenario, rng: random.Random) -> None:
    _crashes(scenario, rng)
    scenario.fault_rates["power_both"] = 1.0
    scenario.rot = 0.6


def _split_brains(no_primary: str, one_primary: str = "disconnect", *, differ: bool = False) -> Bias:
    """Both nodes serve apart from each other again and again, with these policies."""

    def bias(scenario: Scenario, rng: random.Random) -> None:
        _plain(scenario, rng)
        scenario.split_brain = True
        policies = Policies(no_primary, one_primary)
        scenario.policies = {"node1": policies, "node2": Policies() if differ else policies}
        scenario.fault_rates = {**dict.fromkeys(scenario.fault_rates, 0.0), "kill": rng.choice((0.0, 0.3))}
        scenario.verb_rates = {**dict.fromkeys(scenario.verb_rates, 0.0), "part": 2.0}
        scenario.al_slots = scenario.most_extents = scenario.side["al_extents"] = 3

    return bias


CANARIES = (
    Canary(
        "ack-before-peer",
        "a write is acknowledged when it was sent, not when the peer has applied it",
        "replica.volume:Volume._write_mirrored",
        "            self._in_flight.append((sequence, (done, errors, len(writes))))",
        "            done(errors)",
    ),
    Canary(
        "fua-before-peer",
        "FUA is answered without the peer's word",
        "replica.volume:Volume._change_both",
        "            by_peer = await asked if asked is not None else False",
        "            by_peer = asked is not None",
    ),
    Canary(
        "flush-without-peer",
        "the peer answers FLUSH and flushes nothing",
        "replica.mirror:Answers._on_flush",
        "self._start(sequence, self._target.flush())",
        "self._link.send(wire.DONE, sequence=sequence)",
    ),
    Canary(
        "held-for-ever",
        "writes that wait for room in the page cache wait for ever",
        "replica.backpressure:Backpressure._poll",
        "            self._go_on()",
        "            pass",
    ),
    Canary(
        "stand-in-unrecorded",
        "the peer stands in for the Primary's disk without a record that this disk lacks what comes",
        "replica.stand_in:StandIn._begin_service",
        "                await volume.ensure_alone_recorded()",
        "                volume.alone_recorded = True",
        _without_disk,
    ),
    Canary(
        "handed-over-answered-early",
        "what was under way when the Primary's disk failed is answered before the peer has recorded that",
        "replica.peer_volume:PeerVolume._answer_adopted",
        "        if self._link is not None:",
        "        if True:",
        _write_errors,
    ),
    Canary(
        "stand-in-started-anew",
        "a Primary without a disk goes on through a peer that has lost unflushed writes",
        "replica.stand_in:StandIn.may_go_on",
        "        if ran_on and known and not peer.is_primary and not peer.incomplete:",
        "        if known and not peer.is_primary and not peer.incomplete:",
        _without_disk_power,
    ),
    Canary(
        "dirty-block-read-here",
        "a Primary reads a block locally that the resync has not brought yet",
        "replica.peer_volume:PeerVolume._good_here",
        "return None if bitmap.any_in(*blocks_of(offset, length)) else store",
        "return store",
        _without_disk,
    ),
    Canary(
        "hole-that-is-dirty",
        "a Primary reports a hole of its own disk where the resync has not brought the data yet",
        "replica.peer_volume:PeerVolume.block_status",
        "dirty = bitmap.next_run(first, count)",
        "dirty = None",
        _without_disk,
    ),
    Canary(
        "asked-after-yield",
        "a Primary asks its peer to serve although it has told it to yield",
        "replica.peer_volume:PeerVolume._ask",
        "        elif link is None or self._rested is not None:",
        "        elif link is None:",
        _without_disk,
    ),
    Canary(
        "failed-flush-answered",
        "a FLUSH that failed is answered with success",
        "replica.volume:Volume._run_round",
        "            self._disk_failed(error)\n            raise",
        "            pass",
        _bad_disks,
    ),
    Canary(
        "promotion-unrecorded",
        "a copy promoted without its peer does not outrank one that crashed in the same generation",
        "replica.verbs:Verbs._promote",
        "superblock.promoted_alone = not volume.mirroring",
        "superblock.promoted_alone = False",
        _crashes,
    ),
    Canary(
        "survivor-overwritten",
        "a crashed Primary overwrites the copy of the Secondary that ran on",
        "replica.session:Session._establish",
        "self._resource.unbroken = True",
        "pass",
        _crashes,
    ),
    Canary(
        "generation-not-bumped",
        "going on alone makes no new generation",
        "replica.resource:Resource._record_alone",
        "superblock.generations = started_alone(superblock.generations, self.new_generation())",
        "pass",
        _crashes,
    ),
    Canary(
        "generation-after-ack",
        "a write without the peer is acknowledged while the record of it is still being made",
        "replica.volume:Volume._finish_alone",
        "        self._held.append(answer)",
        "        answer[0](answer[1])",
    ),
    Canary(
        "unsettled-forgotten",
        "what the peer may not have durably is not made dirty when the link is lost",
        "replica.volume:Volume.stop_mirroring",
        "            self.bitmap.set_range(first, count)",
        "            pass",
    ),
    Canary(
        "evict-unflushed",
        "an extent leaves the activity log although its last writes are flushed nowhere",
        "replica.admission:Admission._activate",
        "volume.activity_log.plan(wanted, volume.settled_epoch)",
        "volume.activity_log.plan(wanted, volume.epoch)",
    ),
    Canary(
        "evict-bits-not-durable",
        "an extent leaves the activity log before its dirty bits are durable",
        "replica.admission:Admission._activate",
        "            await volume.metadata.save_bitmap(volume.bitmap)",
        "            pass",
    ),
    Canary(
        "extent-used-early",
        "an extent counts as hot before the log that names it is durable",
        "replica.admission:Admission._activate",
        "await volume.metadata.save_activity_log(plan.extents)",
        'spawn(volume.metadata.save_activity_log(plan.extents), "canary")',
    ),
    Canary(
        "demote-without-peer-flush",
        "the activity log is emptied on demotion after a flush of the local disk only",
        "replica.volume:Volume.empty_activity_log",
        "await self.settle()",
        "await self.store.flush()",
    ),
    Canary(
        "recovery-forgets-log",
        "after a crash the hot extents do not become dirty",
        "replica.disk:_recover",
        "disk.bitmap.set_bytes(start, min(1 << EXTENT_SHIFT, superblock.size_bytes - start))",
        "pass",
    ),
    Canary(
        "recovery-clears-log-first",
        "after a crash the log is emptied before its extents' bits are durable",
        "replica.disk:_recover",
        "    await disk.metadata.save_bitmap(disk.bitmap)",
        "    await disk.metadata.save_activity_log(())\n    await disk.metadata.save_bitmap(disk.bitmap)",
    ),
    Canary(
        "bits-cleared-early",
        "a dirty bit is cleared when the block was sent, before the target's flush",
        "replica.resync:SyncSource._checkpoint",
        "        self._checkpoints[self._number] = self._sent",
        "        self._checkpoints[self._number] = self._sent\n"
        "        for first, count in self._sent:\n            self._bitmap.clear_range(first, count)",
    ),
    Canary(
        "sync-flush-skipped",
        "the target answers SYNC_FLUSH without flushing",
        "replica.resync:SyncTarget._flush",
        "await self._store.flush()",
        "pass",
        _resyncs,
    ),
    Canary(
        "source-not-flushed",
        "the source does not flush what it had as Secondary",
        "replica.session:Session._be_source",
        "await resource.disk.store.flush()",
        "pass",
        _bad_disks,
    ),
    Canary(
        "bitmap-not-ored",
        "the handshake does not take the peer's dirty bits",
        "replica.session:Session._exchange_bitmaps",
        "bitmap.merge_packed(payload)",
        "pass",
    ),
    Canary(
        "bitmap-stretch-lost",
        "of the changed sectors of the bitmap only the first ones that are neighbours are written",
        "replica.metadata:Metadata._write_sectors",
        "in _stretches(taken[at : at + _CHUNK_SECTORS]):",
        "in list(_stretches(taken[at : at + _CHUNK_SECTORS]))[:1]:",
    ),
    Canary(
        "inconsistent-not-recorded",
        "a resync target is not durably Inconsistent before its first block changes",
        "replica.session:Session._be_target",
        "superblock.inconsistent = True",
        "pass",
    ),
    Canary(
        "hook-ignored",
        "a resync begins although the hook before-resync-target has refused it",
        "replica.session:Session._ask_before_resync",
        "if problem:",
        "if False:",
        _hooked,
    ),
    Canary(
        "hook-asked-late",
        "the hook before-resync-target is asked about a copy that is half copied already",
        "replica.session:Session._ask_before_resync",
        "if resource.superblock.inconsistent:",
        "if False:",
        _hooked,
    ),
    Canary(
        "peer-not-counted-in",
        "after a resync a Primary that loses the peer again thinks that this is on record",
        "replica.session:Session._run_source",
        "await self._count_peer_in()",
        "pass",
    ),
    Canary(
        "resync-overwrites-write",
        "a resync block is read while writes to it go on",
        "replica.resync:SyncSource._read_and",
        "async with self._locks.hold(start, stop):",
        "if True:",
        _resyncs,
    ),
    Canary(
        "equal-not-flushed",
        "a block that is equal on both nodes counts as clean although the target has not flushed it",
        "replica.resync:SyncSource._on_differs",
        "self._settle(run_start, run_stop)",
        "self._bitmap.clear_range(*blocks_of(run_start, run_stop - run_start))",
        _slow_questions,
        (
            (
                "replica.resync:SyncTarget._compare",
                "add_run(self._applied, (offset >> BLOCK_SHIFT) + first, count)",
                "self._bitmap.clear_range((offset >> BLOCK_SHIFT) + first, count)",
            ),
        ),
    ),
    Canary(
        "different-taken-for-equal",
        "a block whose hash differs is not sent",
        "replica.resync:SyncSource._on_differs",
        "                if differ:",
        "                if False:",
        _questions,
    ),
    Canary(
        "question-kept-for-answer",
        "what was read for the question is sent when the answer comes, over what was written meanwhile",
        "replica.resync:SyncSource._send_question",
        "        self._asked[number] = start, start + len(data)",
        "        self._asked[number] = start, start + len(data)\n"
        "        kept = {start + at: data[at : at + BLOCK_SIZE] for at in range(0, len(data), BLOCK_SIZE)}\n"
        '        vars(self).setdefault("kept", {}).update(kept)',
        _questions,
        (
            (
                "replica.resync:SyncSource._send_wanted",
                "await self._send_data(start, piece_stop)",
                "self._send_read(start, b''.join(self.kept[at] for at in range(start, piece_stop, BLOCK_SIZE)))"
                "; self._settle(start, piece_stop)",
            ),
        ),
    ),
    Canary(
        "dead-session-applied",
        "frames of a connection are applied after a newer one has taken its place",
        "replica.connector:Connector.link_opened",
        '            self._link.close("the peer made a newer connection.")',
        '            old, self._link = self._link, None\n            self._closed(old, "replaced")',
        _late,
    ),
    Canary(
        "promote-beside-the-past",
        "promotion does not wait for what a dead connection has left under way",
        "replica.verbs:Verbs._promote",
        "await resource.past_finished()",
        "pass",
        _failover,
    ),
    Canary(
        "torn-superblock-accepted",
        "a superblock copy whose checksum is wrong is used",
        "replica.superblock:_open_copy",
        "        return None\n    return version",
        "        pass\n    return version",
        _rotten,
    ),
    Canary(
        "superblock-not-flushed",
        "a superblock counts as saved before it is durable",
        "replica.metadata:Metadata._write_superblock",
        "            await self._flush(failed_before)\n",
        "",
    ),
    Canary(
        "torn-bitmap-trusted",
        "a bitmap sector whose checksum is wrong counts as clean",
        "replica.bitmap:Bitmap.load_sector",
        "        else:\n            bits = full",
        "        else:\n            bits = 0",
        _rotten,
    ),
    Canary(
        "policy-discards-the-winner",
        "discard-least-changes discards the copy with more changes",
        "replica.split_brain:_by_changes",
        "return fewer, why",
        "return more, why",
        _split_brains("discard-least-changes"),
    ),
    Canary(
        "policy-takes-the-older",
        "discard-younger-primary discards the older one",
        "replica.split_brain:_by_age",
        "return (younger if",
        "return (older if",
        _split_brains("discard-younger-primary"),
    ),
    Canary(
        "parting-role-unrecorded",
        "a node that is promoted alone counts as Primary when the two parted",
        "replica.verbs:Verbs._promote",
        "superblock.parted_as_primary or volume.mirroring",
        "not volume.mirroring",
        _split_brains("discard-older-primary"),
    ),
    Canary(
        "policies-not-compared",
        "the policies of one node are enough",
        "replica.split_brain:ruling",
        "if one.policies != other.policies:",
        "if False:",
        _split_brains("discard-least-changes", "discard-secondary", differ=True),
    ),
    Canary(
        "policy-overwrites-a-primary",
        "a Primary counts as Secondary when a policy is chosen and when the target is",
        "replica.split_brain:ruling",
        "primaries = one.is_primary + other.is_primary",
        "primaries = 0",
        _split_brains("discard-least-changes", "consensus"),
        (
            ("replica.split_brain:ruling", "if not loser.is_primary and", "if"),
            ("replica.generation:_guard", "if target.serving and not target.incomplete:", "if False:"),
            (
                "replica.session:Session._be_target",
                "if resource.state.role is Role.PRIMARY and resource.peer_volume is None:",
                "if False:",
            ),
        ),
    ),
    Canary(
        "verified-unlocked",
        "the driver of a verification does not keep its clients' writes back",
        "replica.verify_walk:Walker._compare_locked",
        "self._locks.hold(start, stop)",
        "self._locks.hold(start, start)",
        _verified,
    ),
    Canary(
        "answered-unlocked",
        "the node that answers does not keep its clients' writes back",
        "replica.verify_walk:Answers._hold_until",
        "locks.hold(start, stop)",
        "locks.hold(start, start)",
        _verified,
    ),
    Canary(
        "hashed-before-the-answer",
        "the driver reads before it has applied what the other node had written",
        "replica.verify_walk:Walker._compare_locked",
        """\
            _, theirs = await self._ask(wire.VERIFY_HASH, number, start, stop)
            data = await self._volume.store.read_medium(start, stop - start)
""",
        """\
            data = await self._volume.store.read_medium(start, stop - start)
            _, theirs = await self._ask(wire.VERIFY_HASH, number, start, stop)
""",
        _verified,
    ),
    Canary(
        "grown-clean",
        "what is new counts as equal without a look at it",
        "replica.resize:Resize.run",
        "clean = assume_clean or",
        "clean = True or",
        _resized,
    ),
    Canary(
        "size-before-bits",
        "the new size is recorded before what is new is dirty",
        "replica.metadata:Metadata.grow",
        """\
        await self.save_bitmap(bitmap)
        superblock.size_bytes = size_bytes
        await self.save_superblock()
""",
        """\
        superblock.size_bytes = size_bytes
        await self.save_superblock()
        await self.save_bitmap(bitmap)
""",
        _resized,
    ),
)


def find(name: str) -> Canary:
    """The canary of this name; LookupError with the names there are."""
    for canary in CANARIES:
        if canary.name == name:
            return canary
    raise LookupError(f"there is no canary {name!r}; there are {', '.join(canary.name for canary in CANARIES)}")


@contextlib.contextmanager
def planted(canary: Canary) -> Iterator[None]:
    """Run with this bug."""
    places: dict[str, list[tuple[str, str]]] = {canary.function: [(canary.old, canary.new)]}
    for function, old, new in canary.more:
        places.setdefault(function, []).append((old, new))
    with contextlib.ExitStack() as stack:
        for function, changes in places.items():
            stack.enter_context(_changed(canary.name, function, changes))
        yield


@contextlib.contextmanager
def _changed(name: str, function: str, changes: list[tuple[str, str]]) -> Iterator[None]:
    module_name, path = function.split(":")
    owner: Any = importlib.import_module(module_name)
    *classes, function_name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original = owner.__dict__[function_name]
    source = textwrap.dedent(inspect.getsource(original))
    indent = 4 * len(classes)
    for change in changes:
        old, new = (_unindent(text, indent) for text in change)
        if source.count(old) != 1:
            raise LookupError(f"canary {name}: its old text is {source.count(old)} times in {function}")
        source = source.replace(old, new)
    scope: dict[str, Any] = {}
    exec(compile(source, f"<canary {name}>", "exec"), original.__globals__, scope)
    setattr(owner, function_name, scope[function_name])
    # Who has imported a plain function by name has the original.
    others = [] if classes else _importers(function_name, original)
    for module in others:
        setattr(module, function_name, scope[function_name])
    try:
        yield
    finally:
        for place in (owner, *others):
            setattr(place, function_name, original)


def _unindent(text: str, indent: int) -> str:
    return "\n".join(
        line.removeprefix(" " * indent) if line.startswith(" " * indent) else line for line in text.split("\n")
    )


def _importers(name: str, original: Any) -> list[Any]:
    return [
        module
        for module_name, module in sorted(sys.modules.items())
        if module_name.startswith("replica.") and module is not None and vars(module).get(name) is original
    ]


def search(canary: Canary, start: int = 1, seeds: int = MOST_SEEDS) -> tuple[int, Outcome | None]:
    """(seeds it took, what was found), or (seeds, None). What the same seed finds without the bug does not count."""
    with quiet() as listen:
        for seed in range(start, start + seeds):
            with planted(canary):
                outcome = run_seed(seed, listen, bias=canary.bias)
            if outcome.violation is not None and run_seed(seed, listen, bias=canary.bias).violation is None:
                return seed - start + 1, outcome
            if is_over():
                break
    return seeds, None


def _timed_search(name: str, start: int, seeds: int) -> tuple[str, int, str | None, float]:
    """(name, seeds it took, what was found or None, seconds it took)."""
    began = time.monotonic()
    count, outcome = search(find(name), start, seeds)
    return name, count, outcome and outcome.violation, time.monotonic() - began


def hunt(name: str, start: int, seeds: int, jobs: int) -> int:
    """The command line: one canary, or 'all'. Prints how many seeds each took."""
    names = [canary.name for canary in CANARIES] if name == "all" else [find(name).name]
    missed = 0
    work = functools.partial(_timed_search, start=start, seeds=seeds)
    try:
        with contextlib.closing(in_order(work, names, min(jobs, len(names)))) as results:
            for found, count, violation, spent_s in results:
                if violation is None:
                    missed += 1
                    print(f"{found:28} NOT FOUND in {count} seeds ({spent_s:.1f} s)", flush=True)
                else:
                    print(f"{found:28} {count:5} seeds {spent_s:6.1f} s  {violation[:110]}", flush=True)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    print(f"{len(names) - missed} of {len(names)} planted bugs found")
    return 1 if missed else 0
