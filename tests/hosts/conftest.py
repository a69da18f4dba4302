"""Labs that end with their test, and nothing of them left on the machine."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.host import loop_backing
from tests.hosts.lab import Lab, need_hosts


def _left_behind(lab: Lab) -> list[str]:
    """What of a lab that has ended is still on the machine."""
    left = [f"interface {name}" for name in os.listdir("/sys/class/net") if name.partition(".")[0] in lab.hosts]
    left += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(lab.folder) in line]
    left += [device for device, backing in lab.loop_devices if loop_backing(device) == backing]
    return left + ([str(lab.folder)] if lab.folder.exists() else [])


@pytest.fixture
def new_lab() -> Iterator[Callable[..., Lab]]:
    """``new_lab(**settings)``: see `Lab`; it is up, and ends with its test, which fails if something stays. When the
    test has failed, what was done and the logs of all hosts are shown.
    """
    need_hosts()
    labs: list[Lab] = []
    with ExitStack() as stack:

        def make(**settings: Any) -> Lab:
            lab = Lab(**settings)
            labs.append(lab)
            stack.enter_context(lab)
            stack.callback(lambda: print(lab.report()))
            return lab

        yield make
    left = [trace for lab in labs for trace in _left_behind(lab)]
    assert not left, f"left behind: {left}"


@pytest.fixture
def lab(new_lab: Callable[..., Lab]) -> Lab:
    """node1, node2 and the client on one network."""
    return new_lab()
