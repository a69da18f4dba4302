"""Ping nodes, by real ICMP: on this machine, and between network namespaces."""

import asyncio
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from replica.heartbeat import ping
from replica.heartbeat.ping import Pinger
from replica.heartbeat.settings import PingSettings, Timing
from tests.unit.namespaces import Host, hosts, plug

QUICK = Timing(keepalive_s=0.05, deadping_s=0.4)
IGNORE_ECHOES = Path("/proc/sys/net/ipv4/icmp_echo_ignore_all")  # of the namespace of the thread that opens it
ROUTERS = PingSettings("routers", ("192.168.2.1", "192.168.2.2"))


def node(address: str) -> PingSettings:
    return PingSettings(address, (address,))


class Watched:
    """A pinger whose changes can be awaited."""

    def __init__(self, *pings: PingSettings, cluster: tuple[str, ...] = ()) -> None:
        self._changed = asyncio.Event()
        self.pinger = Pinger(pings, QUICK, cluster, self._changed.set)

    async def until_alive(self, count: int) -> None:
        while self.pinger.alive != count:
            self._changed.clear()
            await self._changed.wait()


@pytest.fixture
def two_hosts() -> Iterator[list[Host]]:
    with hosts(2) as made:
        plug(*made, "eth0", "192.168.2.44/24", "192.168.2.1/24")
        yield made


def test_an_echo_is_as_rfc_792_has_it() -> None:
    message = ping.echo(8, 0x1234, 7, b"odd")
    assert message[:2] == b"\x08\0"
    assert message[4:] == b"\x12\x34\0\x07odd"
    padded = message + b"\0"
    total = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    assert (total & 0xFFFF) + (total >> 16) == 0xFFFF  # RFC 1071: with its checksum it adds up to that


def test_an_address_of_the_cluster_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    pings = (node("192.168.2.50"), PingSettings("both", ("fd00::50", "192.168.2.1")))
    pinger = Pinger(pings, QUICK, ("192.168.2.50/24", "fd00:0::50"), lambda: None)
    assert pinger.total == 1
    assert caplog.messages == [
        f"ping node {address} is an address of this cluster, which says nothing of the network: it does not count; "
        "ping the gateway instead."
        for address in ("192.168.2.50", "fd00::50")
    ]
    assert not pinger.reachable("192.168.2.50")


def test_without_ping_nodes_nothing_is_missing() -> None:
    async def main() -> None:
        pinger = Pinger((), QUICK, (), lambda: None)
        await pinger.open()
        assert (pinger.alive, pinger.total, pinger.settled) == (0, 0, True)
        await pinger.close()

    asyncio.run(main())


@pytest.mark.root
def test_a_ping_node_answers_falls_silent_and_answers_again(two_hosts: list[Host]) -> None:
    here, router = two_hosts
    watched = here.call(lambda: Watched(node("192.168.2.1"), node("192.168.2.99"), ROUTERS))
    here.do(watched.pinger.open())
    here.do(watched.until_alive(2))
    names = ("192.168.2.1", "192.168.2.99", "routers", "nobody")
    assert [watched.pinger.reachable(name) for name in names] == [True, False, True, False]
    assert watched.pinger.total == 3
    shown = [(one["name"], one["alive"], one["answered_s_ago"] is not None) for one in watched.pinger.status()]
    assert shown == [("192.168.2.1", True, True), ("192.168.2.99", False, False), ("routers", True, True)]
    router.ip("link set eth0 down")
    here.do(watched.until_alive(0))
    router.ip("link set eth0 up")
    here.do(watched.until_alive(2))
    assert watched.pinger.settled
    here.do(watched.pinger.close())


