"""What the commands share: their form, the configuration and the resource they mean, asking its daemon."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from replica import control
from replica.config import Config, Resource, load_config

PROGRAM = "replicactl"


@dataclass(frozen=True, slots=True)
class Command:
    """A verb: every command module has one as ``COMMAND``. ``run`` returns the exit code."""

    help: str
    run: Callable[[argparse.Namespace], int]
    add_arguments: Callable[[argparse.ArgumentParser], None]


def add_resource(parser: argparse.ArgumentParser) -> None:
    """The argument RESOURCE of most commands."""
    parser.add_argument("resource", metavar="RESOURCE", nargs="?", help="may be left out where only one is configured")


def load(args: argparse.Namespace, *, may_be_client: bool = False) -> Config:
    """The configuration, without the secret: no command needs that, and status must work when it is wrong."""
    return load_config(args.config, args.node, need_secret=False, may_be_client=may_be_client)


def load_resource(args: argparse.Namespace) -> tuple[Config, Resource]:
    """The configuration and the resource that the command line means; raises `ConfigError`."""
    config = load(args)
    return config, config.resource(args.resource)


def ask(args: argparse.Namespace, verb: str, verb_args: dict[str, Any] | None = None) -> Any:
    """Ask the daemon of the command line's resource; its refusal is raised as `ReplicaError`."""
    config, resource = load_resource(args)
    return control.call(config.control_socket(resource.name), verb, verb_args)


def daemon_command(verb: str, help_text: str, flags: dict[str, str] | None = None) -> Command:
    """A command that only passes ``verb`` on to the daemon, with ``flags`` (name: help) as booleans.

    A flag ``discard-my-data`` is the option ``--discard-my-data`` and the argument ``discard_my_data`` of the
    verb. Prints nothing when done, or the one line that the daemon answered.
    """
    flags = flags or {}

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_resource(parser)
        for flag, text in flags.items():
            parser.add_argument(f"--{flag}", action="store_true", help=text)

    def run(args: argparse.Namespace) -> int:
        names = [flag.replace("-", "_") for flag in flags]
        result = ask(args, verb, {name: getattr(args, name) for name in names})
        if isinstance(result, str) and result:
            print(result)
        return 0

    return Command(help_text, run, add_arguments)
