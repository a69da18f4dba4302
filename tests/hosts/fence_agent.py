"""A fence device for the hosts of a lab, as a fence agent: ``key=value`` lines on standard input.

``action`` off, on, reboot, status, monitor, metadata; ``plug`` (or ``port``) the host. Exit status 0: done, and for
status: on; 2: off; 1: failed. Copied into the hosts as fence_lab; asks the lab over a socket that all hosts see.
"""

import socket
import sys

SOCKET = "/lab/fence.sock"
_METADATA = """<?xml version="1.0" ?>
<resource-agent name="fence_lab" shortdesc="Fence agent for hosts of a lab">
<parameters><parameter name="plug" unique="0" required="1"><content type="string"/></parameter></parameters>
<actions><action name="on"/><action name="off"/><action name="reboot"/><action name="status"/><action name="monitor"/>
<action name="metadata"/></actions></resource-agent>"""


def main() -> int:
    """The exit status."""
    lines = (line.strip().partition("=") for line in sys.stdin if not line.startswith("#"))
    options = {key.strip(): value.strip() for key, _, value in lines}
    action = options.get("action", "reboot")
    if action == "metadata":
        print(_METADATA)
        return 0
    with socket.socket(socket.AF_UNIX) as device:
        device.connect(SOCKET)
        device.sendall(f"{action} {options.get('plug') or options.get('port', '')}\n".encode())
        answer = device.makefile().readline().strip()
    if answer not in ("done", "on", "off"):
        print(f"fence_lab: {answer or 'the device hung up'}", file=sys.stderr)
        return 1
    return 2 if answer == "off" else 0


if __name__ == "__main__":
    sys.exit(main())
