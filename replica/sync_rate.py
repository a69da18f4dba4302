"""How much of a resync, or a verification, may be under way at a moment, so that clients hardly feel it. Pure: samples
and time come in; `replica.throttle` waits.

One number is controlled, the *window*: bytes that were sent and that the target has not acknowledged. A window smaller
than one piece means a pause after each piece.

While clients write, their writes rule. The resync *rests* now and then, for some milliseconds, and what writes take
meanwhile is what they take without it (BBR's ProbeRTT, in which a sender drains its own queue to see the path without
it). A write that takes longer than LIMIT times what nine of ten take without it counts as slowed down; the window
shrinks and grows so that at most SLOWED_SHARE of them are. It never shrinks so far that the resync starves:
LEAST_BYTES_S (DRBD's c-min-rate).

While no client writes, everything is the resync's. The window grows until its own queue is QUEUE_S long, by LEDBAT's
rule (RFC 6817): in proportion to how far the delay above the least seen is from its target. More would make nothing
faster, and the first write of a client that comes back has to wait for it.
"""

import collections
import math
import statistics
from typing import Final, Protocol

#: Of a piece while clients write: each node is busy with it for some ten microseconds, and a write waits for that.
PIECE_BYTES: Final = 64 << 10
#: The resync never gets less than this, whatever the clients feel (as far as disks and network go).
LEAST_BYTES_S: Final = 4 << 20
#: Clients count as gone so long after their last write.
CLIENTS_GONE_S: Final = 3.0
QUEUE_S: Final = 0.01

LIMIT: Final = 2.0
SLOWED_SHARE: Final = 0.05
_GROWTH: Final = 1 / 64
_SHRINKAGE: Final = _GROWTH * (1 - SLOWED_SHARE) / SLOWED_SHARE

REST_WRITES: Final = 16
_REST_S: Final = 0.03
_MOST_REST_S: Final = 0.2
#: Slow writes make for longer rests: several of them have to fit in.
_REST_LATENCIES: Final = 3
_REST_EVERY_S: Final = 0.5
#: A rest is followed by at least so many times its length of work.
_WORK_PER_REST: Final = 7
#: Of the estimate of what writes take without a resync, down; up it is nine times as long.
_STEP: Final = 0.01


class Pace(Protocol):
    """When the next piece of a resync may be sent. Lengths in bytes, times in seconds on one clock."""

    def piece_bytes(self, now_s: float) -> int:
        """The longest piece to send now."""

    def wait_s(self, length: int, in_flight: int, now_s: float) -> float:
        """How long a piece has to wait; 0: send it; infinite: until something is acknowledged or written."""

    def sent(self, length: int, on_wire: int, now_s: float) -> None:
        """A piece of `length` was sent, in `on_wire` bytes."""

    def acknowledged(self, length: int, delay_s: float, in_flight: int, now_s: float) -> None:
        """The target has done with a piece, `delay_s` after it was sent; `in_flight` is left."""

    def wrote(self, sent_s: float, now_s: float) -> None:
        """A client's write that was sent at `sent_s` is acknowledged."""


class FixedRate:
    """So many bytes per second, whatever clients feel (`resync-rate`)."""

    def __init__(self, bytes_s: int, piece_bytes: int, window_bytes: int) -> None:
        self._bytes_s = bytes_s
        self._piece_bytes = piece_bytes
        self._window_bytes = window_bytes
        self._next_s = 0.0

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


