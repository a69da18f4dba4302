"""What `make bench-failover` writes: the table and the picture."""

from xml.etree import ElementTree

from bench.failover import Run, table
from bench.timeline_svg import Strip, picture
from tests.hosts.scenarios import Phase
from tests.hosts.timeline import Span


def _strip(product: str) -> Strip:
    held = {"node1": [Span(1, 10)], "node2": [Span(9, 20)]}
    return Strip(product, held, [Span(0, 1)], [9.0, 9.5], [(0, "start"), (8, "cut & paste")], 20.0)


def _run(product: str, outage_s: float, two_holders_s: float = 0.0, holder: str = "node2") -> Run:
    phase = Phase("power cut", 10, 20, outage_s, two_holders_s, holder)
    return Run("power", product, [phase], _strip(product), 0.0)


def test_the_picture_has_a_bar_for_everything_that_was_seen() -> None:
    root = ElementTree.fromstring(picture([("power", [_strip("ours"), _strip("theirs <3>")])]))
    bars = [each.get("fill") for each in root if each.tag.endswith("rect")]
    assert bars.count("#2a6fb0") == bars.count("#e08a1e") == bars.count("#999") == 2
    assert bars.count("#c81e1e") == 4
    texts = [each.text for each in root if each.tag.endswith("text")]
    assert "theirs <3>" in texts and "cut & paste" in texts and "20 s" in texts


def test_the_table_has_medians_and_names_two_holders() -> None:
    runs = [_run("a", 5.0), _run("a", 6.0), _run("a", 5.5, holder=""), _run("b", 1.0, two_holders_s=2.0)]
    *_, row = table(runs, ["a", "b", "c"])
    assert row == "| power | power cut | 5.50 (5.00–6.00) | 0 | nobody, node2 | 1.00 | **2.00** | node2 | – | – | – |"
