"""Where the keys of a TOML text stand, so that an error can name the line (``tomllib`` does not tell).

Pure. This is a help for messages, not a second parser: the text has already been accepted by ``tomllib``, and
a key that is not found here (inside an inline table, say) is reported at its nearest parent.
"""

import re

KeyPath = tuple[str, ...]

_KEY_PART = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'([^']*)'|([A-Za-z0-9_-]+))\s*""")
_MULTI_LINE_QUOTES = ('"""', "'''")


def key_lines(text: str) -> dict[KeyPath, int]:
    """Map every table and key of ``text`` to its line number (from 1), as paths of plain names."""
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    open_quotes: str | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if open_quotes is not None:
            if open_quotes in line:
                open_quotes = None
            continue
        stripped = line.strip()
        if stripped.startswith("["):
            header = _dotted_key(stripped.lstrip("["))
            if header is not None and header[1].startswith("]"):
                table = header[0]
                _note(lines, (), table, number)
            continue
        key = _dotted_key(stripped)
        if key is not None and key[1].startswith("="):
            _note(lines, table, key[0], number)
        open_quotes = next((quotes for quotes in _MULTI_LINE_QUOTES if line.count(quotes) % 2), None)
    return lines


def find_line(lines: dict[KeyPath, int], path: KeyPath) -> int | None:
    """The line of ``path`` or, when it has none of its own, of the nearest table around it."""
    while path:
        if path in lines:
            return lines[path]
        path = path[:-1]
    return None


def _note(lines: dict[KeyPath, int], table: KeyPath, key: KeyPath, number: int) -> None:
    for length in range(1, len(key) + 1):
        lines.setdefault(table + key[:length], number)


def _dotted_key(text: str) -> tuple[KeyPath, str] | None:
    """Split ``a."b c".d = 1`` into ``(("a", "b c", "d"), "= 1")``; None when it does not start with a key."""
    parts: list[str] = []
    position = 0
    while match := _KEY_PART.match(text, position):
        basic, literal, bare = match.groups()
        parts.append(next(part for part in (basic, literal, bare) if part is not None))
        position = match.end()
        if not text.startswith(".", position):
            return tuple(parts), text[position:]
        position += 1
    return None
