"""A client of an SQLite database, as a process of its own: it must be able to die, or hang, with the file system.

`python -m tests.cluster.sqlite_client FILE create MODE WRITERS` makes the tables; `… FILE write WRITER` commits a
transaction for each "number checksum" that it reads from standard input, and prints the number once it is committed;
`… FILE dump` checks the database's integrity and prints it as `Ledger.check` wants it.
"""

import hashlib
import sqlite3
import sys
from pathlib import Path

from tests.cluster import ledger

#: Exit status when the file system or the database reports an error.
FAILED = 3
_BUSY_TIMEOUT_S = 60.0
_TABLES = """
    CREATE TABLE entry (writer INTEGER, number INTEGER, payload BLOB, PRIMARY KEY (writer, number));
    CREATE TABLE mirror (writer INTEGER, number INTEGER, digest BLOB, PRIMARY KEY (writer, number)) WITHOUT ROWID;
    CREATE TABLE ledger (writer INTEGER PRIMARY KEY, number INTEGER, checksum BLOB);
"""


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
    # FULL, and with a rollback journal also the removal of that is made durable: SQLite does not promise that the last
    # commit outlives a power cut without it.
    connection.execute("PRAGMA synchronous = EXTRA")
    return connection


def _create(path: Path, mode: str, writers: int) -> None:
    connection = _open(path)
    connection.execute(f"PRAGMA journal_mode = {mode}")
    connection.executescript(_TABLES)
    connection.executemany("INSERT INTO ledger VALUES (?, 0, ?)", [(writer, ledger.EMPTY) for writer in range(writers)])
    connection.close()


def _write(path: Path, writer: int) -> None:
    connection = _open(path)
    for line in sys.stdin:
        number_text, checksum = line.split()
        number = int(number_text)
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO entry VALUES (?, ?, ?)", (writer, number, ledger.payload(writer, number)))
        connection.execute("INSERT INTO mirror VALUES (?, ?, ?)", (writer, number, ledger.digest(writer, number)))
        row = (number, bytes.fromhex(checksum), writer, number - 1)
        changed = connection.execute("UPDATE ledger SET number = ?, checksum = ? WHERE writer = ? AND number = ?", row)
        assert changed.rowcount == 1, "the ledger is not where it should be"
        connection.execute("COMMIT")
        print(number, flush=True)
    connection.close()


def _dump(path: Path) -> None:
    connection = _open(path)
    problems = connection.execute("PRAGMA integrity_check").fetchall()
    if problems != [("ok",)]:
        raise sqlite3.DatabaseError(f"integrity_check: {problems[:5]}")
    for writer, number, content in connection.execute("SELECT * FROM entry ORDER BY writer, number"):
        print(f"entry|{writer}|{number}|{hashlib.sha256(content).hexdigest()}")
    for table in ("mirror", "ledger"):
        for writer, number, content in connection.execute(f"SELECT * FROM {table} ORDER BY writer, number"):
            print(f"{table}|{writer}|{number}|{content.hex()}")
    connection.close()


def main() -> int:
    path, action = Path(sys.argv[1]), sys.argv[2]
    try:
        if action == "create":
            _create(path, sys.argv[3], int(sys.argv[4]))
        elif action == "write":
            _write(path, int(sys.argv[3]))
        else:
            _dump(path)
    except sqlite3.Error as error:
        print(f"{action}: {error}", file=sys.stderr)
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
