"""Heartbeat's file `authkeys`: which key signs heartbeats."""

import re
from pathlib import Path
from typing import Final

from replica.config_file import ConfigError, suggestion
from replica.heartbeat.settings import Auth, AuthMethod
from replica.private_file import read_private_file

_MAX_BYTES: Final = 64 << 10
_SHORT_KEY_BYTES: Final = 16
_MAX_NUMBER: Final = 15
#: Of white space, no-break spaces are some: pasted text has them.
_COMMENT: Final = re.compile(r"(?:^|\s)#.*")


def read_authkeys(path: Path) -> tuple[Auth, list[str]]:
    """The key that is chosen there, and warnings. ConfigError, also when others may read the file."""
    form = 'write "auth 1" and, below it, "1 sha256 KEY", the same on both nodes, and run `chmod 600`'
    try:
        data = read_private_file(path, _MAX_BYTES, form)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path}: is longer than {_MAX_BYTES} bytes: {form}")
    # Keys are bytes, whatever their encoding.
    lines = data.removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape").split("\n")
    chosen: tuple[int, str] | None = None
    keys: dict[int, tuple[str, Auth, list[str]]] = {}
    for line_number, line in enumerate(lines, start=1):
        words = _COMMENT.sub("", line).split()
        where = f"{path}:{line_number}"
        if not words:
            continue
        if words[0] == "auth":
            if chosen is not None:
                raise ConfigError(f"{where}: auth: is there twice: keep one of them")
            chosen = _number(where, words[1:2]), where
        else:
            number = _number(where, words[:1])
            if number in keys:
                raise ConfigError(f"{where}: key {number} is there twice ({keys[number][0]}): keep one of them")
            keys[number] = (where, *_key(where, number, words[1:]))
    if chosen is None:
        raise ConfigError(f'{path}: no line says which key is used: write "auth 1", say')
    if chosen[0] not in keys:
        raise ConfigError(f'{chosen[1]}: auth: there is no key {chosen[0]}: write "{chosen[0]} sha256 KEY"')
    _, auth, warnings = keys[chosen[0]]
    return auth, warnings


def _number(where: str, words: list[str]) -> int:
    if not (words and re.fullmatch("[0-9]{1,2}", words[0]) and 1 <= int(words[0]) <= _MAX_NUMBER):
        found = f", not {_shown(words[0])!r}" if words else ""
        raise ConfigError(f'{where}: must be "auth N" or "N METHOD KEY" with a number N from 1 to {_MAX_NUMBER}{found}')
    return int(words[0])


def _key(where: str, number: int, words: list[str]) -> tuple[Auth, list[str]]:
    methods = [str(method) for method in AuthMethod]
    if not words or words[0] not in methods:
        hint = (words and suggestion(words[0], methods)) or f": it must be {', '.join(methods)}"
        raise ConfigError(f"{where}: key {number} has no known method{hint}")
    method = AuthMethod(words[0])
    key = words[1].encode(errors="surrogateescape") if len(words) > 1 else b""
    no_security = "heartbeats are not protected: anybody in the network can stop and start what the cluster runs"
    better = "use sha256 with a key made by `replicactl secret`"
    if method is AuthMethod.CRC:
        return Auth(method, b""), [f"{where}: crc is a checksum and no key: {no_security}; {better}"]
    if not key:
        return Auth(AuthMethod.CRC, b""), [f"{where}: {method} has no key: {no_security}; {better}"]
    warnings = []
    if len(key) < _SHORT_KEY_BYTES:
        warnings.append(f"{where}: the key is short ({len(key)} bytes) and can be guessed: {better}")
    if len(words) > 2:
        warnings.append(f"{where}: what follows the key is ignored, as by Heartbeat: a key has no spaces")
    return Auth(method, key), warnings


def _shown(word: str) -> str:
    """A number, or not: it may be a key that stands in the wrong place, and is not shown."""
    return word if len(word) <= 2 else "…"
