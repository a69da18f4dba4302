"""Where a resource may be served, whom to choose, and how long to wait (pure)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nbdserver.handshake import TlsMode
from replica.config import Config, Resource, ResourceSide
from replica.errors import ReplicaError
from replica.nbd_client_tls import ClientTls

_LOCAL_ONLY = ("localhost", "::1")
_ANY = ("0.0.0.0", "::")

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 2.0


@dataclass(frozen=True)
class Place:
    """Where one node serves NBD: a unix socket's path, or host and port; and by which TLS (None: in plain)."""

    node: str
    unix_path: str | None = None
    host: str = ""
    port: int = 0
    tls: ClientTls | None = None

    @property
    def address(self) -> tuple[str | None, str, int]:
        """Where it is."""
        return self.unix_path, self.host, self.port

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        where = f"{host}:{self.port}" if self.unix_path is None else self.unix_path
        return f"{self.node} ({where}{', TLS' if self.tls is not None else ''})"


def places(config: Config, resource: Resource, given: ClientTls | None = None) -> list[Place]:
    """Where clients on this machine may find the resource, this node's own place first.

    A node that listens on all addresses is asked at its own. What is only for its own machine (127.0.0.1, a unix
    socket) is asked all the same: both nodes may be on this one.

    A node that offers TLS is spoken to by TLS and in no other way, by `given` or by what the configuration has for this
    machine; with `given`, both are. Raises ReplicaError when there is nothing to know such a node by.
    """
    found: list[Place] = []
    for side in (resource.local, resource.peer):
        tls = given
        if tls is None and side.nbd_tls.mode is not TlsMode.OFF:
            tls = _own_tls(config, resource)
        place = _place(side, tls, is_here=config.is_member and side.node == config.node)
        # Where a certificate says who answers, an address may be of both nodes: one that moves with the Primary.
        if tls is not None or all(place.address != one.address for one in found):
            found.append(place)
    return found


def _own_tls(config: Config, resource: Resource) -> ClientTls:
    """On a node, what it shows to clients will do for a server, too; elsewhere, and without a CA, `client-tls`."""
    own = resource.tls.files if config.is_member and resource.tls is not None else None
    if own is not None and own.ca is not None:
        return ClientTls(own.ca, own.cert, own.key)
    if config.client_tls is None:
        raise ReplicaError(
            f"clients of {resource.name} use TLS (`nbd-tls`), and this machine does not know by which authority: "
            "name its file with --tls-ca, or in `client-tls` of [cluster]"
        )
    return config.client_tls


def _place(side: ResourceSide, tls: ClientTls | None, *, is_here: bool) -> Place:
    listen, node = side.nbd, side.node
    if listen.unix_path is not None:
        return Place(node.name, unix_path=listen.unix_path, tls=tls)
    host = listen.host
    if host in _ANY:
        host = ("::1" if ":" in host else "127.0.0.1") if is_here else node.address
    return Place(node.name, host=host, port=listen.port, tls=tls)


@dataclass
class Trust:
    """Which of the nodes that serve a client may use without being shown another past (pure).

    A node that the client has left while it was silent (frozen, cut off) may still be Primary when it is back, and lack
    what the client wrote elsewhere meanwhile. So it is not used again before it was seen not to serve: from then on it
    has to be promoted, which asks the other node or takes an operator's word.
    """

    last: Place | None = None
    left: set[Place] = field(default_factory=set)

    def choose(self, serving: Sequence[Place]) -> Place | None:
        """Whom to connect to. If both nodes serve (split brain), a client stays with the past that it knows."""
        usable = [place for place in serving if place not in self.left]
        return self.last if self.last in usable else next(iter(usable), None)

    def moved(self, place: Place) -> None:
        """The client is connected there now."""
        if self.last not in (None, place):
            assert self.last is not None
            self.left.add(self.last)
        self.last = place

    def seen_idle(self, place: Place) -> None:
        """It was asked, and does not serve."""
        self.left.discard(place)

    def copy(self) -> "Trust":
        """As it is now."""
        return Trust(self.last, set(self.left))


def nobody_serves(resource: str, answers: Mapping[Place, str], *, is_unproven: bool = False) -> str:
    """The sentence when no place opens the export; `answers` says why not; `is_unproven`: for one it is TLS."""
    reasons = "; ".join(f"{place}: {why.rstrip('.')}" for place, why in answers.items())
    hint = "promote a node" + (", or mend TLS between it and this machine" if is_unproven else "")
    if all(place.unix_path is not None or _is_loopback(place.host) for place in answers):
        hint += ", or let `nbd` in the configuration be an address that this machine reaches"
    return f"nobody serves {resource} ({reasons}): {hint}"


def too_small(place: Place, size_bytes: int, device: str, device_bytes: int) -> str | None:
    """Why a device cannot go on with this volume, None if it can: what lies behind its end would be gone."""
    if size_bytes >= device_bytes:
        return None
    return (
        f"{place} serves {size_bytes} bytes, but {device} has {device_bytes}: a device does not shrink; serve the old "
        f"volume, or unmap {device} and map it again"
    )


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host in _LOCAL_ONLY


def next_delay_s(last_s: float) -> float:
    """How long to wait before the nodes are asked again, after waiting `last_s`; 0 before the first time."""
    return min(max(last_s * 2, FIRST_DELAY_S), LONGEST_DELAY_S)


@dataclass
class Watchdog:
    """Decides that an idle connection is dead: its server's machine has been silent `limit` times in a row."""

    limit: int = 2
    silent: int = 0

    def probed(self, *, answered: bool) -> bool:
        """One probe is over; whether to give the connections up. Any answer counts, also a refusal: a server that
        demotes closes its connections itself, after their answers.
        """
        self.silent = 0 if answered else self.silent + 1
        return self.silent >= self.limit


BACKEND_PREFIX = "replica"


@dataclass(frozen=True)
class Backend:
    """What the kernel keeps with a device (its "backend"): whose it is, so that a new agent can go on with it."""

    cluster: str
    resource: str
    client: bytes
    connections: int

    def __str__(self) -> str:
        return f"{backend_prefix(self.cluster, self.resource)}{self.client.hex()}:{self.connections}"

    @classmethod
    def parse(cls, text: str) -> "Backend":
        """From the text; raises ValueError."""
        prefix, cluster, resource, client, connections = text.split(":")
        if prefix != BACKEND_PREFIX:
            raise ValueError(text)
        return cls(cluster, resource, bytes.fromhex(client), int(connections))


def backend_prefix(cluster: str, resource: str) -> str:
    """How the backends of this resource's devices begin."""
    return f"{BACKEND_PREFIX}:{cluster}:{resource}:"
