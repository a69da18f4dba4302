"""Waiting for a state of the resource, in its own words when it does not come."""

import argparse
from collections.abc import Callable
from typing import Any

from replica import control
from replica.cli._common import add_resource, load_resource
from replica.errors import ReplicaError


class _Reached(Exception):
    """The state is there: ends the request from within."""


def add_wait_arguments(parser: argparse.ArgumentParser) -> None:
    add_resource(parser)
    parser.add_argument("--timeout", metavar="S", type=positive_seconds, help="give up after S seconds")


def wait_until(args: argparse.Namespace, wanted: str, reached: Callable[[dict[str, Any]], bool]) -> int:
    """Follow the status until ``reached(status)``; raises `ReplicaError` when that cannot or does not happen.

    ``wanted`` names the state for the message ("connected").
    """
    config, resource = load_resource(args)
    name = resource.name
    last: dict[str, Any] = {}

    def look(status: dict[str, Any]) -> None:
        last.update(status)
        if reached(status):
            raise _Reached
        if status["connection"] == "StandAlone":
            raise ReplicaError(
                f"{name} is StandAlone{_because(status)} and will not be {wanted} by itself: "
                f"see `replicactl status {name}`, then `replicactl connect {name}`"
            )

    try:
        control.call(config.control_socket(name), "watch", on_event=look, timeout_s=args.timeout)
    except _Reached:
        return 0
    except control.ControlTimeout:
        state = f"{last['connection']}, {last['replication']}" if last else "no answer from replicad"
        raise ReplicaError(
            f"{name} is not {wanted} after {args.timeout:g} s ({state}{_because(last)}): see `replicactl status {name}`"
        ) from None
    raise ReplicaError(f"replicad {name} stopped before it was {wanted}: see its log")


def _because(status: dict[str, Any]) -> str:
    return f" ({status['last_error']})" if status.get("last_error") else ""


def positive_seconds(text: str) -> float:
    """An argument of the command line."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, not {text!r}")
    return seconds
