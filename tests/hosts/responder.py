"""Answers datagrams with the name of this host, from the address that was asked."""

import os
import socket
import struct

PORT = 7000
_PRIORITY = -10  # as the prober has
_IP_PKTINFO = 8  # <linux/in.h>; Python has it from 3.14 on
_IN_PKTINFO = struct.Struct("I4s4s")  # interface, address of ours, destination


def main() -> None:
    """Until the host ends."""
    os.setpriority(os.PRIO_PROCESS, 0, _PRIORITY)
    name = socket.gethostname().encode()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        sock.bind(("", PORT))
        while True:
            question, ancillary, _, asker = sock.recvmsg(64, socket.CMSG_SPACE(_IN_PKTINFO.size))
            _, _, asked = _IN_PKTINFO.unpack(ancillary[0][2])
            from_there = _IN_PKTINFO.pack(0, asked, bytes(4))
            try:
                sock.sendmsg([question + name], [(socket.IPPROTO_IP, _IP_PKTINFO, from_there)], 0, asker)
            except OSError:
                continue  # the address has just gone


if __name__ == "__main__":
    main()
