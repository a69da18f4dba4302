"""The kind "ip" as the configuration has it.

The agent itself (`replica.heartbeat.agents.ip`), with all that it takes to talk to the kernel, is imported only where
one is made: every program reads the configuration.
"""

import ipaddress
from collections.abc import Mapping
from typing import Any, Final

from replica.config_values import text
from replica.heartbeat.agents.base import Agent, Kind, Option, Surroundings
from replica.heartbeat.settings import ResourceSettings

#: (IFNAMSIZ of linux/if.h, less the final zero.)
_MAX_NAME: Final = 15


def parse_address(value: object) -> str:
    """An address with the length of its network's prefix, or its netmask, or without: "192.168.2.50/24"."""
    wanted = f'must be an IP address such as "192.168.2.50/24" or "2001:db8::50/64", not {value!r}'
    if not isinstance(value, str):
        raise ValueError(wanted)
    try:
        interface = ipaddress.ip_interface(value.strip())
    except ValueError:
        raise ValueError(wanted) from None
    address, network = interface.ip, interface.network
    if address.is_loopback or address.is_multicast or address.is_unspecified:
        raise ValueError(f"must be the address of a machine on a network, which {address} is not")
    if address.version == 4 and network.num_addresses > 2 and address in (network[0], network[-1]):
        raise ValueError(f"must be the address of one machine, and {address} means all of {network}")
    return str(interface) if "/" in value else str(address)


def _parse_interface(value: object) -> str:
    name = text(value)
    if len(name.split(":")[0]) > _MAX_NAME or "/" in name or any(map(str.isspace, name)):
        raise ValueError(f'must be the name of a network interface, such as "eth0", not {value!r}')
    if name == "lo":
        raise ValueError('must be an interface to a network, and "lo" is none')
    return name


def _parse_label(value: object) -> str:
    label = text(value)
    if len(label) > _MAX_NAME:
        raise ValueError(f'must be a label of at most {_MAX_NAME} characters, such as "eth0:web", not {value!r}')
    return label


def _parse_broadcast(value: object) -> str:
    try:
        return str(ipaddress.IPv4Address(value if isinstance(value, str) else ""))
    except ValueError:
        raise ValueError(f"must be an IPv4 address, not {value!r}") from None


def _check(options: Mapping[str, Any]) -> None:
    interface = ipaddress.ip_interface(options["ip"])
    if interface.version == 6:
        for name in ("label", "broadcast"):
            if options[name]:
                raise ValueError(f"{name} is for IPv4 only, and {interface.ip} is IPv6")
        if interface.ip.is_link_local and not options["interface"]:
            raise ValueError(f"{interface.ip} needs interface: every interface has its network")


def _make(settings: ResourceSettings, surroundings: Surroundings) -> Agent:
    from replica.heartbeat.agents.ip import AddressAgent

    return AddressAgent(settings, surroundings)


KINDS: Final = (
    Kind(
        name="ip",
        options={
            "ip": Option(parse_address),
            "interface": Option(_parse_interface, ""),
            "label": Option(_parse_label, ""),
            "broadcast": Option(_parse_broadcast, ""),
        },
        title=lambda options: f"ip {options['ip']}",
        make=_make,
        check=_check,
    ),
)
