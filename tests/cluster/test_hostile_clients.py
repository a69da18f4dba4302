"""A pair under each of the known attacks on the Primary's NBD port: the replication does not notice."""

from collections.abc import Callable

import pytest

from nbdserver.limits import Limits
from tests.attacks import ATTACKS, MIB, under
from tests.cluster.cluster import Cluster, Status
from tests.raw_nbd import FLUSH, FUA, READ, WRITE, WRITE_ZEROES, Peak, RawClient, request, to_path

#: The most clients that an attack keeps open beyond the handshake.
GREEDY_CLIENTS = 2
#: Of a server that is at work: longer than it takes for what one receive brings.
_QUIET_MS = 1500


def what_counts(pair: Cluster) -> list[object]:
    """What would change if the two nodes had parted for a moment."""

    def of(status: Status) -> object:
        volume = status["volumes"][0]
        return status["role"], status["connection"], status["replication"], volume["disk"], volume["generations"]

    return [of(node.status()) for node in pair.nodes]


def test_attacks_do_not_disturb_the_replication(pair: Cluster) -> None:
    """One after the other, on one pair: what one leaves behind would show in the next."""
    connect = to_path(pair.node1.nbd_path)
    process = pair.node1.process
    assert process is not None
    before = what_counts(pair)
    for number, attack in enumerate(ATTACKS):
        print(attack.__name__)
        with RawClient(connect).open() as bystander:
            peak = Peak(process.pid)
            with under(attack, connect, pair.size_bytes):
                own = bytes([number + 1]) * 4096
                assert bystander.ask(WRITE, pair.size_bytes - 8192, data=own) == 0
                assert bystander.ask(WRITE, pair.size_bytes - 4096, data=own, flags=FUA) == 0
                assert bystander.ask(FLUSH, 0, 0) == 0
                with RawClient(connect).open() as newcomer:
                    newcomer.send(request(READ, 1, pair.size_bytes - 8192, 8192))
                    assert newcomer.reply(8192) == (1, 0, own * 2)
                assert peak.grown_bytes() < GREEDY_CLIENTS * Limits().client_bytes + 32 * MIB
            assert what_counts(pair) == before
    pair.quiesce().check_identical()
    for node in pair.nodes:
        assert "Traceback" not in node.log()
        assert node.log().count("connected to") == 2, node.log()  # once before the promotion, once since


@pytest.mark.parametrize("what", ["tiny writes", "a byte that keeps a buffer"])
def test_a_client_that_writes_while_the_peer_is_frozen_is_held_back(
    new_cluster: Callable[..., Cluster], what: str, libnbd: object
) -> None:
    """Nothing can be answered: what is under way stays within the bound, however it is made up."""
    pair = new_cluster(timeout="20").up()
    connect = to_path(pair.node1.nbd_path)
    process = pair.node1.process
    assert process is not None
    rejected = request(WRITE_ZEROES + 71, 9, 0, 4096) + request(WRITE, 2, pair.size_bytes, data=bytes(480_000))
    stream = {
        "tiny writes": request(WRITE, 1, 0, data=b"t") * 10_000,
        "a byte that keeps a buffer": request(WRITE, 1, 0, data=b"t") + rejected,
    }[what]
    clients = [RawClient(connect).open() for _ in range(3)]
    with clients[0] as greedy, clients[1] as filler, clients[2] as reader:
        pair.node2.freeze()
        # First what the kernel takes for the peer: from then on the server has to keep what it cannot send.
        filler.push(request(WRITE, 1, 0, data=bytes(100_000)), 200)
        peak = Peak(process.pid)
        greedy.push(stream, 1000, _QUIET_MS)
        assert reader.ask(READ, 0, 4096) == 0  # reads are local
        pair.node2.thaw()
        assert peak.grown_bytes() < Limits().client_bytes + 32 * MIB
    pair.wait_in_sync().quiesce().check_identical()
    assert pair.node1.log().count("connected to") == 2, pair.node1.log()
