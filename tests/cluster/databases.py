"""The databases that the tests drive, both with the tables of `ledger`: SQLite and PostgreSQL, in a given folder."""

import contextlib
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from tests.cluster import ledger
from tests.cluster.cluster import PATIENCE_S
from tests.cluster.mounted import run
from tests.cluster.writers import Writers

_ROOT = Path(__file__).resolve().parents[2]


class Database(Protocol):
    """A database whose files are in a folder on the file system under test."""

    def create(self, writers: int) -> None:
        """Make it, with its tables, on an empty file system."""

    def start(self) -> None:
        """Bring it up; it repairs itself after a crash."""

    def write(self, book: ledger.Ledger) -> Writers:
        """Set clients to work on it."""

    def dump(self) -> list[str]:
        """Check its integrity, and give its content as `Ledger.check` wants it."""

    def stop(self) -> None:
        """Bring it down in order."""

    def crashed(self) -> None:
        """Its file system is gone: wait for the end of what ran, or end it."""


class SQLite:
    """A file, with a rollback journal ("DELETE") or a write-ahead log ("WAL")."""

    def __init__(self, folder: Path, mode: str) -> None:
        self._file = folder / "ledger.sqlite"
        self._mode = mode

    def _client(self, *arguments: str) -> list[str]:
        command = [sys.executable, "-m", "tests.cluster.sqlite_client", str(self._file), *arguments]
        return ["env", f"PYTHONPATH={_ROOT}", *command]

    def create(self, writers: int) -> None:
        run(*self._client("create", self._mode, str(writers)))

    def start(self) -> None:
        """The next client that opens the file repairs it."""

    def write(self, book: ledger.Ledger) -> Writers:
        commands = [self._client("write", str(writer)) for writer in range(len(book.committed))]
        return Writers(book, commands, lambda _, number, checksum: f"{number} {checksum.hex()}\n")

    def dump(self) -> list[str]:
        return run(*self._client("dump")).splitlines()

    def stop(self) -> None:
        """Nothing runs."""

    def crashed(self) -> None:
        """The clients are all there is."""


_TABLES = """
    CREATE TABLE entry (writer int, number int, payload bytea, PRIMARY KEY (writer, number));
    CREATE TABLE mirror (writer int, number int, digest bytea, PRIMARY KEY (writer, number));
    CREATE TABLE ledger (writer int PRIMARY KEY, number int, checksum bytea);
    CREATE EXTENSION amcheck;
"""
_DUMP = """
    SELECT 'entry', writer, number, encode(sha256(payload), 'hex') FROM entry ORDER BY writer, number;
    SELECT 'mirror', writer, number, encode(digest, 'hex') FROM mirror ORDER BY writer, number;
    SELECT 'ledger', writer, number, encode(checksum, 'hex') FROM ledger ORDER BY writer;
"""
#: Every index against its table, and pages against their checksums as they are read.
_INTEGRITY = """
    SELECT bt_index_parent_check(indexrelid, true, true) FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
    WHERE relam = (SELECT oid FROM pg_am WHERE amname = 'btree');
"""
_SETTINGS = {
    "listen_addresses": "",
    "restart_after_crash": "off",  # a server whose disk is gone ends
    "shared_buffers": "4MB",  # small, so that pages go to the disk and come from it
    "max_wal_size": "8MB",
    "min_wal_size": "2MB",
}


