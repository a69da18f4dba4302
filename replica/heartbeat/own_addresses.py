"""The IP addresses of this machine, without a look at its routes."""

import array
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path
from typing import Final

_SIOCGIFCONF: Final = 0x8912
_IFCONF: Final = struct.Struct("@iP")  # struct ifconf
_IFREQ_BYTES: Final = 40  # struct ifreq on 64 bits; an address family, a port and an IPv4 address from byte 16 on
_MAX_ADDRESSES: Final = 1024
_IPV6_FILE: Final = Path("/proc/net/if_inet6")


def own_addresses() -> frozenset[str]:
    """All of them in their usual form, of interfaces that are up or not."""
    return frozenset((*_ipv4(), *_ipv6()))


def _ipv4() -> list[str]:
    buffer = array.array("B", bytes(_MAX_ADDRESSES * _IFREQ_BYTES))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = _IFCONF.pack(len(buffer), buffer.buffer_info()[0])
        used, _ = _IFCONF.unpack(fcntl.ioctl(probe, _SIOCGIFCONF, request))
    entries = (buffer[at : at + _IFREQ_BYTES].tobytes() for at in range(0, used, _IFREQ_BYTES))
    return [socket.inet_ntoa(entry[20:24]) for entry in entries]


def _ipv6() -> list[str]:
    try:
        lines = _IPV6_FILE.read_text().splitlines()
    except OSError:  # a kernel without IPv6
        return []
    return [str(ipaddress.IPv6Address(bytes.fromhex(line.split()[0]))) for line in lines]
