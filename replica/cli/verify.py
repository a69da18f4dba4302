"""``replicactl verify``: compare both copies while clients write, and say what differs."""

import argparse
import contextlib
import sys
from typing import Any

from replica import control
from replica.cli._common import PROGRAM, Command, add_resource, load_resource
from replica.cli._status_text import last_verify_text
from replica.config_values import size
from replica.errors import ReplicaError

#: With --wait: the run is complete, and the two copies were not the same.
EXIT_DIFFERENT = 3


class _Ended(Exception):
    """The run is over: ends the request from within."""


def _offset(text: str) -> int:
    try:
        return size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_resource(parser)
    parser.add_argument("--from", dest="start", metavar="OFFSET", type=_offset, help="where to begin (0)")
    parser.add_argument("--to", dest="stop", metavar="OFFSET", type=_offset, help="where to end (the volume's end)")
    parser.add_argument("--repair", action="store_true", help="send the Primary's blocks where the other one's differ")
    parser.add_argument(
        "--wait",
        action="store_true",
        help=f"return when it is done, with status {EXIT_DIFFERENT} if something differed",
    )
    parser.add_argument("--stop", dest="end", action="store_true", help="end the run that is under way")


def _run(args: argparse.Namespace) -> int:
    config, resource = load_resource(args)
    socket = config.control_socket(resource.name)
    if args.end:
        if args.repair or args.wait or args.start is not None or args.stop is not None:
            raise ReplicaError("verify --stop goes with no other option: leave the others out")
        control.call(socket, "verify", {"stop": True})
        return 0
    status = control.call(
        socket, "verify", {"from_bytes": args.start or 0, "to_bytes": args.stop, "repair": args.repair}
    )
    if not args.wait:
        return 0
    volume = status["volumes"][0]
    number = (volume["verify"] or volume["last_verify"])["number"]
    last: dict[str, Any] = {}

    def look(status: dict[str, Any]) -> None:
        result = status["volumes"][0]["last_verify"]
        if result is not None and result["number"] >= number:
            last.update(result)
            raise _Ended

    with contextlib.suppress(_Ended):
        control.call(socket, "watch", on_event=look)
    if not last:
        raise ReplicaError(f"replicad {resource.name} stopped before the verification was complete: see its log")
    if not last["complete"]:
        raise ReplicaError(
            f"{resource.name} is verified up to {last['position_bytes']} only, {_found(last)}: {last['reason']}; go on "
            f"with `{PROGRAM} verify {resource.name} --from {last['position_bytes']}`"
        )
    print(f"{resource.name}: {last_verify_text(last).partition(', ')[2]}")
    sys.stdout.flush()
    return EXIT_DIFFERENT if last["found_bytes"] else 0


def _found(last: dict[str, Any]) -> str:
    return f"{last['found_bytes']} bytes of that differ" if last["found_bytes"] else "which has no difference"


COMMAND = Command("compare both copies while clients write", _run, _add_arguments)
