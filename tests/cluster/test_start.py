"""What a node refuses to start with, and what two nodes refuse to do with each other; nothing is touched."""

import fcntl
import hashlib
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import MIB, Cluster, Node


def refusal(node: Node) -> str:
    """The one sentence with which `replicad` refuses to start."""
    done = node.run_until_exit()
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("replicad: ")]
    assert len(said) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return said[0]


def digest(*paths: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


# ── the secret ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_secret_that_others_may_read_is_refused(cluster: Cluster) -> None:
    cluster.create()
    cluster.key.chmod(0o640)
    said = refusal(cluster.node1)
    assert "secret-file" in said
    assert f"chmod 600 {cluster.key}" in said


def stays_apart(cluster: Cluster, *words: str) -> None:
    """Both run, both say why they are not connected, neither takes anything from the other."""
    cluster.start()
    for node in cluster.nodes:
        status = node.wait_for(lambda status: all(word in status["last_error"] for word in words))
        assert status["connection"] == "Connecting"
        assert status["replication"] == "Off"
        assert "connected to" not in node.log()


def test_a_wrong_secret_is_not_let_in(cluster: Cluster) -> None:
    cluster.create()
    other_key = cluster.folder / "other.key"
    other_key.write_text("fedcba9876543210" * 4)
    other_key.chmod(0o600)
    cluster.write_config(cluster.node2, secret_file='"other.key"')
    stays_apart(cluster, "different cluster secrets")


def test_with_the_right_secret_they_connect_by_themselves(cluster: Cluster) -> None:
    cluster.create()
    cluster.write_config(cluster.node2, protocol='"A"')
    stays_apart(cluster, "protocol")
    cluster.node2.stop()
    cluster.node2.config = cluster.node1.config
    cluster.node2.start()
    for node in cluster.nodes:
        node.wait_connection("Connected")


# ── pairs that do not fit ────────────────────────────────────────────────────────────────────────────────────────


def test_another_cluster_is_not_let_in(cluster: Cluster) -> None:
    cluster.node1.cli("create-md", "--size", str(cluster.size_bytes))
    cluster.write_config(cluster.node2, cluster_name='"other"')
    cluster.node2.cli("create-md", "--size", str(cluster.size_bytes))
    stays_apart(cluster, "cluster", "'test'", "'other'")


@pytest.mark.parametrize(("setting", "value"), [("protocol", '"B"'), ("data_integrity", "true")])
def test_settings_that_both_need_alike_are_compared(cluster: Cluster, setting: str, value: str) -> None:
    cluster.create()
    cluster.write_config(cluster.node2, **{setting: value})
    stays_apart(cluster, setting, "compare the two configuration files")


def test_another_resource_on_the_port_is_not_let_in(cluster: Cluster) -> None:
    cluster.node1.cli("create-md", "--size", str(cluster.size_bytes))
    mine = cluster.configuration()
    other = cluster.folder / "other.toml"
    other.write_text(mine.replace("[resource.r0", "[resource.r1"))
    node2 = cluster.node2
    node2.config = other
    node2.metadata = node2.metadata.with_name("r1-0.md")
    node2.socket = node2.socket.with_name("r1.sock")
    node2.daemon_command = lambda: [  # type: ignore[method-assign]
        "r1" if word == "r0" else word for word in Node.daemon_command(node2)
    ]
    node2.cli("create-md", "--size", str(cluster.size_bytes))
    stays_apart(cluster, "resource", "'r0'", "'r1'")


def test_another_node_is_not_let_in(cluster: Cluster) -> None:
    cluster.node1.cli("create-md", "--size", str(cluster.size_bytes))
    other = cluster.folder / "other.toml"
    other.write_text(cluster.configuration().replace("node2]", "node3]"))
    node2 = cluster.node2
    node2.config, node2.name = other, "node3"
    node2.metadata = cluster.folder / "state/node3/r0-0.md"
    node2.socket = cluster.folder / "run/node3/r0.sock"
    done = node2.cli("create-md", "--size", str(cluster.size_bytes))
    assert done.returncode == 0, done.stderr
    stays_apart(cluster, "node", "'node2'", "'node3'")


def test_the_pair_uses_the_smaller_of_two_sizes(libnbd: Any, cluster: Cluster) -> None:
    node1, node2 = cluster.nodes
    node1.cli("create-md", "--size", str(cluster.size_bytes))
    node2.cli("create-md", "--size", str(2 * cluster.size_bytes))
    cluster.start()
    node2.wait_for(lambda status: status["volumes"][0]["size_bytes"] == cluster.size_bytes)
    node1.wait_connection("Connected")
    node2.ctl("promote", force=True)
    cluster.wait_in_sync()
    node2.write(cluster.size_bytes - 4096, b"e" * 4096)
    node2.stop()
    node1.ctl("promote")
    assert node1.read(cluster.size_bytes - 4096, 4096) == b"e" * 4096
    node2.start()
    cluster.wait_in_sync()
    assert node2.volume()["size_bytes"] == cluster.size_bytes
    # What the larger backing has behind the volume is left alone.
    assert node2.image.stat().st_size == 2 * cluster.size_bytes


def test_a_new_copy_that_is_larger_takes_the_size_of_the_data(libnbd: Any, cluster: Cluster) -> None:
    node1, node2 = cluster.nodes
    node1.cli("create-md", "--size", str(cluster.size_bytes))
    node1.start().ctl("promote", force=True)
    node1.write(cluster.size_bytes - 4096, b"e" * 4096)
    node2.cli("create-md", "--size", str(3 * cluster.size_bytes))
    node2.start()
    cluster.wait_in_sync()
    assert node2.volume()["size_bytes"] == cluster.size_bytes
    node2.ctl("takeover")
    assert node2.read(cluster.size_bytes - 4096, 4096) == b"e" * 4096


def test_a_new_copy_that_is_too_small_is_refused(libnbd: Any, cluster: Cluster) -> None:
    node1, node2 = cluster.nodes
    node1.cli("create-md", "--size", str(2 * cluster.size_bytes))
    node1.start().ctl("promote", force=True)
    node2.cli("create-md", "--size", str(cluster.size_bytes))
    node2.start()
    for node in cluster.nodes:
        status = node.wait_connection("StandAlone")
        assert f"the volume of node2 has {cluster.size_bytes} bytes" in status["last_error"]


# ── the backing ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_backing(cluster: Cluster) -> None:
    cluster.create()
    cluster.node1.image.unlink()
    before = digest(cluster.node1.metadata)
    assert str(cluster.node1.image) in refusal(cluster.node1)
    assert digest(cluster.node1.metadata) == before
    assert not cluster.node1.image.exists()


def test_a_backing_that_has_shrunk(cluster: Cluster) -> None:
    cluster.create()
    os.truncate(cluster.node1.image, cluster.size_bytes - 4096)
    before = digest(cluster.node1.metadata, cluster.node1.image)
    said = refusal(cluster.node1)
    assert "too small" in said
    assert str(cluster.size_bytes) in said
    assert digest(cluster.node1.metadata, cluster.node1.image) == before


def test_a_backing_that_another_process_uses(cluster: Cluster) -> None:
    cluster.create()
    with cluster.node1.image.open("rb+") as image:
        fcntl.flock(image, fcntl.LOCK_EX)
        said = refusal(cluster.node1)
    assert str(cluster.node1.image) in said
    assert "in use" in said
    cluster.node1.start()


def test_a_backing_that_another_replicad_uses(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster()
    cluster.create()
    cluster.node1.start()
    cluster.on["node2"] = {"backing": f'"{cluster.node1.image}"'}
    cluster.write_config(cluster.node2)
    said = refusal(cluster.node2)
    assert str(cluster.node1.image) in said
    assert cluster.node1.status()["volumes"][0]["disk"] == "Inconsistent"


def test_a_second_replicad_of_the_same_node(cluster: Cluster) -> None:
    cluster.create()
    cluster.node1.start()
    assert "another replicad" in refusal(cluster.node1)
    assert cluster.node1.status()["node"] == "node1"


def test_a_copy_in_the_place_of_the_backing(cluster: Cluster) -> None:
    cluster.create()
    image = cluster.node1.image
    image.rename(image.with_suffix(".old"))
    shutil.copy(image.with_suffix(".old"), image)
    said = refusal(cluster.node1)
    assert "not the backing its metadata were made for" in said
    image.with_suffix(".old").rename(image)
    cluster.node1.start()


# ── the metadata ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_missing_metadata(cluster: Cluster) -> None:
    cluster.create()
    cluster.node1.metadata.unlink()
    said = refusal(cluster.node1)
    assert str(cluster.node1.metadata) in said
    assert "create-md" in said
    assert not cluster.node1.metadata.exists()


def corrupt(path: Path, offset: int) -> None:
    """Flip the bits of 100 bytes."""
    with path.open("rb+") as file:
        file.seek(offset)
        data = file.read(100)
        file.seek(offset)
        file.write(bytes(byte ^ 0xFF for byte in data))


@pytest.mark.parametrize("copy", [0, 1])
def test_one_rotten_superblock_is_outlived_and_healed(cluster: Cluster, copy: int) -> None:
    cluster.create()
    node, metadata = cluster.node1, cluster.node1.metadata
    whole = metadata.read_bytes()[:8192]
    corrupt(metadata, copy * 4096 + 50)
    node.start()
    assert f"copy {'AB'[copy]} of the superblock was damaged" in node.log()
    assert node.status()["volumes"][0]["disk"] == "Inconsistent"
    node.stop()
    healed = metadata.read_bytes()[:8192]
    assert healed[:4096] == healed[4096:] == whole[:4096]


def test_two_rotten_superblocks_are_refused_and_not_touched(cluster: Cluster) -> None:
    cluster.create()
    node = cluster.node1
    for copy in (0, 1):
        corrupt(node.metadata, copy * 4096 + 50)
    before = digest(node.metadata, node.image)
    said = refusal(node)
    assert "both copies of the superblock are damaged" in said
    assert str(node.metadata) in said
    assert digest(node.metadata, node.image) == before


def test_metadata_of_another_resource(cluster: Cluster) -> None:
    cluster.create()
    shutil.copy(cluster.node2.metadata, cluster.node1.metadata)
    said = refusal(cluster.node1)
    assert "'node2'" in said
    assert "'node1'" in said


# ── addresses ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_peer_port_in_use(cluster: Cluster) -> None:
    cluster.create()
    with socket.socket() as other:
        other.bind(("127.0.0.2", cluster.port))
        other.listen()
        said = refusal(cluster.node2)
    assert f"127.0.0.2:{cluster.port}" in said
    cluster.node2.start()


def test_an_nbd_port_in_use(new_cluster: Callable[..., Cluster]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        cluster = new_cluster(on={"node1": {"nbd": f'"{address}"'}}, size_bytes=MIB)
        cluster.create()
        said = refusal(cluster.node1)
    assert address in said
    cluster.node1.start()


def test_an_nbd_socket_that_another_program_serves(cluster: Cluster) -> None:
    cluster.create()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(cluster.node1.nbd_path))
        other.listen()
        assert str(cluster.node1.nbd_path) in refusal(cluster.node1)


def test_an_address_of_another_machine(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(size_bytes=MIB)
    cluster.create()
    cluster.node2.config = cluster.folder / "moved.toml"
    cluster.node2.config.write_text(cluster.configuration().replace("127.0.0.2", "192.0.2.1"))
    assert f"192.0.2.1:{cluster.port}" in refusal(cluster.node2)
