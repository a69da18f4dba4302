"""A copy as STATE describes it to the peer: `replica.generation.Side` as the values of a control frame. Pure."""

from dataclasses import asdict, fields
from typing import Any, Final

from replica import wire
from replica.bitmap import BLOCK_SIZE
from replica.generation import Generations, Side
from replica.split_brain import Policies

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
        generations=Generations(
            wire.field(message, "current", int), wire.field(message, "base", int), unpack_ids(message, "history")
        ),
        size_bytes=wire.field(message, "size_bytes", int),
        dirty=wire.field(message, "dirty", int),
        policies=Policies(**{field.name: wire.field(policies, field.name, str) for field in fields(Policies)}),
        **{name: wire.field(message, name, bool) for name in _FLAGS},
    )


def unpack_ids(message: dict[str, Any], name: str) -> tuple[int, ...]:
    """The named list of generation ids. ProtocolError."""
    values = wire.field(message, name, list)
    if not all(isinstance(value, int) for value in values):
        raise wire.ProtocolError(f"{name!r} must be a list of generation ids.")
    return tuple(values)
