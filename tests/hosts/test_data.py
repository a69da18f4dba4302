"""The page of a site with data on hosts of its own: what was written last is what is served, wherever it runs."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.hosts import apache
from tests.hosts.deposits import Deposits
from tests.hosts.fence import FenceDevice
from tests.hosts.host import Host, now
from tests.hosts.lab import Lab
from tests.hosts.namespace import LabError
from tests.hosts.probe import Probe
from tests.hosts.site import PAGE, Site, need_site, toml

#: Longer than it takes to find out that a volume is gone, and to begin mending it.
_MISSED_S = 5.0
_WRITE = 'echo "$1" > "$2.new" && sync "$2.new" && mv "$2.new" "$2" && sync "$(dirname "$2")"'

pytestmark = pytest.mark.root


class Pages:
    """Writes one page after the other, and looks for the last."""

    def __init__(self, site: Site, fence: FenceDevice) -> None:
        self.site = site
        self.fence = fence
        self.probe = site.probe
        self.node1, self.node2 = site.lab.nodes
        self._version = 0

    def write(self, node: Host) -> str:
        """Write a new page on the node that has the volume, safely; the page."""
        self._version += 1
        page = f"version {self._version}"
        node.run("sh", "-c", _WRITE, "sh", page, PAGE)
        self.probe.wait_page(page)
        return page

    def served_by(self, node: Host, since: float | None = None) -> None:
        """Until this node serves what was written last; LabError when the page is another one, or does not come."""
        start = now() if since is None else since
        self.probe.wait_answer(node, start)
        self.probe.wait_page(f"version {self._version}", start)
        pages = {page for received, page in self.probe.timeline.pages if received > start}
        if pages != {f"version {self._version}"}:
            raise LabError(f"the client saw {pages}")


@pytest.fixture
def pages(new_lab: Callable[..., Lab]) -> Iterator[Pages]:
    """The site runs on node1, with a first page."""
    need_site()
    with ExitStack() as stack:
        lab = new_lab()
        fence = stack.enter_context(FenceDevice(lab))
        probe = stack.enter_context(Probe(lab, http=True))
        site = Site(lab, stack.enter_context(Deposits(lab)), probe)
        site.install(toml(resource="timeout-s = 2\nconnect-interval = 0.1"))
        site.start()
        pages = Pages(site, fence)
        probe.wait_answer(pages.node1)
        pages.write(pages.node1)
        yield pages
        assert probe.timeline.two_holders(0.0, now()) == []


def test_an_operator_moves_it_both_ways(pages: Pages) -> None:
    for holder, other in ((pages.node1, pages.node2), (pages.node2, pages.node1)):
        pages.write(holder)
        pages.site.product.takeover(other)
        pages.served_by(other)
    assert pages.fence.asked == []


def test_a_dead_node_is_fenced_and_gets_its_group_back_with_the_data_of_the_other(pages: Pages) -> None:
    pages.write(pages.node1)
    pages.node1.power_cut()
    pages.served_by(pages.node2)
    assert pages.fence.asked == ["off node1"]
    pages.write(pages.node2)
    pages.node1.boot()
    pages.served_by(pages.node1)


def test_a_frozen_node_is_switched_off_before_its_data_is_used(pages: Pages) -> None:
    pages.write(pages.node1)
    pages.node1.freeze()
    pages.served_by(pages.node2)
    assert not pages.node1.on


def test_without_a_fence_device_that_answers_nothing_is_promoted(pages: Pages) -> None:
    pages.write(pages.node1)
    pages.fence.broken = True
    pages.node1.power_cut()
    pages.probe.wait(lambda seen: bool(pages.fence.asked), "the fence device is asked")
    pages.probe.watch(1)
    since = now()
    pages.probe.watch(1)
    assert pages.probe.timeline.recent(since) == []
    pages.site.wait_refused(pages.node2, "could not be fenced")
    pages.fence.broken = False
    pages.served_by(pages.node2)


def test_a_killed_apache_is_started_again_where_it_was(pages: Pages) -> None:
    page = pages.write(pages.node1)
    since = now()
    apache.kill(pages.node1)
    pages.probe.wait(lambda seen: bool(seen.outages(since, now(), pages=True)), "it is missed")
    pages.probe.wait_page(page)
    assert {who for _, who in pages.probe.timeline.recent(since)} == {"node1"}


def test_a_killed_replicad_costs_no_data(pages: Pages) -> None:
    page = pages.write(pages.node1)
    assert pages.node1.signal(signal.SIGKILL, f"{Host.interpreter} -m replica.daemon")
    pages.probe.watch(_MISSED_S)  # until then, writes may fail, and pages may come from memory
    pages.probe.wait_page(page)
    pages.write(pages.node1 if pages.probe.timeline.last() == "node1" else pages.node2)
