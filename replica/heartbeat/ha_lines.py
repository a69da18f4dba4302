"""The lines of Heartbeat's files, as a person reads them: pasted no-break spaces are spaces, `#` begins a comment."""

import re
from pathlib import Path
from typing import Final, NamedTuple

from replica.config_file import ConfigError

_MAX_BYTES: Final = 1 << 20
_COMMENT: Final = re.compile(r"(?:^|\s)#.*")


class Line(NamedTuple):
    """A line that says something; ``where`` is "file:line" of its first part."""

    where: str
    words: tuple[str, ...]


def read_lines(path: Path) -> list[Line]:
    """Those that are not empty. A backslash at the end of a line continues it. ConfigError when it cannot be read."""
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): name the directory with --ha-dir") from None
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path}: is longer than {_MAX_BYTES} bytes: is it one of Heartbeat's files?")
    lines: list[Line] = []
    words: list[str] = []
    where = ""
    # Comments may be in any encoding; what counts is checked, word by word.
    for number, text in enumerate(data.decode("utf-8-sig", errors="replace").split("\n"), start=1):
        text = _COMMENT.sub("", text).strip()
        continued = text.endswith("\\")
        if not words:
            where = f"{path}:{number}"
        words += text.removesuffix("\\").split()
        if words and not continued:
            lines.append(Line(where, tuple(words)))
            words = []
    if words:
        lines.append(Line(where, tuple(words)))
    return lines
