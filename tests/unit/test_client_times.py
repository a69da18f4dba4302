"""Clients' requests are timed on a real volume and link, one of a kind at a time, and only while somebody asks."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from replica import wire
from replica.link import PeerLink
from replica.volume import Volume
from tests.unit.a_volume import disk, volume_on
from tests.unit.test_link import opened, run


class Told:
    """What a resync is told."""

    def __init__(self) -> None:
        self.writes: list[float] = []
        self.reads: list[float] = []
        self.at_once = 0

    def wrote(self, sent_s: float, now_s: float) -> None:
        self.writes.append(now_s - sent_s)

    def read(self, begun_s: float, now_s: float) -> None:
        self.reads.append(now_s - begun_s)

    def read_at_once(self, now_s: float) -> None:
        self.at_once += 1

    @property
    def counts(self) -> tuple[int, int, int]:
        return len(self.writes), len(self.reads), self.at_once


@asynccontextmanager
async def mirrored(folder: Path) -> AsyncIterator[tuple[Volume, PeerLink]]:
    """A volume whose writes go over a link, to a peer that answers none of them."""
    one, two = await opened()
    two.link.on_writes = lambda writes, last: None
    with disk(folder) as store:
        volume = await volume_on(store, folder)
        volume.start_mirroring(one.link)
        yield volume, one.link
        for end in (one, two):
            end.link.close("the test is over.")


def test_one_request_of_a_kind_is_timed_at_a_time_and_none_is_lost(tmp_path: Path) -> None:
    async def test() -> None:
        async with mirrored(tmp_path) as (volume, link):
            answered: list[int] = []

            def write(number: int) -> None:
                volume.write_batch([(4096 * number, memoryview(b"x" * 512))], lambda errors: answered.append(number))

            def acknowledge(sequence: int) -> None:
                link.handlers[wire.APPLIED](0, sequence, 0, memoryview(b""))

            write(1)
            acknowledge(1)
            told = Told()
            assert not volume.watches_clients
            volume.watch_clients(told, time.monotonic)
            assert volume.watches_clients
            write(2)
            write(3)
            acknowledge(2)  # the other one is not timed
            acknowledge(3)
            write(4)
            write(5)
            acknowledge(5)  # covers the fourth, which is timed
            assert told.counts == (2, 0, 0) and min(told.writes) >= 0
            assert answered == [1, 2, 3, 4, 5]

            assert volume.read_now(4096, 512) == b"x" * 512
            assert told.counts == (2, 0, 1)
            assert volume.read_now(0, 32 << 20) is None  # that is too long to be done at once
            assert await volume.read(4096, 512) == b"x" * 512
            assert told.counts == (2, 1, 1)

            write(6)
            volume.watch_no_clients()
            acknowledge(6)
            assert volume.read_now(0, 512) == await volume.read(0, 512) == bytes(512)
            assert told.counts == (2, 1, 1) and answered[-1] == 6

    run(test)


def test_a_read_counts_for_each_of_its_pieces(tmp_path: Path) -> None:
    """A long one takes longer without being slowed down by anything."""
    clock = iter((1.0, 1.1, 2.0, 2.1))

    async def test() -> None:
        async with mirrored(tmp_path) as (volume, _link):
            told = Told()
            volume.watch_clients(told, lambda: next(clock))
            await volume.read(0, 512)
            await volume.read(0, 1 << 20)
            assert told.reads == pytest.approx([0.1, 0.1 / 8])

    run(test)


def test_with_the_link_the_watching_ends(tmp_path: Path) -> None:
    async def test() -> None:
        async with mirrored(tmp_path) as (volume, link):
            told = Told()
            volume.watch_clients(told, time.monotonic)
            volume.stop_mirroring()
            assert not volume.watches_clients
            assert volume.read_now(0, 512) == bytes(512)
            volume.start_mirroring(link)
            assert not volume.watches_clients and told.counts == (0, 0, 0)

    run(test)
