"""A TOML file, or what reads like one, as tables whose errors know where they stand: file, line and key."""

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from replica.errors import ReplicaError
from replica.toml_lines import KeyPath, element, find_line, key_lines, path_text

T = TypeVar("T")


class ConfigError(ReplicaError):
    """The configuration (or its secret file) is missing, unreadable or wrong."""


class Document:
    """Settings as tables, and where they stand: makes error messages."""

    def __init__(self, folder: Path, document: dict[str, Any]) -> None:
        self.folder = folder
        self.document = document

    def where(self, key: KeyPath) -> str:
        """ "file:line" of the key, or of what is nearest around it."""
        raise NotImplementedError

    def error(self, key: KeyPath, problem: str) -> ConfigError:
        return ConfigError(f"{self.where(key)}: {path_text(key)}: {problem}")

    def table(self, key: KeyPath, value: object) -> "Table":
        if not isinstance(value, dict):
            raise self.error(key, f"must be a table ([{path_text(key)}]), not {value!r}")
        return Table(self, key, value)

    def resolve(self, path: str) -> Path:
        """A path of the file: relative ones are relative to the file, not to the working directory."""
        return Path(os.path.normpath(self.folder / path))


class ConfigFile(Document):
    """The parsed TOML file and the lines of its keys."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            source = path.read_bytes().decode()
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}): "
                "name the configuration file with --config or $REPLICA_CONFIG"
            ) from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: is not UTF-8 text: a TOML file is needed") from None
        try:
            super().__init__(path.parent, tomllib.loads(source))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(self._syntax_error(str(error), source)) from None
        self.lines = key_lines(source)

    def _syntax_error(self, message: str, source: str) -> str:
        position = re.search(r"\s*\(at (?:line (\d+), column \d+|end of document)\)$", message)
        line = (position and position[1]) or len(source.splitlines())
        problem = message[: position.start()] if position else message
        return f"{self.path}:{line}: is not valid TOML: {problem}"

    def where(self, key: KeyPath) -> str:
        """ "file:line" of the key, or of the nearest table around it."""
        line = find_line(self.lines, key)
        return f"{self.path}:{line}" if line is not None else str(self.path)


class Table:
    """One table of the file with the path of keys that leads to it."""

    def __init__(self, file: Document, key: KeyPath, items: dict[str, Any]) -> None:
        self.file = file
        self.key = key
        self.items = items

    def subtable(self, name: str, missing: str = "") -> "Table":
        """The table ``name`` of this one; ``missing`` says what to do when it is not there."""
        return self.file.table((*self.key, name), self._item(name, missing))

    def tables(self, name: str) -> "list[Table]":
        """The tables of the array ``name``; none when it is not there."""
        value = self.items.get(name, [])
        if not isinstance(value, list):
            raise self.file.error((*self.key, name), f"must be an array of tables, not {value!r}")
        return [self.file.table((*self.key, name, element(number)), item) for number, item in enumerate(value)]

    def error(self, problem: str) -> ConfigError:
        """An error about this table as a whole."""
        return self.file.error(self.key, problem)

    def check_keys(self, known: tuple[str, ...], reserved: tuple[str, ...] = ()) -> None:
        """Refuse what is not in ``known``; ``reserved`` keys have a meaning, in a later version."""
        for name in self.items:
            if name in reserved:
                problem = "is not supported by this version yet: remove it"
                raise self.file.error((*self.key, name), problem)
            if name not in known:
                hint = suggestion(name, known) or f" (known are {', '.join(known)})"
                raise self.file.error((*self.key, name), f"unknown key{hint}")

    def value(self, name: str, parse: Callable[[object], T], missing: str = "") -> T:
        """The checked value of ``name``; ``missing`` says what to do when it is not there."""
        item = self._item(name, missing)
        try:
            return parse(item)
        except ValueError as error:
            raise self.file.error((*self.key, name), str(error)) from None

    def _item(self, name: str, missing: str) -> object:
        if name not in self.items:
            raise self.file.error((*self.key, name), f"is missing: {missing}")
        item: object = self.items[name]
        return item


def suggestion(name: str, known: Iterable[str]) -> str:
    """The words ``, did you mean 'x'?`` for the known name nearest to ``name``; "" when none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean {near[0]!r}?" if near else ""
