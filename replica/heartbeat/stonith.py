"""``stonith_host`` of ha.cf: the plug-ins of Heartbeat's STONITH, as the fence agents that do the same. Pure.

The parameters are those that `stonith -t TYPE -n` prints, in that order (cluster-glue 1.0.12).
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from replica.heartbeat.settings import FenceDevice

Parameters = dict[str, str]


class _Plugin(NamedTuple):
    #: In their order; "[name]" may be left out.
    parameters: tuple[str, ...]
    agent: str
    options: Callable[[Parameters], dict[str, str]]
    #: The parameter that names the only node that it switches off.
    target: str


def _ipmi(given: Parameters) -> dict[str, str]:
    return {
        "ip": given["ipaddr"],
        "username": given["userid"],
        "password": given["passwd"],
        **({"lanplus": "1"} if given.get("interface") == "lanplus" else {}),
    }


def _ipmilan(given: Parameters) -> dict[str, str]:
    privileges = {"admin": "administrator"}
    return {
        "ip": given["ipaddr"],
        "ipport": given["port"],
        "auth": {"straight": "password"}.get(given["auth"], given["auth"]),
        "privlvl": privileges.get(given["priv"], given["priv"]),
        "username": given["login"],
        "password": given["password"],
    }


_PLUGINS: Final = {
    "external/ipmi": _Plugin(
        ("hostname", "ipaddr", "userid", "passwd", "[interface]"), "fence_ipmilan", _ipmi, "hostname"
    ),
    "ipmilan": _Plugin(
        ("hostname", "ipaddr", "port", "auth", "priv", "login", "password", "[reset_method]"),
        "fence_ipmilan",
        _ipmilan,
        "hostname",
    ),
    "external/riloe": _Plugin(
        ("hostlist", "ilo_hostname", "ilo_user", "ilo_password", "[ilo_can_reset]", "[ilo_protocol]"),
        "fence_ilo",
        lambda given: {
            "ip": given["ilo_hostname"],
            "username": given["ilo_user"],
            "password": given["ilo_password"],
            "ssl_insecure": "1",  # the plug-in checks no certificate
        },
        "hostlist",
    ),
}

_BY_NUMBER: Final = "finds a node's outlet by its name, and the fence agent by its number: add [fencing.NODE] with "
_NOT_HERE: Final = {
    "apcmaster": f'{_BY_NUMBER}agent = "fence_apc" and plug = "1" or whichever it is',
    "apcmastersnmp": f'{_BY_NUMBER}agent = "fence_apc_snmp" and plug = "1" or whichever it is',
    "external/rackpdu": f'{_BY_NUMBER}agent = "fence_apc_snmp" and plug = "1" or whichever it is',
    "wti_nps": f'{_BY_NUMBER}agent = "fence_wti" and plug = "1" or whichever it is',
    "external/drac5": 'logs in with a key of root\'s: add [fencing.NODE] with agent = "fence_drac5", secure and '
    "identity_file",
    "drac3": 'does not name the node that it switches off: add [fencing.NODE] with agent = "fence_drac"',
    "external/libvirt": 'asks a hypervisor by virsh: add [fencing.NODE] with agent = "fence_virsh" and plug',
    "ibmhmc": 'asks an HMC by ssh: add [fencing.NODE] with agent = "fence_lpar"',
    "external/vcenter": 'asks a vCenter: add [fencing.NODE] with agent = "fence_vmware_rest" and plug',
    "meatware": "asks a person: leave it out, and run `replicactl fence NODE --done` after switching a node off",
    "ssh": "cannot reach a node that is dead, cut off or frozen: it is no fencing",
    "external/ssh": "cannot reach a node that is dead, cut off or frozen: it is no fencing",
    "null": "does nothing: it is no fencing",
    "suicide": "is done by the node itself, which may be frozen: it is no fencing",
}


def stonith_target(kind: str, parameters: Sequence[str]) -> str:
    """The only node that this device can switch off. ValueError as below."""
    plugin = _plugin(kind)
    return _named(kind, plugin, parameters)[plugin.target]


def device_from_stonith(kind: str, parameters: Sequence[str], node: str | None = None) -> FenceDevice:
    """What ``stonith_host FROM kind parameters…`` is as a fence device for `node`.

    Raises ValueError with the rest of a sentence: for a type that is not known or has no equal, for missing
    parameters, and when the device switches off another node than `node`, or `node` is not given: fencing the wrong
    node would be worse than none.
    """
    plugin = _plugin(kind)
    target = stonith_target(kind, parameters)
    if target != node:
        raise ValueError(f"{kind} with these parameters switches off {target} and no other node")
    return FenceDevice(plugin.agent, plugin.options(_named(kind, plugin, parameters)))


def _plugin(kind: str) -> _Plugin:
    if kind in _PLUGINS:
        return _PLUGINS[kind]
    if kind in _NOT_HERE:
        raise ValueError(f"{kind} {_NOT_HERE[kind]}")
    known = ", ".join(_PLUGINS)
    raise ValueError(f"{kind} is no type that has a fence agent here (known are {known}): add [fencing.NODE]")


def _named(kind: str, plugin: _Plugin, parameters: Sequence[str]) -> Parameters:
    names = [name.strip("[]") for name in plugin.parameters]
    required = sum(not name.startswith("[") for name in plugin.parameters)
    if not required <= len(parameters) <= len(names):
        raise ValueError(f"{kind} takes {' '.join(plugin.parameters)}, and {len(parameters)} are given")
    return dict(zip(names, parameters, strict=False))
