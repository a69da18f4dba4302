"""``replicactl cluster``: what the cluster manager of this node knows and does."""

import argparse
import json
import queue
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from replica.cli._cluster import add_ha_dir, load_cluster
from replica.cli._cluster_text import cluster_lines
from replica.cli._common import Command
from replica.errors import ReplicaError
from replica.heartbeat import client
from replica.heartbeat.settings import HeartbeatSettings

_RETRY_S = 1.0
#: What is different each time, and tells nothing new.
_CLOCKS = ("uptime_s", "heard_s_ago", "answered_s_ago", "lost")

Report = dict[str, Any] | ReplicaError


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_ha_dir(parser)
    parser.add_argument("--json", action="store_true", help="the full status document, for programs")
    parser.add_argument("--watch", action="store_true", help="go on and show every change, until interrupted")
    parser.add_argument("--clear", action="store_true", help="forget the failures of this node's resources first")


def _run(args: argparse.Namespace) -> int:
    settings = load_cluster(args)
    if args.clear:
        client.ask(settings, "clear", timeout_s=client.STATUS_TIMEOUT_S)
    if not args.watch:
        status = client.status(settings)
        print(json.dumps(status, indent=2) if args.json else "\n".join(cluster_lines(status)))
        return 0
    if args.json or not sys.stdout.isatty():
        return _print_changes(settings, args.json)
    return _show_live(settings)


def _follow(settings: HeartbeatSettings) -> Iterator[Report]:
    """Every status that the daemon sends, for ever; one that is down is asked again and again."""
    reports: queue.SimpleQueue[Report] = queue.SimpleQueue()

    def follow() -> None:
        while True:
            try:
                client.ask(settings, "watch", on_event=reports.put)
            except ReplicaError as error:
                reports.put(error)
            time.sleep(_RETRY_S)

    threading.Thread(target=follow, daemon=True).start()
    while True:
        yield reports.get()


def _print_changes(settings: HeartbeatSettings, as_json: bool) -> int:
    """JSON: a line for each change. Text: only the lines that have changed, each with the time."""
    last: set[str] | str = ""
    for report in _follow(settings):
        if as_json:
            document = {"error": str(report)} if isinstance(report, ReplicaError) else report
            known = json.dumps(_steady(document))
            if known != last:
                last = known
                print(json.dumps(document), flush=True)
            continue
        lines = _lines(settings, report if isinstance(report, ReplicaError) else _steady(report))
        for line in lines:
            if line not in last:
                print(f"{time.strftime('%H:%M:%S')} {line.strip()}", flush=True)
        last = set(lines)
    return 0


def _steady(status: dict[str, Any]) -> dict[str, Any]:
    """Without clocks: what is the same while nothing happens."""
    steady = {key: value for key, value in status.items() if key not in _CLOCKS}
    for key in ("paths", "pings"):
        entries = status.get(key, [])
        steady[key] = [{name: item for name, item in entry.items() if name not in _CLOCKS} for entry in entries]
    return steady


def _lines(settings: HeartbeatSettings, report: Report) -> list[str]:
    if isinstance(report, ReplicaError):
        return [f"{settings.node} is down: {report}"]
    return cluster_lines(report)


def _show_live(settings: HeartbeatSettings) -> int:
    from rich.live import Live
    from rich.text import Text

    with Live(Text(f"{settings.node}: …"), auto_refresh=False) as live:
        for report in _follow(settings):
            live.update(Text("\n".join(_lines(settings, report))), refresh=True)
    return 0


COMMAND = Command("show the nodes and groups of the cluster, and why each group is where it is", _run, _add_arguments)
