"""A write that is passed on in pieces while its data arrives (pure)."""

from collections.abc import Mapping

from nbdserver.constants import PREFERRED_BLOCK_BYTES

MIN_PIECE_BYTES = 64 * 1024


class StreamedWrite:
    """What is known about one large, or rejected, write whose payload is being received.

    A rejected one (`error` set from the start, or by a piece that failed) has the rest of its payload
    thrown away. Its reply is due when the payload is complete and no piece is outstanding: some clients
    cannot take a reply to a request that they are still sending.
    """

    __slots__ = ("cookie", "error", "fua", "offset", "outstanding", "remaining")

    def __init__(self, cookie: bytes, offset: int, length: int, *, fua: bool, error: int) -> None:
        self.cookie = cookie
        self.offset = offset  # of the next piece
        self.remaining = length  # bytes of payload not taken yet
        self.fua = fua
        self.error = error
        self.outstanding = 0  # pieces handed over and not done

    def next_piece(self, available: int) -> int:
        """How many of `available` received bytes to take now; 0: wait for more.

        Pieces end on block boundaries, so that no block is written by halves, and are not tiny.
        """
        if self.error or available >= self.remaining:
            return min(available, self.remaining)
        length = (self.offset + available) // PREFERRED_BLOCK_BYTES * PREFERRED_BLOCK_BYTES - self.offset
        return length if length >= MIN_PIECE_BYTES else 0

    def take(self, length: int) -> None:
        self.offset += length
        self.remaining -= length

    def piece_done(self, errors: Mapping[int, int]) -> None:
        """One piece is done; a later error does not replace the first."""
        self.outstanding -= 1
        if errors and not self.error:
            self.error = next(iter(errors.values()))

    @property
    def is_complete(self) -> bool:
        return self.remaining == 0 and self.outstanding == 0
