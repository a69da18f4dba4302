"""Whether a group may be taken although its holder does not say that it has let go.

Two machines alone cannot tell a dead node from a cut cable. What answers instead is behind one interface, `Judge`;
fencing is the first.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol

from replica.errors import ReplicaError
from replica.heartbeat import clock
from replica.heartbeat.decide import Consent
from replica.heartbeat.fencing import Fencer
from replica.heartbeat.settings import GroupSettings, HeartbeatSettings
from replica.tasks import spawn

log = logging.getLogger("replica.heartbeat")

#: Until a refusal is asked about again.
RETRY_S: Final = 0.5
FENCING_RETRY_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """`words`: why, as the end of a sentence."""

    granted: bool
    words: str
    #: The other node is known not to run.
    fenced: bool = False
    retry_s: float = RETRY_S


class Judge(Protocol):
    """Says whether a group may be taken from `peer`, which is silent."""

    async def ask(self, group: GroupSettings, peer: str) -> Answer:
        """What it raises is taken for a refusal."""


class FencingJudge:
    """Fences the other node where that is configured.

    Where it is not, a replicated group is refused, and another one is granted unless one of its addresses is still
    answered for by somebody else (`held_elsewhere`: by whom, or "").
    """

    def __init__(
        self,
        settings: HeartbeatSettings,
        fencer: Fencer,
        held_elsewhere: Callable[[GroupSettings], Awaitable[str]],
    ) -> None:
        self._settings = settings
        self._fencer = fencer
        self._held_elsewhere = held_elsewhere

    async def ask(self, group: GroupSettings, peer: str) -> Answer:
        """By fencing, or without."""
        if self._fencer.configured(peer):
            fenced = await self._fencer.fence(peer, why=f"to take {group.name}")
            return Answer(fenced.ok, fenced.sentence.rstrip("."), fenced.ok, FENCING_RETRY_S)
        if group.replicated and not self._settings.promote_without_fencing:
            return Answer(
                False,
                f"it has replicated data and there is no [fencing.{peer}] to make sure that {peer} is dead; if you are "
                f"sure that it is off, run `replicactl fence {peer} --done`",
            )
        holder = await self._held_elsewhere(group)
        if holder:
            return Answer(False, f"{holder}, so {peer} seems to be alive")
        if group.replicated:
            return Answer(True, f"without fencing {peer}, as promote-without-fencing says")
        return Answer(True, f"without fencing {peer}, for which no [fencing.{peer}] is configured")


class Consents:
    """What was asked and answered, for each group, while the other node is silent."""

    def __init__(self, judge: Judge, peer: str, changed: Callable[[], None]) -> None:
        self._judge = judge
        self._peer = peer
        self._changed = changed
        self._answers: dict[str, Answer] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        #: Refusals that are old enough to ask again.
        self._due: set[str] = set()
        #: When (`clock.now`) the other node was known not to run; None: it is not known.
        self.fenced_s: float | None = None
        self._vouched = ""

    def of(self, group: str) -> tuple[Consent, str]:
        """What is known, with the words for it."""
        answer = self._answers.get(group)
        if answer is not None:
            return (Consent.GRANTED if answer.granted else Consent.REFUSED), answer.words
        if group in self._asking:
            return Consent.PENDING, f"making sure that {self._peer} is dead"
        return Consent.NOT_ASKED, ""

    def due(self, group: str) -> bool:
        """Whether a refusal is to be asked about again. (It stands until there is another answer.)"""
        return group in self._due

    def ask(self, group: GroupSettings) -> None:
        """Ask, unless that is under way or answered."""
        if group.name not in self._asking and (group.name in self._due or group.name not in self._answers):
            self._due.discard(group.name)
            self._asking[group.name] = spawn(self._ask(group), f"consent for {group.name}")

    def vouch(self, words: str) -> None:
        """An operator says that the other node is off."""
        self.forget()
        self.fenced_s = clock.now()
        self._vouched = words
        self._changed()

    def forget(self) -> None:
        """The other node was heard: nothing of it holds any more."""
        for task in self._asking.values():
            task.cancel()
        self._asking.clear()
        self._answers.clear()
        self._due.clear()
        self.fenced_s = None
        self._vouched = ""

    async def _ask(self, group: GroupSettings) -> None:
        # What is heard of it from now on is not from before its end.
        began_s = clock.now()
        answer = Answer(True, self._vouched, True) if self._vouched else await self._judged(group)
        del self._asking[group.name]
        self._answers[group.name] = answer
        if answer.fenced:
            self.fenced_s = began_s
        if not answer.granted:
            asyncio.get_running_loop().call_later(answer.retry_s, self._ask_again, group.name, answer)
        self._changed()

    async def _judged(self, group: GroupSettings) -> Answer:
        """A judge that fails has not granted anything, and is asked again like one that refuses."""
        try:
            return await self._judge.ask(group, self._peer)
        except (OSError, ReplicaError) as error:
            return Answer(False, f"whether {self._peer} is dead cannot be found out ({error})")
        except Exception as error:
            log.exception("whether %s is dead cannot be found out", self._peer)
            return Answer(False, f"whether {self._peer} is dead cannot be found out ({error!r})")

    def _ask_again(self, group: str, answer: Answer) -> None:
        if self._answers.get(group) is answer:
            self._due.add(group)
            self._changed()
