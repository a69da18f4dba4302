"""Hooks of real nodes: each event is told once, with its facts; nothing waits for them but the one that is asked."""

import hashlib
import os
import resource
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from replica.hooks import Event
from tests.cluster.cluster import MIB, PATIENCE_S, Cluster, Node
from tests.cluster.test_split_brain import both_stand_alone, connect_both, demote, promoted_apart
from tests.processes import StuckProgram, gone

Told = dict[str, str]


def script(path: Path, text: str) -> str:
    """Write a shell script; it as a TOML value."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return f'"{path}"'


class Line:
    """A FIFO as a line from the hooks to the test; each thing that they say is one write."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self._rest = b""

    def read(self) -> str:
        """The next line."""
        while b"\n" not in self._rest:
            assert select.select([self._descriptor], [], [], PATIENCE_S)[0], "no hook says anything any more"
            self._rest += os.read(self._descriptor, 1 << 16)
        line, self._rest = self._rest.split(b"\n", 1)
        return line.decode()

    def close(self) -> None:
        os.close(self._descriptor)


class Recorder:
    """A hook that tells all its variables, and what both nodes have told so far."""

    def __init__(self, folder: Path, line: Line) -> None:
        self._line = line
        text = f"""printf '%s\\n' "$(env | grep ^REPLICA_ | tr '\\n' '\\t')" > {line.path}"""
        self.hooks = dict.fromkeys(Event, script(folder / "told.sh", text))
        self.told: list[Told] = []

    def wait(self, node: Node, event: Event) -> Told:
        """What the hook is told of this event on this node, when it is, after what was asked for so far."""
        while True:
            told = dict(pair.split("=", 1) for pair in self._line.read().strip("\t").split("\t"))
            self.told.append(told)
            if (told["REPLICA_NODE"], told["REPLICA_EVENT"]) == (node.name, event):
                return told

    def wait_all(self, *expected: tuple[Node, Event]) -> dict[tuple[str, str], Told]:
        """The same for several, in whatever order they come."""
        missing = {(node.name, str(event)) for node, event in expected}
        found: dict[tuple[str, str], Told] = {}
        while missing:
            told = dict(pair.split("=", 1) for pair in self._line.read().strip("\t").split("\t"))
            self.told.append(told)
            key = (told["REPLICA_NODE"], told["REPLICA_EVENT"])
            missing.discard(key)
            found[key] = told
        return found

    def events(self, node: Node) -> list[str]:
        """Everything that this node's hooks were told since the last call, in its order."""
        events = [told["REPLICA_EVENT"] for told in self.told if told["REPLICA_NODE"] == node.name]
        self.told = [told for told in self.told if told["REPLICA_NODE"] != node.name]
        return events


@pytest.fixture
def line(short_dir: Path) -> Iterator[Line]:
    line = Line(short_dir / "line")
    yield line
    line.close()


@pytest.fixture
def recorder(short_dir: Path, line: Line) -> Recorder:
    return Recorder(short_dir, line)


def digest(node: Node) -> str:
    return hashlib.sha256(node.image.read_bytes()).hexdigest()


