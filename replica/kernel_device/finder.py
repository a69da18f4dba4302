"""Finding the Primary and opening connections to it: blocking, bounded in time, for threads."""

import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass

from nbdserver.client_identity import ClientIdentity
from nbdserver.tls import TlsFileError
from replica.errors import ReplicaError
from replica.kernel_device import places, relay
from replica.kernel_device.places import Place, Trust
from replica.nbd_handshake import ExportInfo, NbdLost, NbdRefused, NbdUnproven, Shaker

PROBE_TIMEOUT_S = 3.0
#: A claim waits for what the server executes, up to the server's own limit for a handshake (10 s).
CLAIM_TIMEOUT_S = 12.0
#: When one node serves: how long the answer of the one that did so last is waited for.
_LAST_SERVER_GRACE_S = 0.5
_SILENT = "does not answer"
#: Said by this machine or a router when a machine is off or its cable is cut; nothing is known of the server.
_NO_WAY = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.ETIMEDOUT})
_OTHER_PAST = "it serves a past that this client has left (split brain), demote it"


class NobodyServes(ReplicaError):
    """No node opens the export now."""


@dataclass(frozen=True)
class Link:
    """A connection in the transmission phase, for the kernel: to the server, or to a relay that speaks TLS with it."""

    socket: socket.socket
    place: Place
    info: ExportInfo

    def is_taken(self) -> bool:
        """Whether the kernel uses it: it sets its request timeout as the socket's when it takes one."""
        return any(self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16))

    def drop(self) -> None:
        """End the connection, in the kernel as well."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def ask(place: Place, export: str) -> str | None:
    """None if the export can be opened there now, else why not: it says so, or nobody listens there.

    Raises TimeoutError when nothing answers, `NbdLost` when something does, and whether that node serves is not known.
    """
    try:
        with _shaking(place, PROBE_TIMEOUT_S) as shaker:
            shaker.info(export)
    except NbdRefused as error:
        return str(error)
    except (ConnectionRefusedError, FileNotFoundError) as error:
        return error.strerror
    except OSError as error:
        if is_silence(error):
            raise TimeoutError from None
        raise NbdLost(error.strerror or str(error)) from None
    return None


def is_silence(error: OSError) -> bool:
    """Whether a connection failed so that the server, or its machine, has said nothing."""
    return isinstance(error, TimeoutError) or error.errno in _NO_WAY


def is_idle(place: Place, export: str) -> bool:
    """Whether it was seen not to serve."""
    try:
        return ask(place, export) is not None
    except (TimeoutError, NbdLost):
        return False


def answers(place: Place, export: str) -> bool:
    """Whether anything answers there. Who it is does not count: certificates expire under connections that live on."""
    try:
        ask(place, export)
    except TimeoutError:
        return False
    except NbdLost:
        pass
    return True


def find(candidates: list[Place], export: str, trust: Trust) -> Place:
    """Who serves the export, and notes in `trust` what was seen; raises `NobodyServes`. All are asked at once."""

    def answer(place: Place) -> str | TimeoutError | NbdLost | None:
        try:
            return ask(place, export)
        except (TimeoutError, NbdLost) as error:
            return error

    pool = ThreadPoolExecutor(len(candidates))
    asked = {pool.submit(answer, place): place for place in candidates}
    pool.shutdown(wait=False)
    waiting, timeout_s = set(asked), None
    serving: list[Place] = []
    refusals: dict[Place, str] = {}
    idle: list[Place] = []
    is_unproven = False
    while waiting and trust.last not in serving:
        done, waiting = wait(waiting, timeout_s, FIRST_COMPLETED)
        for each in done:
            place, said = asked[each], each.result()
            if said is None:
                serving.append(place)
                if place not in trust.left:
                    timeout_s = _LAST_SERVER_GRACE_S  # who was the Primary may answer, too
            elif isinstance(said, str):
                refusals[place] = said
                idle.append(place)
            else:
                refusals[place] = _why(said)
                is_unproven |= isinstance(said, NbdUnproven)
        if not done:
            break
    chosen = trust.choose(serving)
    if chosen is not None:
        trust.moved(chosen)
    for place in idle:
        trust.seen_idle(place)
    if chosen is None:
        refusals |= dict.fromkeys(serving, _OTHER_PAST)
        answers = {place: refusals[place] for place in candidates}
        raise NobodyServes(places.nobody_serves(export, answers, is_unproven=is_unproven))
    return chosen


def open_links(place: Place, export: str, identity: ClientIdentity, count: int) -> list[Link]:
    """`count` connections of this generation; raises `NobodyServes`."""
    links: list[Link] = []
    try:
        for _ in range(count):
            links.append(_open(place, export, identity))
    except BaseException as error:
        for link in links:
            link.drop()
        if isinstance(error, (OSError, NbdRefused, NbdLost)):
            is_unproven = isinstance(error, NbdUnproven)
            raise NobodyServes(places.nobody_serves(export, {place: _why(error)}, is_unproven=is_unproven)) from None
        raise
    return links


def _why(error: Exception) -> str:
    return _SILENT if isinstance(error, TimeoutError) else str(error)


def _open(place: Place, export: str, identity: ClientIdentity) -> Link:
    with _shaking(place, CLAIM_TIMEOUT_S) as shaker:
        shaker.claim(identity)
        info = shaker.go(export)
        connection = shaker.take()
        if isinstance(connection, ssl.SSLSocket):
            connection = relay.start(connection, str(place))
        return Link(connection, place, info)


@contextlib.contextmanager
def _shaking(place: Place, timeout_s: float) -> Iterator[Shaker]:
    """A connection that was greeted, and speaks TLS if that place does; it is closed at the end unless it was taken."""
    with Shaker(_connect(place, PROBE_TIMEOUT_S), timeout_s) as shaker:
        try:
            shaker.greet()
            if place.tls is not None:
                shaker.start_tls(place.tls.context(), place.node)
            yield shaker
        except TlsFileError as error:
            raise NbdUnproven(str(error)) from None
        except (NbdLost, ConnectionError) as error:
            if place.tls is None or isinstance(error, NbdUnproven):
                raise
            # Anybody on the way can end a connection: that says nothing of the node.
            raise NbdUnproven(getattr(error, "strerror", None) or str(error)) from None


def _connect(place: Place, timeout_s: float) -> socket.socket:
    if place.unix_path is None:
        connection = socket.create_connection((place.host, place.port), timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return connection
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(os.fspath(place.unix_path))
    except BaseException:
        connection.close()
        raise
    return connection
