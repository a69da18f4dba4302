"""``replicactl secret``: make the secret that both nodes share."""

import argparse
import secrets

from replica.cli._common import Command

_BYTES = 32


def _run(args: argparse.Namespace) -> int:
    print(secrets.token_hex(_BYTES))
    return 0


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    pass


COMMAND = Command("print a new random secret for the cluster's secret-file", _run, _no_arguments)
