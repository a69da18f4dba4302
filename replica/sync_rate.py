"""How much of a resync, or a verification, may be under way at a moment, so that clients hardly feel it. Pure: samples
and time come in; `replica.throttle` waits.

One number is controlled, the *window*: bytes that were sent and that the target has not acknowledged. A window smaller
than one piece means a pause after each piece. It is the smallest of these:

*What clients feel*, one window for their writes and one for their reads that wait for the disk. The resync *rests* now
and then, for some milliseconds, and what requests take meanwhile is what they take without it (BBR's ProbeRTT, in
which a sender drains its own queue to see the path without it). A request that takes longer than LIMIT times what nine
of ten take without it counts as slowed down; the window shrinks and grows so that at most SLOWED_WRITES and
SLOWED_READS of them are.

*Its own queue*, while no client is there: the window grows until the queue is QUEUE_S long, by LEDBAT's rule (RFC
6817): in proportion to how far the delay above the least seen is from its target. More would make nothing faster, and
the first request of a client that comes back has to wait for it. Reads from the page cache cannot be timed, as they
take no time but that in front of the event loop; there they wait in line with the resync's own answers. So while
clients do such reads, the queue is kept to READ_QUEUE_S.

It never shrinks so far that the resync starves: LEAST_BYTES_S (DRBD's c-min-rate).
"""

import collections
import math
import statistics
from typing import Final, Protocol

#: Of a piece while clients are there: a node is busy with it for some ten microseconds, and a request waits for that.
PIECE_BYTES: Final = 64 << 10
#: The resync never gets less than this, whatever the clients feel (as far as disks and network go).
LEAST_BYTES_S: Final = 4 << 20
#: Clients count as gone so long after their last request.
CLIENTS_GONE_S: Final = 3.0
QUEUE_S: Final = 0.01
READ_QUEUE_S: Final = 0.00002

LIMIT: Final = 2.0
SLOWED_WRITES: Final = 0.05
#: More, as the disk is asked for one piece at a time: a read that finds it busy waits for that, and for nothing else.
SLOWED_READS: Final = 0.1
_GROWTH: Final = 1 / 64
#: How far the window of one kind of requests may be above what is in force, because of another kind.
_MOST_AHEAD: Final = 2.0

REST_REQUESTS: Final = 16
_REST_S: Final = 0.03
_MOST_REST_S: Final = 0.2
#: Slow requests make for longer rests: several of them have to fit in.
_REST_LATENCIES: Final = 3
_REST_EVERY_S: Final = 0.5
#: A rest is followed by at least so many times its length of work.
_WORK_PER_REST: Final = 7
#: Of the estimate of what requests take without a resync, down; up it is nine times as long.
_STEP: Final = 0.01
#: So many in a row that take less than half of it do not happen by chance.
_FAR_BELOW: Final = 12


class Clients(Protocol):
    """Is told what clients do (`Volume.watch_clients`)."""

    def wrote(self, sent_s: float, now_s: float) -> None:
        """A write that went to the peer at `sent_s` is acknowledged."""

    def read(self, begun_s: float, now_s: float) -> None:
        """A read that had to wait for the disk is done."""

    def read_at_once(self, now_s: float) -> None:
        """A read was answered from the page cache."""


class Pace(Clients, Protocol):
    """When the next piece of a resync may be sent. Lengths in bytes, times in seconds on one clock."""

    def gives_way(self, now_s: float) -> bool:
        """Whether there are clients, and they are to be considered."""

    def piece_bytes(self, now_s: float) -> int:
        """The longest piece to send now."""

    def wait_s(self, length: int, in_flight: int, now_s: float) -> float:
        """How long a piece has to wait; 0: send it; infinite: until something is acknowledged or written."""

    def sent(self, length: int, on_wire: int, now_s: float) -> None:
        """A piece of `length` was sent, in `on_wire` bytes."""

    def acknowledged(self, length: int, delay_s: float, in_flight: int, now_s: float) -> None:
        """The target has done with a piece, `delay_s` after it was sent; `in_flight` is left."""


