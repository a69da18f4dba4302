"""Kind "ip": an address that clients use, on whichever node holds the group.

The address has a lifetime in the kernel, which `hold` renews: when this process dies or is frozen, the kernel removes
it by itself.
"""

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from replica.heartbeat import clock
from replica.heartbeat.agents import addresses, neighbours
from replica.heartbeat.agents.addresses import Interface, Lease, Link, Watch
from replica.heartbeat.agents.base import AgentError, Start, Surroundings
from replica.heartbeat.agents.threads import in_thread
from replica.heartbeat.node_state import Readiness, Ready
from replica.heartbeat.settings import ResourceSettings
from replica.tasks import spawn

log = logging.getLogger("replica.heartbeat")

#: After the first announcement so many more, a second apart: some may be lost, or come before the switch is up.
ANNOUNCEMENTS: Final = 5
ANNOUNCEMENT_INTERVAL_S: Final = 1.0
#: For so long the answer holds that nobody has an address.
RECENT_S: Final = 0.5


#: How long another holder may take to lose the address: a dead one has it for its lifetime (see `lifetime_s`).
YIELD_S: Final = 2.0
_ASK_AGAIN_S: Final = 0.1


class _Place(NamedTuple):
    """Where the address is to be."""

    link: Link
    interface: Interface


def _find_place(options: Mapping[str, Any]) -> _Place:
    """Blocks. AgentError."""
    wanted = ipaddress.ip_interface(options["ip"])
    name = options["interface"].split(":")[0]
    links = {link.ifindex: link for link in addresses.links()}
    networks = addresses.attached_networks(wanted.ip)
    if name:
        named = [link for link in links.values() if link.name == name]
        if not named:
            raise AgentError(f"needs the interface {name}, which this node does not have")
        link = named[0]
        networks = [(index, prefix) for index, prefix in networks if index == link.ifindex]
    elif networks:
        link = links[networks[0][0]]
    else:
        raise AgentError(f"is in no network that this node is attached to (`ip route get {wanted.ip}`): name one")
    if link.loopback:
        raise AgentError(f"cannot be on {link.name}, which is no interface to a network")
    if "/" not in options["ip"]:
        if not networks:
            raise AgentError(f"is in no network of {link.name}: write it with the length of its prefix, such as /24")
        wanted = ipaddress.ip_interface(f"{wanted.ip}/{networks[0][1]}")
    return _Place(link, wanted)


def _unusable(link: Link) -> str:
    """Why nobody could reach an address there; "": it is usable."""
    return f"{link.name} is down" if not link.up else f"{link.name} has no carrier" if not link.carrier else ""


#: Interface and address → when nobody answered for it.
_unheld: dict[tuple[str, addresses.Address], float] = {}


async def _holder(place: _Place) -> str:
    if not place.link.neighbours:
        return ""
    asked = (place.link.name, place.interface.ip)
    _unheld.pop(asked, None)
    ours = {link.mac for link in await in_thread(addresses.links)}
    try:
        mac = await neighbours.find_holder(place.link.name, place.link.mac, place.interface.ip, ours)
    except OSError as error:
        raise AgentError(f"cannot be asked for on {place.link.name} ({error.strerror or error})") from None
    if mac is None:
        _unheld[asked] = clock.now()
        return ""
    return neighbours.mac_text(mac)


async def _new_holder(place: _Place) -> str:
    """The same, but who was asked just now, before the takeover, is not asked again: clients wait."""
    asked_s = _unheld.get((place.link.name, place.interface.ip), float("-inf"))
    return "" if clock.now() - asked_s < RECENT_S else await _holder(place)


async def held_elsewhere(settings: ResourceSettings) -> str:
    """The MAC of another machine that answers for the address of a resource of kind "ip", "" when none does within
    `neighbours.PROBE_END_S`. AgentError when that cannot be asked: no interface, no carrier, no right to.
    """
    place = await _asked(_find_place, settings.options)
    if why := _unusable(place.link):
        raise AgentError(f"cannot be asked for: {why}")
    return await _holder(place)


