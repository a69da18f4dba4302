"""Single values of the configuration: each parser takes what TOML gave and returns the checked value.

Pure. A parser raises ``ValueError`` with the end of a sentence ("must be …, not …"); the caller puts the
file, the line and the key in front of it.
"""

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nbdserver.handshake import TlsMode
from replica.split_brain import CASES, CHOICES, Policies, Policy

_SIZE = re.compile(r"(\d+)\s*(?:([KMGTP])(?:iB)?)?", re.ASCII)
_SIZE_SHIFTS = {None: 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9_.:%-]+", re.ASCII)
_MAX_PORT = 65535
#: The cluster manager has a control socket beside those of the resources, by this name.
CLUSTER_MANAGER = "replica-heartbeat"
CLUSTER_MANAGER_STEM = "heartbeat"
# struct sockaddr_un has room for 108 bytes, one of them the final zero
MAX_UNIX_PATH_BYTES = 107


@dataclass(frozen=True, slots=True)
class Listen:
    """Where the NBD server listens: TCP ``host`` and ``port``, or the Unix socket ``unix_path``."""

    host: str = ""
    port: int = 0
    unix_path: str | None = None

    def __str__(self) -> str:
        if self.unix_path is not None:
            return f"unix:{self.unix_path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class TlsPaths:
    """The files of TLS as they stand in the file; ``%n`` in them is the node's name."""

    cert: str
    key: str
    ca: str | None


@dataclass(frozen=True, slots=True)
class ClientTlsPaths:
    """``client-tls`` as it stands in the file; ``%n`` in them is the name of the machine."""

    ca: str
    cert: str | None
    key: str | None


@dataclass(frozen=True, slots=True)
class NbdTls:
    """``nbd-tls``; the files are there unless the mode is "off"."""

    mode: TlsMode = TlsMode.OFF
    paths: TlsPaths | None = None


def size(value: object) -> int:
    """Bytes from an integer or from "512", "64K", "64M", "1G", "1GiB" (powers of 1024)."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f'must be a size in bytes or one like "64M" or "1G", not {value!r}')
    return int(match[1]) << _SIZE_SHIFTS[match[2]]


def size_at_least(minimum: int, shown: str) -> Callable[[object], int]:
    """A parser of sizes of at least ``minimum`` bytes, which the message calls ``shown``."""

    def parse(value: object) -> int:
        bytes_ = size(value)
        if bytes_ < minimum:
            raise ValueError(f"must be at least {shown}, not {value!r}")
        return bytes_

    return parse


def text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must be a non-empty string, not {value!r}")
    return value


def name(value: object) -> str:
    """A name of a cluster, node or resource: it becomes part of file names and of messages."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(
            f"must be a name of 1 to 64 letters, digits, '_', '.' or '-' that starts with none of "
            f"the last two, not {value!r}"
        )
    return value


def command(value: object) -> tuple[str, ...]:
    """A program and its arguments: a list, or one string that is split like a shell's words (there is no shell)."""
    wanted = f"must be a command, as a string or a list of strings, not {value!r}"
    if isinstance(value, str):
        try:
            words: list[object] = [*shlex.split(value)]
        except ValueError as error:
            raise ValueError(f"{wanted} ({error})") from None
    else:
        words = value if isinstance(value, list) else []
    if not words or not all(isinstance(word, str) and "\0" not in word for word in words):
        raise ValueError(wanted)
    program, *arguments = map(str, words)
    if not program.startswith("/"):
        raise ValueError(f"must begin with the absolute path of a program, not {program!r}")
    return (program, *arguments)


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {value!r}")
    return value


def integer(low: int, high: int) -> Callable[[object], int]:
    """A parser of whole numbers from ``low`` to ``high``."""

    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}, not {value!r}")
        return value

    return parse


def seconds(low: float, high: float) -> Callable[[object], float]:
    """A parser of times from ``low`` to ``high`` seconds."""

    def parse(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"must be a number of seconds from {low:g} to {high:g}, not {value!r}")
        return float(value)

    return parse


def one_of(*choices: str) -> Callable[[object], str]:
    """A parser that accepts exactly the ``choices``."""
    listed = _listed(choices)

    def parse(value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"must be {listed}, not {value!r}")
        return value

    return parse


#: DRBD has these, too. Whoever brings them along is told why they are not here.
_POLICIES_NOT_HERE = (
    ("violently-as0p", "would overwrite a Primary under its clients, which never happens here"),
    ("call-pri-lost-after-sb", "gives up a Primary's data by a handler, and no Primary's data are given up here"),
    ("discard-node-", "names the loser beforehand, whatever its copy is: run `replicactl connect --discard-my-data`"),
)


