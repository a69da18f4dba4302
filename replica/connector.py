"""Keeps one authenticated link to the peer: dials or accepts, replaces, and gives up when told to.

Of the two nodes the one named first in the configuration dials and the other listens, so that two connections made at
the same moment never have to be told apart.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, cast

from replica import wire
from replica.auth import NONCE_BYTES
from replica.errors import ReplicaError
from replica.link import LinkSettings, PeerLink
from replica.runtime import Listener, Runtime
from replica.tasks import spawn

log = logging.getLogger("replica.link")

#: Connections that have not proven themselves yet; more are not kept.
MAX_GREETINGS: Final = 8
DIAL_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True)
class Endpoints:
    """Where the two ends of the link are."""

    local_host: str
    peer_host: str
    port: int
    peer_port: int
    dialer: bool
    connect_interval_s: float


class Connector:
    """Owner of the links of one resource. At most one is open; a newer one takes the older one's place."""

    def __init__(
        self,
        runtime: Runtime,
        endpoints: Endpoints,
        settings: LinkSettings,
        opened: Callable[[PeerLink], None],
        closed: Callable[[PeerLink, str], None],
        failed: Callable[[str], None],
    ) -> None:
        self._runtime = runtime
        self._endpoints = endpoints
        self._settings = settings
        self._opened = opened
        self._closed = closed
        self._failed = failed
        self._listener: Listener | None = None
        self._dialing: asyncio.Task[None] | None = None
        self._greeting: dict[PeerLink, None] = {}  # a set in the order of their coming
        self._link: PeerLink | None = None
        self._idle = asyncio.Event()
        self._stand_alone = True

    async def start(self) -> None:
        """Listen, on the node that listens. Raises ReplicaError when the port is taken."""
        if not self._endpoints.dialer:
            self._listener = await self._runtime.listen(
                self._endpoints.local_host, self._endpoints.port, self._accepted
            )

    def connect(self) -> None:
        """Leave StandAlone: dial, or accept what the peer dials."""
        self._stand_alone = False
        if self._endpoints.dialer and self._dialing is None:
            self._dialing = spawn(self._dial(), "dialing the peer")

    def disconnect(self, reason: str) -> None:
        """Go StandAlone: close the link, stop dialing, turn the peer away."""
        self._stand_alone = True
        if self._dialing is not None:
            self._dialing.cancel()
            self._dialing = None
        if self._link is not None:
            self._link.refuse(reason)

    async def stop(self, reason: str) -> None:
        """Let go of everything."""
        dialing = self._dialing
        self.disconnect(reason)
        if dialing is not None:
            # A connection that is only being made has no transport to close yet; its dialer lets go of it.
            await asyncio.wait([dialing])
        for link in list(self._greeting):
            link.close(reason)
        if self._listener is not None:
            self._listener.close()

    # ── LinkOwner ────────────────────────────────────────────────────────────────────────────────────────────

    def link_opened(self, link: PeerLink) -> None:
        """A connection has proven itself."""
        self._greeting.pop(link, None)
        if self._link is not None:
            self._link.close("the peer made a newer connection.")
        # Not before: a link on which this node was about to go StandAlone makes it do so as it ends.
        if self._stand_alone:
            link.refuse(self._is_stand_alone())
            return
        self._link = link
        self._opened(link)

    def link_closed(self, link: PeerLink, reason: str) -> None:
        """A connection has ended, proven or not."""
        self._greeting.pop(link, None)
        if link is self._link:
            self._link = None
            self._closed(link, reason)
        elif not self._stand_alone:
            self._complain(reason)
        self._idle.set()

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────

    def _accepted(self) -> asyncio.BaseProtocol:
        # Said before the greeting: the peer, which dials again and again, never takes this for a connection.
        return _TurnedAway(self._is_stand_alone()) if self._stand_alone else self._new_link()

    def _is_stand_alone(self) -> str:
        identity = self._settings.identity
        return (
            f"{identity.resource} is StandAlone on {identity.node}: run `replicactl connect {identity.resource}` there."
        )

    def _new_link(self) -> asyncio.BaseProtocol:
        if len(self._greeting) >= MAX_GREETINGS:
            # The oldest gives way: who only connects must not keep the peer out, who needs a few milliseconds for it.
            oldest = next(iter(self._greeting))
            if not oldest.connected:
                return _TurnedAway()
            oldest.close("others connected before it had proven that it knows the cluster's secret.")
        link = PeerLink(self._settings, self, self._runtime.random_bytes(NONCE_BYTES), dialer=self._endpoints.dialer)
        self._greeting[link] = None
        return link

    async def _dial(self) -> None:
        """Dial until there is a link, wait until it ends, begin again: at once after a link that was in use (the peer
        restarts, or both negotiate anew), but never twice at once after links that end right away.
        """
        patient = True
        while True:
            self._idle.clear()
            lasted_s = await self._dial_once()
            if lasted_s >= self._endpoints.connect_interval_s:
                patient = True
            elif lasted_s > 0 and patient:
                patient = False
            else:
                patient = True
                await asyncio.sleep(self._endpoints.connect_interval_s)

    async def _dial_once(self) -> float:
        """One attempt; returns when it has failed or its link has ended: how long that was open, in seconds (or 0)."""
        host, port = self._endpoints.peer_host, self._endpoints.peer_port
        link = self._new_link()
        if not isinstance(link, PeerLink):
            return 0.0
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                await self._runtime.dial(host, port, self._endpoints.local_host, lambda: link)
        except ReplicaError as error:  # there is no TLS, and this says why
            self._greeting.pop(link, None)
            self._complain(str(error))
            return 0.0
        except (OSError, TimeoutError) as error:
            self._greeting.pop(link, None)
            words = getattr(error, "strerror", None) or str(error) or "no answer"
            self._complain(f"cannot reach {self._settings.identity.peer} at {host}:{port} ({words}).")
            return 0.0
        except asyncio.CancelledError:
            # Or it would count as a greeting under way for ever.
            self._greeting.pop(link, None)
            raise
        began_s = loop.time()
        while not link.closed:
            await self._idle.wait()
            self._idle.clear()
        return max(loop.time() - began_s, 1e-6) if link.session else 0.0

    def _complain(self, sentence: str) -> None:
        self._failed(sentence)


class _TurnedAway(asyncio.Protocol):
    """A connection that is closed unread: too many unproven ones at once, or a peer that must wait for an operator."""

    def __init__(self, reason: str = "") -> None:
        self._reason = reason

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        with contextlib.suppress(OSError):
            if self._reason:
                cast(asyncio.Transport, transport).write(wire.pack(wire.ERROR, self._reason.encode()))
            transport.close()
