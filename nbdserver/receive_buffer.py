"""The memory one connection receives into."""

RECEIVE_BUFFER_BYTES = 512 * 1024
_MIN_ROOM_BYTES = 64 * 1024
_CHEAP_MOVE_BYTES = 8 * 1024


class Hold:
    """Slices of one piece of memory that are under way: how many holders, and what they are charged, in bytes."""

    __slots__ = ("charged_bytes", "holders", "is_full")

    def __init__(self) -> None:
        self.holders = 0
        self.charged_bytes = 0
        self.is_full = False  # nothing more is received into this memory


class ReceiveBuffer:
    """Bytes [start, end) of `view` are received and not parsed yet.

    Parsed requests are handed on as slices of `view`, without a copy. Whoever keeps such a slice sets
    `pinned`: from then on nothing before `end` is overwritten, new input goes behind it, and when the room
    there is used up the memory is left to those who still hold slices of it.

    `held_bytes` is what that costs: as long as input is received into a piece of memory, what its holders are charged;
    from then on all of it, until the last of them lets go. Otherwise a client could make one byte keep half a MiB.
    """

    __slots__ = ("_hold", "end", "held_bytes", "memory", "pinned", "start", "view")

    def __init__(self) -> None:
        self.start = 0
        self.end = 0
        self.held_bytes = 0
        self._hold = Hold()
        self._renew()

    def hold(self, charge_bytes: int) -> Hold:
        """Somebody takes slices of what was received; to be given back to `release`, with the same charge."""
        hold = self._hold
        hold.holders += 1
        hold.charged_bytes += charge_bytes
        self.held_bytes += charge_bytes
        return hold

    def release(self, hold: Hold, charge_bytes: int) -> None:
        """One who held slices is done with them."""
        hold.holders -= 1
        if hold.is_full:
            if not hold.holders:
                self.held_bytes -= hold.charged_bytes
        else:
            hold.charged_bytes -= charge_bytes
            self.held_bytes -= charge_bytes

    def _renew(self) -> None:
        old = self._hold
        if old.holders:
            whole_bytes = max(old.charged_bytes, RECEIVE_BUFFER_BYTES)
            self.held_bytes += whole_bytes - old.charged_bytes
            old.charged_bytes, old.is_full = whole_bytes, True
            self._hold = Hold()
        self.memory = bytearray(RECEIVE_BUFFER_BYTES)
        self.view = memoryview(self.memory)
        self.pinned = False

    def room(self) -> memoryview:
        """Where the next input goes: never empty as long as what waits is less than half of the buffer."""
        waiting = self.end - self.start
        room = RECEIVE_BUFFER_BYTES - self.end
        if self.pinned:
            if room < _MIN_ROOM_BYTES:
                tail = self.view[self.start : self.end]
                self._renew()
                self._move_to_front(tail)
        elif waiting == 0:
            self.start = self.end = 0
        elif self.start and (waiting <= _CHEAP_MOVE_BYTES or room < RECEIVE_BUFFER_BYTES // 2):
            self._move_to_front(self.view[self.start : self.end])
        return self.view[self.end :]

    def _move_to_front(self, tail: memoryview) -> None:
        self.view[: len(tail)] = tail
        self.start, self.end = 0, len(tail)

    def put_back(self, data: bytes) -> None:
        """Start again with `data` (what was received behind the handshake) as the input."""
        self._renew()
        self._move_to_front(memoryview(data))

    def clear(self) -> None:
        """Forget what was received."""
        self.start = self.end
