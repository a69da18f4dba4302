"""The status of a resource in words. Pure: from the status document to text."""

from typing import Any

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_MINUTE_S = 60
_HOUR_S = 3600


def bytes_text(count: float) -> str:
    """ "512 B", "1.0 GiB"."""
    power = min((max(int(count), 1).bit_length() - 1) // 10, len(_UNITS) - 1)
    return f"{count / 1024**power:.1f} {_UNITS[power]}" if power else f"{count:.0f} B"


def duration_text(seconds: float) -> str:
    """ "8 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < _MINUTE_S:
        return f"{whole} s"
    if whole < _HOUR_S:
        return f"{whole // _MINUTE_S} min {whole % _MINUTE_S} s"
    return f"{whole // _HOUR_S} h {whole % _HOUR_S // _MINUTE_S} min"


def status_lines(status: dict[str, Any]) -> list[str]:
    """A line for the resource, one for each volume that is syncing, one for the last error if any."""
    parts = [f"{status['name']} {status['node']}: {status['role']}, {_link_text(status)}"]
    parts += [_volume_text(volume) for volume in status["volumes"]]
    lines = ["; ".join(parts)]
    lines += [
        f"  {status['replication']}: {progress_text(volume)}"
        for volume in status["volumes"]
        if volume.get("done_percent") is not None
    ]
    if any((status.get("tls") or {}).values()):
        lines.append(f"  TLS: {_tls_text(status['tls'])}")
    if status.get("last_error"):
        lines.append(f"  last error: {status['last_error']}")
    return lines


def _tls_text(tls: dict[str, Any]) -> str:
    """ "peer link until 2027-02-24, NBD (require) until 2027-02-24"."""
    parts = []
    if tls["peer_link"] is not None:
        parts.append(f"peer link until {_day(tls['peer_link'])}")
    if tls["nbd"] is not None:
        parts.append(f"NBD ({tls['nbd']['mode']}) until {_day(tls['nbd'])}")
    return ", ".join(parts)


def _day(tls: dict[str, Any]) -> str:
    return str(tls["not_after"]).partition("T")[0]


def progress_text(volume: dict[str, Any]) -> str:
    """ "43.2 % done, 580.0 MiB to go, 80.0 MiB/s, about 8 s left" of a volume that is syncing."""
    parts = [
        f"{volume['done_percent']:.1f} % done",
        f"{bytes_text(volume['out_of_sync_bytes'])} to go",
    ]
    if volume.get("resync_rate_bytes_s") is not None:
        parts.append(f"{bytes_text(volume['resync_rate_bytes_s'])}/s")
    if volume.get("eta_seconds") is not None:
        parts.append(f"about {duration_text(volume['eta_seconds'])} left")
    return ", ".join(parts)


def _link_text(status: dict[str, Any]) -> str:
    peer = status["peer"]
    if status["connection"] == "Connected":
        return f"Connected to {peer['name']} ({peer['role']}), {status['replication']}"
    if status["connection"] == "StandAlone":
        return "StandAlone"
    return f"{status['connection']} to {peer['name']}"


def _volume_text(volume: dict[str, Any]) -> str:
    text = f"disk {volume['disk']} / peer {volume['peer_disk']}; {bytes_text(volume['size_bytes'])}"
    if volume["out_of_sync_bytes"] and volume.get("done_percent") is None:
        text += f"; {bytes_text(volume['out_of_sync_bytes'])} out of sync"
    return text