def after_split_brain(value: object) -> Policies:
    """The table of policies after a split brain."""
    if not isinstance(value, dict):
        raise ValueError(f'must be a table such as {{ no-primary = "discard-least-changes" }}, not {value!r}')
    for case, policy in value.items():
        if case not in CASES:
            raise ValueError(f"has no key {case!r}: its keys are {', '.join(CASES)}")
        for name, why in _POLICIES_NOT_HERE:
            if isinstance(policy, str) and policy.startswith(name):
                raise ValueError(f"{case} = {policy!r} is refused: it {why}")
        choices = CHOICES[case]
        if policy not in choices:
            why = ": with two Primaries an operator demotes one of them first" if len(choices) == 1 else ""
            raise ValueError(f"{case} must be {_listed(choices)}, not {policy!r}{why}")
    return Policies(**{case.replace("-", "_"): Policy(policy) for case, policy in value.items()})


def _listed(choices: Sequence[str]) -> str:
    return " or ".join(part for part in (", ".join(choices[:-1]), choices[-1]) if part)


_LINK_TLS = '{ cert = "certs/%n.crt", key = "certs/%n.key", ca = "certs/ca.crt" }'


def link_tls(value: object) -> TlsPaths:
    """The table of the files for the peer link: all three."""
    if not isinstance(value, dict):
        raise ValueError(f"must be a table such as {_LINK_TLS}, not {value!r}")
    paths = _tls_paths(value, ("cert", "key", "ca"))
    if paths.ca is None:
        raise ValueError("needs ca, too: by it each node knows the other")
    return paths


def nbd_tls(value: object) -> NbdTls:
    """The table of mode and files for NBD clients; without ``ca``, clients need no certificate."""
    modes = tuple(map(str, TlsMode))
    if not isinstance(value, dict) or value.get("mode") not in modes:
        raise ValueError(f"must be a table with mode = {_listed(modes)}, and the files, not {value!r}")
    if value["mode"] == TlsMode.OFF and len(value) == 1:
        return NbdTls()
    return NbdTls(TlsMode(value["mode"]), _tls_paths(value, ("mode", "cert", "key", "ca")))


def client_tls(value: object) -> ClientTlsPaths:
    """The table of the files of NBD clients: the authority, and a certificate with its key if they need one."""
    known = ("ca", "cert", "key")
    if not isinstance(value, dict):
        raise ValueError(f'must be a table such as {{ ca = "certs/ca.crt" }}, not {value!r}')
    _check_paths(value, known)
    if "ca" not in value:
        raise ValueError("needs ca: by it clients know the nodes")
    if ("cert" in value) != ("key" in value):
        raise ValueError("needs cert and key, or neither")
    ca, cert, key = map(value.get, known)
    return ClientTlsPaths(str(ca), cert, key)


def _check_paths(value: dict[str, object], known: tuple[str, ...]) -> None:
    for name, path in value.items():
        if name not in known:
            raise ValueError(f"has no key {name!r}: its keys are {', '.join(known)}")
        if not isinstance(path, str) or not path.strip() or "\0" in path:
            raise ValueError(f"{name} must be the path of a file, not {path!r}")


def _tls_paths(value: dict[str, object], known: tuple[str, ...]) -> TlsPaths:
    _check_paths(value, known)
    for name in ("cert", "key"):
        if name not in value:
            raise ValueError(f"needs {name}, the path of a file in PEM")
    ca = value.get("ca")
    return TlsPaths(str(value["cert"]), str(value["key"]), None if ca is None else str(ca))


def address(value: object) -> str:
    """A host name or an IP address, without a port."""
    if not isinstance(value, str) or not _HOST.fullmatch(value):
        raise ValueError(f"must be an IP address or a host name, not {value!r}")
    if value.count(":") == 1:
        raise ValueError(f"must be an address without a port, not {value!r}: the port belongs to the resource")
    return value


def listen(value: object) -> Listen:
    """``"host:port"``, ``"[v6]:port"`` or ``"unix:/path"`` (the path as it stands)."""
    wanted = f'must be "host:port", "[v6-address]:port" or "unix:/path", not {value!r}'
    if not isinstance(value, str):
        raise ValueError(wanted)
    if value.startswith("unix:"):
        if not value.removeprefix("unix:"):
            raise ValueError(wanted)
        return Listen(unix_path=value.removeprefix("unix:"))
    host, _, port = value.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if bracketed != (":" in host) or not _HOST.fullmatch(host):
        raise ValueError(wanted)
    if not (port.isascii() and port.isdigit() and 0 < int(port) <= _MAX_PORT):
        raise ValueError(f"must have a port from 1 to {_MAX_PORT} after the last colon, not {value!r}")
    return Listen(host=host, port=int(port))
