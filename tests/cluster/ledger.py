"""What database clients write in the tests, and what a database must hold afterwards: pure, the same for each engine.

Each writer `w` commits its transactions n = 1, 2, 3, … one after the other. Each puts a payload made of (w, n) into the
table `entry`, the payload's digest into the table `mirror`, and n and a running checksum of all its digests into the
writer's row of the table `ledger`. So a lost transaction, half a transaction, and one that nobody made all show.
"""

import hashlib
import random
from collections.abc import Iterable

_DIGEST_BYTES = 32
_MAX_PAYLOAD_BYTES = 3000


def payload(writer: int, number: int) -> bytes:
    """What transaction `number` of this writer stores."""
    rng = random.Random(writer << 32 | number)
    return rng.randbytes(rng.randint(1, _MAX_PAYLOAD_BYTES))


def digest(writer: int, number: int) -> bytes:
    """The digest of its payload."""
    return hashlib.sha256(payload(writer, number)).digest()


def next_checksum(checksum: bytes, writer: int, number: int) -> bytes:
    """The running checksum after transaction `number`, from the one before it."""
    return hashlib.sha256(checksum + digest(writer, number)).digest()


#: The running checksum of a writer that has committed nothing.
EMPTY = bytes(_DIGEST_BYTES)


class Ledger:
    """What was committed, as far as the clients know: for each writer the last transaction that was answered."""

    def __init__(self, writers: int) -> None:
        self.committed = [0] * writers
        self.checksums = [EMPTY] * writers

    def check(self, dump: Iterable[str]) -> int:
        """Compare a database's content with it, and take over from there; how many were there though unanswered.

        `dump` has the rows of the three tables, sorted by writer and number, as lines "table|writer|number|digest in
        hexadecimal", where an entry's digest was made of the payload that was read. AssertionError says what is wrong.
        """
        tables: dict[str, list[list[bytes]]] = {
            name: [[] for _ in self.committed] for name in ("entry", "mirror", "ledger")
        }
        totals = [0] * len(self.committed)
        for line in dump:
            table, writer_text, number_text, found = line.split("|")
            writer, number = int(writer_text), int(number_text)
            if table == "ledger":
                totals[writer] = number
            else:
                expected = len(tables[table][writer]) + 1
                assert number == expected, f"{table}: transaction {expected} of writer {writer} is missing"
            tables[table][writer].append(bytes.fromhex(found))
        surplus = 0
        for writer, answered in enumerate(self.committed):
            surplus += self._check_writer(
                writer, answered, totals[writer], {name: tables[name][writer] for name in tables}
            )
        return surplus

    def _check_writer(self, writer: int, answered: int, total: int, rows: dict[str, list[bytes]]) -> int:
        # Writers wait for each answer, so that at most one transaction was under way.
        assert answered <= total <= answered + 1, (
            f"writer {writer} had {answered} transactions committed, and the ledger has {total}"
        )
        for table in ("entry", "mirror"):
            assert len(rows[table]) == total, f"{table}: {len(rows[table])} rows of writer {writer}, not {total}"
        checksum = EMPTY
        for number in range(1, total + 1):
            wanted = digest(writer, number)
            for table in ("entry", "mirror"):
                assert rows[table][number - 1] == wanted, f"{table}: transaction {number} of writer {writer} is damaged"
            checksum = hashlib.sha256(checksum + wanted).digest()
        assert rows["ledger"] == [checksum], f"the running checksum of writer {writer} is wrong"
        self.committed[writer], self.checksums[writer] = total, checksum
        return total - answered
