"""What `replicactl` shows of the kernel devices of this machine."""

from typing import Any

from replica import control
from replica.cli._status_text import bytes_text
from replica.config import Config
from replica.kernel_device import netlink
from replica.kernel_device.places import backend_prefix

_ANSWER_TIMEOUT_S = 5.0


def ask_all(config: Config) -> list[dict[str, Any]]:
    """The status of each resource that is mapped on this machine. Raises `ReplicaError` as `control.call` does."""
    return [status for name in config.resources if (status := _ask(config, name)) is not None]


def _ask(config: Config, name: str) -> dict[str, Any] | None:
    try:
        status: dict[str, Any] = control.call(
            config.map_run_dir / f"{name}.sock", "status", timeout_s=_ANSWER_TIMEOUT_S
        )
    except control.NotRunning:
        found = netlink.find_backend(backend_prefix(config.cluster.name, name))
        if found is None:
            return None
        sentence = f"its replicad-map has ended: `replicactl map {name}` goes on with it"
        device = netlink.device_path(found[0])
        return {"resource": name, "device": device, "state": "unattended", "mount": "", "last_error": sentence}
    return status


def device_text(status: dict[str, Any]) -> str:
    """ "r0 /dev/nbd0: attached to node1 (10.0.0.1:10809), 1.0 GiB, mounted at /srv/web"."""
    parts = [status["state"] + (f" to {status['server']}" if status["state"] == "attached" else "")]
    if status.get("size_bytes"):
        parts.append(bytes_text(status["size_bytes"]))
    if status["mount"]:
        parts.append(f"mounted at {status['mount']}")
    text = f"{status['resource']} {status.get('device') or 'no device yet'}: {', '.join(parts)}"
    return f"{text}; {status['last_error']}" if status.get("last_error") else text