class PostgreSQL:
    """A server of its own, without network, run by an unprivileged user."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._data = folder / "postgresql"
        self._scratch = scratch / "postgresql"
        self._log = scratch / "postgresql.log"
        self._bin = _need_postgresql()
        self._user = _unprivileged_user()
        self._server: subprocess.Popen[bytes] | None = None
        scratch.chmod(0o711)
        self._scratch.mkdir()
        shutil.chown(self._scratch, self._user)

    def _psql(self, *options: str) -> list[str]:
        settings = ["-v", "ON_ERROR_STOP=1", "-qAt", "-F|", "-h", str(self._scratch), "-U", self._user, "postgres"]
        return ["setpriv", "--reuid", self._user, "--clear-groups", str(self._bin / "psql"), "-X", *settings, *options]

    def create(self, writers: int) -> None:
        self._data.mkdir()
        shutil.chown(self._data, self._user)
        options = ["--auth=trust", "--data-checksums", "--wal-segsize=1", "--no-sync", "--locale=C", "--encoding=UTF8"]
        run(self._bin / "initdb", *options, self._data, user=self._user)
        run("sync", "--file-system", self._data)
        self.start()
        rows = "".join(
            f"INSERT INTO ledger VALUES ({writer}, 0, '\\x{ledger.EMPTY.hex()}');" for writer in range(writers)
        )
        run(*self._psql(), stdin=_TABLES + rows)
        self.stop()

    def start(self) -> None:
        """Returns when the server, after its recovery, takes clients; AssertionError with its log otherwise."""
        notify_path = self._scratch / "notify"
        settings = {**_SETTINGS, "unix_socket_directories": str(self._scratch)}
        command = [self._bin / "postgres", "-D", self._data]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, self._log.open("ab") as log:
            notify_path.unlink(missing_ok=True)
            notify.bind(str(notify_path))
            notify_path.chmod(0o777)
            environment = {**os.environ, "NOTIFY_SOCKET": str(notify_path)}
            self._server = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, user=self._user, extra_groups=[], cwd="/"
            )
            with _exit_of(self._server) as exit_fd:
                ready: list[object] = []
                while notify not in ready:
                    ready, _, _ = select.select([notify, exit_fd], [], [], PATIENCE_S)
                    if notify in ready and b"READY=1" not in notify.recv(4096):
                        ready = []
                        continue
                    assert notify in ready, f"PostgreSQL does not start:\n{self._last_words()}"

    def write(self, book: ledger.Ledger) -> Writers:
        return Writers(book, [self._psql() for _ in book.committed], _postgresql_request)

    def dump(self) -> list[str]:
        run(*self._psql(), stdin=_INTEGRITY)
        return run(*self._psql(), stdin=_DUMP).splitlines()

    def stop(self) -> None:
        assert self._server is not None
        self._server.send_signal(signal.SIGINT)  # "fast": clients are disconnected
        status = self._server.wait(PATIENCE_S)
        self._server = None
        assert status == 0, f"PostgreSQL ended with {status}:\n{self._last_words()}"

    def crashed(self) -> None:
        if self._server is None:
            return
        # It has met EIO and is about to end, or has had nothing to write so far.
        self._server.send_signal(signal.SIGQUIT)
        try:
            self._server.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._server.kill()  # its children notice that they are orphans
            raise AssertionError(f"PostgreSQL does not end:\n{self._last_words()}") from None
        finally:
            self._server = None

    def _last_words(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])


def _postgresql_request(writer: int, number: int, checksum: bytes) -> str:
    content, digest = ledger.payload(writer, number).hex(), ledger.digest(writer, number).hex()
    # What the last statement prints comes only after COMMIT has returned.
    return (
        "BEGIN;"
        f"INSERT INTO entry VALUES ({writer}, {number}, '\\x{content}');"
        f"INSERT INTO mirror VALUES ({writer}, {number}, '\\x{digest}');"
        f"UPDATE ledger SET number = {number}, checksum = '\\x{checksum.hex()}'"
        f" WHERE writer = {writer} AND number = {number - 1};"
        f"COMMIT; SELECT {number};\n"
    )


def _need_postgresql() -> Path:
    found = shutil.which("postgres")
    candidates: Sequence[Path] = (
        [Path(found).resolve()] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    )
    if not candidates:
        pytest.skip("postgres is not installed (Debian package postgresql)")
    return candidates[-1].parent


def _unprivileged_user() -> str:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@contextlib.contextmanager
def _exit_of(process: "subprocess.Popen[bytes]") -> Iterator[int]:
    descriptor = os.pidfd_open(process.pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
