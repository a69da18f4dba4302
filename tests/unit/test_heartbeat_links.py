"""Heartbeats over real sockets: on this machine, and between network namespaces."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

from replica.heartbeat import sockets, start_number
from replica.heartbeat.links import Links, Way, way_of
from replica.heartbeat.membership import PathStatus, Refusal
from replica.heartbeat.node_state import NodeState, Phase
from replica.heartbeat.packet import Number, PacketError
from replica.heartbeat.settings import GroupSettings, HeartbeatSettings, PathKind, PathSettings, Timing
from tests.unit.heartbeat_settings import OTHER_KEY, settings_of
from tests.unit.namespaces import Host, hosts, plug

UP = NodeState(Phase.UP)
ADDRESSES = {"node1": "127.0.0.1", "node2": "127.0.0.2"}
_AGAIN_S = 0.05


class Node:
    """One end, with an event that is set for each packet that is news."""

    def __init__(self, settings: HeartbeatSettings) -> None:
        self.news = asyncio.Event()
        self.links = Links(settings, self.news.set)

    @property
    def known(self) -> Any:
        return self.links.peer()

    async def hears(self, other: "Node", until: Callable[[], bool] = lambda: True) -> None:
        """The other sends, again and again if need be, until it was heard and the condition holds."""
        self.news.clear()
        while not (self.news.is_set() and until()):
            self.news.clear()
            other.links.send(UP)
            try:
                await asyncio.wait_for(self.news.wait(), _AGAIN_S)
            except TimeoutError:
                continue


@pytest.fixture
def port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def local(tmp_path: Path, port: int) -> Callable[..., HeartbeatSettings]:
    """Settings of a node that shares this machine with the other one."""

    def make(node: str, **changes: Any) -> HeartbeatSettings:
        (peer,) = ADDRESSES.keys() - {node}
        path = PathSettings(PathKind.UNICAST, "", ADDRESSES[peer], port, local=ADDRESSES[node])
        return settings_of(node, peer, **{"paths": (path,), "state_dir": tmp_path / node, **changes})

    return make


@asynccontextmanager
async def opened(*settings: HeartbeatSettings) -> AsyncIterator[list[Node]]:
    nodes = [Node(one) for one in settings]
    for node in nodes:
        await node.links.open()
    try:
        yield nodes
    finally:
        for node in nodes:
            await node.links.close()


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_two_nodes_hear_each_other(local: Callable[..., HeartbeatSettings], runner: Callable[[Any], None]) -> None:
    async def main() -> None:
        async with opened(local("node1"), local("node2")) as (here, there):
            await here.hears(there)
            assert here.known.state is None
            await there.hears(here)
            await here.hears(there)
            assert (here.known.state, here.known.hears_us) == (UP, True)
            assert here.known.round_trip_s < 5
            assert [path.status for path in here.known.paths] == [PathStatus.UP]

    runner(main())


async def _restart(local: Callable[..., HeartbeatSettings]) -> None:
    async with opened(local("node1"), local("node2")) as (here, there):
        await there.hears(here)
        await here.hears(there)
        first, seen = here.links.membership.number.start, here.links.membership.seen
        recorded = there.links.membership.pack_next(UP, 1.0)
        here.links.membership.accept(recorded, 1.0)
    async with opened(local("node1")) as (here,):
        assert here.links.membership.number.start > first
        assert here.links.membership.seen == Number(seen.start, seen.sequence + 1)
        assert here.links.membership.accept(recorded, 2.0).refusal is Refusal.OLD


def test_a_restart_grows_the_start_number_and_remembers_the_other_node(local: Callable[..., HeartbeatSettings]) -> None:
    asyncio.run(_restart(local))


def test_what_was_never_opened_can_be_closed(local: Callable[..., HeartbeatSettings]) -> None:
    asyncio.run(Node(local("node1")).links.close())


def test_nobody_listening_is_no_end(local: Callable[..., HeartbeatSettings]) -> None:
    async def main() -> None:
        async with opened(local("node1")) as (here,):
            for _ in range(5):  # each answered by "port unreachable"
                here.links.send(UP)
            async with opened(local("node2")) as (there,):
                await there.hears(here)
                await here.hears(there)
            here.links.send(UP)
            assert here.known.paths[0].problem == ""

    asyncio.run(main())


def test_a_port_that_is_taken_is_told_and_tried_again(local: Callable[..., HeartbeatSettings], port: int) -> None:
    async def main() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as squatter:
            squatter.bind(("127.0.0.1", port))
            here = Node(local("node1"))
            await here.links.open()
            assert here.known.paths[0].problem == f"listening on 127.0.0.1 port {port}: Address already in use"
        async with opened(local("node2")) as (there,):
            await there.hears(here)
            assert here.known.paths[0].problem == ""
            await here.hears(there)
        await here.links.close()

    asyncio.run(main())


def test_a_name_is_resolved_while_the_loop_goes_on(local: Callable[..., HeartbeatSettings]) -> None:
    async def main() -> None:
        named = local("node2")
        named = replace(named, paths=(replace(named.paths[0], address="localhost"),))
        async with opened(local("node1"), named) as (here, there):
            assert there.known.paths[0].problem == "the address of localhost is not known"
            await here.hears(there)
            assert there.known.paths[0].problem == ""

    asyncio.run(main())


def test_a_name_that_does_not_exist_is_told(local: Callable[..., HeartbeatSettings]) -> None:
    async def main() -> None:
        settings = local("node1")
        unknown = replace(settings.paths[0], address="no such name")
        async with opened(replace(settings, paths=(unknown, *settings.paths)), local("node2")) as (here, there):
            await there.hears(here)
            assert [path.problem for path in here.known.paths] == ["the address of no such name is not known", ""]

    asyncio.run(main())


def test_after_a_pause_what_waited_in_the_sockets_is_thrown_away(local: Callable[..., HeartbeatSettings]) -> None:
    async def main() -> None:
        async with opened(local("node1"), local("node2")) as (here, there):
            await here.hears(there)
            for _ in range(20):  # the loop does not get to reading them
                there.links.send(UP)
            here.links.renew()
            received = here.known.paths[0].received
            await there.hears(here)
            assert here.known.heard_s is None
            await here.hears(there)
            assert here.known.paths[0].received == received + 1
            assert here.known.paths[0].lost == 20
            assert here.known.state == UP

    asyncio.run(main())


def test_who_was_asleep_is_told_before_what_waited_is_looked_at(local: Callable[..., HeartbeatSettings]) -> None:
    async def main() -> None:
        async with opened(local("node1"), local("node2")) as (here, there):
            await there.hears(here)
            await here.hears(there)
            before = here.known
            assert before.state == UP
            there.links.send(NodeState(Phase.LEFT))
            assert here.links._sent_s is not None
            here.links._sent_s -= 3.0  # more than half of deadtime
            seen: list[Any] = []

            def noticed() -> None:
                seen.append(here.known)
                here.links.renew()
                here.news.set()

            here.news.clear()
            here.links._heard = noticed
            await here.news.wait()
            assert seen[0] == before
            assert (here.known.state, here.known.left) == (None, False)
            here.links._heard = here.news.set
            here.links.send(UP)
            await here.hears(there)

    asyncio.run(main())


def test_another_secret_is_told_apart(
    local: Callable[..., HeartbeatSettings], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with opened(local("node1"), local("node2", auth=OTHER_KEY)) as (here, there):
            for _ in range(100):
                there.links.send(UP)
            while here.known.rejected.get(Refusal.SIGNATURE, 0) < 100:  # noqa: ASYNC110 - a refusal is no event
                await asyncio.sleep(0)
            assert here.known.heard_s is None
            assert here.known.wrong_secret_s is not None

    asyncio.run(main())
    lines = [line for line in caplog.messages if "in vain" in line]
    assert lines[0].startswith("node2 (127.0.0.2) sends heartbeats in vain: ")
    assert len(lines) == 10  # of a hundred


def test_datagrams_of_any_size_are_no_end(local: Callable[..., HeartbeatSettings], port: int) -> None:
    async def main() -> None:
        async with opened(local("node1"), local("node2")) as (here, there):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
                for size_bytes in (0, 1, 8, 8192, 8193, 60000):
                    stranger.sendto(b"x" * size_bytes, ("127.0.0.1", port))
            await here.hears(there)
            assert here.known.rejected == {Refusal.MALFORMED: 6}

    asyncio.run(main())


def test_heartbeats_go_before_bulk_traffic(port: int) -> None:
    with sockets.open_socket(sockets.Bind(socket.AF_INET, "127.0.0.1", port)) as one:
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) == 6
        assert one.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == 0xC0


def test_too_many_groups_are_refused_at_the_start(local: Callable[..., HeartbeatSettings]) -> None:
    groups = tuple(GroupSettings(f"group{number}", "node1", ()) for number in range(400))
    with pytest.raises(PacketError, match="use fewer groups"):
        Links(local("node1", groups=groups), lambda: None)


# Start numbers


def test_start_numbers_grow_whatever_the_wall_clock_says(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "on demand"
    numbers = [start_number.next_start(folder, wall_clock_s) for wall_clock_s in (1000.9, 1000.9, 5.0, 2000.0)]
    assert numbers == [1000, 1001, 1002, 2000]


def test_a_lost_start_number_is_made_from_the_wall_clock(tmp_path: Path) -> None:
    assert start_number.next_start(tmp_path, 1000.0) == 1000
    (tmp_path / "start-number").unlink()
    assert start_number.next_start(tmp_path, 1010.0) == 1010


@pytest.mark.parametrize("text", ["", "{", "[]", '{"start": "x"}', '{"start": -5}', '{"start": 1e400}', "\xff"])
def test_a_damaged_start_number_is_made_from_the_wall_clock(tmp_path: Path, text: str) -> None:
    (tmp_path / "start-number").write_text(text, encoding="latin-1")
    assert start_number.next_start(tmp_path, 1000.0) == 1000
    assert start_number.next_start(tmp_path, 1000.0) == 1001


def test_a_folder_that_cannot_be_written_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert start_number.next_start(tmp_path / "file" / "state", 1000.0) == 1000
    assert caplog.messages[-1] == f"{tmp_path}/file/state/start-number cannot be written: Not a directory."


def test_what_was_seen_is_kept_for_that_node(tmp_path: Path) -> None:
    assert start_number.read_seen(tmp_path, "node2") == Number(0, 0)
    start_number.keep_seen(tmp_path, "node2", Number(7, 9))
    assert start_number.read_seen(tmp_path, "node2") == Number(7, 9)
    assert start_number.read_seen(tmp_path, "node3") == Number(0, 0)


# Which path brought a packet

PATHS = (
    (PathSettings(PathKind.UNICAST, "eth0", "192.168.2.45"), 2),
    (PathSettings(PathKind.BROADCAST, "eth0", ""), 2),
    (PathSettings(PathKind.MULTICAST, "eth1", "239.0.0.42"), 3),
    (PathSettings(PathKind.UNICAST, "", "10.0.0.2"), 0),
    (PathSettings(PathKind.UNICAST, "eth9", "10.9.0.2"), 0),  # there is no such interface
    (PathSettings(PathKind.MULTICAST, "eth0", "FF02:0::1:42"), 2),
)


@pytest.mark.parametrize(
    ("source", "destination", "interface", "path"),
    [
        ("192.168.2.45", "192.168.2.44", 2, 0),
        ("192.168.2.45", "192.168.2.44", 3, None),
        ("192.168.2.99", "192.168.2.44", 2, 0),  # from another address of that node: the only unicast path of eth0
        ("192.168.2.45", "255.255.255.255", 2, 1),
        ("192.168.2.45", "255.255.255.255", 3, None),
        ("192.168.2.45", "239.0.0.42", 3, 2),
        ("192.168.2.45", "239.0.0.42", 2, None),
        ("192.168.2.45", "239.0.0.43", 3, None),
        ("10.0.0.2", "10.0.0.1", 7, 3),
        ("10.9.0.2", "10.9.0.1", 9, None),
        ("fe80::1", "ff02::1:42", 2, 5),
        ("10.0.0.99", "10.0.0.1", 7, None),
    ],
)
def test_the_path_that_brought_a_packet(source: str, destination: str, interface: int, path: int | None) -> None:
    ways = []
    for settings, index in PATHS:
        ways.append(Way(settings, bind_all=True))
        ways[-1].interface = index
    assert way_of(sockets.Arrival(b"", source, destination, interface), ways) == path


# Between namespaces

UNICAST = {
    "node1": PathSettings(PathKind.UNICAST, "eth0", "192.168.2.45"),
    "node2": PathSettings(PathKind.UNICAST, "eth0", "192.168.2.44"),
}


def _same(path: PathSettings) -> dict[str, PathSettings]:
    return dict.fromkeys(("node1", "node2"), path)


@pytest.fixture
def two_hosts() -> Iterator[list[Host]]:
    with hosts(2) as made:
        yield made


class Pair:
    """A node on each of two hosts."""

    def __init__(self, made: list[Host], folder: Path, *paths: dict[str, PathSettings], **changes: Any) -> None:
        self.hosts = dict(zip(("node1", "node2"), made, strict=True))
        self.nodes: dict[str, Node] = {}
        for name, peer in (("node1", "node2"), ("node2", "node1")):
            own = tuple(path[name] for path in paths)
            settings = settings_of(name, peer, paths=own, state_dir=folder / name, **changes)
            self.nodes[name] = self.hosts[name].call(lambda settings=settings: Node(settings))  # type: ignore[misc]
            self.hosts[name].do(self.nodes[name].links.open())

    def heard(self, name: str, until: Callable[[Node], bool] = lambda node: True) -> None:
        """The other one sends until this one hears it."""
        (other,) = self.nodes.keys() - {name}
        node = self.nodes[name]
        while True:
            self.hosts[name].call(node.news.clear)
            self.hosts[other].call(lambda: self.nodes[other].links.send(UP))
            try:
                self.hosts[name].do(asyncio.wait_for(node.news.wait(), _AGAIN_S))
            except TimeoutError:
                continue
            if self.hosts[name].call(lambda: until(node)):
                return

    def sends(self, name: str) -> list[str]:
        """One packet; the problems of its paths."""
        self.hosts[name].call(lambda: self.nodes[name].links.send(UP))
        return [path.problem for path in self.nodes[name].known.paths]

    def close(self) -> None:
        for name, node in self.nodes.items():
            self.hosts[name].do(node.links.close())


@pytest.mark.root
@pytest.mark.parametrize(
    "path",
    [
        UNICAST,
        _same(PathSettings(PathKind.BROADCAST, "eth0", "")),
        _same(PathSettings(PathKind.MULTICAST, "eth0", "239.0.0.42")),
        _same(PathSettings(PathKind.MULTICAST, "eth0", "ff02::1:42")),
        {
            "node1": PathSettings(PathKind.UNICAST, "eth0", "fd00::45"),
            "node2": PathSettings(PathKind.UNICAST, "", "fd00::44"),
        },
        {
            "node1": PathSettings(PathKind.UNICAST, "eth0", "fe80::45"),
            "node2": PathSettings(PathKind.UNICAST, "eth0", "fe80::44"),
        },
    ],
    ids=["unicast", "broadcast", "multicast", "multicast IPv6", "unicast IPv6", "link-local IPv6"],
)
def test_each_kind_of_path(two_hosts: list[Host], tmp_path: Path, path: dict[str, PathSettings]) -> None:
    plug(*two_hosts, "eth0", "192.168.2.44/24", "192.168.2.45/24")
    for host, number in zip(two_hosts, ("44", "45"), strict=True):
        for prefix in ("fd00", "fe80"):
            host.ip(f"address add {prefix}::{number}/64 dev eth0 nodad")
    pair = Pair(two_hosts, tmp_path, path)
    pair.heard("node1")
    pair.heard("node2")
    pair.heard("node1")
    for node in pair.nodes.values():
        assert [status.status for status in node.known.paths] == [PathStatus.UP]
        assert node.known.rejected == {}
    assert pair.nodes["node1"].known.state == UP
    pair.close()


@pytest.mark.root
def test_an_interface_that_comes_late_goes_and_comes_back(two_hosts: list[Host], tmp_path: Path) -> None:
    pair = Pair(two_hosts, tmp_path, UNICAST, _same(PathSettings(PathKind.MULTICAST, "eth0", "239.0.0.42")))
    for _ in range(2):
        assert pair.sends("node1") == ["interface eth0: No such device"] * 2
        plug(*two_hosts, "eth0", "192.168.2.44/24", "192.168.2.45/24")
        received = [path.received for path in pair.nodes["node2"].known.paths]

        def by_both(node: Node, before: list[int] = received) -> bool:
            node.links.send(UP)  # as for each keepalive, which joins the group again
            return all(path.received > old for path, old in zip(node.known.paths, before, strict=True))

        pair.heard("node2", by_both)
        assert pair.sends("node1") == ["", ""]
        two_hosts[0].ip("link delete eth0")
    pair.close()


@pytest.mark.root
def test_one_of_two_paths_is_cut(two_hosts: list[Host], tmp_path: Path) -> None:
    plug(*two_hosts, "eth0", "192.168.2.44/24", "192.168.2.45/24")
    plug(*two_hosts, "eth1", "10.0.0.1/24", "10.0.0.2/24")
    second = _same(PathSettings(PathKind.BROADCAST, "eth1", ""))
    pair = Pair(two_hosts, tmp_path, UNICAST, second, timing=Timing(keepalive_s=0.1, warntime_s=0.3, deadtime_s=0.5))
    pair.heard("node2", lambda node: [path.status for path in node.known.paths] == [PathStatus.UP] * 2)
    two_hosts[0].ip("link set eth1 down")

    def second_is_dead(node: Node) -> bool:
        node.links.send(UP)  # as the daemon does for each keepalive, which looks at the paths
        return [path.status for path in node.known.paths] == [PathStatus.UP, PathStatus.DEAD]

    pair.heard("node2", second_is_dead)
    two_hosts[0].ip("link set eth1 up")
    pair.heard("node2", lambda node: [path.status for path in node.known.paths] == [PathStatus.UP] * 2)
    pair.close()


@pytest.mark.root
def test_the_tutorials_two_unicast_lines(two_hosts: list[Host], tmp_path: Path) -> None:
    plug(*two_hosts, "eth0", "192.168.2.44/24", "192.168.2.45/24")
    both = [_same(PathSettings(PathKind.UNICAST, "eth0", address)) for address in ("192.168.2.44", "192.168.2.45")]
    pair = Pair(two_hosts, tmp_path, *both)
    pair.heard("node1")
    pair.heard("node2")
    statuses = {name: [path.status for path in node.known.paths] for name, node in pair.nodes.items()}
    assert statuses == {
        "node1": [PathStatus.UNUSED, PathStatus.UP],
        "node2": [PathStatus.UP, PathStatus.UNUSED],
    }
    pair.close()


@pytest.mark.root
def test_two_machines_with_one_name(two_hosts: list[Host], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    plug(*two_hosts, "eth0", "192.168.2.44/24", "192.168.2.45/24")
    path = PathSettings(PathKind.BROADCAST, "eth0", "")

    async def twin(folder: Path) -> Node:
        node = Node(settings_of("node1", "node2", paths=(path,), state_dir=folder))
        await node.links.open()
        return node

    twins = [host.do(twin(tmp_path / str(number))) for number, host in enumerate(two_hosts)]
    while not twins[0].known.rejected:
        two_hosts[1].call(lambda: twins[1].links.send(UP))
    two_hosts[0].call(lambda: None)  # what it refused has also been logged by now
    assert twins[0].known.rejected.keys() == {Refusal.OWN_NAME}
    assert twins[1].known.rejected == {}  # what it sent to all came back to it, which is nothing
    assert "another machine (192.168.2.45) calls itself node1 as well: give each node a name of its own." in caplog.text
    for host, node in zip(two_hosts, twins, strict=True):
        host.do(node.links.close())
