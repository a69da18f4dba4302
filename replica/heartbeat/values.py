"""Single values of the cluster manager's settings, as `replica.config_values` has others. Pure."""

import ipaddress
import re
from typing import Any, Final

_INTERFACE: Final = re.compile(r"[^\s/:]{1,15}")  # as dev_valid_name() of the kernel has it; IFNAMSIZ 16


def tables(value: object) -> list[dict[str, Any]]:
    """An array of tables."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"must be an array of tables, not {value!r}")
    return value


def table(value: object) -> dict[str, Any]:
    """A table."""
    if not isinstance(value, dict):
        raise ValueError(f"must be a table, not {value!r}")
    return value


def interface(value: object) -> str:
    """The name of a network interface; whether there is one is seen later."""
    if not isinstance(value, str) or not _INTERFACE.fullmatch(value) or value in (".", ".."):
        raise ValueError(f'must be the name of a network interface such as "eth0", not {value!r}')
    return value


def ip_address(value: object) -> str:
    """An IP address in its usual form."""
    try:
        return str(ipaddress.ip_address(value if isinstance(value, str) else ""))
    except ValueError:
        raise ValueError(f"must be an IP address, not {value!r}") from None


def ip_addresses(value: object) -> list[str]:
    """A list of different IP addresses, in their usual form. (Names could not be looked up while the network fails.)"""
    if not isinstance(value, list) or not value:
        raise ValueError(f"must be a list of IP addresses, not {value!r}")
    addresses: list[str] = []
    for item in value:
        try:
            address = ip_address(item)
        except ValueError:
            raise ValueError(f"must be a list of IP addresses: {item!r} is none") from None
        if address in addresses:
            raise ValueError(f"names {address} twice: remove one")
        addresses.append(address)
    return addresses
