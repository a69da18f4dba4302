"""``replicactl status``: what the daemons of this node say, once or for as long as one looks."""

import argparse
import json
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from replica import control
from replica.cli._common import PROGRAM, Command, add_resource, load
from replica.cli._kernel_device import ask_all, device_text
from replica.cli._status_text import status_lines
from replica.config import Config
from replica.errors import ReplicaError

_ANSWER_TIMEOUT_S = 10.0
_RETRY_S = 1.0

Report = dict[str, Any] | ReplicaError


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_resource(parser)
    parser.add_argument("--json", action="store_true", help="the full status documents, for programs")
    parser.add_argument("--watch", action="store_true", help="go on and show every change, until interrupted")


def _run(args: argparse.Namespace) -> int:
    config = load(args)
    names = list(config.resources) if args.resource is None else [config.resource(args.resource).name]
    if args.watch:
        reports = _follow(config, names)
        if args.json or not sys.stdout.isatty():
            return _print_changes(config, reports, args.json)
        return _show_live(config, names, reports)
    return _print_once(config, names, args.json)


def _print_once(config: Config, names: list[str], as_json: bool) -> int:
    reports = {name: _ask(config.control_socket(name)) for name in names}
    running = [report for report in reports.values() if not isinstance(report, ReplicaError)]
    if as_json:
        print(json.dumps([_document(config, name, report) for name, report in reports.items()], indent=2))
    else:
        for status in running:
            print("\n".join(status_lines(status)))
        _print_devices(config, names)
    for name, report in reports.items():
        if isinstance(report, ReplicaError):
            print(f"{PROGRAM}: {name} {config.node.name}: {report}", file=sys.stderr)
    return 0 if len(running) == len(reports) else 1


def _print_devices(config: Config, names: list[str]) -> None:
    try:
        devices = ask_all(config)
    except ReplicaError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return
    for device in devices:
        if device["resource"] in names:
            print(f"  {device_text(device)}")


def _ask(socket: Path) -> Report:
    try:
        status: dict[str, Any] = control.call(socket, "status", timeout_s=_ANSWER_TIMEOUT_S)
    except ReplicaError as error:
        return error
    return status


def _document(config: Config, name: str, report: Report) -> dict[str, Any]:
    if isinstance(report, ReplicaError):
        return {"name": name, "node": config.node.name, "error": str(report)}
    return report


def _text(config: Config, name: str, report: Report) -> str:
    if isinstance(report, ReplicaError):
        return f"{name} {config.node.name}: down: {report}"
    return "\n".join(status_lines(report))


def _follow(config: Config, names: list[str]) -> Iterator[tuple[str, Report]]:
    """Every status that the daemons send, for ever; a daemon that is down is asked again and again."""
    reports: queue.SimpleQueue[tuple[str, Report]] = queue.SimpleQueue()

    def follow_one(name: str) -> None:
        socket = config.control_socket(name)
        while True:
            try:
                control.call(socket, "watch", on_event=lambda event: reports.put((name, event)))
            except ReplicaError as error:
                reports.put((name, error))
            time.sleep(_RETRY_S)

    for name in names:
        threading.Thread(target=follow_one, args=(name,), daemon=True).start()
    while True:
        yield reports.get()


def _print_changes(config: Config, reports: Iterator[tuple[str, Report]], as_json: bool) -> int:
    last: dict[str, str] = {}
    for name, report in reports:
        text = json.dumps(_document(config, name, report)) if as_json else _text(config, name, report)
        if last.get(name) != text:
            last[name] = text
            print(text if as_json else text.replace("\n ", ";"), flush=True)
    return 0


def _show_live(config: Config, names: list[str], reports: Iterator[tuple[str, Report]]) -> int:
    from rich.live import Live
    from rich.text import Text

    texts = {name: f"{name} {config.node.name}: …" for name in names}
    with Live(Text("\n".join(texts.values())), auto_refresh=False) as live:
        for name, report in reports:
            texts[name] = _text(config, name, report)
            live.update(Text("\n".join(texts.values())), refresh=True)
    return 0


COMMAND = Command("show the state of the resources of this node", _run, _add_arguments)
