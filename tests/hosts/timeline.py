"""What the client saw: who answered when, what was answered by nobody, what by two. Pure."""

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

#: So many questions may be under way.
_UNANSWERED: Final = 2


class Span(NamedTuple):
    """From one moment to another, both of CLOCK_BOOTTIME in seconds."""

    begin: float
    end: float

    @property
    def length_s(self) -> float:
        """How long it is."""
        return self.end - self.begin


class Answer(NamedTuple):
    """An answer and when it came; `who` is the host's name, or what it served."""

    received: float
    who: str


@dataclass
class Timeline:
    """Filled by `add` from what `tests.hosts.prober` prints."""

    every_s: float
    #: MAC address → host.
    macs: dict[str, str]
    ticks: list[float] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    pages: list[Answer] = field(default_factory=list)
    #: When it was asked by ARP → who answered.
    holders: dict[float, set[str]] = field(default_factory=dict)

    def add(self, line: Sequence[Any]) -> None:
        """One line of the prober."""
        match line:
            case ["tick", float(asked)]:
                self.ticks.append(asked)
            case ["holder", float(asked), str(mac)]:
                self.holders.setdefault(asked, set()).add(self.macs.get(mac, mac))
            case ["answer", float(received), str(who)]:
                self.answers.append(Answer(received, who))
            case ["http", float(received), str(page)]:
                self.pages.append(Answer(received, page))
            case _:
                raise ValueError(f"the prober says {line}")

    def copy(self) -> "Timeline":
        """As it is now; it does not grow."""
        holders = {asked: set(who) for asked, who in self.holders.items()}
        return replace(
            self, ticks=self.ticks.copy(), answers=self.answers.copy(), pages=self.pages.copy(), holders=holders
        )

    # ── looking back ─────────────────────────────────────────────────────────────────────────────────────────

    def seen(self, pages: bool = False) -> list[Answer]:
        """All answers, or all pages."""
        return self.pages if pages else self.answers

    def outages(self, since: float, until: float, pages: bool = False) -> list[Span]:
        """When several questions in a row were answered by nobody (a client that did not ask has no outage)."""
        moments = [since, *(moment for moment, _ in self.seen(pages) if since < moment < until), until]
        spans = (Span(begin, end) for begin, end in itertools.pairwise(moments))
        return [span for span in spans if span.length_s > 3 * self.every_s and self._asked(span) > _UNANSWERED]

    def _asked(self, span: Span) -> int:
        return bisect.bisect_left(self.ticks, span.end) - bisect.bisect_right(self.ticks, span.begin)

    def outage_s(self, since: float, until: float, pages: bool = False) -> float:
        """How long nobody answered, in all."""
        return sum(span.length_s for span in self.outages(since, until, pages))

    def two_holders(self, since: float, until: float) -> list[float]:
        """When both nodes said, on one question, that they have the address."""
        return [asked for asked, who in self.holders.items() if since <= asked < until and len(who) > 1]

    def two_holders_s(self, since: float, until: float) -> float:
        """For how long, in all."""
        return len(self.two_holders(since, until)) * self.every_s

    def last(self, pages: bool = False) -> str:
        """Who answered last, "" for nobody yet."""
        return self.seen(pages)[-1].who if self.seen(pages) else ""

    def recent(self, since: float, pages: bool = False) -> list[Answer]:
        """The answers from then on."""
        answers = self.seen(pages)
        return answers[bisect.bisect_left(answers, (since, "")) :]

    def runs(self, since: float, until: float) -> list[tuple[str, Span]]:
        """Who answered from when to when, in order; a gap ends a run."""
        return _runs(self.answers, since, until, 3 * self.every_s)

    def holder_runs(self, since: float, until: float) -> list[tuple[str, Span]]:
        """The same of who had the address, by ARP; two at a time are two runs side by side."""
        hosts = sorted({who for names in self.holders.values() for who in names})
        found = []
        for host in hosts:
            moments = (Answer(asked, host) for asked, names in self.holders.items() if host in names)
            found += _runs(moments, since, until, 3 * self.every_s)
        return sorted(found, key=lambda run: run[1])

    def blind_s(self, since: float, until: float) -> float:
        """For how long in all the prober itself did not get to ask: what it says about that time is nothing."""
        moments = [since, *(moment for moment in self.ticks if since < moment < until), until]
        gaps = (end - begin for begin, end in itertools.pairwise(moments))
        return sum(gap for gap in gaps if gap > 3 * self.every_s)


def _runs(answers: Iterable[Answer], since: float, until: float, gap_s: float) -> list[tuple[str, Span]]:
    runs: list[tuple[str, Span]] = []
    for moment, who in answers:
        if not since <= moment < until:
            continue
        if runs and runs[-1][0] == who and moment - runs[-1][1].end <= gap_s:
            runs[-1] = (who, Span(runs[-1][1].begin, moment))
        else:
            runs.append((who, Span(moment, moment)))
    return runs
