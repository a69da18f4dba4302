"""``replicactl import-ha``: the settings of Heartbeat's directory, as sections of the TOML file."""

import argparse
from pathlib import Path

from replica.cli._common import Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", type=Path, help="with ha.cf, haresources and authkeys: /etc/ha.d")


def _run(args: argparse.Namespace) -> int:
    from replica.heartbeat.ha_d import read_ha_d
    from replica.heartbeat.ha_export import as_toml

    print(as_toml(read_ha_d(args.directory, args.node, args.config)), end="")
    return 0


COMMAND = Command("print Heartbeat's ha.cf and haresources as sections of the configuration", _run, _add_arguments)
