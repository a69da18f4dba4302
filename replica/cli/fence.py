"""``replicactl fence``: switch a node off, or say that it is."""

import argparse
import asyncio

from replica import control
from replica.cli._cluster import add_ha_dir, known_node, load_cluster
from replica.cli._common import Command
from replica.errors import ReplicaError
from replica.heartbeat.fencing import Fencer
from replica.heartbeat.settings import HeartbeatSettings


def _run(args: argparse.Namespace) -> int:
    print(fence(load_cluster(args), args.node_to_fence, done=args.done))
    return 0


def fence(settings: HeartbeatSettings, node: str, *, done: bool) -> str:
    """Through the daemon, which then knows of it, or without one; what was done. ReplicaError."""
    known_node(settings, node)
    try:
        return str(control.call(settings.control_socket, "fence", {"node": node, "done": done}))
    except control.WentAway as error:
        # It may have fenced the node, which may be up again by now: not a second time without being asked.
        raise ReplicaError(f"{error}; `replicactl fence-test {node}` tells whether {node} is off") from None
    except control.NotRunning:
        if done:
            raise ReplicaError(
                f"replica-heartbeat does not run on {settings.node}, so there is nobody to believe that {node} is off: "
                "start it, and repeat this"
            ) from None
    return asyncio.run(_fence(settings, node))


async def _fence(settings: HeartbeatSettings, node: str) -> str:
    fencer = Fencer(settings)
    fenced = await fencer.fence(node, why="an operator asked for it", delayed=False)
    await fencer.settled()
    if not fenced.ok:
        raise ReplicaError(fenced.sentence)
    return fenced.sentence


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_ha_dir(parser)
    parser.add_argument("node_to_fence", metavar="NODE")
    parser.add_argument(
        "--done", action="store_true", help="do nothing, but know that NODE is off: you have switched it off yourself"
    )


COMMAND = Command("switch a node off by its fence devices, now", _run, _add_arguments)
