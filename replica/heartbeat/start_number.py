"""The numbers that keep recorded heartbeats from being taken for new ones, durable in the state directory. Blocking.

This node's start number grows with each start, also when its file is lost: it is never less than the wall clock's
seconds. Of the other node the newest accepted packet is kept, though not at each packet: after a crash, those since it
was kept could be replayed once. They would show the node as heard, but never with a state, for they do not echo this
node's new nonce.
"""

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any, Final

from replica.heartbeat.packet import MAX_NUMBER, NOTHING_YET, Number

log = logging.getLogger("replica.heartbeat")

_OWN: Final = "start-number"
_PEER: Final = "peer-start-number"
_MAX_BYTES: Final = 4096


def next_start(folder: Path, wall_clock_s: float) -> int:
    """The number of this start, durable when it returns. What cannot be read or written is warned of: the wall clock
    alone makes repeats unlikely, and a node must not stay away because its disk is full.
    """
    number = max(_number(_read(folder / _OWN), "start") + 1, int(wall_clock_s))
    keep_start(folder, number)
    return number


def keep_start(folder: Path, number: int) -> None:
    """Make a start number durable that this node goes on with."""
    _write(folder / _OWN, {"start": number})


def read_seen(folder: Path, peer: str) -> Number:
    """The newest packet of `peer` that was kept."""
    document = _read(folder / _PEER)
    if document.get("node") != peer:
        return NOTHING_YET
    return Number(_number(document, "start"), _number(document, "sequence"))


def keep_seen(folder: Path, peer: str, seen: Number) -> None:
    """Make it durable."""
    _write(folder / _PEER, {"node": peer, "start": seen.start, "sequence": seen.sequence})


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            document = json.loads(stream.read(_MAX_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s) and is made anew.", path, error)
        return {}
    return document if isinstance(document, dict) else {}


def _number(document: dict[str, Any], key: str) -> int:
    value = document.get(key)
    return value if isinstance(value, int) and 0 <= value < MAX_NUMBER else 0


def _write(path: Path, document: dict[str, Any]) -> None:
    """The whole of it or nothing, also after a power cut."""
    new = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new.open("w") as stream:
            json.dump(document, stream)
            stream.flush()
            os.fsync(stream.fileno())
        new.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        log.warning("%s cannot be written: %s.", path, error.strerror)
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
