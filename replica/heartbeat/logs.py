"""Where the daemon's log goes: standard error, and as ha.cf (or the TOML file) says."""

import contextlib
import logging
import logging.handlers
import os
import queue
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, Final

from replica.heartbeat.settings import Logging

_FORMAT = "%(asctime)s %(levelname)s %(message)s"
_OURS = ("replica", "nbdserver")


#: What waits to be written; more is left out.
_MOST_WAITING: Final = 10_000
#: How long the end of the program waits for it.
_FLUSH_S: Final = 2.0


class _InTheBackground(logging.handlers.QueueHandler):
    """Writes in a thread: a log on a disk that is busy with the data, or whose reader is stopped, must not delay a
    heartbeat.
    """

    def __init__(self, handlers: Sequence[logging.Handler]) -> None:
        self._waiting: queue.Queue[logging.LogRecord | threading.Event] = queue.Queue(_MOST_WAITING)
        super().__init__(self._waiting)
        self._handlers = handlers
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def enqueue(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(record)

    def flush(self) -> None:
        """Wait until all is written, but not for ever."""
        written = threading.Event()
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(written)
            written.wait(_FLUSH_S)

    def _write(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are for those who wait for them
        while True:
            record = self._waiting.get()
            if isinstance(record, threading.Event):
                record.set()
                continue
            for handler in self._handlers:
                if record.levelno >= handler.level:
                    handler.handle(record)


def set_up_logging(settings: Logging, level: str) -> None:
    """Standard error at `level`; the debug file gets everything. A file that cannot be written is said, not fatal."""
    under_systemd = "JOURNAL_STREAM" in os.environ
    root, handlers = logging.getLogger(), list[logging.Handler]()
    problems: list[tuple[Any, ...]] = []
    for name in _OURS:
        # (What libraries have to say for their own debugging is not part of it.)
        logging.getLogger(name).setLevel(logging.DEBUG if settings.debug_file is not None else level)
    stderr = logging.StreamHandler(sys.stderr)
    stderr.setFormatter(logging.Formatter("%(levelname)s %(message)s" if under_systemd else _FORMAT))
    stderr.setLevel(level)
    handlers.append(stderr)
    for path, file_level in ((settings.log_file, level), (settings.debug_file, "DEBUG")):
        if path is None:
            continue
        try:
            # (It is found again after logrotate has moved it.)
            handler: logging.Handler = logging.handlers.WatchedFileHandler(path)
        except OSError as error:
            problems.append(("%s cannot be written (%s).", path, error.strerror))
            continue
        handler.setFormatter(logging.Formatter(_FORMAT))
        handler.setLevel(file_level)
        handlers.append(handler)
    if settings.facility is not None and os.path.exists("/dev/log"):
        syslog = logging.handlers.SysLogHandler("/dev/log", settings.facility)
        syslog.setFormatter(logging.Formatter("replica-heartbeat: %(levelname)s %(message)s"))
        syslog.setLevel(level)
        handlers.append(syslog)
    root.addHandler(_InTheBackground(handlers))
    for problem in problems:
        logging.getLogger("replica.heartbeat").warning(*problem)
