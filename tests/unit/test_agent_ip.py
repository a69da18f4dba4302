"""An address that moves: who has it is asked first, everybody is told, and it goes when its holder dies."""

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest

from replica.heartbeat import clock
from replica.heartbeat.agents import neighbours
from replica.heartbeat.agents.addresses import lifetime_s
from replica.heartbeat.agents.base import AgentError, Start, Surroundings
from replica.heartbeat.agents.ip import AddressAgent, held_elsewhere
from replica.heartbeat.agents.ip_options import KINDS
from replica.heartbeat.node_state import Readiness
from replica.heartbeat.settings import Auth, AuthMethod, HeartbeatSettings, ResourceSettings, Timing
from tests.network import ip, neighbour, own_network, printing
from tests.processes import PATIENCE_S

START = Start(peer_is_dead=False)
V4, V6 = "10.77.0.50/24", "2001:db8::50/64"
MAC = bytes.fromhex("020000000001")


def resource(address: str, **options: str) -> ResourceSettings:
    """The settings of one address."""
    (kind,) = KINDS
    given = {"ip": address, **options}
    checked = {
        name: option.parse(given[name]) if name in given else option.default for name, option in kind.options.items()
    }
    kind.check(checked)
    return ResourceSettings("ip", kind.title(checked), checked, "test:1")


def make_agent(address: str, changed: Callable[[], None] = lambda: None, **options: str) -> AddressAgent:
    """Its agent, with a dead time of two seconds."""
    timing = Timing(keepalive_s=0.2, deadtime_s=2.0)
    settings = HeartbeatSettings(
        "test", "node1", "node2", Auth(AuthMethod.CRC, b""), (), (), Path("state"), Path("run"), timing
    )
    return AddressAgent(resource(address, **options), Surroundings(settings, changed))


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """In an event loop of its own."""
    return asyncio.run(asyncio.wait_for(work, PATIENCE_S))


def shown(address: str) -> str:
    """What iproute2 says of the address, "" when it is not there."""
    return ip(f"addr show to {ip_address(address.partition('/')[0])}")


# ── pure ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("remaining_s", "keepalive_s", "wanted_s"),
    [
        (4.9, 1.0, 4),  # rather too short
        (5.0, 1.0, 5),
        (2.0, 1.0, 2),
        (1.9, 1.0, 2),  # one second would be over when the next renewal comes
        (0.9, 0.2, 1),  # there is nothing shorter
        (0.3, 1.0, 1),  # never more than a second too long
        (0.0, 0.2, 0),
        (-3.0, 0.2, 0),
    ],
)
def test_a_lifetime_is_short_and_lasts_to_the_next_renewal(
    remaining_s: float, keepalive_s: float, wanted_s: int
) -> None:
    assert lifetime_s(remaining_s, keepalive_s) == wanted_s


@pytest.mark.parametrize("address", [IPv4Address("10.77.0.50"), IPv6Address("2001:db8::50")])
def test_an_announcement_names_its_holder_and_a_question_does_not(address: neighbours.Address) -> None:
    other = address + 1
    for frame in neighbours.announcements(MAC, address):
        assert neighbours.holder(frame, address) == MAC
        assert neighbours.holder(frame, other) is None
        for length in range(len(frame)):  # cut short
            assert neighbours.holder(frame[:length], address) in (None, MAC)
    assert neighbours.holder(neighbours.question(MAC, address), address) is None


