"""Writes are timed on a real link, one at a time, and only while somebody wants to know."""

import time

from replica import wire
from replica.write_times import WriteTimes
from tests.unit.test_link import opened, run


def test_one_write_at_a_time_is_timed_and_none_is_lost() -> None:
    async def test() -> None:
        one, two = await opened()
        link = one.link
        newest, answered, timed = 0, [], []  # type: ignore[var-annotated]
        link.handlers[wire.APPLIED] = lambda flags, sequence, offset, payload: answered.append(sequence)
        before = link.handlers[wire.APPLIED]
        times = WriteTimes(link, lambda: newest, lambda sent_s, now_s: timed.append(now_s - sent_s), time.monotonic)
        got: list[int] = []
        two.link.on_writes = lambda writes, last: got.append(last)

        def write() -> None:
            nonlocal newest
            newest += 1
            times.send_buffers([wire.pack(wire.WRITE, b"x" * 512, sequence=newest)])

        def acknowledge(sequence: int) -> None:
            link.handlers[wire.APPLIED](0, sequence, 0, memoryview(b""))

        for _ in range(3):
            write()
        assert timed == []
        acknowledge(1)  # of the first one; the others are not timed
        assert len(timed) == 1 and timed[0] >= 0
        acknowledge(3)
        assert len(timed) == 1
        write()
        write()
        acknowledge(5)  # covers the fourth, which is timed
        assert len(timed) == 2
        assert answered == [1, 3, 5]
        write()
        times.end()
        assert link.handlers[wire.APPLIED] is before
        acknowledge(6)
        assert len(timed) == 2 and answered[-1] == 6
        for end in (one, two):
            end.link.close("the test is over.")

    run(test)
