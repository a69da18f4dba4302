"""The states of a resource, by DRBD's names, and the one table of how they may change. Pure.

`State.change` is the only place where a state changes; a change that the table does not list is a bug and raises.
docs/states.md is made from these tables (``python -m replica.states``).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, TypeVar


class Role(StrEnum):
    """Who may be written to."""

    PRIMARY = "Primary"
    SECONDARY = "Secondary"
    UNKNOWN = "Unknown"


class Disk(StrEnum):
    """What a node's copy is worth."""

    DISKLESS = "Diskless"
    FAILED = "Failed"
    INCONSISTENT = "Inconsistent"
    OUTDATED = "Outdated"
    CONSISTENT = "Consistent"
    UP_TO_DATE = "UpToDate"
    UNKNOWN = "DUnknown"


class Connection(StrEnum):
    """The link to the peer."""

    STAND_ALONE = "StandAlone"
    CONNECTING = "Connecting"
    CONNECTED = "Connected"


class Replication(StrEnum):
    """What the link is used for."""

    OFF = "Off"
    NEGOTIATING = "Negotiating"
    ESTABLISHED = "Established"
    SYNC_SOURCE = "SyncSource"
    SYNC_TARGET = "SyncTarget"
    PAUSED_SYNC_S = "PausedSyncS"
    PAUSED_SYNC_T = "PausedSyncT"


SYNCING: Final = frozenset(
    {Replication.SYNC_SOURCE, Replication.SYNC_TARGET, Replication.PAUSED_SYNC_S, Replication.PAUSED_SYNC_T}
)

#: Those of a node whose copy is not complete.
SYNC_TARGETS: Final = frozenset({Replication.SYNC_TARGET, Replication.PAUSED_SYNC_T})

#: state → states it may change to, with what makes it do so.
CONNECTION_CHANGES: Final = {
    Connection.STAND_ALONE: {Connection.CONNECTING: "connect, or start of the daemon"},
    Connection.CONNECTING: {
        Connection.CONNECTED: "both ends have proven that they know the secret",
        Connection.STAND_ALONE: "disconnect",
    },
    Connection.CONNECTED: {
        Connection.CONNECTING: "the link was lost, or is made anew to negotiate again",
        Connection.STAND_ALONE: "disconnect, split brain, or peers that do not fit together",
    },
}

REPLICATION_CHANGES: Final = {
    Replication.OFF: {Replication.NEGOTIATING: "link open"},
    Replication.NEGOTIATING: {
        Replication.ESTABLISHED: "both copies are the same",
        Replication.SYNC_SOURCE: "the peer's copy is older",
        Replication.SYNC_TARGET: "the peer's copy is newer",
        Replication.OFF: "link lost, a node without disk, or no good copy on either side",
    },
    Replication.ESTABLISHED: {Replication.OFF: "link lost, or the Primary's disk failed or was detached"},
    Replication.SYNC_SOURCE: {
        Replication.ESTABLISHED: "nothing is dirty any more and the peer has recorded it",
        Replication.PAUSED_SYNC_S: "pause-sync on either node",
        Replication.OFF: "link lost",
    },
    Replication.SYNC_TARGET: {
        Replication.ESTABLISHED: "nothing is dirty any more and that is recorded",
        Replication.PAUSED_SYNC_T: "pause-sync on either node",
        Replication.OFF: "link lost",
    },
    Replication.PAUSED_SYNC_S: {
        Replication.SYNC_SOURCE: "resume-sync on the node or nodes that paused",
        Replication.ESTABLISHED: "nothing was left to copy",
        Replication.OFF: "link lost",
    },
    Replication.PAUSED_SYNC_T: {
        Replication.SYNC_TARGET: "resume-sync on the node or nodes that paused",
        Replication.ESTABLISHED: "nothing was left to copy",
        Replication.OFF: "link lost",
    },
}

ROLE_CHANGES: Final = {
    Role.SECONDARY: {Role.PRIMARY: "promote, takeover"},
    Role.PRIMARY: {Role.SECONDARY: "demote, takeover by the peer, end of the daemon"},
}

S = TypeVar("S", bound=StrEnum)


class IllegalChange(AssertionError):
    """A state change that the table does not list."""


@dataclass
class State:
    """Everything about a resource that changes as a whole; the disk state is derived (`local_disk`)."""

    role: Role = Role.SECONDARY
    connection: Connection = Connection.STAND_ALONE
    replication: Replication = Replication.OFF
    peer_role: Role = Role.UNKNOWN
    peer_disk: Disk = Disk.UNKNOWN
    last_error: str = ""
    on_change: Callable[[], None] = field(default=lambda: None, repr=False)

    def change(self, **changes: Any) -> bool:
        """Set the named states together; True when anything was different. Raises IllegalChange."""
        before = self.words()
        for name, new in changes.items():
            old = getattr(self, name)
            if old != new:
                self._check(name, old, new)
        for name, new in changes.items():
            setattr(self, name, new)
        if self.words() == before:
            return False
        self.on_change()
        return True

    def words(self) -> tuple[str, ...]:
        """All states, for comparison and for the log."""
        return (
            self.role,
            self.connection,
            self.replication,
            self.peer_role,
            self.peer_disk,
            self.last_error,
        )

    @staticmethod
    def _check(name: str, old: Any, new: Any) -> None:
        tables: dict[str, Any] = {
            "role": ROLE_CHANGES,
            "connection": CONNECTION_CHANGES,
            "replication": REPLICATION_CHANGES,
        }
        table = tables.get(name)
        if table is not None and new not in table[old]:
            raise IllegalChange(f"{name} cannot change from {old} to {new}.")


def local_disk(*, attached: bool, failed: bool, inconsistent: bool, outdated: bool, current: bool) -> Disk:
    """The state of a node's own disk.

    `current`: the node is Primary, or in touch with a peer that confirmed its generation.
    """
    if failed:
        return Disk.FAILED
    if not attached:
        return Disk.DISKLESS
    if inconsistent:
        return Disk.INCONSISTENT
    if outdated:
        return Disk.OUTDATED
    return Disk.UP_TO_DATE if current else Disk.CONSISTENT


def tables_as_markdown() -> str:
    """The transition tables as docs/states.md shows them."""
    parts: list[str] = []
    tables: tuple[tuple[str, Any], ...] = (
        ("Connection", CONNECTION_CHANGES),
        ("Replication", REPLICATION_CHANGES),
        ("Role", ROLE_CHANGES),
    )
    for title, table in tables:
        rows = [f"| {old} | {new} | {why} |" for old, changes in table.items() for new, why in changes.items()]
        parts.append("\n".join([f"## {title}", "", "| from | to | when |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(tables_as_markdown(), end="")
