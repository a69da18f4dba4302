"""Between the kernel, whose NBD client needs a plain socket, and a server that wants TLS.

The kernel has one end of a pair of sockets; a thread of its own for each connection passes what arrives at the other
end on to the server, and back. When one side ends, the other one does: the kernel's end hangs up as a connection does,
so that nobody else has to know of relays.

The kernel waits for its dirty pages to pass here. So the thread needs nothing from the rest of the program (whose loop
may itself wait for the device), its buffers are there before the first request, and it inherits what
`keeper.keep_out_of_the_way` has set.
"""

import contextlib
import logging
import select
import socket
import ssl
import threading
import time
from typing import Final, TypeGuard

from nbdserver.tls_transport import words

log = logging.getLogger("replica")

#: In each direction. Several records of TLS (16 KiB); whoever sends more waits in the kernel's own buffers.
BUFFER_BYTES: Final = 64 << 10
#: How long what one side has sent before its end may take to reach the other.
_LINGER_S: Final = 1.0

_NOT_NOW: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_GONE: Final = select.POLLHUP | select.POLLERR | select.POLLNVAL


def start(server: ssl.SSLSocket, name: str) -> socket.socket:
    """The kernel's end of a relay to this server, which belongs to the relay from now on; `name` is for the log."""
    kernel_end, our_end = socket.socketpair()
    try:
        relay = _Relay(our_end, server, name)
        threading.Thread(target=relay.run, name=f"relay to {name}", daemon=True).start()
    except BaseException:
        for end in (kernel_end, our_end, server):
            end.close()
        raise
    return kernel_end


class _Flow:
    """What one side sends, on its way to the other."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self._sink = sink
        self._memory = memoryview(bytearray(BUFFER_BYTES))
        self._start = self._end = 0  # of what was received and not passed on
        #: There is nothing to do before this socket is ready for these events of poll; 0: there may be.
        self.need: tuple[socket.socket, int] = (source, 0)

    def step(self) -> bool:
        """Receive once and pass that on, as far as neither waits. False: the source has ended, and nothing is left."""
        if self._start == self._end:
            try:
                count = self.source.recv_into(self._memory)
            except _NOT_NOW as error:
                self.need = (self.source, _events(error, select.POLLIN))
                return True
            if count == 0:
                return False
            self._start, self._end = 0, count
        try:
            while self._start < self._end:
                self._start += self._sink.send(self._memory[self._start : self._end])
        except _NOT_NOW as error:
            self.need = (self._sink, _events(error, select.POLLOUT))
            return True
        self.need = (self.source, 0 if _holds_more(self.source) else select.POLLIN)
        return True

    def finish(self) -> None:
        """The source has ended: pass on what it had sent, up to the end, within `_LINGER_S`. Raises OSError."""
        deadline = time.monotonic() + _LINGER_S
        while (left_s := deadline - time.monotonic()) > 0 and self.step():
            wanted, events = self.need
            if events:
                poll = select.poll()
                poll.register(wanted, events)
                poll.poll(left_s * 1000)


class _Relay:
    """One connection."""

    def __init__(self, kernel: socket.socket, server: ssl.SSLSocket, name: str) -> None:
        for end in (kernel, server):
            end.setblocking(False)
        self._name = name
        self._ends: tuple[socket.socket, socket.socket] = (kernel, server)
        self._flows = (_Flow(kernel, server), _Flow(server, kernel))

    def run(self) -> None:
        """Until one side has ended, and what it had sent before has reached the other."""
        try:
            self._until_an_end().finish()
        except OSError as error:  # the side that is left sees the end
            if _is_broken(error):
                log.warning("TLS with %s was broken: %s", self._name, words(error))
        finally:
            for end in self._ends:
                _hang_up(end)

    def _until_an_end(self) -> _Flow:
        """Returns the flow whose source has ended; raises SSLError when it is not TLS any more."""
        poll = select.poll()
        for end in self._ends:
            poll.register(end, 0)
        ready = {end.fileno(): select.POLLIN for end in self._ends}
        while True:
            for flow, other in (self._flows, self._flows[::-1]):
                wanted, events = flow.need
                try:
                    if (not events or ready.get(wanted.fileno(), 0) & events) and not flow.step():
                        return flow
                except OSError as error:
                    if _is_broken(error):
                        raise
                    return other  # nobody takes what flows here; what that side has sent before still counts
            needs = [flow.need for flow in self._flows]
            for end in self._ends:
                poll.modify(end, needs[0][1] * (needs[0][0] is end) | needs[1][1] * (needs[1][0] is end))
            ready = dict(poll.poll(None if all(events for _, events in needs) else 0))
            for flow in self._flows:
                # A side that is gone is so for good, and would wake this thread without end while the other one waits.
                if ready.get(flow.source.fileno(), 0) & _GONE:
                    return flow


def _events(error: Exception, plain: int) -> int:
    """What has to come about before the call that failed so can succeed: TLS may have to read before it can write."""
    if isinstance(error, ssl.SSLWantReadError):
        return select.POLLIN
    return select.POLLOUT if isinstance(error, ssl.SSLWantWriteError) else plain


def _is_broken(error: OSError) -> TypeGuard[ssl.SSLError]:
    """Whether it is TLS that fails, and not the connection below."""
    return isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError)


def _holds_more(source: socket.socket) -> bool:
    """Whether something was decrypted already, of which poll knows nothing."""
    return isinstance(source, ssl.SSLSocket) and source.pending() > 0


def _hang_up(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        # Not SSLSocket's own, after which the rest of it would pass for plain.
        socket.socket.shutdown(end, socket.SHUT_RDWR)
    end.close()
