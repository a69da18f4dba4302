"""Listening sockets that were passed to this process by who started it: systemd, libnbd's socket activation.

Source: sd_listen_fds(3).
"""

import os
import socket

from nbdserver.server import ListenError

_FIRST_FD = 3
_MOST_SOCKETS = 64


def passed_sockets() -> list[socket.socket]:
    """The sockets, none when nothing was passed to this very process. Raises ListenError.

    The variables that tell of them are removed, so that no child takes them for its own; call this once.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = os.environ.get("LISTEN_FDS", "")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    if not (count.isascii() and count.isdigit()) or not 0 < int(count) <= _MOST_SOCKETS:
        raise ListenError(f"LISTEN_FDS is {count!r}, not a number of sockets from 1 to {_MOST_SOCKETS}; correct it")
    return [_take(fd) for fd in range(_FIRST_FD, _FIRST_FD + int(count))]


def _take(fd: int) -> socket.socket:
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        usable = sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError:
        usable = False
    if not usable:
        raise ListenError(f"file descriptor {fd} is not a listening stream socket; LISTEN_FDS says that it is")
    return sock
