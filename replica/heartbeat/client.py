"""Asking this node's `replica-heartbeat`: what the commands share."""

from collections.abc import Callable
from typing import Any

from replica import control
from replica.heartbeat.settings import HeartbeatSettings

#: A daemon that is alive answers at once.
STATUS_TIMEOUT_S = 10.0


def ask(
    settings: HeartbeatSettings,
    verb: str,
    args: dict[str, Any] | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    timeout_s: float | None = None,
) -> Any:
    """The daemon's answer, as of `replica.control.call`; NotRunning says how to start it."""
    try:
        return control.call(settings.control_socket, verb, args, on_event, timeout_s)
    except control.WentAway:
        raise
    except control.NotRunning:
        raise control.NotRunning(
            f"replica-heartbeat is not running on {settings.node} (nobody serves {settings.control_socket}): "
            "start it with `systemctl start replica-heartbeat` or `replica-heartbeat`"
        ) from None


def status(settings: HeartbeatSettings) -> dict[str, Any]:
    """The status document of the daemon."""
    document: dict[str, Any] = ask(settings, "status", timeout_s=STATUS_TIMEOUT_S)
    return document


def move(settings: HeartbeatSettings, verb: str, args: dict[str, Any], timeout_s: float | None = None) -> None:
    """Let groups move, and print each step as the daemon tells it, until all is done. ReplicaError, when it is not."""
    ask(settings, verb, args, lambda event: print(event.get("done", ""), flush=True), timeout_s)
