"""Where the daemon's log goes: standard error, and as ha.cf (or the TOML file) says."""

import logging
import logging.handlers
import os
import sys

from replica.heartbeat.settings import Logging

_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def set_up_logging(settings: Logging, level: str) -> None:
    """Standard error at `level`; the debug file gets everything. A file that cannot be written is said, not fatal."""
    under_systemd = "JOURNAL_STREAM" in os.environ
    root = logging.getLogger()
    root.setLevel(logging.DEBUG if settings.debug_file is not None else level)
    stderr = logging.StreamHandler(sys.stderr)
    stderr.setFormatter(logging.Formatter("%(levelname)s %(message)s" if under_systemd else _FORMAT))
    stderr.setLevel(level)
    root.addHandler(stderr)
    for path, file_level in ((settings.log_file, level), (settings.debug_file, "DEBUG")):
        if path is None:
            continue
        try:
            # (It is found again after logrotate has moved it.)
            handler: logging.Handler = logging.handlers.WatchedFileHandler(path)
        except OSError as error:
            logging.getLogger("replica.heartbeat").warning("%s cannot be written (%s).", path, error.strerror)
            continue
        handler.setFormatter(logging.Formatter(_FORMAT))
        handler.setLevel(file_level)
        root.addHandler(handler)
    if settings.facility is not None and os.path.exists("/dev/log"):
        syslog = logging.handlers.SysLogHandler("/dev/log", settings.facility)
        syslog.setFormatter(logging.Formatter("replica-heartbeat: %(levelname)s %(message)s"))
        syslog.setLevel(level)
        root.addHandler(syslog)
