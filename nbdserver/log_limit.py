"""Keeps clients from filling the log: of lines that are alike, only some in a while are written."""

import logging

_WINDOW_S = 10.0
_LINES = 20


class FewAlike(logging.Filter):
    """Lets `lines` records of the same message (whatever its arguments) pass in `window_s` seconds.

    The first one of the next window says how many were left out.
    """

    def __init__(self, lines: int = _LINES, window_s: float = _WINDOW_S) -> None:
        super().__init__()
        self._lines = lines
        self._window_s = window_s
        self._seen: dict[str, tuple[float, int]] = {}  # when the window began, and how many there were

    def filter(self, record: logging.LogRecord) -> bool:
        message = str(record.msg)  # a template of the program's: there are only so many
        began_s, count = self._seen.get(message, (record.created, 0))
        if record.created - began_s >= self._window_s:
            if count > self._lines:
                record.msg = f"{message} (and {count - self._lines} more like this before it)"
            began_s, count = record.created, 0
        self._seen[message] = (began_s, count + 1)
        return count < self._lines


def limit_log() -> None:
    """For programs, once, after they have set up logging: what clients cause is limited."""
    logging.getLogger("nbdserver").addFilter(FewAlike())
