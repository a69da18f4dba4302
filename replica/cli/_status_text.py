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
    for volume in status["volumes"]:
        if volume.get("verify"):
            lines.append(f"  verify: {verify_text(volume['verify'])}")
        elif volume.get("last_verify"):
            lines.append(f"  last verify: {last_verify_text(volume['last_verify'])}")
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


def verify_text(verify: dict[str, Any]) -> str:
    """ "43.2 % done, 80.0 MiB/s, about 8 s left, nothing found" of a verification that runs."""
    parts = [f"{verify['done_percent']:.1f} % done"]
    if verify["rate_bytes_s"]:
        parts.append(f"{bytes_text(verify['rate_bytes_s'])}/s")
    if verify["eta_seconds"] is not None:
        parts.append(f"about {duration_text(verify['eta_seconds'])} left")
    return ", ".join([*parts, _found_text(verify)])


def last_verify_text(last: dict[str, Any]) -> str:
    """ "3 min 5 s ago, 1.0 GiB from 0 B on compared in 8 s, nothing found" of the last one; why, if it has not come to
    its end.
    """
    size = bytes_text(last["position_bytes"] - last["from_bytes"])
    where = f" from {bytes_text(last['from_bytes'])} on" if last["from_bytes"] else ""
    compared = f"{size}{where} compared in {duration_text(last['took_seconds'])}"
    parts = [f"{duration_text(last['seconds_ago'])} ago", compared, _found_text(last)]
    if not last["complete"]:
        parts.append(f"not complete: {last['reason']} (go on with --from {last['position_bytes']})")
    return ", ".join(parts)


def _found_text(verify: dict[str, Any]) -> str:
    if not verify["found_bytes"] and not verify["repaired_bytes"]:
        return "nothing found"
    found = f"{bytes_text(verify['found_bytes'])} found to differ"
    return f"{found}, {bytes_text(verify['repaired_bytes'])} repaired" if verify["repair"] else found


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