class FixedRate:
    """So many bytes per second, whatever clients feel (`resync-rate`)."""

    def __init__(self, bytes_s: int, piece_bytes: int, window_bytes: int) -> None:
        self._bytes_s = bytes_s
        self._piece_bytes = piece_bytes
        self._window_bytes = window_bytes
        self._next_s = 0.0

    def gives_way(self, now_s: float) -> bool:
        return False

    def piece_bytes(self, now_s: float) -> int:
        return self._piece_bytes

    def wait_s(self, length: int, in_flight: int, now_s: float) -> float:
        if in_flight and in_flight + length > self._window_bytes:
            return math.inf
        return max(0.0, self._next_s - now_s)

    def sent(self, length: int, on_wire: int, now_s: float) -> None:
        self._next_s = max(self._next_s, now_s) + on_wire / self._bytes_s

    def acknowledged(self, length: int, delay_s: float, in_flight: int, now_s: float) -> None:
        """It does not matter here."""

    def wrote(self, sent_s: float, now_s: float) -> None:
        """Nor does this."""

    def read(self, begun_s: float, now_s: float) -> None:
        """Nor this."""

    def read_at_once(self, now_s: float) -> None:
        """Nor this."""


class _Requests:
    """Clients' requests of one kind: what they take without a resync, and the window that slows few of them down."""

    def __init__(self, window_bytes: int, slowed_share: float) -> None:
        self.window = float(window_bytes)
        #: Whether it grows or shrinks in the long run is then decided by whether fewer or more than these are slowed.
        self._shrinkage = _GROWTH * (1 - slowed_share) / slowed_share
        self.last_s = -math.inf
        #: What nine of ten take at most without a resync; 0: not known yet.
        self._without_s = 0.0
        self._first_s: list[float] = []
        self._far_below = 0

    def learn(self, latency_s: float) -> None:
        """One without a resync. The ninth decile, in steps: it stands still when one of ten samples is above it. What
        was under way before the first rest, a flush say, is in the first samples: so these give their median, and
        where many in a row are far below the steps are large.
        """
        if len(self._first_s) < REST_REQUESTS:
            self._first_s.append(latency_s)
            self._without_s = statistics.median(self._first_s)
            return
        self._far_below = self._far_below + 1 if 2 * latency_s < self._without_s else 0
        if latency_s > self._without_s:
            self._without_s *= 1 + 9 * _STEP
        else:
            self._without_s *= 1 - (_STEP if self._far_below < _FAR_BELOW else 10 * _STEP)

    def adjust(self, latency_s: float, *, quiet: bool, least: float, most: float) -> None:
        """One beside a resync (or, `quiet`, not)."""
        if self._without_s:
            slowed = not quiet and latency_s > LIMIT * self._without_s
            window = self.window * (1 - self._shrinkage if slowed else 1 + _GROWTH)
            self.window = min(max(window, least), most)


