"""TLS between two real nodes, and of their clients: what it carries, what it refuses, what is said about it."""

import contextlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from replica import wire
from replica.certificates import issue
from tests.certificates import PAST, Authority, save
from tests.cluster.cluster import MIB, PATIENCE_S, Cluster, Node, free_port

TLS = '{ cert = "certs/%n.crt", key = "certs/%n.key", ca = "certs/ca.crt" }'
NBD_TLS = '{ mode = "require", cert = "certs/%n.crt", key = "certs/%n.key", ca = "certs/ca.crt" }'


def certs(cluster: Cluster, *arguments: str, node: Node | None = None) -> None:
    done = (node or cluster.node1).cli("certs", *arguments)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def secured(libnbd: Any, new_cluster: Callable[..., Cluster]) -> Cluster:
    """Two nodes with TLS on the link, in sync; node1 is Primary."""
    cluster = new_cluster(tls=TLS)
    certs(cluster)
    return cluster.up()


def authority_of(folder: Path) -> Authority:
    """An authority that signs whatever a test wants, in the place of the cluster's own."""
    authority = Authority(folder / "certs")
    for number in (1, 2):
        authority.files(f"node{number}", f"node{number}", f"127.0.0.{number}")
    return authority


# ── the peer link ────────────────────────────────────────────────────────────────────────────────────────────────


def test_writes_are_replicated_and_a_dead_node_is_resynced(secured: Cluster) -> None:
    data = os.urandom(3 * MIB)
    secured.node1.write(4096, data)
    secured.quiesce().check_identical()
    secured.node2.kill9()
    secured.node1.wait_alone()
    secured.node1.write(8 * MIB, data)
    secured.node2.start()
    secured.wait_in_sync().quiesce().check_identical()
    # The other way round: the node that dials dies.
    secured.node1.kill9()
    secured.node2.wait_alone()
    secured.node2.ctl("promote")
    assert secured.node2.read(8 * MIB, len(data)) == data
    secured.node2.write(0, data)
    secured.node1.start()
    secured.wait_in_sync().quiesce().check_identical()


def test_a_link_that_hangs_is_found(secured: Cluster) -> None:
    secured.node2.freeze()
    secured.node1.wait_alone()
    secured.node1.write(0, b"x" * MIB)
    secured.node2.thaw()
    secured.wait_in_sync().quiesce().check_identical()


def test_the_words_of_a_peer_that_stands_alone_arrive(secured: Cluster) -> None:
    secured.node2.ctl("disconnect")
    stands_alone = "r0 is StandAlone on node2: run `replicactl connect r0` there."
    secured.node1.wait_for(lambda status: stands_alone in status["last_error"])
    secured.node2.ctl("connect")
    secured.wait_in_sync()


def test_the_status_tells_until_when(secured: Cluster) -> None:
    status = secured.node1.status()
    not_after = datetime.fromisoformat(status["tls"]["peer_link"]["not_after"])
    assert timedelta(days=824) < not_after - datetime.now(UTC) <= timedelta(days=825)
    assert status["tls"]["nbd"] is None
    assert f"  TLS: peer link until {not_after:%Y-%m-%d}\n" in secured.node1.cli("status").stdout
    assert json.loads(secured.node1.cli("status", "--json").stdout)[0]["tls"] == status["tls"]
    assert "expires on" not in secured.node1.log()


