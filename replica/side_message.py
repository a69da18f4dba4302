"""A copy as STATE describes it to the peer: `replica.generation.Side` as the values of a control frame. Pure."""

from dataclasses import asdict, fields
from typing import Any, Final

from replica import wire
from replica.bitmap import BLOCK_SIZE
from replica.generation import HISTORY_LENGTH, MAX_ID, Generations, Side
from replica.split_brain import Policies
from replica.superblock import MAX_VOLUME_BYTES

_FLAGS: Final = (
    "just_created",
    "inconsistent",
    "ahead",
    "promoted_alone",
    "unbroken",
    "is_primary",
    "attaching",
    "parted_as_primary",
    "discard",
)


def pack_side(side: Side | None) -> dict[str, Any] | None:
    """The map that describes this copy; None without a disk."""
    if side is None:
        return None
    generations = side.generations
    return {
        "size_bytes": side.size_bytes,
        "room_bytes": side.room_bytes,
        "block_size": BLOCK_SIZE,
        "current": generations.current,
        "base": generations.base,
        "history": list(generations.history),
        "dirty": side.dirty,
        **{name: getattr(side, name) for name in _FLAGS},
        "after_split_brain": {name: str(policy) for name, policy in asdict(side.policies).items()},
    }


def unpack_side(node: str, message: Any) -> Side | None:
    """What the peer, called `node`, says of its copy. ProtocolError when that is no proper description of one."""
    if message is None:
        return None
    if not isinstance(message, dict):
        raise wire.ProtocolError("the peer's description of its copy is not a map.")
    if wire.field(message, "block_size", int) != BLOCK_SIZE:
        raise wire.ProtocolError("the peer's bitmap has another block size: update the older node.")
    policies = wire.field(message, "after_split_brain", dict)
    return Side(
        node=node,
        generations=unpack_generations(message),
        size_bytes=_number(message, "size_bytes", 1, MAX_VOLUME_BYTES),
        # An older program does not tell: then its copy does not grow.
        room_bytes=_number(message, "room_bytes", 0, MAX_ID) if "room_bytes" in message else 0,
        dirty=_number(message, "dirty", 0, MAX_VOLUME_BYTES // BLOCK_SIZE),
        policies=Policies(**{field.name: wire.field(policies, field.name, str) for field in fields(Policies)}),
        **{name: wire.field(message, name, bool) for name in _FLAGS},
    )


def unpack_generations(message: dict[str, Any]) -> Generations:
    """The ids in a control message: such as a superblock can hold, for that is where they may go. ProtocolError."""
    history = wire.field(message, "history", list)
    if len(history) > HISTORY_LENGTH or not all(type(value) is int and 0 < value <= MAX_ID for value in history):
        raise wire.ProtocolError(f"'history' must be a list of at most {HISTORY_LENGTH} generation ids.")
    return Generations(_number(message, "current", 0, MAX_ID), _number(message, "base", 0, MAX_ID), tuple(history))


def _number(message: dict[str, Any], name: str, least: int, most: int) -> int:
    value: int = wire.field(message, name, int)
    if not least <= value <= most:
        raise wire.ProtocolError(f"a control message has {value} as {name!r}.")
    return value
