"""A virtual clock, and event loops that live on it: one for each incarnation of a node."""

import asyncio
import functools
import heapq
from asyncio.events import _set_running_loop
from collections import deque
from collections.abc import Callable
from typing import Any

#: Steps without an end are a livelock.
MOST_STEPS = 2_000_000


class MachineDied(BaseException):
    """The machine died in the middle of a step; nothing in the node's code catches it for good."""


class Handle(list[Any]):
    """A callback that is due: [time, running number, owner, callback, arguments]; owner None: the simulator's own.

    A list, because the heap compares those in C, and because millions of them are made.
    """

    __slots__ = ()

    def cancel(self) -> None:
        self[3], self[4] = _nothing, ()

    def cancelled(self) -> bool:
        return self[3] is _nothing

    def when(self) -> float:
        when_s: float = self[0]
        return when_s


def _nothing(*_args: Any) -> None:
    pass


class World:
    """The clock and the queue of everything that is going to happen."""

    def __init__(self, most_steps: int = MOST_STEPS) -> None:
        self.now_s = 0.0
        self.most_steps = most_steps
        self.steps = 0
        self.complaints: list[str] = []
        #: Nothing more is to happen: somebody complained, or a rule is broken.
        self.halted = False
        self._count = 0
        self._timers: list[Handle] = []
        self._ready: deque[Handle] = deque()
        self._current: NodeLoop | None = None
        self._running: NodeLoop | None = None  # what asyncio takes for the running loop
        #: Of all tasks of all incarnations.
        self.coroutines: list[Any] = []

    def soon(self, owner: "NodeLoop | None", callback: Callable[..., Any], args: tuple[Any, ...]) -> Handle:
        handle = Handle((0.0, 0, owner, callback, args))
        self._ready.append(handle)
        return handle

    def at(self, when_s: float, callback: Callable[..., Any], *args: Any) -> Handle:
        """Something that the simulated world does (not a node)."""
        return self.timer(None, when_s, callback, args)

    def after(self, delay_s: float, callback: Callable[..., Any], *args: Any) -> Handle:
        self._count += 1
        handle = Handle((self.now_s + delay_s, self._count, None, callback, args))
        heapq.heappush(self._timers, handle)
        return handle

    def timer(
        self, owner: "NodeLoop | None", when_s: float, callback: Callable[..., Any], args: tuple[Any, ...]
    ) -> Handle:
        now_s = self.now_s
        self._count += 1
        handle = Handle((when_s if when_s > now_s else now_s, self._count, owner, callback, args))
        heapq.heappush(self._timers, handle)
        return handle

    def enter(self, loop: "NodeLoop", callback: Callable[..., Any], *args: Any) -> Any:
        """Call into a node as its own event loop would."""
        if loop.dead:
            return None
        before, self._current = self._current, loop
        if self._running is not loop:
            self._set_running(loop)
        try:
            return callback(*args)
        except MachineDied:
            return None
        except Exception as error:
            if not loop.dead:
                self.complain(loop, error)
            return None
        finally:
            self._current = before
            if before is not None and before is not loop:
                self._set_running(before)

    def _set_running(self, loop: "NodeLoop | None") -> None:
        """What asyncio takes for the running loop; left as it is between events, for the next is often of the same."""
        self._running = loop
        _set_running_loop(loop)

    def close(self) -> None:
        """Nothing happens any more."""
        self._set_running(None)

    def complain(self, loop: "NodeLoop", error: BaseException) -> None:
        """A callback of the node raised, which a real loop would log and no node may do."""
        frames = []
        trace = error.__traceback__
        while trace is not None:
            frames.append(f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}")
            trace = trace.tb_next
        self.halted = True
        self.complaints.append(f"{loop.name}: {type(error).__name__}: {error} ({' > '.join(frames[-6:])})")

    def run(self, until: Callable[[], bool] | None, limit_s: float) -> bool:
        """Let things happen until `until()` or `halted`; False: `limit_s` (virtual) or the last event came first."""
        ready, timers = self._ready, self._timers
        while not (self.halted or (until is not None and until())):
            if ready:
                _, _, owner, callback, args = ready.popleft()
            elif timers:
                when_s = timers[0][0]
                if when_s > limit_s:
                    self.now_s = limit_s
                    return until is not None and until()
                _, _, owner, callback, args = heapq.heappop(timers)
                if callback is _nothing:
                    continue
                self.now_s = when_s
            else:
                return False
            self.steps += 1
            if self.steps > self.most_steps:
                self.halted = True
            if owner is None:
                callback(*args)
            elif owner.frozen is not None:
                owner.frozen.append((callback, args))
            elif not owner.dead:
                # As `enter` does; written out, for most steps are these.
                self._current = owner
                if self._running is not owner:
                    self._set_running(owner)
                try:
                    callback(*args)
                except MachineDied:
                    pass
                except Exception as error:
                    if not owner.dead:
                        self.complain(owner, error)
                finally:
                    self._current = None
        return True


class NodeLoop(asyncio.AbstractEventLoop):
    """The event loop of one incarnation."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.dead = False
        #: While it is paused: what would have been called.
        self.frozen: list[tuple[Callable[..., Any], tuple[Any, ...]]] | None = None
        self._soon = world._ready.append
        self.create_future = functools.partial(asyncio.Future, loop=self)  # type: ignore[method-assign]

    def time(self) -> float:
        return self.world.now_s

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> Any:
        handle = Handle((0.0, 0, self, callback, args))
        self._soon(handle)
        return handle

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> Any:
        return self.world.soon(self, callback, args)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:
        return self.world.timer(self, when, callback, args)

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> Any:
        return self.world.timer(self, self.world.now_s + delay, callback, args)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> Any:
        self.world.coroutines.append(coro)
        return asyncio.Task(coro, loop=self, name=name)

    get_debug = bool  # False; asked for each future, and a built-in answers fastest

    def is_running(self) -> bool:
        return not self.dead

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: Any) -> None:
        """Only "never retrieved" and "destroyed while pending" come this way, when the collector finds them."""
