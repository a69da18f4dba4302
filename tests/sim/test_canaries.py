"""The simulator finds every planted bug."""

import pytest

from tests.sim.canaries import CANARIES, MOST_SEEDS, Canary, search


@pytest.mark.timeout(600)
@pytest.mark.parametrize("canary", CANARIES, ids=lambda canary: canary.name)
def test_canary_is_found(canary: Canary) -> None:
    count, outcome = search(canary)
    assert outcome is not None, f"{canary.what}: not found in {MOST_SEEDS} seeds"
    assert count <= MOST_SEEDS
    print(f"{canary.name}: {count} seeds: {outcome.violation}")
