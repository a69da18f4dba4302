"""``replicactl wait-sync``: wait until both copies are the same, with a progress bar on a terminal."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from replica.cli._common import Command
from replica.cli._status_text import progress_text
from replica.cli._wait import add_wait_arguments, wait_until


def _run(args: argparse.Namespace) -> int:
    with _progress_bar() if sys.stderr.isatty() else contextlib.nullcontext(_no_bar) as show:

        def reached(status: dict[str, Any]) -> bool:
            show(status)
            return _in_sync(status)

        return wait_until(args, "in sync", reached)


def _in_sync(status: dict[str, Any]) -> bool:
    return (
        status["connection"] == "Connected"
        and status["replication"] == "Established"
        and all(volume["disk"] == volume["peer_disk"] == "UpToDate" for volume in status["volumes"])
    )


def _no_bar(status: dict[str, Any]) -> None:
    pass


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[dict[str, Any]], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=100.0, words="")

        def show(status: dict[str, Any]) -> None:
            syncing = [volume for volume in status["volumes"] if volume.get("done_percent") is not None]
            state = status["replication"] if status["connection"] == "Connected" else status["connection"]
            progress.update(
                bar,
                description=f"{status['name']} {state}",
                completed=min((volume["done_percent"] for volume in syncing), default=0.0),
                words="; ".join(map(progress_text, syncing)),
                refresh=True,
            )

        yield show


COMMAND = Command("wait until both copies are UpToDate", _run, add_wait_arguments)
