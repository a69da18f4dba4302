"""What starts and watches the daemons: systemd, or a test."""

import contextlib
import os
import socket


def notify_supervisor(message: str) -> None:
    """Tell systemd (sd_notify(3)); nothing when it did not start us."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect("\0" + address[1:] if address.startswith("@") else address)
        notify.send(message.encode())