@pytest.mark.parametrize("address", [IPv4Address("10.77.0.50"), IPv6Address("2001:db8::50")])
def test_a_question_tells_who_is_about_to_take_the_address(address: neighbours.Address) -> None:
    frame = neighbours.question(MAC, address)
    assert neighbours.contender(frame + bytes(18), address) == MAC  # Ethernet frames are padded
    assert neighbours.contender(frame, address + 1) is None
    assert {neighbours.contender(frame[:length], address) for length in range(len(frame))} == {None}
    for said in neighbours.announcements(MAC, address):
        assert neighbours.contender(said, address) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ip": "10.77.0.256/24"}, "must be an IP address"),
        ({"ip": 7}, "must be an IP address"),
        ({"ip": "127.0.0.5/8"}, "which 127.0.0.5 is not"),
        ({"ip": "224.0.0.5"}, "which 224.0.0.5 is not"),
        ({"ip": "10.77.0.255/24"}, "means all of 10.77.0.0/24"),
        ({"ip": V4, "interface": "lo"}, "to a network"),
        ({"ip": V4, "interface": "a name with blanks"}, "name of a network interface"),
        ({"ip": V4, "broadcast": "x"}, "IPv4 address"),
        ({"ip": V4, "label": "eth0:much-too-long"}, "at most 15 characters"),
        ({"ip": V6, "label": "eth0:web"}, "IPv4 only"),
        ({"ip": "fe80::50/64"}, "needs interface"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resource(options.pop("ip"), **options)


def test_a_netmask_is_a_prefix() -> None:
    assert resource("10.77.0.50/255.255.255.0").name == "ip 10.77.0.50/24"


# ── on a network ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.root
@pytest.mark.parametrize("address", [V4, V6])
@own_network
def test_it_is_added_announced_and_removed(address: str) -> None:
    async def work() -> None:
        agent = make_agent(address)
        assert not await agent.active()
        with printing(*host.inside("ip", "monitor", "neigh")) as news:
            await agent.start(START)
            plain = address.partition("/")[0]
            if address == V4:  # a neighbour that knows another MAC of it learns the new one
                assert f"{plain} dev eth0 lladdr 02:00:00:00:00:01" in await in_line(news, "00:01")
            else:
                assert plain in await in_line(news, "00:01")
        await agent.start(START)
        await agent.monitor()
        assert await agent.active()
        assert "sec" in shown(address)
        await agent.stop()
        assert not shown(address)
        await agent.stop()
        with pytest.raises(AgentError, match="not on eth0 any more"):
            await agent.monitor()
        await agent.close()

    with neighbour() as host:
        host.ip(f"neigh add {address.partition('/')[0]} lladdr 02:00:00:00:00:77 dev eth0 nud stale")
        run(work())


async def in_line(lines: Any, words: str) -> str:
    """The first line with these words."""
    while True:
        line: str = await asyncio.to_thread(lines.readline)
        assert line, f"nothing with {words!r}"
        if words in line:
            return line


@pytest.mark.root
@pytest.mark.parametrize("address", [V4, V6])
@own_network
def test_what_another_machine_has_is_not_taken(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replica.heartbeat.agents.ip.YIELD_S", 0.2)

    async def work() -> None:
        agent = make_agent(address, interface="eth0")
        assert await held_elsewhere(resource(address)) == ""
        host.ip(f"addr add {address} dev eth0" + (" nodad" if address == V6 else ""))
        assert await held_elsewhere(resource(address)) == "02:00:00:00:00:02"
        with pytest.raises(AgentError, match="is held by 02:00:00:00:00:02 on eth0"):
            await agent.start(START)
        assert not shown(address)
        await agent.close()

    with neighbour() as host:
        run(work())


#: Answers a question about an address by asking itself; says how often it was asked after that.
_RIVAL = """
import ipaddress, sys
from replica.heartbeat.agents import neighbours
address, mac = ipaddress.ip_address(sys.argv[1]), bytes.fromhex(sys.argv[2])
network = neighbours.open_network("eth0", address)
network.settimeout(1)
print("ready", flush=True)
asked = 0
try:
    while True:
        if neighbours.contender(network.recv(2048), address) == bytes.fromhex("020000000001"):
            if not asked:
                network.send(neighbours.question(mac, address))
            asked += 1
except TimeoutError:
    print(asked, flush=True)
"""


@pytest.mark.root
@pytest.mark.parametrize("address", [V4, V6])
@pytest.mark.parametrize(("rival", "found"), [("020000000002", None), ("020000000000", bytes.fromhex("020000000000"))])
@own_network
def test_of_two_that_ask_at_once_one_gives_way(address: str, rival: str, found: bytes | None) -> None:
    plain = ip_address(address.partition("/")[0])
    with neighbour() as host, printing(*host.inside(sys.executable, "-c", _RIVAL, str(plain), rival)) as said:
        assert said.readline() == "ready\n"
        assert run(neighbours.find_holder("eth0", MAC, plain, [MAC])) == found
        asked = int(said.readline())
        assert asked == len(neighbours.PROBES_S) + 1 if found is None else asked >= 1


@pytest.mark.root
@own_network
def test_an_address_is_taken_when_its_holder_loses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a daemon that hangs does: its kernel still has the address for a while."""

    async def work() -> None:
        agent = make_agent(V4)
        host.ip(f"addr add {V4} dev eth0 valid_lft 1 preferred_lft 1")
        assert await held_elsewhere(resource(V4)) == "02:00:00:00:00:02"
        await agent.start(START)
        assert shown(V4)
        await agent.stop()
        await agent.close()

    monkeypatch.setattr("replica.heartbeat.agents.ip.YIELD_S", PATIENCE_S)
    with neighbour() as host:
        run(work())


@pytest.mark.root
@own_network
def test_nobody_is_asked_twice_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        agent = make_agent(V4)
        assert await held_elsewhere(resource(V4)) == ""
        host.ip(f"addr add {V4} dev eth0")  # so that whoever asks again finds it out
        await agent.start(START)
        await agent.stop()
        now = clock.now()
        monkeypatch.setattr("replica.heartbeat.agents.ip.YIELD_S", -1.0)
        monkeypatch.setattr("replica.heartbeat.clock.now", lambda: now + 120)
        with pytest.raises(AgentError, match="is held by"):
            await agent.start(START)
        await agent.close()

    monkeypatch.setattr("replica.heartbeat.agents.ip.RECENT_S", 60.0)
    with neighbour() as host:
        run(work())


@pytest.mark.root
@own_network
def test_it_finds_interface_and_prefix_by_the_route() -> None:
    async def work() -> None:
        agent = make_agent("10.77.0.50")
        await agent.start(START)
        assert "10.77.0.50/24 brd 10.77.0.255" in shown(V4)
        await agent.stop()
        await agent.close()
        labelled = make_agent("10.77.0.51/32", interface="eth0:0", broadcast="10.77.0.255")
        await labelled.start(START)
        assert "10.77.0.51/32 brd 10.77.0.255" in shown("10.77.0.51")
        assert "eth0:0" in shown("10.77.0.51")
        await labelled.stop()
        await labelled.close()
        for address, words in (("10.78.0.50/24", "in no network"), ("10.77.0.50", "does not have")):
            lost = make_agent(address, **({} if "no" in words[:5] else {"interface": "eth7"}))
            with pytest.raises(AgentError, match=words):
                await lost.start(START)
            await lost.close()

    with neighbour():
        run(work())


@pytest.mark.root
@own_network
def test_an_address_of_the_administrator_is_left_alone() -> None:
    async def work() -> None:
        agent = make_agent(V4)
        assert not await agent.active()
        with pytest.raises(AgentError, match="configured on this node for good"):
            await agent.start(START)
        await agent.stop()
        assert "forever" in shown(V4)
        await agent.close()

    with neighbour():
        ip(f"addr add {V4} dev eth0")
        run(work())


@pytest.mark.root
@own_network
def test_an_interface_without_carrier_is_not_ready() -> None:
    async def work() -> None:
        news = asyncio.Event()
        agent = make_agent(V4, news.set, interface="eth0")

        async def ready(wanted: Readiness) -> str:
            while agent.ready().readiness is not wanted:
                news.clear()
                await news.wait()
            return agent.ready().why

        await ready(Readiness.YES)
        await agent.start(START)
        host.ip("link set eth0 down")
        assert await ready(Readiness.NO) == "eth0 has no carrier"
        await agent.monitor()  # starting it again would mend nothing
        host.ip("link set eth0 up")
        await ready(Readiness.YES)
        await agent.monitor()
        news.clear()
        ip(f"addr del {V4} dev eth0")
        await news.wait()
        with pytest.raises(AgentError, match="not on eth0 any more"):
            await agent.monitor()
        ip("link set eth0 down")
        assert await ready(Readiness.NO) == "eth0 is down"
        with pytest.raises(AgentError, match="eth0 is down"):
            await agent.start(START)
        await agent.close()

    with neighbour() as host:
        run(work())


@pytest.mark.root
@pytest.mark.parametrize("address", [V4, V6])
@own_network
def test_let_go_is_at_once(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        agent = make_agent(address)
        await agent.start(START)
        for _ in range(5):  # a renewal that is under way does not bring it back
            agent.hold(clock.now() + 2)
            await asyncio.sleep(0)
            agent.let_go()
            agent.hold(clock.now() + 2)
            await agent.stop()
            assert not shown(address)
            await agent.start(START)
        agent.let_go()
        assert not shown(address)
        monkeypatch.setattr("replica.heartbeat.agents.ip.RECENT_S", 0.0)
        starting = asyncio.create_task(agent.start(START))
        await asyncio.sleep(0)
        agent.let_go()
        with pytest.raises(AgentError, match="was let go"):
            await starting
        assert not shown(address)
        await agent.close()

    with neighbour():
        run(work())


@pytest.mark.root
@own_network
def test_a_new_daemon_goes_on_with_what_the_old_one_left() -> None:
    async def work() -> None:
        first = make_agent(V4)
        await first.start(START)
        await first.close()
        assert shown(V4)
        second = make_agent(V4)
        assert await second.active()
        second.hold(clock.now() + 600)
        with printing("ip", "monitor", "address") as news:
            second.hold(clock.now() + 700)
            while "valid_lft 6" not in shown(V4):
                await asyncio.to_thread(news.readline)
        second.let_go()
        assert not shown(V4)
        await second.close()

    with neighbour():
        run(work())


_HOLDER = """
import asyncio
from replica.heartbeat import clock
from tests.unit.test_agent_ip import START, make_agent
async def main():
    agents = [make_agent("10.77.0.50/24"), make_agent("2001:db8::50/64")]
    for agent in agents:
        await agent.start(START)
    print("held", flush=True)
    while True:
        for agent in agents:
            agent.hold(clock.now() + 2)
        await asyncio.sleep(0.2)
asyncio.run(main())
"""


@pytest.mark.root
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@own_network
def test_the_address_of_a_daemon_that_dies_or_hangs_goes_by_itself(number: signal.Signals) -> None:
    with neighbour(), printing("ip", "monitor", "address") as news:
        holder = subprocess.Popen(
            [sys.executable, "-c", _HOLDER],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        try:
            assert holder.stdout is not None
            assert select.select([holder.stdout], [], [], PATIENCE_S)[0]
            assert holder.stdout.readline() == b"held\n"
            renewals = 0
            while renewals < 16:  # each lives for 2 s: without renewals they would be gone
                line = news.readline()
                assert not line.startswith("Deleted")
                renewals += ".50/24" in line
            holder.send_signal(number)
            gone: set[str] = set()
            while gone != {V4, V6}:
                line = news.readline()
                if line.startswith("Deleted"):
                    gone |= {address for address in (V4, V6) if address in line}
        finally:
            holder.kill()
            holder.communicate()
