"""When a copy may become Primary, as the agent reads replicad's status."""

from typing import Any

import pytest

from replica.heartbeat.agents.replicated import readiness, trouble
from replica.heartbeat.node_state import Readiness


def status(role: str, connection: str, replication: str, disk: str, **more: Any) -> dict[str, Any]:
    """What replicad of node1 says."""
    return {
        "name": "r0",
        "node": "node1",
        "role": role,
        "connection": connection,
        "replication": replication,
        "last_error": more.get("last_error", ""),
        "peer": {"name": "node2"},
        "volumes": [
            {
                "disk": disk,
                "through_peer": more.get("through_peer", False),
                "peer_outdated": more.get("peer_outdated", False),
            }
        ],
    }


@pytest.mark.parametrize(
    ("said", "level", "why"),
    [
        (status("Secondary", "Connected", "Established", "UpToDate"), Readiness.YES, ""),
        (status("Secondary", "Connected", "SyncSource", "UpToDate"), Readiness.YES, ""),
        (status("Secondary", "Connected", "PausedSyncS", "UpToDate"), Readiness.YES, ""),
        (status("Secondary", "Connected", "SyncTarget", "Inconsistent"), Readiness.NO, "being resynced from node2"),
        (status("Secondary", "Connected", "PausedSyncT", "Inconsistent"), Readiness.NO, "being resynced from node2"),
        (status("Secondary", "Connected", "Negotiating", "Consistent"), Readiness.NO, "r0 is negotiating with node2"),
        (status("Secondary", "Connected", "Off", "UpToDate"), Readiness.YES, ""),  # serves a Primary without a disk
        (status("Secondary", "Connected", "Off", "Consistent"), Readiness.IF_ALONE, "not in touch"),
        (status("Secondary", "Connecting", "Off", "Consistent"), Readiness.IF_ALONE, "not in touch with that of node2"),
        (status("Secondary", "Connecting", "Off", "Consistent", peer_outdated=True), Readiness.YES, ""),
        (status("Secondary", "StandAlone", "Off", "Consistent"), Readiness.IF_ALONE, "not in touch"),
        (
            status("Secondary", "StandAlone", "Off", "Consistent", peer_outdated=True, last_error="both changed"),
            Readiness.NO,
            "r0 is StandAlone: both changed",
        ),
        (status("Secondary", "Connecting", "Off", "Outdated"), Readiness.NO, "its copy of r0 is Outdated"),
        (status("Secondary", "Connecting", "Off", "Inconsistent"), Readiness.NO, "its copy of r0 is Inconsistent"),
        (status("Secondary", "Connected", "Off", "Failed"), Readiness.NO, "its copy of r0 is Failed"),
        (status("Secondary", "Connecting", "Off", "Diskless"), Readiness.NO, "its copy of r0 is Diskless"),
        (status("Primary", "Connecting", "Off", "UpToDate"), Readiness.YES, ""),
        (status("Primary", "Connected", "Off", "Failed", through_peer=True), Readiness.YES, ""),
        (status("Primary", "Connecting", "Off", "Failed"), Readiness.NO, "has no usable disk on node1"),
    ],
)
def test_a_copy_is_ready(said: dict[str, Any], level: Readiness, why: str) -> None:
    ready = readiness(said)
    assert ready.readiness is level
    assert (why in ready.why) if why else (ready.why == "")


def test_only_a_primary_with_a_disk_serves() -> None:
    assert trouble(status("Secondary", "Connected", "Established", "UpToDate")) == "is Secondary on node1"
    assert trouble(status("Primary", "Connected", "Established", "UpToDate")) == ""
    assert trouble(status("Primary", "Connected", "Off", "Diskless", through_peer=True)) == ""
    assert "node2 does not stand in" in trouble(status("Primary", "Connecting", "Off", "Diskless"))