async def _asked(function: Any, *arguments: Any) -> Any:
    """What the kernel says, asked in a thread. AgentError."""
    try:
        return await in_thread(function, *arguments)
    except AgentError:
        raise
    except Exception as error:  # pyroute2 has errors of its own, which are no OSError
        why = getattr(error, "strerror", None) or str(error)
        raise AgentError(f"cannot be looked after: the kernel says {why!r}") from error


# ── the agent ────────────────────────────────────────────────────────────────────────────────────────────────────────


class AddressAgent:
    """One address."""

    def __init__(self, settings: ResourceSettings, surroundings: Surroundings) -> None:
        self._options = settings.options
        self._address = ipaddress.ip_interface(settings.options["ip"]).ip
        self._name = settings.name
        self._timing = surroundings.settings.timing
        self._changed = surroundings.changed
        self._ready = Ready(Readiness.NO, f"the network of {self._name} was not looked at yet")
        self._watch: Watch | None = None
        self._looking: asyncio.Task[None] | None = None
        self._look_again = False
        self._lease: Lease | None = None
        self._until_s = 0.0
        self._renewing: asyncio.Task[None] | None = None
        self._complaint = ""
        self._announcing: asyncio.Task[None] | None = None
        self._usable = False
        self._farewells = 0  # counts `let_go`

    async def start(self, start: Start) -> None:
        farewells = self._farewells
        self._begin_watch()
        place: _Place = await _asked(_find_place, self._options)
        if why := _unusable(place.link):
            raise AgentError(f"cannot be added: {why}")
        existing = await self._existing(place)
        if self._lease is not None and self._lease.held and existing:
            return
        give_up_s = clock.now() + YIELD_S
        while mac := await _new_holder(place):
            if clock.now() > give_up_s:
                raise AgentError(f"is held by {mac} on {place.link.name}")
            await asyncio.sleep(_ASK_AGAIN_S)
        await self._forget_lease()
        if self._farewells != farewells:
            raise AgentError("was let go before it was added")
        lease = self._new_lease(place)
        if self._until_s <= clock.now():  # nobody has said anything yet
            self._until_s = clock.now() + self._timing.deadtime_s
        await _asked(lease.renew, self._until_s)
        if not lease.held:
            raise AgentError("was let go while it was added")
        self._announce(place.link)

    async def stop(self) -> None:
        self._until_s = 0.0
        self._stop_announcing()
        if self._lease is not None:
            await _asked(self._lease.end)
        for one in await self._leased():
            await _asked((await self._lease_of(one)).end)
        if await self._leased():
            raise AgentError("is still there, although it was removed")
        await self._forget_lease()

    async def monitor(self) -> None:
        """A pulled cable is no failure of the address, which starting it again would mend: `ready` tells of that."""
        place: _Place = await _asked(_find_place, self._options)
        if not await self._existing(place):
            raise AgentError(f"is not on {place.link.name} any more")

    async def active(self) -> bool:
        """(It is held on, if it is found: what an earlier run of this program has added.)"""
        self._begin_watch()
        found = await self._leased()
        if not found:
            return False
        if self._lease is None:
            self._lease = await self._lease_of(found[0])
        return True

    def ready(self) -> Ready:
        self._begin_watch()
        return self._ready

    def hold(self, until_s: float) -> None:
        self._until_s = until_s
        if self._lease is not None and self._lease.held and self._renewing is None:
            self._renewing = spawn(self._renew(self._lease), f"lifetime of {self._name}")

    def let_go(self) -> None:
        self._farewells += 1
        self._until_s = 0.0
        if self._lease is not None:
            self._lease.end_now()
        self._stop_announcing()

    async def close(self) -> None:
        self._stop_announcing()
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        if self._looking is not None:
            self._looking.cancel()
        await self._forget_lease()

    # ── the lease ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _leased(self) -> list[addresses.Configured]:
        """The address as it is on this machine, where it has a lifetime: only that is ours."""
        found: list[addresses.Configured] = await _asked(addresses.configured, self._address)
        return [one for one in found if not one.permanent]

    async def _existing(self, place: _Place) -> bool:
        """Whether it is where it should be. AgentError when it is somewhere else."""
        found: list[addresses.Configured] = await _asked(addresses.configured, self._address)
        for one in found:
            if one.permanent:
                raise AgentError(
                    "is configured on this node for good: take it out of the network's configuration (`ip addr del`), "
                    "for only the cluster manager may add and remove it"
                )
            here = one.ifindex == place.link.ifindex and one.prefix == place.interface.network.prefixlen
            if not here:
                raise AgentError(
                    f"is on another interface or network of this node already: remove it there (`ip addr show to "
                    f"{self._address}`)"
                )
        return bool(found)

    def _new_lease(self, place: _Place) -> Lease:
        _, _, alias = self._options["interface"].partition(":")
        label = self._options["label"] or (self._options["interface"] if alias else "")
        broadcast = self._options["broadcast"]
        if not broadcast and place.interface.version == 4 and place.interface.network.num_addresses > 2:
            broadcast = str(place.interface.network[-1])
        self._lease = Lease(
            place.link.ifindex,
            place.interface,
            label=label,
            broadcast=broadcast,
            keepalive_s=self._timing.keepalive_s,
        )
        return self._lease

    async def _lease_of(self, one: addresses.Configured) -> Lease:
        """The lease on what is there already."""
        interface = ipaddress.ip_interface(f"{self._address}/{one.prefix}")
        if self._lease is not None and (self._lease.ifindex, self._lease.interface) == (one.ifindex, interface):
            return self._lease
        await self._forget_lease()
        return self._new_lease(_Place(Link(one.ifindex, "", b"", True, True, False, False), interface))

    async def _forget_lease(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            await in_thread(lease.close)  # it waits for a renewal that is under way

    async def _renew(self, lease: Lease) -> None:
        try:
            done_s = 0.0
            while lease.held and done_s != self._until_s:
                done_s = self._until_s
                await in_thread(lease.renew, done_s)
            self._complaint = ""
        except OSError as error:
            complaint = f"{self._name}: its lifetime cannot be renewed ({error.strerror or error})"
            if lease.held and complaint != self._complaint:
                self._complaint = complaint
                log.error("%s", complaint)
                self._changed()
        finally:
            self._renewing = None

    # ── the network ──────────────────────────────────────────────────────────────────────────────────────────────

    def _begin_watch(self) -> None:
        if self._watch is None:
            self._watch = Watch(self._look, self._address_added, self._address_lost)
            self._look()

    def _address_added(self) -> None:
        if self._ready.readiness is Readiness.NO:
            self._look()  # its network may have come

    def _address_lost(self) -> None:
        if self._lease is not None and self._lease.held:
            self._changed()  # it may be ours: the monitor will see

    def _look(self) -> None:
        self._look_again = True
        if self._looking is None:
            self._looking = spawn(self._look_at_links(), f"interface of {self._name}")

    async def _look_at_links(self) -> None:
        try:
            while self._look_again:
                self._look_again = False
                link: Link | None = None
                try:
                    link = (await _asked(_find_place, self._options)).link
                    why = _unusable(link)
                except AgentError as error:
                    why = f"{self._name} {error}"
                self._found(link, why)
        finally:
            self._looking = None

    def _found(self, link: Link | None, why: str) -> None:
        before, usable_before = self._ready, self._usable
        self._usable = not why
        self._ready = Ready(Readiness.NO, why) if why else Ready()
        if self._lease is not None and self._lease.held and self._usable and not usable_before and link is not None:
            self._announce(link)  # the cable is back, perhaps in another switch
        if self._ready != before:
            self._changed()

    def _announce(self, link: Link) -> None:
        self._stop_announcing()
        if not link.neighbours:
            return
        try:
            network = neighbours.open_network(link.name, self._address)
        except OSError as error:
            log.warning("%s: cannot be announced on %s (%s)", self._name, link.name, error.strerror or error)
            return
        neighbours.announce(network, link.mac, self._address)
        self._announcing = spawn(self._announce_again(network, link.mac), f"announcements of {self._name}")
        self._announcing.add_done_callback(lambda _: network.close())

    async def _announce_again(self, network: socket.socket, mac: bytes) -> None:
        for _ in range(ANNOUNCEMENTS):
            await asyncio.sleep(ANNOUNCEMENT_INTERVAL_S)
            neighbours.announce(network, mac, self._address)

    def _stop_announcing(self) -> None:
        if self._announcing is not None:
            self._announcing.cancel()
            self._announcing = None
