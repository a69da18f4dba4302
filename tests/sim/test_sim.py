"""Seeds of the simulator: ordinary ones, and those that once found a bug."""

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.run import quiet, run_seed
from tests.sim.workers import in_order

#: Seeds for one run of the tests; SIM_SEEDS and SIM_START ask for others (`make sim` runs campaigns).
SEEDS = int(os.environ.get("SIM_SEEDS", "500"))
START = int(os.environ.get("SIM_START", "1"))
BATCH = 50

#: Each of these found a bug of the node once (docs/testing.md); what a seed does changes with the simulator.
REMEMBERED = (
    *(117, 120, 329, 1149, 1192, 1602, 3344, 4009, 4020, 4043, 5223, 5758, 7183),
    *(22831, 103617, 111178, 118099, 123597, 129935, 309743, 418957, 545403, 620569, 624635),
)


def _run(seeds: range | tuple[int, ...]) -> None:
    with quiet() as listen:
        for seed in seeds:
            outcome = run_seed(seed, listen)
            if outcome.violation is not None:
                trace = "\n".join(outcome.trace[-60:])
                pytest.fail(
                    f"seed {seed}: {outcome.violation}\n{trace}\n"
                    f"replay: python -m tests.sim --seeds 1 --start {seed} --verbose",
                    pytrace=False,
                )


@pytest.mark.parametrize("first", range(START, START + SEEDS, BATCH))
def test_seeds_keep_the_rules(first: int) -> None:
    _run(range(first, min(first + BATCH, START + SEEDS)))


def test_remembered_seeds() -> None:
    _run(REMEMBERED)


def _campaign(*arguments: str, hash_seed: str = "random") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.sim", "--keep-going", "--checksums", *arguments],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_one_seed_is_one_run() -> None:
    """Processes with different hash seeds do the same, byte for byte; and so do several at once."""
    checksums = []
    for hash_seed, jobs in (("1", "1"), ("4242", "1"), ("77", "2")):
        output, _ = _campaign("--seeds", "12", "--start", "40", "--jobs", jobs, hash_seed=hash_seed).communicate()
        checksums.append(re.findall(r"^seed \d+ checksum [0-9a-f]{8}$", output, re.MULTILINE))
    assert len(checksums[0]) == 12
    assert checksums[0] == checksums[1] == checksums[2]


def test_an_interrupted_campaign_sums_up_and_leaves_no_process() -> None:
    campaign = _campaign("--seeds", "1000000", "--jobs", "2")
    assert campaign.stdout is not None
    assert campaign.stdout.readline().startswith("seed 1 checksum")
    os.killpg(campaign.pid, signal.SIGINT)
    # Both pipes end when the last process that has them is gone.
    output, errors = campaign.communicate()
    assert campaign.returncode == 130
    assert re.search(r"^\d+ seeds, \d+ failed, \d+ simulated seconds", output, re.MULTILINE)
    assert errors.strip() == "interrupted"


def test_the_end_of_the_results_is_the_end_of_the_workers() -> None:
    with contextlib.closing(in_order(abs, range(-1000, 0), 2)) as results:
        assert [next(results), next(results)] == [1000, 999]
    assert not multiprocessing.active_children()
