"""The status document of a resource: what `replicactl status --json` shows."""

import asyncio
from typing import TYPE_CHECKING, Any

from replica.bitmap import BLOCK_SIZE
from replica.config_tls import Tls
from replica.states import Replication

if TYPE_CHECKING:
    from replica.resource import Resource


def status_document(resource: "Resource") -> dict[str, Any]:
    """The document, msgpack- and JSON-ready. Sizes in bytes, times in seconds, generation ids in hex."""
    state = resource.state
    return {
        "name": resource.name,
        "node": resource.node_name,
        "role": str(state.role),
        "connection": str(state.connection),
        "replication": str(state.replication),
        "protocol": resource.settings.protocol,
        "last_error": state.last_error,
        "peer": {
            "name": resource.peer_name,
            "role": str(state.peer_role),
            "disk": str(state.peer_disk),
            "address": resource.config.peer.address,
        },
        "volumes": [_volume(resource)],
        "nbd": {"listen": str(resource.settings.nbd), "clients": len(resource.export.clients)},
        "tls": {"peer_link": _tls(resource.config.tls), "nbd": _tls(resource.nbd_tls)},
    }


def _tls(tls: Tls | None) -> dict[str, Any] | None:
    if tls is None:
        return None
    not_after = tls.not_after.isoformat(timespec="seconds") if tls.not_after is not None else None
    return {"mode": str(tls.mode), "not_after": not_after}


def _volume(resource: "Resource") -> dict[str, Any]:
    document: dict[str, Any] = {
        "volume": 0,
        "disk": str(resource.disk_state),
        "peer_disk": str(resource.state.peer_disk),
        "size_bytes": resource.export.size_bytes,
        "backing": str(resource.settings.backing),
        "through_peer": resource.peer_volume is not None,
        "peer_outdated": resource.has_disk and resource.superblock.peers[0].outdated,
        "out_of_sync_bytes": 0,
        "generations": None,
        "activity_log": None,
        **_progress(resource),
        **_verification(resource),
    }
    if resource.attached:
        disk = resource.disk
        generations = disk.metadata.superblock.generations
        document["out_of_sync_bytes"] = min(disk.bitmap.count * BLOCK_SIZE, disk.size_bytes)
        document["generations"] = {
            "current": f"{generations.current:016x}",
            "base": f"{generations.base:016x}",
            "history": [f"{value:016x}" for value in generations.history],
        }
        document["activity_log"] = {"slots": disk.activity_log.slots, "hot": len(disk.activity_log.hot)}
    return document


def _verification(resource: "Resource") -> dict[str, Any]:
    now_s = asyncio.get_running_loop().time()
    progress, result = resource.verify_progress, resource.verify_result
    return {
        "verify": progress.document(now_s) if progress is not None else None,
        "last_verify": result.document(now_s) if result is not None else None,
    }


def _progress(resource: "Resource") -> dict[str, Any]:
    empty = dict.fromkeys(("resync_total_bytes", "done_percent", "eta_seconds", "resync_rate_bytes_s"))
    progress = resource.progress
    if progress is None or not resource.attached:
        return {**empty, "resync_total_bytes": 0}
    left = resource.disk.bitmap.count
    paused = resource.state.replication in (Replication.PAUSED_SYNC_S, Replication.PAUSED_SYNC_T)
    rate = 0.0 if paused else progress.rate_bytes_s(left, asyncio.get_running_loop().time())
    return {
        "resync_total_bytes": progress.total_blocks * BLOCK_SIZE,
        "done_percent": progress.done_percent(left),
        "eta_seconds": round(left * BLOCK_SIZE / rate, 1) if rate else None,
        "resync_rate_bytes_s": round(rate),
    }
