"""What the daemon tells of the cluster: the document behind `replicactl cluster`."""

from collections.abc import Mapping
from typing import Any

from replica.heartbeat import clock
from replica.heartbeat.group import GroupRunner
from replica.heartbeat.manager import Manager
from replica.heartbeat.membership import PeerView
from replica.heartbeat.node_state import GroupState, Status


def report(
    manager: Manager, peer: PeerView, pings: list[dict[str, Any]], fencing: Mapping[str, Any], warnings: list[str]
) -> dict[str, Any]:
    """The document, msgpack- and JSON-ready. Times in seconds."""
    settings, now = manager.settings, clock.now()
    return {
        "cluster": settings.cluster,
        "node": settings.node,
        "phase": str(manager.phase),
        "sentence": manager.decision.sentence,
        "uptime_s": round(now - manager.began_s, 1),
        "peer": settings.peer,
        "peer_alive": manager.peer_alive,
        "peer_phase": None if peer.state is None else str(peer.state.phase),
        "peer_hears_us": peer.hears_us,
        "paths": [
            {
                "name": path.name,
                "state": str(path.status),
                "problem": path.problem,
                "lost": path.lost,
                "heard_s_ago": None if path.heard_s is None else round(now - path.heard_s, 2),
            }
            for path in peer.paths
        ],
        "pings": pings,
        "groups": [_group(manager, runner, peer) for runner in manager.runners.values()],
        "fencing": dict(fencing),
        "auto_failback": settings.auto_failback,
        "promote_without_fencing": settings.promote_without_fencing,
        "warnings": warnings,
    }


def _group(manager: Manager, runner: GroupRunner, peer: PeerView) -> dict[str, Any]:
    settings = manager.settings
    here = manager.group_state(runner)
    there = None if peer.state is None or not manager.peer_alive else peer.state.groups.get(runner.name)
    holder, state = _holder(settings.node, here, settings.peer, there)
    verdict = manager.decision.groups.get(runner.name)
    return {
        "name": runner.name,
        "preferred": runner.settings.preferred,
        "holder": holder,
        "owner": here.claim.owner or None,
        "status": str(state.status),
        "term": here.claim.term,
        "by_operator": here.claim.by_operator,
        "sentence": "" if verdict is None else verdict.words,
        "ready": {
            node: None if state is None else state.ready.why or state.ready.readiness.name.lower()
            for node, state in ((settings.node, here), (settings.peer, there))
        },
        "problem": state.problem,
        "resources": [
            {"name": r.settings.name, "status": _resource_status(runner, r.running), "problem": r.problem}
            for r in runner.resources
        ],
    }


def _holder(node: str, here: GroupState, peer: str, there: GroupState | None) -> tuple[str | None, GroupState]:
    """Who holds something of the group, and its state there; nobody: that of this node."""
    if not here.status.holds_nothing:
        return node, here
    if there is not None and not there.status.holds_nothing:
        return peer, there
    return None, here


def _resource_status(runner: GroupRunner, running: bool) -> str:
    if running:
        return "running"
    return "unknown" if runner.status is Status.SUSPENDED else "stopped"
