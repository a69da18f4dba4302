"""Data that waits to be encrypted, taken in pieces; without I/O."""

from collections import deque
from collections.abc import Iterable
from typing import Final

Buffer = bytes | bytearray | memoryview

#: The longest piece. What is shorter is joined, what is longer is cut.
PIECE_BYTES: Final = 256 * 1024
#: What is shorter is copied: as an object of its own it would take several times its size.
_SMALL_BYTES: Final = 4096


class PieceQueue:
    """First in, first out. Buffers of bytes that are put in must not change until they are taken.

    It is true when something is in it; `size_bytes` says how much.
    """

    __slots__ = ("_buffers", "size_bytes")

    def __init__(self) -> None:
        self._buffers: deque[bytearray | memoryview] = deque()  # a bytearray is our own, of small buffers
        self.size_bytes = 0

    def __bool__(self) -> bool:
        return self.size_bytes > 0

    def put(self, buffers: Iterable[Buffer]) -> None:
        """Append them all."""
        for data in buffers:
            self.size_bytes += len(data)
            if len(data) >= _SMALL_BYTES:
                self._buffers.append(memoryview(data))
            elif data:
                last = self._buffers[-1] if self._buffers else None
                if isinstance(last, bytearray) and len(last) + len(data) <= PIECE_BYTES:
                    last += data
                else:
                    self._buffers.append(bytearray(data))

    def take(self) -> Buffer:
        """The next piece: whole buffers, as many as fit, or a part of one that is longer. IndexError if it is empty."""
        first = self._buffers.popleft()
        if len(first) > PIECE_BYTES:
            view = memoryview(first)
            self._buffers.appendleft(view[PIECE_BYTES:])
            self.size_bytes -= PIECE_BYTES
            return view[:PIECE_BYTES]
        pieces, piece_bytes = [first], len(first)
        while self._buffers and piece_bytes + len(self._buffers[0]) <= PIECE_BYTES:
            pieces.append(self._buffers.popleft())
            piece_bytes += len(pieces[-1])
        self.size_bytes -= piece_bytes
        return b"".join(pieces)
