"""``replicactl fence-test``: ask the fence devices whether they would work; nothing is switched off."""

import argparse
import asyncio
from collections.abc import Sequence

from replica import control
from replica.cli._cluster import add_ha_dir, known_node, load_cluster
from replica.cli._common import Command
from replica.heartbeat.fencing import DeviceAnswer, Fencer
from replica.heartbeat.settings import HeartbeatSettings


def _run(args: argparse.Namespace) -> int:
    settings = load_cluster(args)
    if args.node_to_test is not None:
        known_node(settings, args.node_to_test)
    nodes = settings.nodes if args.node_to_test is None else (args.node_to_test,)
    results = test(settings, nodes)
    for node in nodes:
        for line in _lines(node, results[node]):
            print(line)
    return 0 if all(results[node] and all(one.ok for one in results[node]) for node in nodes) else 1


def test(settings: HeartbeatSettings, nodes: Sequence[str]) -> dict[str, list[DeviceAnswer]]:
    """Node → what each of its devices answers: to the daemon, or to this process when there is none."""
    try:
        return {node: _ask(settings, node) for node in nodes}
    except control.NotRunning:
        return asyncio.run(_test(settings, nodes))


def _ask(settings: HeartbeatSettings, node: str) -> list[DeviceAnswer]:
    answer = control.call(settings.control_socket, "fence-test", {"node": node})
    return [DeviceAnswer(**one) for one in answer[node]]


async def _test(settings: HeartbeatSettings, nodes: Sequence[str]) -> dict[str, list[DeviceAnswer]]:
    fencer = Fencer(settings)
    return {node: await fencer.test(node) for node in nodes}


def _lines(node: str, results: Sequence[DeviceAnswer]) -> list[str]:
    if not results:
        return [f"{node}: FAILED: no fencing is configured, add [fencing.{node}]"]
    return [f"{node}: {'' if one.ok else 'FAILED: '}{one.sentence}" for one in results]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_ha_dir(parser)
    parser.add_argument("node_to_test", metavar="NODE", nargs="?", help="without it, both")


COMMAND = Command("ask the fence devices whether they work; switches nothing off", _run, _add_arguments)
