"""Writes that can be told apart, and the check that none which was acknowledged is missing.

Every write fills one block with its own number, so that reading a block tells which write it holds. The `Ledger`
knows of each block which write was acknowledged last, and which one was under way when a connection ended: that one
may be there or not, the acknowledged one may be followed by it but never be missing.
"""

import random
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nbdserver import constants as c
from replica.demo.nbd_client import NbdClient, NbdLost, NbdRefused, Reply

BLOCK_BYTES = 4096
_STAMP = struct.Struct("<QQ")
_RETRY_S = 0.02
_GIVE_UP_S = 30.0


class DataLost(Exception):
    """A block holds neither what was acknowledged nor what was under way."""


def content(number: int, block: int) -> bytes:
    """What write ``number`` puts into ``block``; number 0 is a block never written."""
    return _STAMP.pack(number, block) * (BLOCK_BYTES // _STAMP.size) if number else bytes(BLOCK_BYTES)


class Ledger:
    """What the client knows of every block it wrote."""

    def __init__(self) -> None:
        self.acknowledged: dict[int, int] = {}  # block → number of the last acknowledged write
        self.under_way: dict[int, int] = {}  # block → number of a write without an answer
        self.acknowledged_count = 0
        self._number = 0

    def begin(self, block: int) -> bytes:
        """A write to ``block`` (that has none under way) begins; returns its content."""
        self._number += 1
        self.under_way[block] = self._number
        return content(self._number, block)

    def end(self, block: int) -> None:
        """The write to ``block`` was acknowledged."""
        self.acknowledged[block] = self.under_way.pop(block)
        self.acknowledged_count += 1

    def blocks(self) -> list[int]:
        """Every block that was ever written or begun."""
        return sorted(self.acknowledged.keys() | self.under_way.keys())

    def settle(self, block: int, data: bytes) -> bool:
        """Compare what was read; from now on that is the block's content.

        True when a write that was under way turned out to have arrived; raises `DataLost`.
        """
        acknowledged, under_way = self.acknowledged.get(block, 0), self.under_way.pop(block, None)
        if data == content(acknowledged, block):
            return False
        if under_way is not None and data == content(under_way, block):
            self.acknowledged[block] = under_way
            return True
        found, where = _STAMP.unpack_from(data)
        raise DataLost(
            f"block {block} has to hold write {acknowledged}"
            + (f" or {under_way}" if under_way is not None else "")
            + f" and holds something else (it begins like write {found} to block {where})"
        )


class Writer:
    """Writes blocks at random places of some regions, many at a time, over one connection after the other."""

    def __init__(self, ledger: Ledger, rng: random.Random, depth: int) -> None:
        self.ledger = ledger
        self.longest_pause_s = 0.0
        self.reconnects = 0
        self._rng = rng
        self._depth = depth
        self._blocks: dict[int, int] = {}  # cookie → block
        self._last_answer_s = time.monotonic()

    def write(self, client: NbdClient, blocks: Sequence[int], until: Callable[[], bool]) -> None:
        """Write to random ones of ``blocks`` until ``until()``, then wait for the answers; raises `NbdLost`.

        ``until`` is asked while writes are under way: they were sent, and their answers not read yet.
        """
        self._blocks.clear()
        stopping = False
        while not stopping or client.in_flight:
            while not stopping and len(client.in_flight) < self._depth:
                self._start(client, self._rng.choice(blocks))
            client.send()
            stopping = stopping or until()
            if client.in_flight:
                self._take(client.receive())

    def write_anywhere(
        self, paths: Sequence[Path], export: str, blocks: Sequence[int], until: Callable[[], bool]
    ) -> None:
        """Write until ``until()``, to whichever of the servers serves, as a client of a cluster address does.

        A connection that ends, or a server that says it shuts down, costs a pause: what has no answer is sent again.
        """
        self._last_answer_s = time.monotonic()
        deadline_s = self._last_answer_s + _GIVE_UP_S
        while not until():
            client = self._open_any(paths, export, deadline_s)
            try:
                self._send_again(client)
                self.write(client, blocks, until)
                client.disconnect()
            except NbdLost:
                client.close()
                self.reconnects += 1
                deadline_s = time.monotonic() + _GIVE_UP_S

    def _open_any(self, paths: Sequence[Path], export: str, deadline_s: float) -> NbdClient:
        refusal = "nobody answers"
        while time.monotonic() < deadline_s:
            for path in paths:
                try:
                    return NbdClient.connect(path, export)
                except (NbdRefused, NbdLost, OSError) as error:
                    refusal = str(error)
            time.sleep(_RETRY_S)  # as real clients do: there is nothing to wait for but the server
        raise NbdLost(f"no server could be used for {_GIVE_UP_S:.0f} s: {refusal}")

    def _send_again(self, client: NbdClient) -> None:
        self._blocks.clear()
        for block, number in self.ledger.under_way.items():
            self._blocks[client.start_write(block * BLOCK_BYTES, content(number, block))] = block
        while client.in_flight:
            self._take(client.receive())

    def _start(self, client: NbdClient, block: int) -> None:
        if block not in self.ledger.under_way:  # two writes to one block at once would have no order
            data = self.ledger.begin(block)
            self._blocks[client.start_write(block * BLOCK_BYTES, data)] = block

    def _take(self, replies: Sequence[Reply]) -> None:
        now_s = time.monotonic()
        self.longest_pause_s = max(self.longest_pause_s, now_s - self._last_answer_s)
        self._last_answer_s = now_s
        shutting_down = False
        for reply in replies:
            if reply.error == c.ESHUTDOWN:
                shutting_down = True
            elif reply.error:
                raise OSError(reply.error, "a write was answered with an error")
            else:
                self.ledger.end(self._blocks[reply.cookie])
        if shutting_down:
            raise NbdLost("the server shuts down")


def verify(client: NbdClient, ledger: Ledger, depth: int = 64) -> int:
    """Read every block of the ledger back and compare; returns how many writes under way had arrived.

    Raises `DataLost`.
    """
    arrived = 0
    waiting = ledger.blocks()
    blocks: dict[int, int] = {}
    while waiting or client.in_flight:
        while waiting and len(client.in_flight) < depth:
            block = waiting.pop()
            blocks[client.start_read(block * BLOCK_BYTES, BLOCK_BYTES)] = block
        for reply in client.receive():
            if reply.error:
                raise OSError(reply.error, "a read was answered with an error")
            arrived += ledger.settle(blocks.pop(reply.cookie), reply.data)
    return arrived