class FeedbackRate:
    """As fast as clients hardly feel; `piece_bytes` and `window_bytes` are for when there are none. `queue_s`: see
    above; infinite for work whose time is that of the disks.
    """

    def __init__(self, piece_bytes: int, window_bytes: int, queue_s: float = QUEUE_S) -> None:
        self._piece_bytes = piece_bytes
        self._queue_s = queue_s
        self._small_bytes = min(PIECE_BYTES, piece_bytes)
        self._most_bytes = max(window_bytes, piece_bytes)
        self._writes = _Requests(self._most_bytes, SLOWED_WRITES)
        self._reads = _Requests(self._most_bytes, SLOWED_READS)
        self._read_at_once_s = -math.inf
        #: The window of its own queue.
        self._own = float(min(self._most_bytes, 4 * piece_bytes))
        #: Both nodes shall have something to do.
        self._alone_bytes = min(self._most_bytes, 2 * piece_bytes)
        #: Whether pieces are small; the delays below are of such.
        self._small = False
        self._least_delay_s = math.inf
        #: The least of some counts (as in RFC 6817): one that is long may be a process that did not get its turn.
        self._delays_s: collections.deque[float] = collections.deque(maxlen=4)
        #: Nothing of the resync has been under way since then; infinite: something is.
        self._quiet_since_s = 0.0
        self._next_s = 0.0
        self._rest_ends_s = -math.inf
        self._rest_s = _REST_S
        self._rest_requests = 0
        self._next_rest_s = 0.0

    def window_bytes(self, now_s: float) -> float:
        """The window of this moment."""
        windows = [requests.window for requests in (self._writes, self._reads) if _lately(requests.last_s, now_s)]
        if not windows or _lately(self._read_at_once_s, now_s):
            windows.append(self._own)
        return min(max(min(windows), self._least), float(self._most_bytes))

    def gives_way(self, now_s: float) -> bool:
        return _lately(max(self._writes.last_s, self._reads.last_s, self._read_at_once_s), now_s)

    @property
    def _least(self) -> float:
        """A smaller window would let it starve. (On a clock of coarse steps a delay may be none at all.)"""
        return max(1.0, LEAST_BYTES_S * self._least_delay_s) if self._least_delay_s < math.inf else 1.0

    def piece_bytes(self, now_s: float) -> int:
        if self.gives_way(now_s) != self._small:
            self._small = not self._small
            self._least_delay_s = math.inf
            self._delays_s.clear()
        return self._small_bytes if self._small else self._piece_bytes

    def wait_s(self, length: int, in_flight: int, now_s: float) -> float:
        if now_s < self._rest_ends_s:
            return self._rest_ends_s - now_s
        if in_flight:
            return 0.0 if in_flight + length <= self.window_bytes(now_s) else math.inf
        return max(0.0, self._next_s - now_s)

    def sent(self, length: int, on_wire: int, now_s: float) -> None:
        self._quiet_since_s = math.inf

    def acknowledged(self, length: int, delay_s: float, in_flight: int, now_s: float) -> None:
        if not in_flight:
            self._quiet_since_s = now_s
            if self._rest_ends_s == math.inf:
                self._rest_ends_s = now_s + self._rest_s
        self._least_delay_s = min(self._least_delay_s, delay_s)
        self._delays_s.append(delay_s)
        self._watch_queue(length, now_s)
        window = self.window_bytes(now_s)
        if window < length:
            pause_s = min(delay_s * (length / window - 1), length / LEAST_BYTES_S - delay_s)
            self._next_s = now_s + max(0.0, pause_s)

    def _watch_queue(self, length: int, now_s: float) -> None:
        if now_s < self._rest_ends_s:
            return  # that is of what was under way before
        if _lately(self._read_at_once_s, now_s):
            # One piece more in a round trip (RFC 6817), as one read waits for all of them.
            queue_s, gain, least = READ_QUEUE_S, length / max(self._own, length), self._small_bytes
        elif not self._small:
            queue_s, gain, least = self._queue_s, 1.0, self._alone_bytes
        else:
            return
        off_target = max(-1.0, 1 - (min(self._delays_s) - self._least_delay_s) / queue_s)
        self._own = min(max(self._own + off_target * gain * length, float(least)), float(self._most_bytes))

    def wrote(self, sent_s: float, now_s: float) -> None:
        self._timed(self._writes, sent_s, now_s)

    def read(self, begun_s: float, now_s: float) -> None:
        self._timed(self._reads, begun_s, now_s)

    def read_at_once(self, now_s: float) -> None:
        if not _lately(self._read_at_once_s, now_s):
            self._own = float(self._small_bytes)
            # What is under way has to arrive, or its queue would pass for the way without one.
            self._begin_rest(0.0, now_s)
        self._read_at_once_s = now_s

    def _timed(self, requests: _Requests, begun_s: float, now_s: float) -> None:
        latency_s = now_s - begun_s
        in_force = self.window_bytes(now_s)
        were_gone = not _lately(requests.last_s, now_s)
        requests.last_s = now_s
        if were_gone:
            requests.window = min(in_force, float(self._small_bytes))
            self._begin_rest(latency_s, now_s)
            return
        quiet = begun_s >= self._quiet_since_s
        if quiet:
            requests.learn(latency_s)
        if self._rest_requests and now_s < self._rest_ends_s:
            self._rest_requests -= quiet
            if not self._rest_requests:
                self._rest_ends_s = now_s
            return
        self._rest_requests = 0
        requests.adjust(latency_s, quiet=quiet, least=self._least, most=_MOST_AHEAD * in_force)
        if now_s >= self._next_rest_s:
            self._begin_rest(latency_s, now_s)

    def _begin_rest(self, latency_s: float, now_s: float) -> None:
        """Send nothing until some requests, each of which takes about `latency_s`, were timed without a resync."""
        rest_s = min(_MOST_REST_S, max(_REST_S, _REST_LATENCIES * latency_s))
        self._rest_s, self._rest_requests = rest_s, REST_REQUESTS
        # What is under way has to arrive first.
        self._rest_ends_s = now_s + rest_s if self._quiet_since_s <= now_s else math.inf
        self._next_rest_s = now_s + max(_REST_EVERY_S, _WORK_PER_REST * rest_s)


def _lately(last_s: float, now_s: float) -> bool:
    return now_s - last_s < CLIENTS_GONE_S


def pace_of(rate_bytes_s: int | None, piece_bytes: int, window_bytes: int, queue_s: float = QUEUE_S) -> Pace:
    """At a fixed rate, or None: by feedback."""
    if rate_bytes_s is None:
        return FeedbackRate(piece_bytes, window_bytes, queue_s)
    return FixedRate(rate_bytes_s, piece_bytes, window_bytes)