class FeedbackRate:
    """As fast as clients hardly feel; `piece_bytes` and `window_bytes` are for when there are none. `queue_s`: see
    above; infinite for work whose time is that of the disks.
    """

    def __init__(self, piece_bytes: int, window_bytes: int, queue_s: float = QUEUE_S) -> None:
        self._piece_bytes = piece_bytes
        self._queue_s = queue_s
        self._small_bytes = min(PIECE_BYTES, piece_bytes)
        self._most_bytes = max(window_bytes, piece_bytes)
        self._window = float(min(self._most_bytes, 4 * piece_bytes))
        #: Both nodes shall have something to do.
        self._alone_bytes = min(self._most_bytes, 2 * piece_bytes)
        self._least_delay_s = math.inf
        #: The least of some counts (as in RFC 6817): one that is long may be a process that did not get its turn.
        self._delays_s: collections.deque[float] = collections.deque(maxlen=4)
        self._last_write_s = -math.inf
        #: Nothing of the resync has been under way since then; infinite: something is.
        self._quiet_since_s = 0.0
        #: What nine of ten writes take at most without a resync; 0: not known yet.
        self._without_s = 0.0
        self._first_s: list[float] = []
        self._next_s = 0.0
        self._rest_ends_s = -math.inf
        self._rest_s = _REST_S
        self._rest_writes = 0
        self._next_rest_s = 0.0

    @property
    def window_bytes(self) -> float:
        """The window of now."""
        return self._window

    def clients_write(self, now_s: float) -> bool:
        """Whether clients have written lately."""
        return now_s - self._last_write_s < CLIENTS_GONE_S

    def piece_bytes(self, now_s: float) -> int:
        return self._small_bytes if self.clients_write(now_s) else self._piece_bytes

    def wait_s(self, length: int, in_flight: int, now_s: float) -> float:
        if now_s < self._rest_ends_s:
            return self._rest_ends_s - now_s
        if in_flight:
            return 0.0 if in_flight + length <= self._window else math.inf
        return max(0.0, self._next_s - now_s)

    def sent(self, length: int, on_wire: int, now_s: float) -> None:
        self._quiet_since_s = math.inf

    def acknowledged(self, length: int, delay_s: float, in_flight: int, now_s: float) -> None:
        if not in_flight:
            self._quiet_since_s = now_s
            if self._rest_ends_s == math.inf:
                self._rest_ends_s = now_s + self._rest_s
        self._least_delay_s = min(self._least_delay_s, delay_s)
        if self.clients_write(now_s):
            self._set_window(self._window)
            if self._window < length:
                pause_s = min(delay_s * (length / self._window - 1), length / LEAST_BYTES_S - delay_s)
                self._next_s = now_s + max(0.0, pause_s)
            return
        self._delays_s.append(delay_s)
        off_target = 1 - (min(self._delays_s) - self._least_delay_s) / self._queue_s
        self._set_window(max(self._alone_bytes, self._window + max(-1.0, off_target) * length))

    def wrote(self, sent_s: float, now_s: float) -> None:
        latency_s = now_s - sent_s
        were_gone = not self.clients_write(now_s)
        self._last_write_s = now_s
        if were_gone:
            self._set_window(min(self._window, float(self._small_bytes)))
            self._begin_rest(latency_s, now_s)
            return
        quiet = sent_s >= self._quiet_since_s
        if quiet:
            self._learn(latency_s)
        if self._rest_writes and now_s < self._rest_ends_s:
            self._rest_writes -= quiet
            if not self._rest_writes:
                self._rest_ends_s = now_s
            return
        self._rest_writes = 0
        if self._without_s:
            slowed = not quiet and latency_s > LIMIT * self._without_s
            self._set_window(self._window * (1 - _SHRINKAGE if slowed else 1 + _GROWTH))
        if now_s >= self._next_rest_s:
            self._begin_rest(latency_s, now_s)

    def _begin_rest(self, latency_s: float, now_s: float) -> None:
        """Send nothing until some writes, each of which takes about `latency_s`, were timed without a resync."""
        rest_s = min(_MOST_REST_S, max(_REST_S, _REST_LATENCIES * latency_s))
        self._rest_s, self._rest_writes = rest_s, REST_WRITES
        # What is under way has to arrive first.
        self._rest_ends_s = now_s + rest_s if self._quiet_since_s <= now_s else math.inf
        self._next_rest_s = now_s + max(_REST_EVERY_S, _WORK_PER_REST * rest_s)

    def _set_window(self, window: float) -> None:
        # On a clock of coarse steps a delay may be none at all.
        least = max(1.0, LEAST_BYTES_S * self._least_delay_s) if self._least_delay_s < math.inf else 1.0
        self._window = min(max(window, least), float(self._most_bytes))

    def _learn(self, latency_s: float) -> None:
        """The ninth decile, in steps: it stands still when one of ten samples is above it. The first steps are large:
        what was under way before the first rest, a flush say, is in the first samples.
        """
        if len(self._first_s) < REST_WRITES:
            self._first_s.append(latency_s)
            self._without_s = statistics.median(self._first_s)
        elif latency_s > self._without_s:
            self._without_s *= 1 + 9 * _STEP
        else:
            self._without_s *= 1 - (_STEP if 2 * latency_s > self._without_s else 10 * _STEP)


def pace_of(rate_bytes_s: int | None, piece_bytes: int, window_bytes: int, queue_s: float = QUEUE_S) -> Pace:
    """At a fixed rate, or None: by feedback."""
    if rate_bytes_s is None:
        return FeedbackRate(piece_bytes, window_bytes, queue_s)
    return FixedRate(rate_bytes_s, piece_bytes, window_bytes)