# ── each event ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_events_of_a_pairs_life(libnbd: Any, new_cluster: Callable[..., Cluster], recorder: Recorder) -> None:
    cluster = new_cluster(hooks=recorder.hooks)
    node1, node2 = cluster.nodes
    cluster.create().start()
    recorder.wait_all((node1, Event.PEER_CONNECTED), (node2, Event.PEER_CONNECTED))
    assert (recorder.events(node1), recorder.events(node2)) == (["peer-connected"], ["peer-connected"])

    # The nodes negotiate anew, which is no loss of the peer. A new copy is not asked about: it has nothing to save.
    node1.ctl("promote", force=True)
    recorder.wait_all((node1, Event.AFTER_RESYNC_SOURCE), (node2, Event.AFTER_RESYNC_TARGET))
    assert recorder.events(node1) == ["promoted", "before-resync-source", "peer-connected", "after-resync-source"]
    assert recorder.events(node2) == ["peer-connected", "after-resync-target"]

    node1.write(0, b"1" * 4096)
    node2.ctl("takeover")
    told = recorder.wait_all((node1, Event.DEMOTED), (node2, Event.PROMOTED))
    assert told["node1", "demoted"]["REPLICA_ROLE"] == "Secondary"
    assert told["node2", "promoted"]["REPLICA_ROLE"] == "Primary"
    assert (recorder.events(node1), recorder.events(node2)) == (["demoted"], ["promoted"])

    node1.kill9()
    lost = recorder.wait(node2, Event.PEER_LOST)
    assert lost.pop("REPLICA_REASON")
    assert lost == {
        "REPLICA_EVENT": "peer-lost",
        "REPLICA_CLUSTER": "test",
        "REPLICA_RESOURCE": "r0",
        "REPLICA_NODE": "node2",
        "REPLICA_PEER": "node1",
        "REPLICA_PEER_ADDRESS": "127.0.0.1",
        "REPLICA_ROLE": "Primary",
        "REPLICA_PEER_ROLE": "Secondary",
        "REPLICA_CONNECTION": "Connected",
        "REPLICA_REPLICATION": "Established",
        "REPLICA_DISK": "UpToDate",
        "REPLICA_PEER_DISK": "UpToDate",
        "REPLICA_BACKING": str(node2.image),
        "REPLICA_SIZE_BYTES": str(cluster.size_bytes),
        "REPLICA_CONFIG": str(node2.config),
    }
    node2.wait_alone()
    node2.write(0, b"2" * 4096)
    node1.start()
    told = recorder.wait_all((node1, Event.AFTER_RESYNC_TARGET), (node2, Event.AFTER_RESYNC_SOURCE))
    assert recorder.events(node1) == ["before-resync-target", "peer-connected", "after-resync-target"]
    assert recorder.events(node2) == ["peer-lost", "before-resync-source", "peer-connected", "after-resync-source"]
    for event, node, disk, peer_disk, replication in (
        ("before-resync-target", "node1", "Consistent", "UpToDate", "Negotiating"),
        ("after-resync-target", "node1", "UpToDate", "UpToDate", "Established"),
        ("before-resync-source", "node2", "UpToDate", "Inconsistent", "SyncSource"),
        ("after-resync-source", "node2", "UpToDate", "UpToDate", "Established"),
    ):
        facts = told[node, event]
        assert facts["REPLICA_DISK"] == disk, facts
        assert facts["REPLICA_PEER_DISK"] == peer_disk, facts
        assert facts["REPLICA_REPLICATION"] == replication, facts
    assert "is synced from node2, by bitmap" in told["node1", "before-resync-target"]["REPLICA_REASON"]

    # A stop in order demotes, and that hook still runs; to the other node it is the loss of its peer.
    node2.stop()
    told = recorder.wait_all((node1, Event.PEER_LOST), (node2, Event.DEMOTED))
    assert "was stopped" in told["node1", "peer-lost"]["REPLICA_REASON"]
    assert (recorder.events(node1), recorder.events(node2)) == (["peer-lost"], ["demoted"])


def test_a_node_that_is_told_to_disconnect_has_not_lost_its_peer(
    libnbd: Any, new_cluster: Callable[..., Cluster], recorder: Recorder
) -> None:
    cluster = new_cluster(hooks={**recorder.hooks, "after-resync-source": '"/bin/true"'}).up()
    node1, node2 = cluster.nodes
    recorder.wait_all((node1, Event.PROMOTED), (node2, Event.AFTER_RESYNC_TARGET))
    node2.ctl("disconnect")
    recorder.wait(node1, Event.PEER_LOST)
    node2.ctl("connect")
    recorder.wait_all((node1, Event.PEER_CONNECTED), (node2, Event.PEER_CONNECTED))
    assert recorder.events(node1)[-2:] == ["peer-lost", "peer-connected"]
    assert recorder.events(node2)[-2:] == ["after-resync-target", "peer-connected"]


def test_both_nodes_tell_of_a_split_brain(libnbd: Any, new_cluster: Callable[..., Cluster], recorder: Recorder) -> None:
    pair = new_cluster(hooks={"split-brain": recorder.hooks[Event.SPLIT_BRAIN]}).up()
    promoted_apart(pair)
    demote(pair.node2)
    connect_both(pair)
    both_stand_alone(pair)
    told = recorder.wait_all((pair.node1, Event.SPLIT_BRAIN), (pair.node2, Event.SPLIT_BRAIN))
    for node, role, peer_role in (("node1", "Primary", "Secondary"), ("node2", "Secondary", "Primary")):
        facts = told[node, "split-brain"]
        assert facts["REPLICA_CONNECTION"] == "StandAlone"
        assert (facts["REPLICA_ROLE"], facts["REPLICA_PEER_ROLE"]) == (role, peer_role)
        assert "discard-my-data" in facts["REPLICA_REASON"]
    for node in pair.nodes:
        node.stop()
    assert len(recorder.told) == len(pair.nodes)


