"""How far a verification is, and how it ended."""

import random

from replica.verify_report import Front, VerifyProgress, ended


def test_the_front_is_where_to_go_on(rng: random.Random) -> None:
    """Pieces begin in order and end in any: never is anything before the position not done."""
    front, begun, done = Front(100), 100, set[int]()
    under_way: list[tuple[int, int]] = []
    for _ in range(1000):
        if rng.random() < 0.5:
            stop = begun + rng.randint(1, 9)
            front.begin(begun)
            under_way.append((begun, stop))
            begun = stop
        elif under_way:
            start, stop = under_way.pop(rng.randrange(len(under_way)))
            front.end(start, stop)
            done.update(range(start, stop))
        assert all(at in done for at in range(100, front.position))
        assert front.position == min((start for start, _ in under_way), default=begun)


def test_an_end_that_has_no_beginning_is_nothing() -> None:
    front = Front(0)
    front.end(4096, 8192)
    assert front.position == 0


def run(**changes: object) -> VerifyProgress:
    progress = VerifyProgress(3, "node1", 4096, 4096 + 1000, repair=False, began_s=10.0)
    for name, value in changes.items():
        setattr(progress, name, value)
    return progress


def test_progress() -> None:
    progress = run()
    document = progress.document(10.0)
    assert (document["done_percent"], document["rate_bytes_s"], document["eta_seconds"]) == (0.0, 0, None)
    progress.front.begin(4096)
    progress.front.end(4096, 4096 + 250)
    document = progress.document(12.0)
    assert (document["done_percent"], document["rate_bytes_s"], document["eta_seconds"]) == (25.0, 125, 6.0)
    assert (document["position_bytes"], document["number"], document["driver"]) == (4346, 3, "node1")


def test_sentences() -> None:
    progress = run()
    assert ended(progress, 12.0, "").sentence() == "verified 4096 to 5096: no difference was found."
    progress.found_bytes = 512
    assert "512 bytes differ between the two copies." in ended(progress, 12.0, "").sentence()
    progress.repair, progress.repaired_bytes = True, 512
    assert "of which 512 bytes were repaired." in ended(progress, 12.0, "").sentence()
    result = ended(progress, 12.0, "the cable was cut")
    assert not result.complete
    assert result.sentence().endswith("the cable was cut (go on with --from 4096).")
    document = result.document(15.0)
    assert (document["seconds_ago"], document["took_seconds"], document["reason"]) == (3.0, 2.0, "the cable was cut")
