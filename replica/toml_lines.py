"""Where the keys of a TOML text stand, so that an error can name the line (``tomllib`` does not tell).

Pure. This is a help for messages, not a second parser: the text has already been accepted by ``tomllib``. A part of a
path that is not found is reported at what is around it.
"""

import re
import tomllib
from typing import Final

#: Names of tables and keys; the elements of an array are "[1]", "[2]", …
KeyPath = tuple[str, ...]

_SPACE: Final = re.compile(r"[ \t]*")
_SPACE_AND_LINES: Final = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_KEY_PART: Final = re.compile(r"""[ \t]*(?:"((?:[^"\\\n]|\\.)*)"|'([^'\n]*)'|([A-Za-z0-9_-]+))[ \t]*""")
_STRING: Final = re.compile(
    r'"""(?:[^"\\]|\\.|"(?!""))*"{3,5}' r"|'''(?:[^']|'(?!''))*'{3,5}" r'|"(?:[^"\\\n]|\\.)*"' r"|'[^'\n]*'", re.DOTALL
)
_OTHER_VALUE: Final = re.compile(r"[^,\]}#\n]*")


def element(number: int) -> str:
    """The part of a path for the element `number`, from 0, of an array."""
    return f"[{number + 1}]"


def path_text(path: KeyPath) -> str:
    """As messages have it: "group[2].resources[1].ip"."""
    return ".".join(path).replace(".[", "[")


def key_lines(text: str) -> dict[KeyPath, int]:
    """Map every table, key and element of an array of ``text`` to its line number (from 1)."""
    return _Scan(text).lines


def find_line(lines: dict[KeyPath, int], path: KeyPath) -> int | None:
    """The line of ``path`` or, when it has none of its own, of the nearest table around it."""
    while path:
        if path in lines:
            return lines[path]
        path = path[:-1]
    return None


def _unescaped(basic: str) -> str:
    text: str = tomllib.loads(f'key = "{basic}"')["key"] if "\\" in basic else basic
    return text


class _Scan:
    """One pass over a text that is valid."""

    def __init__(self, text: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._text = text
        self._at = 0
        self._counted = 0, 1  # up to here this is the number of the line
        self._sizes: dict[KeyPath, int] = {}  # of arrays of tables
        table: KeyPath = ()
        while self._skip(_SPACE_AND_LINES):
            if self._takes("[["):
                table = self._array_table(self._key())
                self._takes("]]")
            elif self._takes("["):
                table = self._header(self._key())
                self._takes("]")
            else:
                self._assignment(table)

    def _assignment(self, table: KeyPath) -> None:
        key = self._key()
        self._note(table, key)
        self._takes("=")
        self._value(table + key)

    def _array_table(self, key: KeyPath) -> KeyPath:
        array = self._header(key[:-1]) + key[-1:]
        self._note((), array)
        number = self._sizes.get(array, 0)
        self._sizes[array] = number + 1
        path = (*array, element(number))
        self._note((), path)
        return path

    def _header(self, key: KeyPath) -> KeyPath:
        """The path of a table's header: under an array of tables it means the last one of them."""
        path: KeyPath = ()
        for part in key:
            path = (*path, part)
            if path in self._sizes:
                path = (*path, element(self._sizes[path] - 1))
        self._note((), path)
        return path

    def _key(self) -> KeyPath:
        """A dotted key; one that cannot be read is skipped with its line."""
        parts: list[str] = []
        while match := _KEY_PART.match(self._text, self._at):
            basic, literal, bare = match.groups()
            parts.append(
                _unescaped(basic) if basic is not None else next(part for part in (literal, bare) if part is not None)
            )
            self._at = match.end()
            if not self._takes("."):
                return tuple(parts)
        end = self._text.find("\n", self._at)
        self._at = len(self._text) if end < 0 else end
        return tuple(parts)

    def _value(self, path: KeyPath) -> None:
        self._skip(_SPACE)
        if self._takes("["):
            self._array(path)
        elif self._takes("{"):
            while self._skip(_SPACE_AND_LINES) and not self._takes("}"):
                self._assignment(path)
                self._skip(_SPACE_AND_LINES)
                self._takes(",")
        elif not self._skip_match(_STRING):
            self._skip_match(_OTHER_VALUE)

    def _array(self, path: KeyPath) -> None:
        number = 0
        while self._skip(_SPACE_AND_LINES) and not self._takes("]"):
            self._note(path, (element(number),))
            self._value((*path, element(number)))
            self._skip(_SPACE_AND_LINES)
            self._takes(",")
            number += 1

    def _note(self, table: KeyPath, key: KeyPath) -> None:
        position, line = self._counted
        line += self._text.count("\n", position, self._at)
        self._counted = self._at, line
        for length in range(1, len(key) + 1):
            self.lines.setdefault(table + key[:length], line)

    def _takes(self, sign: str) -> bool:
        found = self._text.startswith(sign, self._at)
        self._at += len(sign) * found
        return found

    def _skip(self, pattern: re.Pattern[str]) -> bool:
        """Skip what matches; whether anything follows."""
        self._skip_match(pattern)
        return self._at < len(self._text)

    def _skip_match(self, pattern: re.Pattern[str]) -> bool:
        match = pattern.match(self._text, self._at)
        if match is None:
            return False
        self._at = match.end()
        return True
