"""Lines that strangers cause, kept few."""

import logging

from nbdserver.log_limit import FewAlike


def record(message: str, argument: int, created_s: float) -> logging.LogRecord:
    made = logging.LogRecord("nbdserver", logging.WARNING, "", 0, message, (argument,), None)
    made.created = created_s
    return made


def test_of_many_alike_some_pass_and_the_rest_is_counted() -> None:
    few = FewAlike(lines=3, window_s=10.0)
    assert [few.filter(record("refusing %d", number, 100.0)) for number in range(5)] == [True] * 3 + [False] * 2
    assert few.filter(record("something else %d", 1, 100.0))
    later = record("refusing %d", 9, 110.0)
    assert few.filter(later)
    assert later.getMessage() == "refusing 9 (and 2 more like this before it)"
    again = record("refusing %d", 10, 111.0)
    assert few.filter(again)
    assert again.getMessage() == "refusing 10"
