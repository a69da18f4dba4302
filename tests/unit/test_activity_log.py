"""The activity log: plans, snapshots, and what is recovered from damaged copies."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replica.activity_log import (
    DEFAULT_SLOTS,
    HEADER_BYTES,
    MAX_EXTENT,
    ActivityLog,
    Plan,
    copy_bytes,
    recover,
)


def filled(slots: int, epochs: dict[int, int]) -> ActivityLog:
    log = ActivityLog(slots)
    log.hot.update(epochs)
    return log


def must_plan(log: ActivityLog, wanted: list[int], settled_epoch: int) -> Plan:
    plan = log.plan(wanted, settled_epoch)
    assert plan is not None
    return plan


def test_inserted_extents_are_hot_only_after_the_commit() -> None:
    log = ActivityLog(4)
    plan = must_plan(log, [7, 3, 7], 0)
    assert plan == Plan(insert=(3, 7), evict=(), extents=(3, 7))
    assert not log.hot
    log.commit(plan, 5)
    assert log.hot == {3: 5, 7: 5}


def test_evicted_extents_are_cold_at_once() -> None:
    log = filled(2, {1: 1, 2: 2})
    plan = must_plan(log, [9], settled_epoch=2)
    assert plan == Plan(insert=(9,), evict=(1,), extents=(2, 9))
    assert 1 not in log.hot  # a write to extent 1 while the transaction is written must be a miss
    log.commit(plan, 3)
    assert log.hot == {2: 2, 9: 3}


def test_the_oldest_leave_first_and_some_more_than_needed() -> None:
    log = filled(32, {extent: 100 - extent for extent in range(32)})
    plan = must_plan(log, [50], settled_epoch=100)
    assert plan.evict == (31, 30, 29)  # one is needed, 32 // 16 more are taken


def test_unsettled_extents_stay() -> None:
    log = filled(2, {1: 4, 2: 5})
    assert log.plan([9], settled_epoch=3) is None
    assert log.hot == {1: 4, 2: 5}
    assert must_plan(log, [9], settled_epoch=4).evict == (1,)


def test_an_extent_that_is_wanted_again_is_not_evicted() -> None:
    log = filled(2, {1: 1, 2: 2})
    assert must_plan(log, [1, 9], settled_epoch=9).evict == (2,)


def test_not_enough_settled_evicts_nothing() -> None:
    log = filled(3, {1: 1, 2: 8, 3: 8})
    assert log.plan([10, 11], settled_epoch=1) is None
    assert set(log.hot) == {1, 2, 3}
    assert log.plan([10], settled_epoch=1) is not None  # the refused plan left no transaction open


def test_one_transaction_at_a_time() -> None:
    log = ActivityLog(4)
    plan = must_plan(log, [1], 0)
    with pytest.raises(RuntimeError, match="under way"):
        log.plan([2], 0)
    log.abandon(plan)
    assert not log.hot
    with pytest.raises(RuntimeError, match="under way"):
        log.commit(plan, 1)
    log.commit(must_plan(log, [2], 0), 1)
    assert log.hot == {2: 1}
    log.clear()
    assert not log.hot


def test_impossible_wishes_are_refused() -> None:
    log = ActivityLog(2)
    with pytest.raises(ValueError, match="2 slots"):
        log.plan([1, 2, 3], 0)
    for extent in (-1, MAX_EXTENT + 1):
        with pytest.raises(ValueError, match="outside"):
            log.plan([extent], 0)
    with pytest.raises(ValueError, match="slot"):
        ActivityLog(0)
    with pytest.raises(ValueError, match="fit"):
        ActivityLog.encode(range(2000), 1, 4096)


@settings(deadline=None)
@given(
    slots=st.integers(1, 40),
    batches=st.lists(st.tuples(st.sets(st.integers(0, 60), max_size=6), st.integers(0, 4), st.booleans()), max_size=60),
)
def test_random_traffic_keeps_the_promises(slots: int, batches: list[tuple[set[int], int, bool]]) -> None:
    log = ActivityLog(slots)
    durable: set[int] = set()
    last_write: dict[int, int] = {}
    for epoch, (wanted, lag, fails) in enumerate(batches, start=1):
        wanted = set(sorted(wanted)[:slots])
        settled = epoch - 1 - lag
        plan = log.plan(wanted, settled)
        if plan is None:
            protected = {extent for extent in log.hot if log.hot[extent] > settled or extent in wanted}
            assert len(protected | wanted) > slots
            continue
        assert set(plan.evict).isdisjoint(wanted)
        assert all(last_write.get(extent, 0) <= settled for extent in plan.evict)
        assert len(plan.extents) <= slots
        if fails:
            log.abandon(plan)
            assert set(log.hot) <= durable
            continue
        durable = set(plan.extents)
        log.commit(plan, epoch)
        assert set(log.hot) == durable
        for extent in wanted:
            assert extent in log.hot
            log.hot[extent] = last_write[extent] = epoch


@given(st.sets(st.integers(0, MAX_EXTENT), max_size=300), st.integers(0, 2**64 - 1))
def test_a_snapshot_survives_the_trip(extents: set[int], sequence: int) -> None:
    data = ActivityLog.encode(extents, sequence, 4096)
    assert len(data) == 4096
    assert ActivityLog.decode(data) == (sequence, sorted(extents))


def test_any_damaged_byte_is_noticed() -> None:
    data = ActivityLog.encode(range(20), 3, 4096)
    for at in range(HEADER_BYTES + 80):
        assert ActivityLog.decode(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]) is None
    assert ActivityLog.decode(bytes(4096)) is None
    assert ActivityLog.decode(b"") is None
    assert ActivityLog.decode(data[: HEADER_BYTES + 40]) is None


@given(st.binary(max_size=200))
def test_garbage_is_not_a_snapshot(data: bytes) -> None:
    assert ActivityLog.decode(data) is None


def test_the_size_of_a_copy() -> None:
    assert copy_bytes(DEFAULT_SLOTS) == 8192
    assert copy_bytes((4096 - HEADER_BYTES) // 4) == 4096
    assert copy_bytes((4096 - HEADER_BYTES) // 4 + 1) == 8192


OLD = ActivityLog.encode({1, 2}, 4, 4096)
NEW = ActivityLog.encode({2, 3}, 5, 4096)
BAD = b"\x55" * 4096
BLANK = bytes(4096)

RECOVERY = {
    "both pairs whole": ([OLD, OLD, NEW, NEW], 5, {2, 3}),
    "one new copy damaged": ([OLD, OLD, BAD, NEW], 5, {1, 2, 3}),
    "new pair torn": ([OLD, OLD, BAD, BAD], 4, {1, 2}),
    "new pair half old": ([OLD, OLD, NEW, ActivityLog.encode({8}, 3, 4096)], 5, {2, 3}),
    "old pair being overwritten": ([BAD, OLD, NEW, NEW], 5, {1, 2, 3}),
    "old pair damaged": ([BAD, BAD, NEW, NEW], 5, {2, 3}),
    "fresh file": ([OLD, OLD, BLANK, BLANK], 4, {1, 2}),
    "first transaction torn": ([OLD, OLD, BAD, BLANK], 4, {1, 2}),
    "retried with other extents": ([OLD, OLD, NEW, ActivityLog.encode({9}, 5, 4096)], 5, {2, 3, 9}),
}


@pytest.mark.parametrize(("copies", "sequence", "extents"), RECOVERY.values(), ids=RECOVERY.keys())
def test_recovery(copies: list[bytes], sequence: int, extents: set[int]) -> None:
    found = recover(copies)
    assert found.sequence == sequence
    assert found.extents == frozenset(extents)
    assert found.damaged == tuple(at for at, copy in enumerate(copies) if copy is BAD)


@pytest.mark.parametrize("copies", [[BAD] * 4, [BLANK] * 4, [BAD, BLANK, BLANK, BLANK]])
def test_no_valid_copy_means_anything_may_have_been_written(copies: list[bytes]) -> None:
    assert recover(copies).extents is None
