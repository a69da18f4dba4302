"""What a node remembers of its groups: their terms over a reboot, what it holds over a restart of the daemon."""

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from replica.heartbeat.node_state import Claim

log = logging.getLogger("replica.heartbeat")


@dataclass(frozen=True, slots=True)
class HeldGroup:
    """One group; `running`: an earlier daemon has left it running."""

    claim: Claim
    running: bool


@dataclass(frozen=True, slots=True)
class Previous:
    """What an earlier daemon has left since the boot."""

    groups: Mapping[str, HeldGroup] = field(default_factory=dict)
    peer_was_dead: bool = False
    #: How long ago it was last alive.
    age_s: float = float("inf")


class Held:
    """Two files: `state_dir`/terms.json outlives a reboot, `run_dir`/held.json only the daemon.

    A failure to write is logged, once: without the first, a term may be used again after a reboot (and then the tie of
    `Claim.yields_to` decides); without the second, a restart of the daemon stops and starts what runs.
    """

    def __init__(self, state_dir: Path, run_dir: Path) -> None:
        self._terms_path = state_dir / "terms.json"
        self._held_path = run_dir / "held.json"
        self._stamp_path = run_dir / "alive"
        self.terms: dict[str, int] = {}
        self._complained = False
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="terms")
        document = _read(self._terms_path)
        if document is not None:
            self.terms = {str(name): term for name, term in document.items() if isinstance(term, int) and term >= 0}

    def load(self, now: float) -> Previous:
        """What was saved since the boot; nothing when there is nothing, or nothing that makes sense."""
        document = _read(self._held_path)
        if document is None:
            return Previous()
        try:
            groups = {
                str(name): HeldGroup(Claim(int(term), str(owner), bool(by_operator)), bool(running))
                for name, (term, owner, by_operator, running) in document["groups"].items()
            }
            alive_s = float(self._stamp_path.read_text())
        except (KeyError, TypeError, ValueError, AttributeError, OSError):
            return Previous()
        return Previous(groups, bool(document.get("peer_was_dead")), max(0.0, now - alive_s))

    def save(self, groups: Mapping[str, HeldGroup], *, peer_is_dead: bool) -> None:
        """Write both, the terms only when they have changed, and those in the background."""
        held = {name: [*group.claim, group.running] for name, group in groups.items()}
        self._write(self._held_path, {"groups": held, "peer_was_dead": peer_is_dead}, durable=False)
        terms = {name: group.claim.term for name, group in groups.items()}
        if terms != self.terms:
            self.terms = terms
            # A flush can take as long as the disk likes.
            self._writer.submit(self._write, self._terms_path, terms, durable=True)

    def stamp(self, now: float) -> None:
        """The daemon is alive."""
        with contextlib.suppress(OSError):
            self._stamp_path.write_text(f"{now:.3f}")

    def _write(self, path: Path, document: Mapping[str, Any], *, durable: bool) -> None:
        temporary = path.with_suffix(".new")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with temporary.open("w") as file:
                json.dump(document, file)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            if not self._complained:
                self._complained = True
                log.warning("%s cannot be written (%s): a restart will know less.", path, error.strerror or error)
            if not durable:
                # Less, but nothing that is not so any more: what it says is believed without asking anybody.
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None
