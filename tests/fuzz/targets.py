"""The parsers that are fuzzed, by name, and where their inputs are kept."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz import heartbeat_target, mutate, nbd_target, peer_target

FOLDER = Path(__file__).resolve().parent
CORPUS = FOLDER / "corpus"
CRASHES = FOLDER / "crashes"


@dataclass(frozen=True)
class Target:
    """`run` raises for an input that breaks an invariant; `split` cuts an input into the messages it is made of, whose
    numbers are in `fields`.
    """

    run: Callable[[bytes], None]
    split: Callable[[bytes], list[bytearray]]
    fields: mutate.Fields = ()


TARGETS: dict[str, Target] = {
    "nbd-handshake": Target(nbd_target.handshake, mutate.options, mutate.OPTION_FIELDS),
    "nbd-transmission": Target(nbd_target.transmission, mutate.requests, mutate.REQUEST_FIELDS),
    "peer-greeting": Target(peer_target.greeting, mutate.frames, mutate.FRAME_FIELDS),
    "peer-frames": Target(peer_target.frames, mutate.frames, mutate.FRAME_FIELDS),
    "peer-state": Target(peer_target.state, mutate.whole),
    "peer-maps": Target(peer_target.maps, mutate.whole),
    "heartbeat": Target(heartbeat_target.heartbeat, mutate.whole),
    "control": Target(peer_target.control, mutate.whole),
}


def inputs(folder: Path) -> list[tuple[str, Path]]:
    """(name of the target, file) of every input kept below `folder`, one folder for each target."""
    return [(name, file) for name in TARGETS for file in sorted((folder / name).glob("*")) if file.is_file()]
