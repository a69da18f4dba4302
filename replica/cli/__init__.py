"""``replicactl``: the operator's command. One module per verb; this one finds the verb and reports errors."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from replica import __version__
from replica.cli._common import PROGRAM, Command
from replica.errors import ReplicaError

VERBS = (
    "create-md",
    "status",
    "promote",
    "demote",
    "takeover",
    "connect",
    "disconnect",
    "attach",
    "detach",
    "invalidate",
    "invalidate-remote",
    "outdate",
    "pause-sync",
    "resume-sync",
    "verify",
    "resize",
    "map",
    "unmap",
    "cluster",
    "standby",
    "takeover-node",
    "import-ha",
    "wait-connect",
    "wait-sync",
    "role",
    "cstate",
    "dstate",
    "dump-md",
    "secret",
    "certs",
    "fence",
    "fence-test",
)
_GLOBAL_OPTIONS = ("--config", "--node")
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 refused or failed, 2 usage, 130 interrupted."""
    try:
        words = sys.argv[1:] if argv is None else argv
        args = _parser(_verb(words)).parse_args(words)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except ReplicaError as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has enough. Nothing more may be written, not even by the interpreter's exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _failed(f"{where}{error.strerror or error}")
    except Exception as error:
        if os.environ.get("REPLICA_DEBUG"):
            raise
        fault = f"{type(error).__name__}: {error}"
        return _failed(f"this is a fault of {PROGRAM} itself ({fault}): REPLICA_DEBUG=1 shows where")


def _failed(sentence: str) -> int:
    print(f"{PROGRAM}: {sentence}", file=sys.stderr)
    return EXIT_FAILED


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, as for every other error, in place of argparse's several lines of usage."""
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see `{self.prog} --help`)\n")


def _verb(words: Sequence[str]) -> str | None:
    """The verb of a command line, if it has one."""
    rest = iter(words)
    for word in rest:
        if word in _GLOBAL_OPTIONS:
            next(rest, None)  # its value
        elif not word.startswith("-"):
            return word if word in VERBS else None
    return None


def _parser(only: str | None) -> argparse.ArgumentParser:
    """With every verb, or with that one only: it spares the import of all the others. A failover waits for that."""
    parser = _Parser(
        prog=PROGRAM,
        description="Control the replicated resources of this node.",
        epilog="Exit codes: 0 done, 1 refused or failed (standard error says why), 2 wrong usage.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    _add_global_options(parser, default=None)
    verbs = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for verb in VERBS if only is None else (only,):
        command: Command = importlib.import_module(f"{__name__}.{verb.replace('-', '_')}").COMMAND
        sub = verbs.add_parser(verb, help=command.help, description=command.help, allow_abbrev=False)
        # No default here: it would overwrite what was given before the verb.
        _add_global_options(sub, default=argparse.SUPPRESS)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def _add_global_options(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=default,
        help="the configuration ($REPLICA_CONFIG, else /etc/replica/replica.toml)",
    )
    parser.add_argument("--node", metavar="NAME", default=default, help="this node ($REPLICA_NODE, else `uname -n`)")
