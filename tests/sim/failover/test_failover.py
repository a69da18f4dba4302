"""The cluster manager keeps its rules in seeds of faults, and the simulator finds every planted bug."""

import os

import pytest

from tests.sim.canaries import planted
from tests.sim.failover.canaries import CANARIES, MOST_SEEDS, FailoverCanary
from tests.sim.failover.run import run
from tests.sim.run import quiet

#: FAILOVER_SEEDS and FAILOVER_START ask for others than those of one run of the tests.
SEEDS = int(os.environ.get("FAILOVER_SEEDS", "60"))
START = int(os.environ.get("FAILOVER_START", "1"))
BATCH = 20

#: Each of these found a bug once; what a seed does changes with the simulator.
REMEMBERED = (51, 90, 114, 214)


def _check(seed: int) -> None:
    with quiet():
        outcome = run(seed)
    if outcome.problem:
        story = "\n".join(outcome.story[-80:])
        pytest.fail(f"seed {seed}: {outcome.problem}\n{story}\nreplay: FAILOVER_SEEDS=1 FAILOVER_START={seed}", False)


@pytest.mark.parametrize("first", range(START, START + SEEDS, BATCH))
def test_seeds_keep_the_rules(first: int) -> None:
    for seed in range(first, min(first + BATCH, START + SEEDS)):
        _check(seed)


@pytest.mark.parametrize("seed", REMEMBERED)
def test_remembered_seeds(seed: int) -> None:
    _check(seed)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("canary", CANARIES, ids=lambda canary: canary.name)
def test_canary_is_found(canary: FailoverCanary) -> None:
    for seed in range(canary.start, canary.start + MOST_SEEDS):
        with quiet(), planted(canary):
            outcome = run(seed)
        if outcome.problem:
            print(f"{canary.name}: seed {seed}: {outcome.problem}")
            return
    pytest.fail(f"{canary.what}: not found in {MOST_SEEDS} seeds from {canary.start} on")
