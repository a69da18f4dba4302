"""The state of the cluster in words. Pure: from the status document of `replica-heartbeat` to text."""

from typing import Any

from replica.cli._status_text import duration_text


def cluster_lines(status: dict[str, Any]) -> list[str]:
    """The nodes, the decision, each group with its resources, what is heard, what is wrong."""
    lines = [f"{status['node']} is {status['phase']}; {_peer_text(status)}", f"  {status['sentence']}"]
    for group in status["groups"]:
        lines += _group_lines(group, status["node"])
    lines += [f"  path {_path_text(path)}" for path in status["paths"]]
    lines += [f"  ping {ping['name']}: {'answers' if ping['alive'] else 'does not answer'}" for ping in status["pings"]]
    lines += [f"  fencing of {node}: {_fencing_text(fencing)}" for node, fencing in status["fencing"].items()]
    lines += [f"  warning: {warning}" for warning in status["warnings"]]
    return lines


def _peer_text(status: dict[str, Any]) -> str:
    if not status["peer_alive"]:
        return f"{status['peer']} is not heard"
    phase = status.get("peer_phase")
    return f"{status['peer']} is {phase or 'heard'}"


def _group_lines(group: dict[str, Any], node: str) -> list[str]:
    holder = f"on {group['holder']}" if group["holder"] else "on no node"
    preferred = "" if group["holder"] == group["preferred"] else f", preferred {group['preferred']}"
    by_operator = ", put there by an operator" if group.get("by_operator") else ""
    lines = [f"  group {group['name']}: {group['status']} {holder}{preferred}{by_operator}"]
    if group.get("sentence"):
        lines.append(f"    {group['sentence']}")
    # Where the other node has the group, this one knows nothing of its resources there.
    for resource in group["resources"] if group["holder"] in (node, None) else ():
        problem = f": {resource['problem']}" if resource.get("problem") else ""
        lines.append(f"    {resource['name']}: {resource['status']}{problem}")
    # A group can run where nothing is said against it.
    for where, why in (group.get("ready") or {}).items():
        if why and why != "yes" and where != group["holder"]:
            lines.append(f"    not ready on {where}: {why}")
    return lines


def _path_text(path: dict[str, Any]) -> str:
    text = f"{path['name']}: {path['state']}"
    if "heard_s_ago" in path:
        age_s = path["heard_s_ago"]
        text += ", nothing heard yet" if age_s is None else f", heard {_age_text(age_s)} ago"
    return f"{text}; {path['problem']}" if path.get("problem") else text


def _age_text(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else duration_text(seconds)


def _fencing_text(fencing: dict[str, Any]) -> str:
    if not fencing["configured"]:
        return "not configured"
    return f"configured; last: {fencing['last']}" if fencing.get("last") else "configured"
