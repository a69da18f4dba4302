"""What is known of the other node from its heartbeats. Pure: times and nonces come in.

Two levels keep the past out. A packet that is signed rightly and is newer than all before (by start number, then by
sequence) makes the node *heard*. Its state counts only when it also echoes this node's present nonce: then it was sent
after this node started, or woke from a pause, and nothing that was recorded before can be passed off as the present.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from replica.heartbeat.node_state import NodeState, Phase
from replica.heartbeat.packet import NOTHING_YET, Echo, Flaw, Number, Packet, PacketError, pack_shortened, unpack
from replica.heartbeat.settings import HeartbeatSettings, PathKind

ELSEWHERE: Final = "an unconfigured path"


class Refusal(StrEnum):
    """Why a packet was not counted."""

    MALFORMED = "malformed"
    SIGNATURE = "signature"
    CLUSTER = "cluster"  # signed rightly, of another cluster
    NODE = "node"  # of a node that is not configured
    OWN_NAME = "own name"  # of another machine that has this node's name
    OLD = "old"  # overtaken, doubled or replayed


class Event(NamedTuple):
    """A line for the log: `logging` level, template and its arguments."""

    level: int
    template: str
    arguments: tuple[object, ...]

    def __str__(self) -> str:
        return self.template % self.arguments


class Verdict(NamedTuple):
    """What became of one packet. `newer`: it was news of the node. Neither newer nor refused: known by another path
    already, or this node's own.
    """

    newer: bool = False
    refusal: Refusal | None = None
    events: tuple[Event, ...] = ()


class PathStatus(StrEnum):
    """One path, as this node hears it."""

    WAITING = "waiting"  # nothing heard yet, and not long enough for DEAD
    UP = "up"
    DEAD = "dead"
    UNUSED = "unused"  # it leads to this node itself


@dataclass(frozen=True, slots=True)
class PathView:
    """`lost` counts by gaps in the sequence: what comes late, behind its successor, counts as lost."""

    name: str
    status: PathStatus
    since_s: float
    heard_s: float | None
    received: int
    lost: int
    problem: str  # why nothing can be sent on it, "" when it can


@dataclass(frozen=True, slots=True)
class PeerView:
    """The other node, as its heartbeats show it."""

    #: The last time since `listening_since_s`.
    heard_s: float | None
    #: Since when heartbeats are listened for without a pause: the start, or the last `renew`.
    listening_since_s: float
    #: Of its present start, and after this node's last `renew`; None until then.
    state: NodeState | None
    #: 0: never heard, not even before this start.
    start_number: int
    #: Its nonce: another one each time it has started, or woken from a pause. None: not heard in the present run.
    session: bytes | None
    #: It has heard this node, in its present session, within deadtime.
    hears_us: bool
    #: It said that it has handed everything over, and nothing since. A `renew` does not forget that.
    left: bool
    paths: tuple[PathView, ...]
    #: When something with a wrong signature last came from its address.
    wrong_secret_s: float | None
    round_trip_s: float | None
    rejected: Mapping[Refusal, int]

    def silent_for(self, now: float) -> float:
        """Seconds since it was last heard, or since this node has been listening."""
        return now - (self.listening_since_s if self.heard_s is None else self.heard_s)


@dataclass(slots=True)
class _Path:
    name: str
    status: PathStatus
    since_s: float
    heard_s: float | None = None
    newest: Number = NOTHING_YET
    received: int = 0
    lost: int = 0
    problem: str = ""


class Membership:
    """Of one other node. `start` is this node's start number, `seen` what was accepted before this start."""

    def __init__(
        self,
        settings: HeartbeatSettings,
        now: float,
        start: int,
        make_nonce: Callable[[], bytes],
        seen: Number = NOTHING_YET,
    ) -> None:
        self._settings = settings
        self._timing = settings.timing
        self._make_nonce = make_nonce
        self._nonce = self._old_nonce = make_nonce()
        #: Of the last packet sent. The start number grows when the other node knows a higher one of this node's past.
        self.number = Number(start)
        #: The newest that was accepted from the other node.
        self.seen = seen
        self._listening_since_s = now
        self._heard_s: float | None = None
        self._state: NodeState | None = None
        self._echo: Echo | None = None
        self._hears_us = False
        self._left = False
        self._round_trip_s: float | None = None
        self._paths = [_Path(path.name, PathStatus.WAITING, now, newest=seen) for path in settings.paths]
        self._wrong_secret_s: float | None = None
        self._rejected: Counter[Refusal] = Counter()
        #: The configured ones: who sends from there with a wrong signature is the other node with another secret.
        self.peer_addresses: frozenset[str] = frozenset()

    def renew(self, now: float) -> None:
        """After a pause: what this node knew is the past, and so is what was sent to it before now."""
        self._old_nonce, self._nonce = self._nonce, self._make_nonce()
        self._listening_since_s = now
        self._heard_s = self._state = self._round_trip_s = None
        self._hears_us = False

    def pack_next(self, state: NodeState, now: float) -> bytes:
        """The next packet to send, on all paths; PacketError when not even a state without explanations fits."""
        self.number = self.number._replace(sequence=self.number.sequence + 1)
        echo = self._echo and self._echo._replace(age_s=max(0.0, now - self._echo.age_s))
        settings = self._settings
        packet = Packet(
            settings.cluster,
            settings.node,
            self.number,
            now,
            self._nonce,
            self.seen,
            echo,
            state,
        )
        return pack_shortened(packet, settings.auth)

    def accept(self, data: bytes, now: float, source: str = "", path: int | None = None) -> Verdict:
        """Take one packet that came from the address `source` by the path of that index (None: by none of them)."""
        settings = self._settings
        try:
            packet = unpack(data, settings.auth)
        except PacketError as error:
            if error.flaw is not Flaw.SIGNATURE:
                return self._refuse(Refusal.MALFORMED, "refused a packet from %s: %s", source, error)
            if not self._from_peer(source, path):
                return self._refuse(Refusal.SIGNATURE, "refused a packet from %s, a stranger: %s", source, error)
            self._wrong_secret_s = now
            return self._refuse(Refusal.SIGNATURE, "%s (%s) sends heartbeats in vain: %s", settings.peer, source, error)
        if packet.cluster != settings.cluster:
            text = "%s sends heartbeats of another cluster (%r) with the secret of this one: give each its own secret."
            return self._refuse(Refusal.CLUSTER, text, source, packet.cluster)
        if packet.node == settings.node:
            if packet.nonce in (self._nonce, self._old_nonce):
                return Verdict()
            text = "another machine (%s) calls itself %s as well: give each node a name of its own."
            return self._refuse(Refusal.OWN_NAME, text, source, packet.node)
        if packet.node != settings.peer:
            text = "%s sends heartbeats of a node that is not configured (%r): name it on both nodes."
            return self._refuse(Refusal.NODE, text, source, packet.node)
        return self._accept(packet, now, path)

    def check(self, now: float) -> tuple[Event, ...]:
        """Find the paths that have fallen silent; to be called for every keepalive."""
        events = []
        for path in self._paths:
            silent_s = now - max(self._listening_since_s, path.since_s if path.heard_s is None else path.heard_s)
            if path.status in (PathStatus.UP, PathStatus.WAITING) and silent_s > self._timing.deadtime_s:
                path.status, path.since_s = PathStatus.DEAD, now
                text = "path %s is dead: nothing from %s for %.1f s."
                events.append(Event(logging.WARNING, text, (path.name, self._settings.peer, silent_s)))
        return tuple(events)

    def sending(self, index: int, problem: str, now: float, *, unused: bool = False) -> tuple[Event, ...]:
        """Tell why nothing can be sent on a path ("": it can), or that it leads to this node itself."""
        path = self._paths[index]
        if unused != (path.status is PathStatus.UNUSED):
            path.status, path.since_s = (PathStatus.UNUSED if unused else PathStatus.WAITING), now
        if problem == path.problem:
            return ()
        path.problem = problem
        if problem:
            return (Event(logging.WARNING, "path %s cannot be sent on: %s.", (path.name, problem)),)
        return (Event(logging.INFO, "path %s can be sent on again.", (path.name,)),)

    def view(self) -> PeerView:
        """All of it, for a decision."""
        return PeerView(
            heard_s=self._heard_s,
            listening_since_s=self._listening_since_s,
            state=self._state,
            start_number=self.seen.start,
            session=None if self._echo is None else self._echo.nonce,
            hears_us=self._hears_us,
            left=self._left,
            paths=tuple(
                PathView(path.name, path.status, path.since_s, path.heard_s, path.received, path.lost, path.problem)
                for path in self._paths
            ),
            wrong_secret_s=self._wrong_secret_s,
            round_trip_s=self._round_trip_s,
            rejected=dict(self._rejected),
        )

    def _from_peer(self, source: str, path: int | None) -> bool:
        if self.peer_addresses:
            return source in self.peer_addresses
        return path is not None and self._settings.paths[path].kind is not PathKind.UNICAST

    def _refuse(self, refusal: Refusal, template: str, *arguments: object) -> Verdict:
        self._rejected[refusal] += 1
        return Verdict(refusal=refusal, events=(Event(logging.WARNING, template, arguments),))

    def _accept(self, packet: Packet, now: float, index: int | None) -> Verdict:
        number = packet.number
        if number.start < self.seen.start:
            text = "refused an old heartbeat of %s: its start number is %d, %d was there before."
            return self._refuse(Refusal.OLD, text, packet.node, number.start, self.seen.start)
        path = None if index is None else self._paths[index]
        events: list[Event] = []
        for_path = path is not None and number > path.newest
        if path is not None and for_path:
            events += self._heard_on(path, number, now)
        if number <= self.seen:
            if for_path:
                return Verdict(events=tuple(events))
            text = "refused an old heartbeat of %s: number %d came after number %d."
            self._rejected[Refusal.OLD] += 1
            event = Event(logging.DEBUG, text, (packet.node, number.sequence, self.seen.sequence))
            return Verdict(refusal=Refusal.OLD, events=(event,))
        events += self._late(packet, now, path)
        if number.start != self.seen.start:
            self._state, self._hears_us, self._left = None, False, False
        self._heard(packet, now)
        if packet.known > self.number:
            self.number = Number(packet.known.start + 1)
            text = "%s remembers start %d of this node, which has forgotten it: this is start %d from now on."
            events.append(Event(logging.WARNING, text, (packet.node, packet.known.start, self.number.start)))
        return Verdict(newer=True, events=tuple(events))

    def _heard(self, packet: Packet, now: float) -> None:
        self.seen = packet.number
        self._heard_s = now
        # `age_s` has the time of arrival until it is sent.
        self._echo = Echo(packet.nonce, packet.sent_s, now)
        self._left = False
        echo = packet.heard
        if echo is None or echo.nonce != self._nonce:
            self._hears_us = False
            return
        self._state = packet.state
        self._left = packet.state.phase is Phase.LEFT
        self._hears_us = echo.age_s <= self._timing.deadtime_s
        self._round_trip_s = max(0.0, now - echo.sent_s - echo.age_s)

    def _heard_on(self, path: _Path, number: Number, now: float) -> list[Event]:
        if number.start == path.newest.start:
            path.lost += number.sequence - path.newest.sequence - 1
        path.newest, path.heard_s = number, now
        path.received += 1
        if path.status is PathStatus.UP:
            return []
        path.status, path.since_s = PathStatus.UP, now
        return [Event(logging.INFO, "path %s is up.", (path.name,))]

    def _late(self, packet: Packet, now: float, path: _Path | None) -> list[Event]:
        if self._heard_s is None or self._left or packet.number.start != self.seen.start:
            return []
        since_s, missed = now - self._heard_s, packet.number.sequence - self.seen.sequence - 1
        if since_s <= self._timing.warntime_s:
            return []
        text = "late heartbeat from %s on %s: %.1f s after the one before; %d were lost."
        name = ELSEWHERE if path is None else path.name
        return [Event(logging.WARNING, text, (packet.node, name, since_s, missed))]