@pytest.mark.root
def test_a_group_is_reachable_while_one_of_it_answers(two_hosts: list[Host]) -> None:
    here, router = two_hosts
    router.ip("address add 192.168.2.2/24 dev eth0")
    watched = here.call(lambda: Watched(ROUTERS, node("192.168.2.1")))
    here.do(watched.pinger.open())
    here.do(watched.until_alive(2))
    router.ip("address del 192.168.2.1/24 dev eth0")
    router.ip("address replace 192.168.2.2/24 dev eth0")  # it went along with the first one
    here.do(watched.until_alive(1))
    assert watched.pinger.reachable("routers")
    here.do(watched.pinger.close())


@pytest.mark.root
def test_ipv6(two_hosts: list[Host]) -> None:
    here, router = two_hosts
    for host, address in ((here, "fd00::44"), (router, "fd00::1")):
        host.ip(f"address add {address}/64 dev eth0 nodad")
    router.ip("address add fe80::1/64 dev eth0 nodad")
    watched = here.call(lambda: Watched(node("fd00:0::1"), node("fe80::1%eth0"), node("fe80::1%eth9")))
    here.do(watched.pinger.open())
    here.do(watched.until_alive(2))
    here.do(watched.pinger.close())


@pytest.mark.root
def test_after_a_pause_nobody_is_silent_for_its_length(two_hosts: list[Host]) -> None:
    here, router = two_hosts
    watched = here.call(lambda: Watched(node("192.168.2.1")))
    here.do(watched.pinger.open())
    here.do(watched.until_alive(1))

    def pause() -> None:
        router.ip("link set eth0 down")
        (target,) = watched.pinger._nodes["192.168.2.1"].targets
        assert target.answered_s is not None
        target.answered_s -= 100
        watched.pinger._reviewed_s -= 100
        watched.pinger._review()
        assert watched.pinger.alive == 1
        target.answered_s -= 100
        watched.pinger.restart()
        watched.pinger._review()
        assert watched.pinger.alive == 1

    here.call(pause)
    here.do(watched.until_alive(0))
    here.do(watched.pinger.close())


@pytest.mark.root
def test_answers_that_were_not_asked_for_do_not_count(two_hosts: list[Host]) -> None:
    here, router = two_hosts
    router.call(lambda: IGNORE_ECHOES.write_text("1"))
    watched = here.call(lambda: Watched(node("192.168.2.1")))
    here.do(watched.pinger.open())

    def forge() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as forger:
            for sequence in range(10):
                forger.sendto(ping.echo(0, watched.pinger._identifier, sequence, bytes(16)), ("192.168.2.44", 0))

    router.call(forge)
    here.do(asyncio.sleep(0))
    assert watched.pinger.alive == 0
    router.call(lambda: IGNORE_ECHOES.write_text("0"))
    here.do(watched.until_alive(1))
    here.do(watched.pinger.close())


@pytest.mark.root
def test_a_process_without_rights_uses_the_kernels_ping_socket_or_says_what_it_lacks(two_hosts: list[Host]) -> None:
    here, _ = two_hosts
    script = """
import asyncio, os, sys
from replica.heartbeat.ping import PingError
from tests.unit.test_heartbeat_ping import Watched, node
os.setgroups([]); os.setgid(65534); os.setuid(65534)
async def main():
    watched = Watched(node("192.168.2.1"))
    try:
        await watched.pinger.open()
    except PingError as error:
        sys.exit(str(error))
    await watched.until_alive(1)
    await watched.pinger.close()
asyncio.run(main())
"""

    def run(allowed: str) -> subprocess.CompletedProcess[str]:
        Path("/proc/sys/net/ipv4/ping_group_range").write_text(allowed)
        return subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=30, env=environment
        )

    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    refused = here.call(lambda: run("1 0"))
    assert refused.returncode == 1
    assert refused.stderr.rstrip() == (
        "pings need root, the capability CAP_NET_RAW, or this process's group in the sysctl net.ipv4.ping_group_range."
    )
    allowed = here.call(lambda: run("0 65535"))
    assert (allowed.returncode, allowed.stderr) == (0, "")
