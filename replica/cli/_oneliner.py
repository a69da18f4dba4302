"""Commands for scripts that print one fact of the status."""

import argparse
from collections.abc import Callable
from typing import Any

from replica.cli._common import Command, add_resource, ask


def oneliner(help_text: str, lines: Callable[[dict[str, Any]], list[str]]) -> Command:
    """A command that prints ``lines(status)``."""

    def run(args: argparse.Namespace) -> int:
        print("\n".join(lines(ask(args, "status"))))
        return 0

    return Command(help_text, run, add_resource)
