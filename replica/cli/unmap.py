"""``replicactl unmap``: detach what ``replicactl map`` attached."""

import argparse

from replica import control
from replica.cli._common import Command, add_resource, load
from replica.errors import ReplicaError


def _run(args: argparse.Namespace) -> int:
    config = load(args, may_be_client=True)
    name = config.resource(args.resource).name
    try:
        control.call(config.map_run_dir / f"{name}.sock", "unmap")
    except control.NotRunning:
        raise ReplicaError(
            f"{name} is not mapped on this machine, or its replicad-map has ended: see `replicactl map --list`; "
            f"`replicactl map {name}` goes on with a device that is still attached"
        ) from None
    return 0


COMMAND = Command("unmount what `map` mounted, and detach the kernel device", _run, add_resource)
