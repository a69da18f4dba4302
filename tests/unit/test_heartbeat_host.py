"""What the daemon asks of its machine: the watchdog, the log that nothing waits for."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from replica.heartbeat import host
from replica.heartbeat.logs import set_up_logging
from replica.heartbeat.settings import Logging


def test_a_watchdog_is_fed_and_ended_in_good_order(tmp_path: Path) -> None:
    device = tmp_path / "watchdog"
    device.touch()
    watchdog = host.Watchdog(device)
    watchdog.open()
    watchdog.feed()
    watchdog.feed()
    watchdog.close()
    watchdog.close()
    assert device.read_text() == "..V"


def test_a_watchdog_that_is_not_there_or_fails_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    missing = host.Watchdog(tmp_path / "nothing")
    missing.open()
    missing.feed()
    missing.close()
    full = host.Watchdog(Path("/dev/full"))
    full.open()
    full.feed()
    full.close()
    assert [record.message for record in caplog.records] == [
        f"the watchdog {tmp_path}/nothing cannot be used (No such file or directory).",
        "the watchdog /dev/full cannot be written to (No space left on device).",
        "the watchdog /dev/full cannot be ended (No space left on device).",
    ]


@pytest.fixture
def _own_handlers() -> Iterator[None]:
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in root.handlers:
        if handler not in before:
            root.removeHandler(handler)
    logging.getLogger("replica").setLevel(logging.NOTSET)
    logging.getLogger("nbdserver").setLevel(logging.NOTSET)


@pytest.mark.usefixtures("_own_handlers")
def test_a_log_that_takes_nothing_holds_up_nobody(tmp_path: Path) -> None:
    """As one on a disk that is busy with the data: more is said here than a pipe holds, which nobody reads yet."""
    path = tmp_path / "log"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        set_up_logging(Logging(log_file=path), "WARNING")
        for number in range(1000):
            logging.getLogger("replica.heartbeat").warning("%d %s", number, "x" * 200)
        os.set_blocking(reader, True)
        read = b""
        while b" 999 " not in read:
            read = read[-300:] + os.read(reader, 65536)
    finally:
        os.close(reader)


@pytest.mark.usefixtures("_own_handlers")
def test_the_log_is_complete_after_a_flush(tmp_path: Path) -> None:
    set_up_logging(Logging(log_file=tmp_path / "log", debug_file=tmp_path / "no" / "such"), "INFO")
    logging.getLogger("replica.heartbeat").info("hello %s", {"a": 1})
    logging.getLogger().handlers[-1].flush()
    first, second = (tmp_path / "log").read_text().splitlines()
    assert first.endswith("such cannot be written (No such file or directory).")
    assert second.endswith(" INFO hello {'a': 1}")