def test_a_node_that_is_promoted_through_its_peer_is_told(
    libnbd: Any, new_cluster: Callable[..., Cluster], recorder: Recorder
) -> None:
    pair = new_cluster(hooks={"promoted": recorder.hooks[Event.PROMOTED]}).up()
    recorder.wait(pair.node1, Event.PROMOTED)
    pair.node2.ctl("detach")
    pair.node1.wait_for(lambda status: status["peer"]["disk"] == "Diskless")
    pair.node2.ctl("takeover")
    told = recorder.wait(pair.node2, Event.PROMOTED)
    assert (told["REPLICA_ROLE"], told["REPLICA_DISK"]) == ("Primary", "Diskless")


def test_a_disk_that_fails(libnbd: Any, new_cluster: Callable[..., Cluster], recorder: Recorder) -> None:
    hooks = {event: recorder.hooks[event] for event in (Event.DISK_FAILED, Event.PEER_LOST)}
    pair = new_cluster(hooks=hooks).up()
    node1, node2 = pair.nodes
    # From here on node2 cannot write beyond 8 MiB.
    assert node2.process is not None
    resource.prlimit(node2.process.pid, resource.RLIMIT_FSIZE, (8 * MIB, 8 * MIB))
    node1.write(12 * MIB, b"x" * 4096)
    told = recorder.wait_all((node2, Event.DISK_FAILED), (node1, Event.PEER_LOST))
    facts = told["node2", "disk-failed"]
    assert (facts["REPLICA_DISK"], facts["REPLICA_BACKING"]) == ("Failed", str(node2.image))
    assert "File too large" in facts["REPLICA_REASON"]
    assert "the disk of node2 failed" in told["node1", "peer-lost"]["REPLICA_REASON"]


# ── nothing waits for them ───────────────────────────────────────────────────────────────────────────────────────


def test_a_hook_that_hangs_holds_nothing_up(
    libnbd: Any, new_cluster: Callable[..., Cluster], short_dir: Path, line: Line
) -> None:
    hangs = script(short_dir / "hangs.sh", f"echo $$ > {line.path}; exec sleep 1000")
    pair = new_cluster(hooks={"timeout": "45", "promoted": hangs, "demoted": hangs}).up()
    node1, node2 = pair.nodes
    pid = int(line.read())
    node1.write(0, b"1" * MIB)
    node1.ctl("demote")
    node1.ctl("promote")
    node1.write(MIB, b"2" * MIB)
    node2.ctl("takeover")
    node2.write(0, b"3" * MIB)
    os.kill(pid, 0)  # still there
    # It has none of the daemon's descriptors, so none of its locks.
    node1.kill9()
    node1.start()
    os.kill(pid, signal.SIGKILL)
    pair.wait_in_sync()
    pair.quiesce().check_identical()


def test_a_hook_that_hangs_is_killed_with_its_children(
    libnbd: Any, new_cluster: Callable[..., Cluster], short_dir: Path, line: Line
) -> None:
    hangs = script(short_dir / "hangs.sh", f"trap '' TERM; sleep 1000 & echo $$ $! > {line.path}; sleep 1000")
    pair = new_cluster(hooks={"timeout": "0.2", "promoted": hangs}).up()
    for pid in line.read().split():
        gone(int(pid))
    pair.node1.stop()  # which waits for what the hook has to say
    assert "r0: the hook promoted ran longer than 0.2 s and was killed." in pair.node1.log()
    assert "Traceback" not in pair.node1.log()


def test_a_hook_whose_start_hangs_holds_nothing_up(
    libnbd: Any, new_cluster: Callable[..., Cluster], short_dir: Path, line: Line
) -> None:
    """As on a file server that has gone away together with the peer."""
    program = short_dir / "stuck.sh"
    pair = new_cluster(hooks={"timeout": "45", "peer-lost": script(program, f"echo runs > {line.path}")}).up()
    stuck = StuckProgram(program)
    pair.node2.kill9()
    select.select([stuck.asked], [], [], PATIENCE_S)
    pair.node1.write(0, b"1" * MIB)
    pair.node1.ctl("demote")
    pair.node1.ctl("promote")
    stuck.release()
    assert line.read() == "runs"


def test_what_a_hook_says_and_why_it_failed_is_in_the_log(
    libnbd: Any, new_cluster: Callable[..., Cluster], short_dir: Path, line: Line
) -> None:
    said = script(short_dir / "said.sh", f'echo out; echo "to $1" >&2; echo > {line.path}; exit 3')
    pair = new_cluster(hooks={"promoted": f"[{said}, 'a b']", "demoted": "'/no/such/hook'"}).up()
    line.read()
    pair.node1.stop()
    log = pair.node1.log()
    for words in (
        "r0: hook promoted: out\n",
        "r0: hook promoted: to a b\n",
        "WARNING r0: the hook promoted returned 3.\n",
        "WARNING r0: the hook demoted cannot be started (/no/such/hook: No such file or directory).\n",
    ):
        assert words in log, log