def test_certificates_that_expire_soon_are_warned_of(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(tls=TLS, nbd_tls=NBD_TLS)
    certs(cluster, "--days", "20")
    cluster.create().node1.start()
    log = cluster.node1.log()
    for what in ("the peer link", "the NBD server"):
        assert f"a certificate of {what} expires on" in log
    assert "in 19 days: renew it and restart replicad" in log


def both_say(cluster: Cluster, *words: str) -> None:
    """Both nodes' status has one of these sentences (in part) as the last error, in one line, and so has their log."""

    def says(status: dict[str, Any]) -> bool:
        return any(word in status["last_error"] for word in words)

    for node in cluster.nodes:
        sentence = node.wait_for(says)["last_error"]
        assert "\n" not in sentence
        assert sentence in node.log()
        assert node.status()["connection"] == "Connecting"
        assert "Traceback" not in node.log()


@pytest.mark.parametrize("bad", ["node1", "node2"])
def test_a_certificate_of_another_ca_is_refused(new_cluster: Callable[..., Cluster], short_dir: Path, bad: str) -> None:
    """It is good by itself: that node has another CA, so each refuses the other's."""
    authority_of(short_dir)
    other = Authority(short_dir / "other")
    other.files(bad, bad)
    cluster = new_cluster(tls=TLS)
    cluster.write_config(getattr(cluster, bad), tls=TLS.replace("certs/", "other/"))
    cluster.create().start()
    both_say(cluster, "certificate is refused (", "it refused this side's certificate (unknown ca)")


@pytest.mark.parametrize(("bad", "expected"), [("node1", "node0"), ("node2", "node3")])
def test_a_certificate_for_another_name_is_refused(
    new_cluster: Callable[..., Cluster], short_dir: Path, bad: str, expected: str
) -> None:
    """It is valid, of the same CA; it is just not the peer's."""
    authority = authority_of(short_dir)
    authority.files(expected, expected)
    cluster = new_cluster(tls=TLS)
    node: Node = getattr(cluster, bad)
    # Its own file names it as its certificate does; the other one expects another peer (that dials, or listens, too).
    renamed = (
        cluster.configuration().replace(f"node.{bad}]", f"node.{expected}]").replace(f"on.{bad}]", f"on.{expected}]")
    )
    node.peer.config = short_dir / "renamed.toml"
    node.peer.config.write_text(renamed)
    cluster.create().start()
    shown = f"{node.peer.name} expected {expected}'s certificate at the other end of the link, and it is for {bad}."
    both_say(cluster, shown)


def test_an_expired_certificate_is_refused_at_the_start(new_cluster: Callable[..., Cluster], short_dir: Path) -> None:
    authority_of(short_dir).files("node1", "node1", expired=True)
    cluster = new_cluster(tls=TLS)
    cluster.create()
    done = cluster.node1.run_until_exit()
    expired = PAST + timedelta(days=90)
    line = 1 + cluster.configuration().splitlines().index(f"tls = {TLS}")
    assert (done.returncode, done.stderr) == (
        1,
        f"replicad: {cluster.node1.config}:{line}: cluster.tls.cert: {short_dir}/certs/node1.crt has expired, "
        f"on {expired:%Y-%m-%d}: renew it\n",
    )


@pytest.mark.parametrize("plain", ["node1", "node2"])
def test_one_side_without_tls(new_cluster: Callable[..., Cluster], plain: str) -> None:
    cluster = new_cluster(tls=TLS)
    certs(cluster)
    cluster.tls = None
    node: Node = getattr(cluster, plain)
    cluster.write_config(node)
    cluster.create().start()
    both_say(cluster, f"{node.peer.name} uses TLS on the peer link and {plain} does not: give both the same `tls`.")
    # The operator mends it.
    node.stop()
    node.config = node.peer.config
    node.start()
    for one in cluster.nodes:
        one.wait_connection("Connected")


def test_a_stranger_in_a_handshake_does_not_disturb_the_link(secured: Cluster) -> None:
    address = (secured.node2.address, secured.port)
    strangers = [socket.create_connection(address) for _ in range(30)]
    strangers[0].sendall(b"\x16\x03\x01\x00\xff" + bytes(255))
    strangers[1].sendall(b"GET / HTTP/1.1\r\n\r\n")
    secured.node1.write(0, b"s" * MIB)
    secured.quiesce().check_identical()
    for stranger in strangers:
        stranger.close()
    assert secured.node1.wait_in_sync()["connection"] == "Connected"
    for node in secured.nodes:
        assert node.log().count("connected to") == 2, node.log()
        assert "Traceback" not in node.log()


def test_what_is_on_the_wire_is_not_readable(libnbd: Any, new_cluster: Callable[..., Cluster]) -> None:
    """A relay between the nodes sees what goes by: nothing of the data, nor of the greeting."""
    cluster = new_cluster(tls=TLS, data_integrity="true")
    certs(cluster)
    seen = bytearray()
    relay = socket.create_server(("127.0.0.2", 0))
    port = relay.getsockname()[1]

    def pump(source: socket.socket, sink: socket.socket) -> None:
        while data := source.recv(65536):
            seen.extend(data)
            sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def serve() -> None:
        while True:
            try:
                near, _ = relay.accept()
            except OSError:
                return  # the test is over
            try:
                far = socket.create_connection(("127.0.0.2", cluster.port))
            except OSError:  # node2 is not up yet
                near.close()
                continue
            threading.Thread(target=pump, args=(near, far), daemon=True).start()
            threading.Thread(target=pump, args=(far, near), daemon=True).start()

    cluster.on = {"node2": {"port": str(port)}}
    cluster.write_config(cluster.node1)
    threading.Thread(target=serve, daemon=True).start()
    cluster.up()
    secret = os.urandom(4096)
    cluster.node1.write(0, secret)
    cluster.quiesce().check_identical()
    relay.close()
    assert len(seen) > 4096
    for readable in (secret[:64], b"node1", b"data_integrity"):
        assert readable not in seen


# ── clients ──────────────────────────────────────────────────────────────────────────────────────────────────────


def libnbd_of(node: Node, folder: Path) -> Any:
    """A connected handle that uses the certificates in this folder."""
    import nbd

    handle = nbd.NBD()
    handle.set_export_name(node.cluster.resource)
    handle.set_tls(nbd.TLS_REQUIRE)
    handle.set_tls_certificates(str(folder))
    handle.connect_unix(str(node.nbd_path))
    return handle


@pytest.fixture
def served(libnbd: Any, new_cluster: Callable[..., Cluster]) -> Cluster:
    """Two nodes with TLS everywhere, in sync; node1 is Primary. Client "tests" has certificates."""
    cluster = new_cluster(tls=TLS, nbd_tls=NBD_TLS)
    certs(cluster)
    certs(cluster, "--client", "tests")
    return cluster.up()


def test_a_client_over_a_takeover_and_a_kill(served: Cluster, libnbd: Any) -> None:
    folder = served.folder / "certs" / "client-tests"
    client = libnbd_of(served.node1, folder)
    data = os.urandom(MIB)
    # Requests under way when the drain begins are answered, all of them.
    cookies = [client.aio_pwrite(libnbd.Buffer.from_bytearray(bytearray(data)), n * MIB) for n in range(8)]
    taking = subprocess.Popen(
        [*served.node2.daemon_command()[:1], "-m", "replica.cli", *served.node2.options(), "takeover"],
        env=served.node2.environment(),
    )
    while client.aio_in_flight():
        client.poll(int(PATIENCE_S * 1000))
    assert all(client.aio_command_completed(cookie) for cookie in cookies)
    assert taking.wait(PATIENCE_S) == 0
    client = libnbd_of(served.node2, folder)
    for n in range(8):
        assert bytes(client.pread(MIB, n * MIB)) == data
    served.node2.kill9()
    served.node1.wait_alone()
    served.node1.ctl("promote")
    client = libnbd_of(served.node1, folder)
    assert bytes(client.pread(MIB, 7 * MIB)) == data
    client.pwrite(data, 0)
    client.flush()
    served.node2.start()
    served.wait_in_sync()
    client.flush()
    served.check_identical()
    status = served.node1.status()
    assert status["tls"]["nbd"]["mode"] == "require"
    assert f"NBD (require) until {status['tls']['nbd']['not_after'][:10]}" in served.node1.cli("status").stdout


def test_a_plain_client_is_turned_away(served: Cluster, libnbd: Any) -> None:
    with pytest.raises(libnbd.Error):
        served.node1.read(0, 512)
    assert served.node1.status()["nbd"]["clients"] == 0


def test_qemu_on_a_replicated_pair(served: Cluster) -> None:
    for program in ("qemu-img", "qemu-io"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: qemu-utils)")
    folder = served.folder / "certs" / "client-tests"
    credentials = ["--object", f"tls-creds-x509,id=tls0,endpoint=client,dir={folder}", "--image-opts"]
    place = f"driver=nbd,path={served.node1.nbd_path},export=r0,tls-creds=tls0,tls-hostname=node1"
    commands = ["-c", "write -P 0x5a 1M 2M", "-c", "flush", "-c", "read -P 0x5a 1M 2M"]
    for command in (["qemu-io", *credentials, place, *commands], ["qemu-img", "info", *credentials, place]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == 0, done.stderr
    served.check_identical()


def test_a_key_that_others_may_read_is_refused(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(nbd_tls=NBD_TLS)
    certs(cluster)
    key = cluster.folder / "certs" / "node1.key"
    key.chmod(0o644)
    cluster.create()
    done = cluster.node1.run_until_exit()
    line = 1 + cluster.configuration().splitlines().index(f"nbd-tls = {NBD_TLS}")
    assert (done.returncode, done.stderr) == (
        1,
        f"replicad: {cluster.node1.config}:{line}: resource.r0.nbd-tls.key: {key} has mode 0644 and others may use it: "
        f"run `chmod 600 {key}`\n",
    )


def test_a_client_certificate_is_not_a_node(secured: Cluster) -> None:
    """Clients have certificates of the same CA. Over TLS, the node says what it expected; it knows it is no peer."""
    certs(secured, "--client", "node3")
    folder = secured.folder / "certs" / "client-node3"
    context = ssl.create_default_context(cafile=str(folder / "ca-cert.pem"))
    context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    with (
        socket.create_connection((secured.node2.address, secured.port), PATIENCE_S) as plain,
        context.wrap_socket(plain, server_hostname="node2") as stranger,
    ):
        said = b"".join(iter(lambda: stranger.recv(4096), b""))
    sentence = "node2 expected node1's certificate at the other end of the link, and it is for nobody."
    assert said == wire.pack(wire.ERROR, sentence.encode())
    secured.node1.write(0, b"x" * MIB)
    secured.quiesce().check_identical()
    assert sentence in secured.node2.log()
    assert secured.node2.status()["last_error"] == ""


def test_the_document(libnbd: Any, new_cluster: Callable[..., Cluster]) -> None:
    """The commands and the configuration of docs/tls.md, in their order, on a pair of this machine."""
    for program, package in (("nbdinfo", "libnbd-bin"), ("qemu-img", "qemu-utils")):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: {package})")
    text = (Path(__file__).parents[2] / "docs" / "tls.md").read_text()
    tables = dict(re.findall(r"^(tls|nbd-tls) = (\{.*?\})", text, re.MULTILINE))
    port = free_port("127.0.0.1")
    on = {"node1": {"nbd": f'"127.0.0.1:{port}"'}}
    cluster = new_cluster(tls=tables["tls"], nbd_tls=tables["nbd-tls"], on=on)
    tools = cluster.folder / "bin"
    tools.mkdir()
    (tools / "replicactl").write_text(f'#!/bin/sh\nexec {sys.executable} -m replica.cli "$@"\n')
    (tools / "replicactl").chmod(0o755)
    environment = cluster.node1.environment() | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "REPLICA_CONFIG": str(cluster.node1.config),
        "REPLICA_NODE": "node1",
    }

    def run(command: str) -> str:
        for theirs, ours in (
            ("/etc/replica", str(cluster.folder)),
            ("192.168.2.44/", f"127.0.0.1:{port}/"),
            ("192.168.2.44,port=10809", f"127.0.0.1,port={port}"),
        ):
            command = command.replace(theirs, ours)
        done = subprocess.run(
            command, shell=True, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    commands = re.findall(r"^    (.+)$", text, re.MULTILINE)
    make, client, info, image, more_hosts, renew = commands
    run(make)
    cluster.up()
    run(client)
    assert "newstyle-fixed with TLS" in run(info)
    assert "16 MiB" in run(image)
    run(more_hosts)
    run(renew)
    for node in cluster.nodes:
        node.stop().start()
        cluster.wait_in_sync()


def test_a_renewed_certificate_is_used_after_a_restart(secured: Cluster) -> None:
    before = secured.node2.status()["tls"]
    secured.node2.stop()
    certs(secured, "--force", "--days", "900")
    secured.node2.start()
    secured.wait_in_sync()
    assert secured.node2.status()["tls"] != before


@pytest.mark.slow
def test_expired_while_it_ran(new_cluster: Callable[..., Cluster], short_dir: Path) -> None:
    """A node whose certificate expires keeps its link, and is refused when it makes a new one."""
    authority = authority_of(short_dir)
    cluster = new_cluster(tls=TLS)
    cluster.create()
    seconds = 20
    pair = issue(authority.pair, "node2", seconds / 86400, hosts=["node2"], server=True)
    save(pair, short_dir / "certs" / "node2.crt", short_dir / "certs" / "node2.key")
    cluster.start()
    cluster.node1.wait_connection("Connected")
    while datetime.now(UTC) <= pair.not_after:
        time.sleep(max(0.0, (pair.not_after - datetime.now(UTC)).total_seconds()) + 0.1)
    assert cluster.node1.status()["connection"] == "Connected"
    cluster.node1.stop().start()
    both_say(
        cluster,
        "TLS with node2 failed: its certificate is refused (certificate has expired).",
        "TLS with node1 failed: it refused this side's certificate (certificate expired).",
    )
