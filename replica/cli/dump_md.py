"""``replicactl dump-md``: a resource's metadata as JSON, read from the file (no daemon is needed)."""

import argparse
import json

from replica.cli._common import Command, add_resource, load_resource


def _run(args: argparse.Namespace) -> int:
    from replica.metadata import dump_metadata

    config, resource = load_resource(args)
    content = dump_metadata(config.metadata_path(resource.name))
    print(json.dumps(content, indent=2, default=_plain))
    return 0


def _plain(value: object) -> object:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


COMMAND = Command("print the metadata of a resource", _run, add_resource)