# ── before-resync-target ─────────────────────────────────────────────────────────────────────────────────────────


def behind(cluster: Cluster) -> Cluster:
    """node2 is down and lacks 4 MiB."""
    cluster.up()
    cluster.node1.write(0, b"old" * MIB)
    cluster.quiesce()
    cluster.node2.stop()
    cluster.node1.wait_alone()
    cluster.node1.write(MIB, b"new!" * MIB)
    return cluster


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("exit 7", "returned 7"),
        ("exec sleep 1000", "ran longer than 0.5 s and was killed"),
        (None, "cannot be started"),
    ],
)
def test_a_resync_that_its_hook_refuses_does_not_begin(
    libnbd: Any, new_cluster: Callable[..., Cluster], short_dir: Path, text: str | None, why: str
) -> None:
    program = short_dir / "ask.sh"
    script(program, text or "")
    if text is None:
        program.unlink()
    cluster = behind(new_cluster(hooks={"timeout": "0.5", "before-resync-target": f'"{program}"'}))
    node1, node2 = cluster.nodes
    before = digest(node2)
    node2.start()
    status = node2.wait_connection("StandAlone")
    assert f"the hook before-resync-target {why}" in status["last_error"]
    assert "replicactl connect r0" in status["last_error"]
    assert status["volumes"][0]["disk"] == "Consistent"
    assert digest(node2) == before
    assert node2.dump_md()["inconsistent"] is False
    node1.wait_for(lambda status: "StandAlone on node2" in status["last_error"])
    assert f"the peer says: the hook before-resync-target {why}" in node1.log()
    node1.write(8 * MIB, b"more")
    # The hook gets what it needs, and saves the copy as it is.
    script(program, f'cp "$REPLICA_BACKING" {short_dir}/saved')
    node2.ctl("connect")
    cluster.wait_in_sync()
    assert hashlib.sha256((short_dir / "saved").read_bytes()).hexdigest() == before != digest(node2)
    cluster.quiesce().check_identical()


def test_its_exit_status_counts_even_where_the_end_of_children_is_ignored(
    libnbd: Any, new_cluster: Callable[..., Cluster], short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = behind(new_cluster(hooks={"before-resync-target": script(short_dir / "ask.sh", "exit 1")}))
    node2 = cluster.node2
    command = ["env", "--ignore-signal=CHLD", *node2.daemon_command()]
    monkeypatch.setattr(node2, "daemon_command", lambda: command)
    node2.start()
    assert "returned 1" in node2.wait_connection("StandAlone")["last_error"]


def test_an_interrupted_resync_goes_on_without_asking(
    libnbd: Any, new_cluster: Callable[..., Cluster], short_dir: Path
) -> None:
    """What is half copied is nothing to save."""
    asked = short_dir / "asked"
    hook = script(short_dir / "ask.sh", f"test ! -e {asked} && touch {asked}")
    cluster = behind(new_cluster(resync_rate='"2M"', hooks={"before-resync-target": hook}))
    node1, node2 = cluster.nodes
    node2.start()
    node2.wait_replication("SyncTarget")
    node1.kill9()
    node2.wait_alone()
    node1.start()
    cluster.wait_in_sync()
    assert node2.log().count("hook before-resync-target") == 1
    cluster.check_identical()


def test_while_it_is_asked_the_primary_goes_on_and_when_the_link_is_lost_it_is_ended(
    libnbd: Any, new_cluster: Callable[..., Cluster], short_dir: Path, line: Line
) -> None:
    hook = script(short_dir / "ask.sh", f"echo $$ > {line.path}; exec sleep 1000")
    cluster = behind(new_cluster(hooks={"timeout": "45", "before-resync-target": hook}))
    node1, node2 = cluster.nodes
    before = digest(node2)
    node2.start()
    pid = int(line.read())
    node1.write(8 * MIB, b"more")
    assert node2.status()["replication"] == "Negotiating"
    os.kill(pid, 0)  # still there
    node1.kill9()
    gone(pid)
    node2.wait_alone()
    node2.ctl("promote")
    assert digest(node2) == before
    assert "StandAlone" not in node2.log().rpartition("before-resync-target")[2]
