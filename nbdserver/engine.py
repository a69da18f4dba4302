"""The requests of one open connection: from the receive buffer to the export and back as replies.

Everything a receive brought is parsed at once. Consecutive plain writes go to the export as one batch and
are answered by one send; cached reads are answered in place. Whatever can block becomes a task. There is no
object, task or log line per plain request.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any

from nbdserver import constants as c
from nbdserver import slow_requests, structured
from nbdserver.export import Export
from nbdserver.limits import Limits
from nbdserver.receive_buffer import Hold, ReceiveBuffer
from nbdserver.streamed_write import StreamedWrite
from nbdserver.transmission import (
    PLAIN_READ,
    PLAIN_WRITE,
    REPLY_OK,
    REQUEST,
    REQUEST_BYTES,
    Dialect,
    reply,
    split_kind,
    validate,
    wire_error,
    write_replies,
)

log = logging.getLogger("nbdserver")

# Larger writes are not collected as a whole but passed on in pieces while they arrive.
WHOLE_WRITE_BYTES = 128 * 1024
# What a write that is under way costs besides its data: the objects that stand for it, here and in the export.
REQUEST_COST_BYTES = 512
# Replies are collected up to this size before they are given to the transport.
_SEND_BYTES = 512 * 1024
# Of less than that on average (the header is one, its data another) they are sent as one piece.
_SMALL_REPLY_BYTES = 256


class RequestEngine:
    """Executes what is in `received` and answers through `transport`, within `limits`.

    `settled` is called when nothing is under way and nothing more will be taken: after a DISC, `stop()`
    or `lost()`, or when a `drain()` has come to its end. It may be called more than once.
    """

    def __init__(
        self,
        export: Export,
        dialect: Dialect,
        transport: asyncio.Transport,
        received: ReceiveBuffer,
        limits: Limits,
        peer_name: str,
        settled: Callable[[], None],
    ) -> None:
        self.accepting = True
        self._export = export
        self._dialect = dialect
        self._structured = dialect.structured_replies
        self._transport = transport
        self._received = received
        self._in_flight_limit_bytes = limits.in_flight_bytes
        self._slow_limit = limits.slow_requests
        self._peer_name = peer_name
        self._settled = settled
        self._loop = asyncio.get_running_loop()
        self._stream: StreamedWrite | None = None
        self._output: list[bytes] = []  # replies made while parsing, to be sent together
        self._output_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself keeps only weak references
        self._slow = 0  # tasks that have not answered yet
        self._under_way = 0  # batches, pieces and tasks that are not done yet
        self._in_flight_bytes = 0  # of tasks; writes that are handed over are charged to the receive buffer
        self._parsing = False
        self._stalled = False  # input is waiting because of the limits
        self._draining = False
        self._connected = True
        self._write_paused = False
        self._reading = True

    @property
    def waits_for_client(self) -> bool:
        """Nothing goes on until the client takes the replies that were sent to it."""
        return self._write_paused

    # ---- what the connection tells us

    def stop(self) -> None:
        """Take no further request; what is under way is finished and answered."""
        self.accepting = False
        self._received.clear()
        self._set_reading(False)
        self._settle()

    def drain(self) -> None:
        """Read nothing more; what was received is executed and answered."""
        self._draining = True
        self.process()

    def lost(self) -> None:
        """The transport is gone."""
        self._connected = self.accepting = False
        self._stream = None
        self._output.clear()
        self._settle()

    def pause_sending(self) -> None:
        self._write_paused = True

    def resume_sending(self) -> None:
        self._write_paused = False
        self._progress()

    # ---- flow

    def process(self) -> None:
        """Execute all that was received, as far as the limits allow."""
        if self._parsing:
            return
        self._parsing = True
        try:
            while self.accepting and not self._is_blocked():
                more = self._take_requests() if self._stream is None else self._take_piece(self._stream)
                if not more:
                    break
        except Exception as error:  # an export that breaks its contract costs this connection, not more
            log.error("dropping %s: the export failed unexpectedly: %r", self._peer_name, error)
            log.debug("where it failed", exc_info=True)
            self.accepting = False
            self._transport.abort()
        finally:
            self._parsing = False
        if self._output:
            self._send_output()
        self._stalled = self.accepting and self._is_blocked()
        self._set_reading(self.accepting and not self._draining and not self._stalled)
        self._settle()

    def _is_blocked(self) -> bool:
        """Some replies have to get out before anything more may be executed."""
        return (
            self._write_paused
            or self._in_flight_bytes + self._received.held_bytes > self._in_flight_limit_bytes
            or self._slow >= self._slow_limit
        )

    def _progress(self) -> None:
        """Something was finished: go on with what had to wait for it."""
        if self._parsing:
            return
        if self._stalled and not self._is_blocked():
            self.process()
        else:
            self._settle()

    def _settle(self) -> None:
        if self._under_way or self._parsing:
            return
        if not self.accepting or (self._draining and not self._stalled):
            self._settled()

    def _set_reading(self, reading: bool) -> None:
        if reading == self._reading or not self._connected or self._transport.is_closing():
            return
        self._reading = reading
        if reading:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def _send(self, *parts: bytes) -> None:
        if self._parsing:
            self._output += parts
        elif self._connected:
            self._transport.writelines(parts)

    def _send_output(self) -> None:
        if self._connected:
            if self._output_bytes < len(self._output) * _SMALL_REPLY_BYTES:
                # As objects of their own, replies that wait for the client would take ten times their size.
                self._transport.write(b"".join(self._output))
            else:
                self._transport.writelines(self._output)
        self._output = []
        self._output_bytes = 0

    # ---- parsing

    def _take_requests(self) -> bool:
        """Take plain writes and reads, and then one request of another kind. False: more input is needed."""
        export, received, output = self._export, self._received, self._output
        memory, view, position, end = received.memory, received.view, received.start, received.end
        size_bytes = export.size_bytes
        writable_bytes = -1 if export.read_only else size_bytes
        unpack_from, read_now = REQUEST.unpack_from, export.read_now
        is_structured, pack_data = self._structured, structured.pack_data
        writes: list[tuple[int, memoryview]] = []
        cookies: list[bytes] = []
        more = is_other = False
        while end - position >= REQUEST_BYTES:
            kind, cookie, offset, length = unpack_from(memory, position)
            if kind == PLAIN_WRITE and 0 < length <= WHOLE_WRITE_BYTES and offset + length <= writable_bytes:
                data_at = position + REQUEST_BYTES
                stop = data_at + length
                if stop > end:
                    break
                writes.append((offset, view[data_at:stop]))
                cookies.append(cookie)
                position = stop
                continue
            if writes:  # handed over first: requests reach the export in the order the client sent them
                self._submit(writes, cookies)
                writes, cookies = [], []
            if kind == PLAIN_READ and 0 < length <= c.MAX_REQUEST_BYTES and offset + length <= size_bytes:
                position += REQUEST_BYTES
                try:
                    data = read_now(offset, length)
                except OSError as error:
                    output.append(self._failure(c.CMD_READ, cookie, wire_error(error.errno)))
                    continue
                if data is None:
                    self._start_read(cookie, offset, length, whole=False)
                    more = True  # after a look at the limits
                    break
                # What is in the page cache is sent as data, hole or not: to look would take longer.
                if is_structured:
                    output += (pack_data(structured.DATA_DONE, cookie, length + 8, offset), data)
                else:
                    output += (REPLY_OK + cookie, data)
                self._output_bytes += length
                if self._output_bytes < _SEND_BYTES:
                    continue
                self._send_output()
                more = True
            else:
                is_other = True
            break
        received.start = position
        if writes:
            self._submit(writes, cookies)
        return self._take_other() if is_other else more

    def _take_other(self) -> bool:
        """Take the one request at the start of the input, whatever it is."""
        received, export = self._received, self._export
        kind, cookie, offset, length = REQUEST.unpack_from(received.memory, received.start)
        magic, flags, command = split_kind(kind)
        if magic != c.REQUEST_MAGIC:
            log.warning("closing the connection of %s: it sent something else than a request", self._peer_name)
            self.accepting = False
            return False
        if command == c.CMD_DISC:
            self.accepting = False
            return False
        error = validate(
            command,
            flags,
            offset,
            length,
            size_bytes=export.size_bytes,
            read_only=export.read_only,
            dialect=self._dialect,
        )
        if command == c.CMD_WRITE:
            return self._take_write(cookie, offset, length, bool(flags & c.CMD_FLAG_FUA), error)
        received.start += REQUEST_BYTES
        if error:
            self._send(self._failure(command, cookie, error))
        elif command == c.CMD_READ:
            if length:
                self._start_read(cookie, offset, length, whole=bool(flags & c.CMD_FLAG_DF))
            else:
                self._send(structured.nothing(cookie) if self._structured else reply(cookie, 0))
        elif length == 0 and command != c.CMD_FLUSH:
            self._send(reply(cookie, 0))
        else:
            work = slow_requests.neither_read_nor_write(export, command, flags, cookie, offset, length)
            self._start(command, cookie, 0, work)
        return True

    def _failure(self, command: int, cookie: bytes, error: int) -> bytes:
        """The reply to a request that failed; `error` is one of the protocol's numbers."""
        if self._structured and command in (c.CMD_READ, c.CMD_BLOCK_STATUS):
            return structured.error(cookie, error)
        return reply(cookie, error)

    def _take_write(self, cookie: bytes, offset: int, length: int, fua: bool, error: int) -> bool:
        """Take a write that is durable, large, empty or rejected. False: its data has to arrive first."""
        received = self._received
        if not length:  # no storage has to know what that would mean
            received.start += REQUEST_BYTES
            self._send(reply(cookie, error))
            return True
        if error or length > WHOLE_WRITE_BYTES:
            received.start += REQUEST_BYTES
            self._stream = StreamedWrite(cookie, offset, length, fua=fua, error=error)
            return True
        stop = received.start + REQUEST_BYTES + length
        if stop > received.end:
            return False
        data = bytes(received.view[stop - length : stop])
        received.start = stop
        work = slow_requests.without_data(self._export, cookie, self._export.write_durable(offset, data))
        self._start(c.CMD_WRITE, cookie, length, work)
        return True

    def _take_piece(self, stream: StreamedWrite) -> bool:
        """Take what is there of a large write. False: more input is needed."""
        received = self._received
        length = stream.next_piece(received.end - received.start)
        if length == 0 and stream.remaining:
            return False
        start, offset = received.start, stream.offset
        received.start += length
        stream.take(length)
        if stream.remaining == 0:
            self._stream = None
        if length and not stream.error:
            stream.outstanding += 1
            piece = (offset, received.view[start : start + length])
            charge = length + REQUEST_COST_BYTES
            hold = received.hold(charge)
            self._hand_over([piece], hold, charge, partial(self._piece_done, stream, hold, charge))
        elif stream.is_complete:
            self._finish_stream(stream)
        return True

    # ---- execution

    def _start_read(self, cookie: bytes, offset: int, length: int, *, whole: bool) -> None:
        work = (
            slow_requests.read_structured(self._export, cookie, offset, length, whole=whole)
            if self._structured
            else slow_requests.read_simple(self._export, cookie, offset, length)
        )
        self._start(c.CMD_READ, cookie, length, work)

    def _submit(self, writes: list[tuple[int, memoryview]], cookies: list[bytes]) -> None:
        charge = sum([len(data) for _, data in writes]) + REQUEST_COST_BYTES * len(writes)
        hold = self._received.hold(charge)
        self._hand_over(writes, hold, charge, partial(self._writes_done, cookies, hold, charge))

    def _hand_over(
        self,
        writes: list[tuple[int, memoryview]],
        hold: Hold,
        charge: int,
        done: Callable[[Mapping[int, int]], None],
    ) -> None:
        self._under_way += 1
        try:
            if self._export.write_batch(writes, done):
                self._received.pinned = True
        except Exception:  # against the contract: nobody will call `done`, and nobody may wait for it
            self._under_way -= 1
            self._received.release(hold, charge)
            raise

    def _writes_done(self, cookies: list[bytes], hold: Hold, charge: int, errors: Mapping[int, int]) -> None:
        self._under_way -= 1
        self._received.release(hold, charge)
        self._send(write_replies(cookies, errors))
        self._progress()

    def _piece_done(self, stream: StreamedWrite, hold: Hold, charge: int, errors: Mapping[int, int]) -> None:
        self._under_way -= 1
        self._received.release(hold, charge)
        stream.piece_done(errors)
        if stream.is_complete:
            self._finish_stream(stream)
        self._progress()

    def _finish_stream(self, stream: StreamedWrite) -> None:
        if stream.fua and not stream.error:
            work = slow_requests.without_data(self._export, stream.cookie, self._export.flush())
            self._start(c.CMD_WRITE, stream.cookie, 0, work)
        else:
            error = wire_error(stream.error) if stream.error else 0
            self._send(reply(stream.cookie, error))

    def _start(self, command: int, cookie: bytes, charge: int, work: Coroutine[Any, Any, list[bytes]]) -> None:
        """Run `work` as a task and send the reply it returns; `charge`: bytes it keeps in memory."""
        self._under_way += 1
        self._slow += 1
        self._in_flight_bytes += charge
        task = self._loop.create_task(self._answer(command, cookie, charge, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, command: int, cookie: bytes, charge: int, work: Coroutine[Any, Any, list[bytes]]) -> None:
        buffers: list[bytes] | None = None
        error = c.ESHUTDOWN  # what it stays when the task is cancelled
        try:
            buffers = await work
        except OSError as problem:
            error = wire_error(problem.errno)
        except Exception as problem:
            error = c.EIO
            log.error("a request of %s failed unexpectedly: %r", self._peer_name, problem)
            log.debug("where it failed", exc_info=True)
        finally:
            self._under_way -= 1
            self._slow -= 1
            self._in_flight_bytes -= charge
            self._send(*(buffers or [self._failure(command, cookie, error)]))
            self._progress()
