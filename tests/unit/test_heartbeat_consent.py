"""Consents: asked once, kept while the other node is silent, asked for again when they were refused."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from replica.heartbeat.agents.base import AgentError
from replica.heartbeat.consent import Answer, Consents, FencingJudge
from replica.heartbeat.decide import Consent
from replica.heartbeat.fencing import Fencer
from replica.heartbeat.settings import FenceDevice, GroupSettings, ResourceSettings
from tests.unit.heartbeat_settings import settings_of

WEB = GroupSettings("web", "node1", (ResourceSettings("exec", "exec web", {}, ""),))
DATA = GroupSettings("data", "node1", (ResourceSettings("replica", "replica r0", {}, ""),))


class Asked:
    """A judge with a script; `consents` wakes `changed` after each answer."""

    def __init__(self, *answers: Answer | Exception) -> None:
        self.answers = list(answers)
        self.questions = 0
        self.changed = asyncio.Event()
        self.consents = Consents(self, "node2", self.changed.set)

    async def ask(self, group: GroupSettings, peer: str) -> Answer:
        self.questions += 1
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def news(self) -> None:
        async with asyncio.timeout(20):
            await self.changed.wait()
        self.changed.clear()


def refused(words: str = "no") -> Answer:
    return Answer(False, words, retry_s=0.001)


def run(body: Callable[[], object]) -> None:
    asyncio.run(body())  # type: ignore[arg-type]


def test_it_is_asked_once_and_kept() -> None:
    async def body() -> None:
        asked = Asked(Answer(True, "off", fenced=True))
        asked.consents.ask(WEB)
        asked.consents.ask(WEB)
        assert asked.consents.of("web")[0] is Consent.PENDING
        await asked.news()
        asked.consents.ask(WEB)
        assert asked.consents.of("web") == (Consent.GRANTED, "off")
        assert asked.consents.fenced_s is not None
        assert asked.questions == 1
        asked.consents.forget()
        assert asked.consents.of("web") == (Consent.NOT_ASKED, "")
        assert asked.consents.fenced_s is None

    run(body)


def test_a_refusal_stands_until_there_is_another_answer() -> None:
    async def body() -> None:
        asked = Asked(refused("busy"), Answer(True, "off"))
        asked.consents.ask(WEB)
        await asked.news()
        assert asked.consents.of("web") == (Consent.REFUSED, "busy")
        await asked.news()
        assert asked.consents.due("web")
        assert asked.consents.of("web") == (Consent.REFUSED, "busy")
        asked.consents.ask(WEB)
        assert asked.consents.of("web") == (Consent.REFUSED, "busy")
        assert not asked.consents.due("web")
        await asked.news()
        assert asked.consents.of("web") == (Consent.GRANTED, "off")

    run(body)


@pytest.mark.parametrize(
    "error", [AgentError("cannot be asked for: eth0 has no carrier"), OSError(1, "no"), KeyError()]
)
def test_a_judge_that_fails_is_asked_again(error: Exception) -> None:
    async def body() -> None:
        asked = Asked(error, Answer(True, "off"))
        asked.consents.ask(WEB)
        await asked.news()
        consent, words = asked.consents.of("web")
        assert consent is Consent.REFUSED
        assert words.startswith("whether node2 is dead cannot be found out (")
        await asked.news()
        asked.consents.ask(WEB)
        await asked.news()
        assert asked.consents.of("web")[0] is Consent.GRANTED

    run(body)


def test_what_was_forgotten_while_it_was_asked_is_not_answered() -> None:
    async def body() -> None:
        asked = Asked(Answer(True, "off"), Answer(False, "no"))
        asked.consents.ask(WEB)
        asked.consents.forget()
        asked.consents.ask(WEB)
        await asked.news()
        assert asked.questions == 1, "the first was ended before it began"
        assert asked.consents.of("web")[0] is Consent.GRANTED

    run(body)


def test_an_operator_vouches() -> None:
    async def body() -> None:
        asked = Asked()
        asked.consents.vouch("an operator says that node2 is off")
        asked.consents.ask(WEB)
        while asked.consents.of("web")[0] is not Consent.GRANTED:
            await asked.news()
        assert asked.questions == 0
        assert asked.consents.fenced_s is not None

    run(body)


async def _nobody(group: GroupSettings) -> str:
    return ""


async def _somebody(group: GroupSettings) -> str:
    return "ip 10.0.0.1 is answered for by 02:00:00:00:00:01"


@pytest.mark.parametrize(
    ("group", "holder", "careless", "granted", "words"),
    [
        (WEB, _nobody, False, True, "without fencing node2"),
        (WEB, _somebody, False, False, "node2 seems to be alive"),
        (DATA, _nobody, False, False, "there is no [fencing.node2]"),
        (DATA, _nobody, True, True, "as promote-without-fencing says"),
        (DATA, _somebody, True, False, "node2 seems to be alive"),
    ],
)
def test_without_fencing(group: GroupSettings, holder: object, careless: bool, granted: bool, words: str) -> None:
    async def body() -> None:
        settings = settings_of(promote_without_fencing=careless)
        answer = await FencingJudge(settings, Fencer(settings), holder).ask(group, "node2")  # type: ignore[arg-type]
        assert answer.granted is granted
        assert not answer.fenced
        assert words in answer.words

    run(body)


@pytest.mark.parametrize("works", [True, False])
def test_with_fencing(tmp_path: Path, works: bool) -> None:
    async def body() -> None:
        agent = tmp_path / "fence_it"
        agent.write_text(f"#!/bin/sh\nread action\n[ $action = action=status ] && exit 2\nexit {int(not works)}\n")
        agent.chmod(0o755)
        settings = settings_of(fencing={"node2": (FenceDevice(str(agent), {}, action="off", retries=0),)})
        answer = await FencingJudge(settings, Fencer(settings), _nobody).ask(DATA, "node2")
        assert (answer.granted, answer.fenced) == (works, works)

    run(body)
