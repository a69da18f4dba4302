"""The memory one connection receives into."""

RECEIVE_BUFFER_BYTES = 512 * 1024
_MIN_ROOM_BYTES = 64 * 1024
_CHEAP_MOVE_BYTES = 8 * 1024


class ReceiveBuffer:
    """Bytes [start, end) of `view` are received and not parsed yet.

    Parsed requests are handed on as slices of `view`, without a copy. Whoever keeps such a slice sets
    `pinned`: from then on nothing before `end` is overwritten, new input goes behind it, and when the room
    there is used up the memory is left to those who still hold slices of it.
    """

    __slots__ = ("end", "memory", "pinned", "start", "view")

    def __init__(self) -> None:
        self.start = 0
        self.end = 0
        self._renew()

    def _renew(self) -> None:
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
