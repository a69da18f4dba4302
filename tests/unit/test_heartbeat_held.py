"""What a node remembers of its groups, in real files: over a restart, a reboot, a disk that cannot be written."""

from pathlib import Path

import pytest

from replica.heartbeat.held import Held, HeldGroup, Previous
from replica.heartbeat.node_state import Claim

GROUPS = {"web": HeldGroup(Claim(4, "node1", True), True), "data": HeldGroup(Claim(7, "node2"), False)}


def folders(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "state", tmp_path / "run"


def write(held: Held) -> None:
    """The terms are written in the background."""
    held.save(GROUPS, peer_is_dead=True)
    held.stamp(100.0)
    held._writer.shutdown()


def test_nothing_is_remembered_at_first(tmp_path: Path) -> None:
    held = Held(*folders(tmp_path))
    assert held.terms == {}
    assert held.load(100.0) == Previous()


def test_a_restart_knows_all(tmp_path: Path) -> None:
    write(Held(*folders(tmp_path)))
    again = Held(*folders(tmp_path))
    assert again.load(103.0) == Previous(GROUPS, True, 3.0)
    assert again.terms == {"web": 4, "data": 7}


def test_a_reboot_knows_the_terms(tmp_path: Path) -> None:
    state, run = folders(tmp_path)
    write(Held(state, run))
    for path in run.iterdir():
        path.unlink()
    again = Held(state, run)
    assert again.load(3.0) == Previous()
    assert again.terms == {"web": 4, "data": 7}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"groups": 1}', '{"groups": {"web": [1]}}', '{"groups": {"web": ["x", "", 0, 0]}}']
)
def test_what_makes_no_sense_is_nothing(tmp_path: Path, text: str) -> None:
    state, run = folders(tmp_path)
    write(Held(state, run))
    (run / "held.json").write_text(text)
    (state / "terms.json").write_text(text)
    again = Held(state, run)
    assert again.load(101.0) == Previous()
    assert all(isinstance(term, int) for term in again.terms.values())


def test_without_a_stamp_nothing_is_known(tmp_path: Path) -> None:
    state, run = folders(tmp_path)
    write(Held(state, run))
    (run / "alive").write_text("")  # what a full disk leaves
    assert Held(state, run).load(101.0) == Previous()


def test_what_cannot_be_written_leaves_nothing_that_is_not_so_any_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A restarted daemon believes that it holds what stands there, and asks nobody but a node that it hears."""
    state, run = folders(tmp_path)
    write(Held(state, run))
    (run / "held.new").mkdir()
    held = Held(state, run)
    held.save({"web": HeldGroup(Claim(5, "node2"), False)}, peer_is_dead=False)
    held.save({"web": HeldGroup(Claim(6, "node2"), False)}, peer_is_dead=False)
    held.stamp(101.0)
    held._writer.shutdown()
    again = Held(state, run)
    assert again.load(101.5) == Previous()
    assert again.terms == {"web": 6}
    assert [record.message for record in caplog.records] == [
        f"{run}/held.json cannot be written (Is a directory): a restart will know less."
    ]
