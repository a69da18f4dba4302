"""Database clients that commit one transaction after the other, and remember what was answered."""

import contextlib
import subprocess
import threading
from collections.abc import Callable, Sequence

from tests.cluster import ledger
from tests.cluster.cluster import PATIENCE_S
from tests.cluster.ledger import Ledger

#: The text that makes a client commit a transaction: of writer, number, and the checksum that goes with it.
Request = Callable[[int, int, bytes], str]


class _Writer(threading.Thread):
    """One client process: takes a request on its standard input, prints the transaction's number once committed."""

    def __init__(self, writers: "Writers", index: int, command: Sequence[str]) -> None:
        super().__init__(name=f"writer {index}", daemon=True)
        self._writers = writers
        self._index = index
        self.client = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/"
        )
        self.said = ""
        self.start()

    def run(self) -> None:
        stdin, stdout = self.client.stdin, self.client.stdout
        assert stdin is not None and stdout is not None
        with contextlib.suppress(BrokenPipeError):
            while self._writers.going_on:
                number, checksum, request = self._writers.next_request(self._index)
                stdin.write(request)
                stdin.flush()
                answer = stdout.readline()
                if answer.strip() != str(number):  # it failed: it says why and ends
                    self.said = answer
                    break
                self._writers.answered(self._index, number, checksum)
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
        self.said += stdout.read()
        self.client.wait()
        self._writers.ended()


class Writers:
    """A client for each writer of `book`, at work from the start."""

    def __init__(self, book: Ledger, commands: Sequence[Sequence[str]], request: Request) -> None:
        self.going_on = True
        self._book = book
        self._request = request
        self._moved = threading.Condition()
        self._count = 0
        self._alive = len(commands)
        self._writers = [_Writer(self, index, command) for index, command in enumerate(commands)]

    # ── for the test ─────────────────────────────────────────────────────────────────────────────────────────

    def wait_committed(self, more: int) -> None:
        """Until so many more transactions were answered; AssertionError when the clients end or stall before."""
        with self._moved:
            goal = self._count + more
            self._moved.wait_for(lambda: self._count >= goal or not self._alive, PATIENCE_S)
            assert self._count >= goal, f"the clients stopped: {self._words()}"

    def finish(self) -> int:
        """Each client ends after the transaction that it is at; AssertionError unless all went well. How many."""
        self.going_on = False
        self._join()
        statuses = [writer.client.returncode for writer in self._writers]
        assert not any(statuses), f"clients ended with {statuses}: {self._words()}"
        return self._count

    def wait_failed(self) -> int:
        """Until each client has met an error and ended by itself; AssertionError when one hangs. How many commits."""
        self._join()
        statuses = [writer.client.returncode for writer in self._writers]
        assert all(statuses), f"clients ended with {statuses} without a server: {self._words()}"
        return self._count

    def kill(self) -> None:
        """End what still runs, at once (after the file system below was taken down)."""
        self.going_on = False
        for writer in self._writers:
            writer.client.kill()
            writer.join(PATIENCE_S)

    def _join(self) -> None:
        for writer in self._writers:
            writer.join(PATIENCE_S)
            assert not writer.is_alive(), f"{writer.name} hangs: {self._words()}"

    def _words(self) -> str:
        return "; ".join(f"{writer.name}: {writer.said.strip()[-300:]}" for writer in self._writers)

    # ── for the clients' threads ─────────────────────────────────────────────────────────────────────────────

    def next_request(self, index: int) -> tuple[int, bytes, str]:
        """The writer's next transaction: its number, its checksum, what to send."""
        number = self._book.committed[index] + 1
        checksum = ledger.next_checksum(self._book.checksums[index], index, number)
        return number, checksum, self._request(index, number, checksum)

    def answered(self, index: int, number: int, checksum: bytes) -> None:
        """COMMIT has returned."""
        with self._moved:
            self._book.committed[index], self._book.checksums[index] = number, checksum
            self._count += 1
            self._moved.notify_all()

    def ended(self) -> None:
        """A client is gone."""
        with self._moved:
            self._alive -= 1
            self._moved.notify_all()
