"""What is set on and asked from the socket below a transport; a transport need not have one."""

import asyncio
import socket
from itertools import count

_unix_clients = count(1)


def describe_peer(transport: asyncio.Transport) -> str:
    """Name of the other side for logs and sentences."""
    peer = transport.get_extra_info("peername")
    if isinstance(peer, tuple) and len(peer) >= 2:
        host = f"[{peer[0]}]" if ":" in str(peer[0]) else peer[0]
        return f"{host}:{peer[1]}"
    return f"unix client {next(_unix_clients)}"


def tune_socket(transport: asyncio.Transport) -> None:
    """Send replies at once, and notice in the end that a silent client is gone."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
