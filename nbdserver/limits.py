"""How much one server lets its clients have."""

from dataclasses import dataclass

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
