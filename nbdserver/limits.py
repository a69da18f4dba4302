"""How much one server lets its clients have."""

from dataclasses import dataclass

from nbdserver.constants import MAX_REQUEST_BYTES
from nbdserver.receive_buffer import RECEIVE_BUFFER_BYTES

MIB = 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """Bounds of one server; sizes in bytes, times in seconds.

    `in_flight_bytes` and `slow_requests` are per connection: above them it reads and executes nothing
    more until replies have been sent. The first request always gets through, whatever its size.
    """

    max_connections: int = 64
    handshake_timeout_s: float = 10.0
    in_flight_bytes: int = 64 * MIB
    slow_requests: int = 256
    unsent_reply_bytes: int = 4 * MIB
    drain_timeout_s: float = 10.0  # how long a client that does not read its replies can hold up a drain
    linger_s: float = 1.0

    @property
    def client_bytes(self) -> int:
        """The most memory that one client can make the server hold, whatever it sends and does not read."""
        # The request that gets through although the others are just at the limit, and what is received meanwhile.
        excess_bytes = MAX_REQUEST_BYTES + 2 * RECEIVE_BUFFER_BYTES
        return self.in_flight_bytes + self.unsent_reply_bytes + excess_bytes
